"""OLMo 1 to 3, OLMoE, StableLM, Nemotron."""

from __future__ import annotations

from gguf import Keys

from .base import Family, Feed, Form, Limit, Value, Weight
from .kinds import Kind as T
from .parts import EDGES, EMBEDDING, HEAD, LAYER_NORMS, ROTARY, attention, experts, gated, norm, one, pair


def _stacked_norm(tensor: T, name: str, heads: str) -> Weight:
    """One norm for each head, stacked into a matrix."""
    form = Form(f"layers.{{}}.self_attn.{name}.norms.{{each}}.weight", ("head",), each=heads)
    return Weight(tensor, (heads, "head"), (form,), when="qk_layernorm")


def _shifted(tensor: T, name: str) -> tuple[Weight, Weight]:
    """A norm stored minus one, with its bias."""
    return norm(tensor, name, add=1.0), one(tensor, name + ".bias", "embd")


_WIDE_NORMS = (
    norm(T.ATTN_Q_NORM, "layers.{}.self_attn.q_norm", "q"),
    norm(T.ATTN_K_NORM, "layers.{}.self_attn.k_norm", "kv"),
)
_OLMO2_WEIGHTS = (
    *EDGES,
    norm(T.ATTN_POST_NORM, "layers.{}.post_attention_layernorm"),
    norm(T.FFN_POST_NORM, "layers.{}.post_feedforward_layernorm"),
    *_WIDE_NORMS,
    *attention(),
    *gated(),
)
_NO_BIAS = Limit("attention_bias", (False,), False)

FAMILIES = (
    Family(
        "olmo",
        "olmo",
        generator="OlmoForCausalLM",
        words={"layer_norm_eps": ""},  # the class has 1e-5 built in
        # Its norms have no weights.
        weights=(EMBEDDING, HEAD, *attention(rotated=True), *gated()),
        activations=("silu",),
        defaults={"layer_norm_eps": 1e-5},
        left_out=(ROTARY,),
        values=(Value(Keys.Attention.CLAMP_KQV, "clip_qkv", "float"),),
        limits=(_NO_BIAS,),
        feeds=(),
        norm="layer",
    ),
    Family(
        "olmo3",
        "olmo2",
        generator="Olmo3ForCausalLM",
        weights=_OLMO2_WEIGHTS,
        activations=("silu",),
        defaults={"rms_norm_eps": 1e-5, "sliding_window": 4096},
        left_out=(ROTARY,),
        values=(Value(Keys.Attention.SLIDING_WINDOW, "sliding_window", "int", required=True),),
        limits=(_NO_BIAS,),
        feeds=(),
        layer_types=4,
        sliding_pattern=True,
        rope_default=5e5,
        needs_output=True,
    ),
    Family(
        "olmoe",
        "olmoe",
        generator="OlmoeForCausalLM",
        words={"moe_intermediate_size": ""},
        weights=(
            *EDGES,
            *LAYER_NORMS,
            *_WIDE_NORMS,
            *attention(),
            one(T.FFN_GATE_INP, "layers.{}.mlp.gate.weight", "experts", "embd"),
            *experts("layers.{}.mlp.experts"),
        ),
        activations=("silu",),
        defaults={"rms_norm_eps": 1e-5, "num_experts": 64, "num_experts_per_tok": 8},
        left_out=(ROTARY,),
        limits=(_NO_BIAS, Limit("norm_topk_prob", (False,), False), Limit("clip_qkv", (None,))),
        needs_output=True,
        equal_heads=True,
    ),
    Family(
        "nemotron",
        "nemotron",
        generator="NemotronForCausalLM",
        words={"layer_norm_eps": "norm_eps"},
        weights=(
            EMBEDDING,
            HEAD,
            *_shifted(T.OUTPUT_NORM, "norm"),
            *_shifted(T.ATTN_NORM, "layers.{}.input_layernorm"),
            *_shifted(T.FFN_NORM, "layers.{}.post_attention_layernorm"),
            *attention(),
            one(T.FFN_UP, "layers.{}.mlp.up_proj.weight", "ff", "embd"),
            one(T.FFN_DOWN, "layers.{}.mlp.down_proj.weight", "embd", "ff"),
        ),
        activations=("relu2",),
        defaults={"layer_norm_eps": 1e-5},
        left_out=(ROTARY,),
        limits=(_NO_BIAS, Limit("mlp_bias", (False,), False)),
        norm="layer",
        partial_default=0.5,
        partial=True,
        count_rope=True,
        needs_output=True,
    ),
    Family(
        "olmo2",
        "olmo2",
        generator="Olmo2ForCausalLM",
        weights=_OLMO2_WEIGHTS,
        activations=("silu",),
        defaults={"rms_norm_eps": 1e-5},
        left_out=(ROTARY,),
        limits=(_NO_BIAS,),
        feeds=(),
        needs_output=True,
    ),
    Family(
        "stablelm",
        "stablelm",
        generator="StableLmForCausalLM",
        weights=(
            EMBEDDING,
            *pair(T.OUTPUT_NORM, "norm", "embd"),
            HEAD,
            *pair(T.ATTN_NORM, "layers.{}.input_layernorm", "embd"),
            *pair(T.FFN_NORM, "layers.{}.post_attention_layernorm", "embd", when="!use_parallel_residual"),
            _stacked_norm(T.ATTN_Q_NORM, "q_layernorm", "heads"),
            _stacked_norm(T.ATTN_K_NORM, "k_layernorm", "kv_heads"),
            *attention(qkv_bias="use_qkv_bias"),
            *gated(),
        ),
        activations=("silu",),
        defaults={"layer_norm_eps": 1e-5},
        left_out=(ROTARY,),
        values=(Value(Keys.LLM.USE_PARALLEL_RESIDUAL, "use_parallel_residual", "bool", required=True),),
        feeds=(
            Feed(T.ATTN_NORM, ("attention",), when="!use_parallel_residual"),
            Feed(T.FFN_NORM, ("feed_forward",), when="!use_parallel_residual"),
            Feed(T.ATTN_NORM, ("attention", "feed_forward"), when="use_parallel_residual"),
        ),
        norm="layer",
        partial_default=0.25,
        partial=True,
        count_rope=True,
        needs_output=True,
    ),
)
