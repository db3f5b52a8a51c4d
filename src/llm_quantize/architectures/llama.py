"""Llama and what is built like it: Mistral, Mixtral, SmolLM3, Granite."""

from __future__ import annotations

from gguf import MODEL_ARCH as A
from gguf import MODEL_TENSOR as T
from gguf import Keys

from .base import Family, Limit, Value
from .parts import EDGES, LAYER_NORMS, ROTARY, attention, either, experts, gated, one

_SCALINGS = frozenset({"linear", "dynamic", "yarn"})
_SLIDING = (
    "sliding_window",
    "llama.cpp has no sliding window for this family: beyond {value} tokens it attends to more than the model did",
)

FAMILIES = (
    Family(
        "llama",
        A.LLAMA,
        weights=(
            *EDGES,
            *LAYER_NORMS,
            *attention(rotated=True, qkv_bias="attention_bias", out_bias="attention_bias"),
            *gated(bias="mlp_bias"),
        ),
        activations=("silu",),
        defaults={"rms_norm_eps": 1e-6},
        left_out=(ROTARY,),
        rope=_SCALINGS | {"llama3"},
        count_rope=True,
        own_head_dim=True,
    ),
    Family(
        "mistral",
        A.LLAMA,
        weights=(*EDGES, *LAYER_NORMS, *attention(rotated=True), *gated()),
        activations=("silu",),
        defaults={"rms_norm_eps": 1e-6, "num_key_value_heads": 8},
        left_out=(ROTARY,),
        rope=_SCALINGS | {"llama3"},
        count_rope=True,
        own_head_dim=True,
        notes=(_SLIDING,),
    ),
    Family(
        "mixtral",
        A.LLAMA,
        weights=(
            *EDGES,
            *LAYER_NORMS,
            *attention(rotated=True),
            either(
                one(T.FFN_GATE_INP, "layers.{}.block_sparse_moe.gate.weight", "experts", "embd"),
                "layers.{}.mlp.gate.weight",
            ),
            *experts("layers.{}.block_sparse_moe.experts", names=("w1", "w3", "w2")),
        ),
        activations=("silu",),
        defaults={"rms_norm_eps": 1e-5, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
        left_out=(ROTARY,),
        rope_default=1e6,
        count_rope=True,
        own_head_dim=True,
        notes=(_SLIDING,),
    ),
    Family(
        "smollm3",
        A.SMOLLM3,
        weights=(
            *EDGES,
            *LAYER_NORMS,
            *attention(rotated=True, qkv_bias="attention_bias", out_bias="attention_bias"),
            *gated(bias="mlp_bias"),
        ),
        activations=("silu",),
        defaults={"rms_norm_eps": 1e-6, "tie_word_embeddings": True, "num_key_value_heads": 4},
        left_out=(ROTARY,),
        limits=(Limit("no_rope_layer_interval", (4,), 4), Limit("use_sliding_window", (False,), False)),
        rope_default=2e6,
        rope_period=4,
        count_rope=True,
        own_head_dim=True,
    ),
    Family(
        "granite",
        A.GRANITE,
        weights=(
            *EDGES,
            *LAYER_NORMS,
            *attention(rotated=True, qkv_bias="attention_bias", out_bias="attention_bias"),
            *gated(bias="mlp_bias"),
        ),
        activations=("silu",),
        defaults={
            "rms_norm_eps": 1e-6,
            "attention_multiplier": 1.0,
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
        left_out=(ROTARY,),
        values=(
            Value(Keys.Attention.SCALE, "attention_multiplier", "float", required=True),
            Value(Keys.LLM.EMBEDDING_SCALE, "embedding_multiplier", "float", required=True),
            Value(Keys.LLM.RESIDUAL_SCALE, "residual_multiplier", "float", required=True),
            Value(Keys.LLM.LOGIT_SCALE, "logits_scaling", "float", required=True),
        ),
        count_rope=True,
    ),
)
