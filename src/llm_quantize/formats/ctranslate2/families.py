"""The families that CTranslate2's converter knows and this format writes: where each weight stands in its network.

Weights are named by their tensors in the map of the source (architectures/), without what llama.cpp wants of them: the
rows of Llama's queries and keys stay in Hugging Face's order, and Gemma's norms less one, as CTranslate2 has its own
words for both. Read from ctranslate2 4.8 (converters/transformers.py, specs/).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Linear:
    """A matrix and its bias, where there is one: NAME/weight, NAME/bias. ``sources``: whose rows follow each other.
    ``ordered``: rows in the order of the map (queries, keys, values one after the other), not of the checkpoint.
    ``part``: (i, n), the i-th of n equal blocks of rows."""

    name: str
    sources: tuple[str, ...]
    ordered: bool = False
    part: tuple[int, int] = (0, 1)


@dataclass(frozen=True)
class Norm:
    """NAME/gamma, and NAME/beta where the source has a bias."""

    name: str
    source: str


@dataclass(frozen=True)
class Table:
    """Vectors by position, never quantized: NAME."""

    name: str
    source: str


Part = Linear | Norm | Table

EMBEDDING, HEAD = "embeddings", "projection"


@dataclass(frozen=True)
class Family:
    """``layer``: the parts of a block, ``edges``: what stands beside the blocks, without embedding and head.

    ``rope``: rotary scalings that its part of the converter knows; None: positions are not rotated. ``rotary``: what
    rotary_dim says: "all" (0), "head" (their number), "share" (of a head). ``head_dim``: the size of a head is told;
    elsewhere it must be the width over the heads. ``window``: what becomes of sliding layers: "" (refused), "all" (told
    once for every layer), "each", "none" (the network has none, and attends to all tokens). ``residual``: norms are
    stored less one. ``scaled``: embeddings are multiplied by the root of their width. ``epsilon``: the configuration's
    value that the norm's epsilon is taken from, "" where it is the runtime's own (1e-5). ``bos``, ``unk``: the tokens
    that stand for these, the first that the tokenizer has; ``chat_eos``: what ends an answer where there is a chat
    template. ``flags``: of alibi. ``fixed``: {value of the configuration: what it must be}, where the converter knows
    nothing else. ``contexts``: {length of the configuration that attention is told: its default}. ``instead``: the row
    that is taken where this value of the configuration is true.
    """

    layer: tuple[Part, ...]
    edges: tuple[Part, ...] = (Norm("layer_norm", "output_norm"),)
    rope: frozenset[str] | None = frozenset({"default", "linear", "llama3"})
    rotary: str = "all"
    head_dim: bool = False
    window: str = ""
    residual: bool = False
    scaled: bool = False
    epsilon: str = "rms_norm_eps"
    bos: tuple[str, ...] = ("bos_token",)
    unk: tuple[str, ...] = ("unk_token",)
    chat_eos: str = ""
    flags: frozenset[str] = frozenset()
    fixed: Mapping[str, tuple[object, ...]] | None = None
    contexts: Mapping[str, int] = field(default_factory=dict)
    instead: tuple[str, Family] | None = None


_GATED = (
    Linear("ffn/linear_0", ("ffn_gate",)),
    Linear("ffn/linear_0_noact", ("ffn_up",)),
    Linear("ffn/linear_1", ("ffn_down",)),
)
_ATTENTION = (
    Linear("self_attention/linear_0", ("attn_q", "attn_k", "attn_v")),
    Linear("self_attention/linear_1", ("attn_output",)),
)
_FUSED = (
    Linear("self_attention/linear_0", ("attn_qkv",), ordered=True),
    Linear("self_attention/linear_1", ("attn_output",)),
    Linear("ffn/linear_0", ("ffn_up",)),
    Linear("ffn/linear_1", ("ffn_down",)),
)
_NORMS = (Norm("self_attention/layer_norm", "attn_norm"), Norm("ffn/layer_norm", "ffn_norm"))
_HEAD_NORMS = (Norm("self_attention/q_norm", "attn_q_norm"), Norm("self_attention/k_norm", "attn_k_norm"))
_GEMMA3_NORMS = (
    Norm("input_layer_norm", "attn_norm"),
    Norm("post_attention_layer_norm", "post_attention_norm"),
    Norm("pre_feedforward_layer_norm", "ffn_norm"),
    Norm("post_feedforward_layer_norm", "post_ffw_norm"),
)
_SIDE_BY_SIDE = (Norm("input_layer_norm", "attn_norm"), Norm("post_attention_layer_norm", "ffn_norm"))
_LLAMA = (*_NORMS, *_ATTENTION, *_GATED)
_GEMMA3 = Family(
    (*_GEMMA3_NORMS, *_HEAD_NORMS, *_ATTENTION, *_GATED),
    rope=frozenset({"default", "linear"}),
    rotary="head",
    head_dim=True,
    window="each",
    residual=True,
    scaled=True,
    epsilon="",
    chat_eos="<end_of_turn>",
    fixed={"attn_logit_softcapping": (None,), "final_logit_softcapping": (None,)},
)

_NEOX = Family((*_NORMS, *_FUSED), rope=frozenset({"default"}), rotary="share", epsilon="")

FAMILIES: Mapping[str, Family] = {
    "llama": Family(_LLAMA),
    "mistral": Family(_LLAMA, head_dim=True, window="all"),
    "qwen2": Family(_LLAMA, bos=("bos_token", "pad_token")),
    "qwen3": Family((*_LLAMA, *_HEAD_NORMS), rotary="head", head_dim=True, bos=("bos_token", "pad_token")),
    "gemma3_text": _GEMMA3,
    "gemma3": _GEMMA3,
    "phi3": Family(
        (
            *_NORMS,
            Linear("self_attention/linear_0", ("attn_qkv",)),
            Linear("self_attention/linear_1", ("attn_output",)),
            Linear("ffn/linear_0", ("ffn_up",), part=(0, 2)),
            Linear("ffn/linear_0_noact", ("ffn_up",), part=(1, 2)),
            Linear("ffn/linear_1", ("ffn_down",)),
        ),
        rope=frozenset({"default"}),
        window="none",
        epsilon="",
        contexts={"max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
    ),
    "gpt2": Family(
        (*_NORMS, *_FUSED),
        edges=(Norm("layer_norm", "output_norm"), Table("position_encodings/encodings", "position_embd")),
        rope=None,
        epsilon="",
        fixed={"scale_attn_weights": (None, True), "scale_attn_by_inverse_layer_idx": (None, False)},
    ),
    "gpt_neox": replace(_NEOX, instead=("use_parallel_residual", replace(_NEOX, layer=(*_SIDE_BY_SIDE, *_FUSED)))),
    "falcon": Family(
        (Norm("shared_layer_norm", "attn_norm"), *_FUSED),
        rope=frozenset({"default"}),
        epsilon="",
        bos=("eos_token",),
        unk=("eos_token",),
        flags=frozenset({"alibi_use_positive_positions", "scale_alibi"}),
        fixed={
            "new_decoder_architecture": (None, False),
            "multi_query": (True,),
            "parallel_attn": (True,),
            "alibi": (None, False),
        },
    ),
}
"""By model_type."""
