"""OLMo 2 and StableLM."""

from __future__ import annotations

from gguf import MODEL_ARCH as A
from gguf import MODEL_TENSOR as T
from gguf import Keys

from .base import Family, Form, Limit, Value, Weight
from .parts import EDGES, EMBEDDING, HEAD, ROTARY, attention, gated, norm, pair


def _stacked_norm(tensor: T, name: str, heads: str) -> Weight:
    """One norm for each head, stacked into a matrix."""
    form = Form(f"layers.{{}}.self_attn.{name}.norms.{{each}}.weight", ("head",), each=heads)
    return Weight(tensor, (heads, "head"), (form,), when="qk_layernorm")


FAMILIES = (
    Family(
        "olmo2",
        A.OLMO2,
        weights=(
            *EDGES,
            norm(T.ATTN_POST_NORM, "layers.{}.post_attention_layernorm"),
            norm(T.FFN_POST_NORM, "layers.{}.post_feedforward_layernorm"),
            norm(T.ATTN_Q_NORM, "layers.{}.self_attn.q_norm", "q"),
            norm(T.ATTN_K_NORM, "layers.{}.self_attn.k_norm", "kv"),
            *attention(),
            *gated(),
        ),
        activations=("silu",),
        defaults={"rms_norm_eps": 1e-5},
        left_out=(ROTARY,),
        limits=(Limit("attention_bias", (False,), False),),
        needs_output=True,
    ),
    Family(
        "stablelm",
        A.STABLELM,
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
        norm="layer",
        partial_default=0.25,
        partial=True,
        count_rope=True,
        needs_output=True,
    ),
)
