"""Llama and what is built like it: Mistral, Ministral 3, Mixtral, SmolLM3, Granite, Seed-OSS, Arcee."""

from __future__ import annotations

from typing import Any

from gguf import Keys

from .base import Family, Feed, Form, Limit, Value, Weight
from .kinds import Kind as T
from .parts import (
    EDGES,
    LAYER_NORMS,
    ROTARY,
    SLIDING,
    TOWER_PREFIXES,
    VISION,
    attention,
    either,
    experts,
    gated,
    norm,
    one,
)

_MINISTRAL: dict[str, Any] = {
    "weights": (*EDGES, *LAYER_NORMS, *attention(rotated=True), *gated()),
    "activations": ("silu",),
    "defaults": {"rms_norm_eps": 1e-5, "num_key_value_heads": 8},
    "rope_default": 1e6,
    "ramp": True,
    "temperature": "llama_4_scaling_beta",
    "count_rope": True,
    "own_head_dim": True,
    "notes": (SLIDING,),
}

_SCALINGS = frozenset({"linear", "dynamic", "yarn"})

_GRANITE_DEFAULTS: dict[str, object] = {
    "rms_norm_eps": 1e-6,
    "attention_multiplier": 1.0,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}
_GRANITE_VALUES = (
    Value(Keys.Attention.SCALE, "attention_multiplier", "float", required=True),
    Value(Keys.LLM.EMBEDDING_SCALE, "embedding_multiplier", "float", required=True),
    Value(Keys.LLM.RESIDUAL_SCALE, "residual_multiplier", "float", required=True),
    Value(Keys.LLM.LOGIT_SCALE, "logits_scaling", "float", required=True),
)
_GRANITE_MOE = "layers.{}.block_sparse_moe."
_BOTH = ("experts", "2expert_ff", "embd")
_GRANITE_EXPERTS = (
    one(T.FFN_GATE_INP, _GRANITE_MOE + "router.layer.weight", "experts", "embd"),
    Weight(
        T.FFN_GATE_EXP,
        ("experts", "expert_ff", "embd"),
        (Form(_GRANITE_MOE + "input_linear.weight", _BOTH, part=(0, 2)),),
    ),
    Weight(
        T.FFN_UP_EXP,
        ("experts", "expert_ff", "embd"),
        (Form(_GRANITE_MOE + "input_linear.weight", _BOTH, part=(1, 2)),),
    ),
    one(T.FFN_DOWN_EXP, _GRANITE_MOE + "output_linear.weight", "experts", "embd", "expert_ff"),
)

FAMILIES = (
    Family(
        "llama",
        "llama",
        generator="LlamaForCausalLM",
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
        "llama",
        generator="MistralForCausalLM",
        weights=(*EDGES, *LAYER_NORMS, *attention(rotated=True), *gated()),
        activations=("silu",),
        defaults={"rms_norm_eps": 1e-6, "num_key_value_heads": 8},
        left_out=(ROTARY,),
        rope=_SCALINGS | {"llama3"},
        count_rope=True,
        own_head_dim=True,
        notes=(SLIDING,),
    ),
    Family("ministral3", "mistral3", generator="Ministral3ForCausalLM", left_out=(ROTARY,), **_MINISTRAL),
    Family(
        "mistral3",
        "mistral3",
        generator="Mistral3ForConditionalGeneration",
        auto="AutoModelForImageTextToText",
        prefixes=TOWER_PREFIXES,
        left_out=(ROTARY, *VISION),
        limits=(Limit("model_type", ("ministral3", "mistral"), "mistral"),),
        nested=True,
        text_prefix="model.language_model.",
        **_MINISTRAL,
    ),
    Family(
        "mixtral",
        "llama",
        generator="MixtralForCausalLM",
        words={"num_experts": "num_local_experts", "moe_intermediate_size": ""},
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
        notes=(SLIDING,),
    ),
    Family(
        "smollm3",
        "smollm3",
        generator="SmolLM3ForCausalLM",
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
        "granite",
        generator="GraniteForCausalLM",
        weights=(
            *EDGES,
            *LAYER_NORMS,
            *attention(rotated=True, qkv_bias="attention_bias", out_bias="attention_bias"),
            *gated(bias="mlp_bias"),
        ),
        activations=("silu",),
        defaults=_GRANITE_DEFAULTS,
        left_out=(ROTARY,),
        values=_GRANITE_VALUES,
        count_rope=True,
    ),
    Family(
        "granitemoe",
        "granitemoe",
        generator="GraniteMoeForCausalLM",
        words={"num_experts": "num_local_experts", "moe_intermediate_size": ""},
        weights=(*EDGES, *LAYER_NORMS, *attention(rotated=True), *_GRANITE_EXPERTS),
        activations=("silu",),
        defaults={**_GRANITE_DEFAULTS, "num_local_experts": 8, "num_experts_per_tok": 2},
        left_out=(ROTARY,),
        values=_GRANITE_VALUES,
        limits=(Limit("attention_bias", (False,), False),),
        count_rope=True,
    ),
    Family(
        "seed_oss",
        "seed_oss",
        generator="SeedOssForCausalLM",
        weights=(
            *EDGES,
            norm(T.ATTN_NORM, "layers.{}.input_layernorm"),
            norm(T.ATTN_POST_NORM, "layers.{}.post_attention_layernorm"),
            *attention(qkv_bias="attention_bias"),
            *gated(),
        ),
        activations=("silu",),
        defaults={"rms_norm_eps": 1e-6, "attention_bias": True, "head_dim": 128},
        left_out=(ROTARY,),
        limits=(Limit("attention_out_bias", (False,), False), Limit("mlp_bias", (False,), False)),
        feeds=(Feed(T.ATTN_NORM, ("attention",)), Feed(T.ATTN_POST_NORM, ("feed_forward",))),
        own_head_dim=True,
    ),
    Family(
        "arcee",
        "arcee",
        generator="ArceeForCausalLM",
        weights=(
            *EDGES,
            *LAYER_NORMS,
            *attention(rotated=True),
            one(T.FFN_UP, "layers.{}.mlp.up_proj.weight", "ff", "embd"),
            one(T.FFN_DOWN, "layers.{}.mlp.down_proj.weight", "embd", "ff"),
        ),
        activations=("relu2",),
        defaults={"rms_norm_eps": 1e-5},
        left_out=(ROTARY,),
        limits=(Limit("attention_bias", (False,), False), Limit("mlp_bias", (False,), False)),
        rope=_SCALINGS | {"llama3"},
        count_rope=True,
        own_head_dim=True,
    ),
)
