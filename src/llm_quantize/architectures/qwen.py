"""Qwen 2 and 3, dense and mixtures of experts."""

from __future__ import annotations

from .base import Family, Limit
from .kinds import Kind as T
from .parts import EDGES, LAYER_NORMS, ROTARY, attention, experts, gated, norm, one

_FULL = Limit("use_sliding_window", (False,), False)
_EVERY_LAYER = (
    _FULL,
    Limit("decoder_sparse_step", (1,), 1),
    Limit("mlp_only_layers", ([],), []),
)
_HEAD_NORMS = (
    norm(T.ATTN_Q_NORM, "layers.{}.self_attn.q_norm", "head"),
    norm(T.ATTN_K_NORM, "layers.{}.self_attn.k_norm", "head"),
)
_ROUTER = one(T.FFN_GATE_INP, "layers.{}.mlp.gate.weight", "experts", "embd")
_SHARED = "layers.{}.mlp.shared_expert"

FAMILIES = (
    Family(
        "qwen2",
        "qwen2",
        generator="Qwen2ForCausalLM",
        weights=(*EDGES, *LAYER_NORMS, *attention(qkv_bias=""), *gated()),
        activations=("silu",),
        defaults={"rms_norm_eps": 1e-6},
        left_out=(ROTARY,),
        limits=(_FULL,),
    ),
    Family(
        "qwen2_moe",
        "qwen2moe",
        generator="Qwen2MoeForCausalLM",
        weights=(
            *EDGES,
            *LAYER_NORMS,
            *attention(qkv_bias="qkv_bias"),
            _ROUTER,
            *experts("layers.{}.mlp.experts"),
            one(T.FFN_GATE_INP_SHEXP, _SHARED + "_gate.weight", "one", "embd"),
            one(T.FFN_GATE_SHEXP, _SHARED + ".gate_proj.weight", "shared_ff", "embd"),
            one(T.FFN_UP_SHEXP, _SHARED + ".up_proj.weight", "shared_ff", "embd"),
            one(T.FFN_DOWN_SHEXP, _SHARED + ".down_proj.weight", "embd", "shared_ff"),
        ),
        activations=("silu",),
        defaults={"rms_norm_eps": 1e-6, "qkv_bias": True},
        left_out=(ROTARY,),
        limits=(*_EVERY_LAYER, Limit("norm_topk_prob", (False,), False)),
        needs_output=True,
    ),
    Family(
        "qwen3",
        "qwen3",
        generator="Qwen3ForCausalLM",
        weights=(
            *EDGES,
            *LAYER_NORMS,
            *_HEAD_NORMS,
            *attention(qkv_bias="attention_bias", out_bias="attention_bias"),
            *gated(),
        ),
        activations=("silu",),
        defaults={"rms_norm_eps": 1e-6, "head_dim": 128},
        left_out=(ROTARY,),
        limits=(_FULL,),
        own_head_dim=True,
    ),
    Family(
        "qwen3_moe",
        "qwen3moe",
        generator="Qwen3MoeForCausalLM",
        weights=(
            *EDGES,
            *LAYER_NORMS,
            *_HEAD_NORMS,
            *attention(qkv_bias="attention_bias", out_bias="attention_bias"),
            _ROUTER,
            *experts("layers.{}.mlp.experts"),
        ),
        activations=("silu",),
        defaults={"rms_norm_eps": 1e-6, "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8},
        left_out=(ROTARY,),
        limits=(*_EVERY_LAYER, Limit("norm_topk_prob", (True,), False)),
        own_head_dim=True,
    ),
)
