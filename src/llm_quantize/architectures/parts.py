"""Words in which the families are written: single weights, and the blocks that many families share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .base import Form, Layers, Order, Weight
from .kinds import Kind as T

ROTARY = (r"\.rotary_emb\.inv_freq$", "rotary frequencies, which the runtime computes from the metadata")

TOWER_PREFIXES = (
    ("language_model.model.", ""),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", ""),
    ("model.", ""),
)

VISION = (
    (r"^(model\.)?vision_tower\.", "the vision tower: this artifact holds the language model alone"),
    (r"^(model\.)?multi_modal_projector\.", "the bridge from the vision tower to the language model"),
)

SLIDING = (
    "sliding_window",
    "llama.cpp has no sliding window for this family: beyond {value} tokens it attends to more than the model did",
)


def one(
    tensor: T,
    name: str,
    *shape: str,
    when: str = "",
    order: Order = "",
    transpose: bool = False,
    add: float = 0.0,
    columns: Order = "",
    **more: Any,
) -> Weight:
    """A weight stored as one tensor of its own. ``shape`` is the source's; transposed, the artifact's is swapped.
    ``more``: of Weight."""
    form = Form(name, shape, order=order, transpose=transpose, columns=columns)
    return Weight(tensor, shape[::-1] if transpose else shape, (form,), when, add, **more)


def pair(tensor: T, name: str, *shape: str, when: str = "", **options: Any) -> tuple[Weight, Weight]:
    """A matrix or norm and its bias. ``name`` without ending."""
    rows = shape[-1] if options.get("transpose") else shape[0]
    bias = {key: value for key, value in options.items() if key != "transpose"}
    return (
        one(tensor, name + ".weight", *shape, when=when, **options),
        one(tensor, name + ".bias", rows, when=when, **bias),
    )


def norm(tensor: T, name: str, size: str = "embd", *, add: float = 0.0, when: str = "") -> Weight:
    """A norm's vector. ``name`` without ending."""
    return one(tensor, name + ".weight", size, add=add, when=when)


def attention(
    *,
    rotated: bool = False,
    qkv_bias: str | None = None,
    out_bias: str | None = None,
    prefix: str = "layers.{}.self_attn.",
    out: str = "o_proj",
) -> tuple[Weight, ...]:
    """Separate query, key, value and output projections. ``rotated``: rows reordered for llama.cpp's pairing.

    ``qkv_bias``/``out_bias``: None = there is none, "" = always, else the condition.
    """
    q: Order = "rope_q" if rotated else ""
    k: Order = "rope_k" if rotated else ""
    found: tuple[Weight, ...] = (
        one(T.ATTN_Q, prefix + "q_proj.weight", "q", "embd", order=q),
        one(T.ATTN_K, prefix + "k_proj.weight", "kv", "embd", order=k),
        one(T.ATTN_V, prefix + "v_proj.weight", "kv", "embd"),
        one(T.ATTN_OUT, prefix + out + ".weight", "embd", "q"),
    )
    if qkv_bias is not None:
        found += (
            one(T.ATTN_Q, prefix + "q_proj.bias", "q", when=qkv_bias, order=q),
            one(T.ATTN_K, prefix + "k_proj.bias", "kv", when=qkv_bias, order=k),
            one(T.ATTN_V, prefix + "v_proj.bias", "kv", when=qkv_bias),
        )
    if out_bias is not None:
        found += (one(T.ATTN_OUT, prefix + out + ".bias", "embd", when=out_bias),)
    return found


def gated(*, bias: str | None = None, prefix: str = "layers.{}.mlp.") -> tuple[Weight, ...]:
    """The gated feed-forward block: gate, up, down; or gate and up fused in one tensor."""
    found: tuple[Weight, ...] = (
        Weight(T.FFN_GATE, ("ff", "embd"), split(prefix, "gate_proj", "gate_up_proj", 0, "ff")),
        Weight(T.FFN_UP, ("ff", "embd"), split(prefix, "up_proj", "gate_up_proj", 1, "ff")),
        one(T.FFN_DOWN, prefix + "down_proj.weight", "embd", "ff"),
    )
    if bias is not None:
        found += (
            one(T.FFN_GATE, prefix + "gate_proj.bias", "ff", when=bias),
            one(T.FFN_UP, prefix + "up_proj.bias", "ff", when=bias),
            one(T.FFN_DOWN, prefix + "down_proj.bias", "embd", when=bias),
        )
    return found


def split(prefix: str, own: str, fused: str, part: int, size: str) -> tuple[Form, Form]:
    """Two forms: a tensor of its own, or half of a fused one."""
    return (
        Form(f"{prefix}{own}.weight", (size, "embd")),
        Form(f"{prefix}{fused}.weight", ("2" + size, "embd"), part=(part, 2)),
    )


def experts(
    prefix: str,
    *,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    fused: str = "layers.{}.mlp.experts",
    size: str = "expert_ff",
) -> tuple[Weight, ...]:
    """Experts: one tensor for each, or fused three-dimensional ones, (experts, 2 ff, embd) and (experts, embd, ff).

    The fused spelling is the one of transformers 5 in memory; its files hold single experts, other writers' may not.
    """
    both = ("experts", "2" + size, "embd")
    back = ("experts", "embd", size)

    def weight(tensor: T, own: str, whole: str, shape: tuple[str, ...], part: tuple[int, int]) -> Weight:
        wide = both if part[1] == 2 else back
        single = Form(f"{prefix}.{{each}}.{own}.weight", shape, each="experts")
        together = [Form(f"{fused}.{whole}{end}", wide, part=part) for end in ("", ".weight")]
        return Weight(tensor, ("experts", *shape), (single, *together))

    gate, up, down = names
    return (
        weight(T.FFN_GATE_EXP, gate, "gate_up_proj", (size, "embd"), (0, 2)),
        weight(T.FFN_UP_EXP, up, "gate_up_proj", (size, "embd"), (1, 2)),
        weight(T.FFN_DOWN_EXP, down, "down_proj", ("embd", size), (0, 1)),
    )


def within(layers: Layers, weights: tuple[Weight, ...]) -> tuple[Weight, ...]:
    """``weights`` in some layers alone."""
    return tuple(replace(weight, layers=layers) for weight in weights)


def shared_experts(prefix: str) -> tuple[Weight, ...]:
    """Experts that every token sees, as one. ``prefix``: of its gate_proj, up_proj and down_proj."""
    return (
        one(T.FFN_GATE_SHEXP, prefix + ".gate_proj.weight", "shared_ff", "embd"),
        one(T.FFN_UP_SHEXP, prefix + ".up_proj.weight", "shared_ff", "embd"),
        one(T.FFN_DOWN_SHEXP, prefix + ".down_proj.weight", "embd", "shared_ff"),
    )


def either(weight: Weight, *names: str) -> Weight:
    """``weight``, which is also found under other names."""
    first = weight.forms[0]
    return replace(weight, forms=(first, *(replace(first, name=name) for name in names)))


EMBEDDING = one(T.TOKEN_EMBD, "embed_tokens.weight", "vocab", "embd")
HEAD = one(T.OUTPUT, "lm_head.weight", "vocab", "embd")
EDGES = (EMBEDDING, norm(T.OUTPUT_NORM, "norm"), HEAD)
LAYER_NORMS = (norm(T.ATTN_NORM, "layers.{}.input_layernorm"), norm(T.FFN_NORM, "layers.{}.post_attention_layernorm"))
