"""Qwen 2, 3 and 3.5 (3.6, 3.8), dense and mixtures of experts.

Qwen 3.5: gated delta rules in three layers of four, attention with an output gate in the fourth (queries and gate of a
head stand one behind the other in ``q_proj``, as llama.cpp has them), norms stored minus one but for the gated one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import Family, Feed, Form, Limit, Weight
from .kinds import Kind as T
from .parts import EDGES, EMBEDDING, HEAD, LAYER_NORMS, ROTARY, attention, experts, gated, norm, one, shared_experts

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

_SHARED_EXPERT = (
    one(T.FFN_GATE_INP_SHEXP, _SHARED + "_gate.weight", "one", "embd"),
    *shared_experts(_SHARED),
)

_DELTA, _FOURTH = "layers.{}.linear_attn.", "layers.{}.self_attn."
_HYBRID = (
    EMBEDDING,
    norm(T.OUTPUT_NORM, "norm", add=1.0),
    HEAD,
    norm(T.ATTN_NORM, "layers.{}.input_layernorm", add=1.0),
    norm(T.ATTN_POST_NORM, "layers.{}.post_attention_layernorm", add=1.0),
    *(
        one(T.ATTN_QKV, _DELTA + "in_proj_qkv.weight", "channels", "embd", order="channels", layers="recurrent"),
        one(T.ATTN_GATE, _DELTA + "in_proj_z.weight", "values", "embd", order="values", layers="recurrent"),
        one(T.SSM_ALPHA, _DELTA + "in_proj_a.weight", "value_heads", "embd", order="value_heads", layers="recurrent"),
        one(T.SSM_BETA, _DELTA + "in_proj_b.weight", "value_heads", "embd", order="value_heads", layers="recurrent"),
        one(T.SSM_DT, _DELTA + "dt_bias", "value_heads", order="value_heads", layers="recurrent", ending=".bias"),
        one(T.SSM_A, _DELTA + "A_log", "value_heads", order="value_heads", layers="recurrent", curve="-exp", ending=""),
        Weight(
            T.SSM_CONV1D,
            ("channels", "kernel"),
            (Form(_DELTA + "conv1d.weight", ("channels", "one", "kernel"), order="channels"),),
            layers="recurrent",
        ),
        one(T.SSM_NORM, _DELTA + "norm.weight", "value_dim", layers="recurrent"),
        one(T.SSM_OUT, _DELTA + "out_proj.weight", "embd", "values", columns="values", layers="recurrent"),
    ),
    *(
        one(T.ATTN_Q, _FOURTH + "q_proj.weight", "2q", "embd", layers="attention"),
        one(T.ATTN_K, _FOURTH + "k_proj.weight", "kv", "embd", layers="attention"),
        one(T.ATTN_V, _FOURTH + "v_proj.weight", "kv", "embd", layers="attention"),
        one(T.ATTN_OUT, _FOURTH + "o_proj.weight", "embd", "q", layers="attention"),
        one(T.ATTN_Q_NORM, _FOURTH + "q_norm.weight", "head", add=1.0, layers="attention"),
        one(T.ATTN_K_NORM, _FOURTH + "k_norm.weight", "head", add=1.0, layers="attention"),
    ),
)
_DELTA_SIZES = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}


def _hybrid(model_type: str, arch: str, generator: str, feed_forward: tuple[Weight, ...], **more: Any) -> Family:
    """One of the Qwen 3.5 line. A head that predicts several tokens (``mtp``) is in all of their checkpoints, and in
    no graph of transformers."""
    defaults: Mapping[str, object] = more.pop("defaults", {})
    return Family(
        model_type,
        arch,
        generator=generator,
        weights=(*_HYBRID, *feed_forward),
        activations=("silu",),
        defaults={"rms_norm_eps": 1e-6, "head_dim": 256, "num_key_value_heads": 2, **_DELTA_SIZES, **defaults},
        prefixes=(("model.language_model.", ""), ("model.", "")) if more.get("nested") else (("model.", ""),),
        left_out=(
            ROTARY,
            (r"^(model\.)?visual\.", "the vision tower: this artifact holds the language model alone"),
            (r"^mtp\.", "a head that predicts several tokens at once, not part of the model proper"),
        ),
        limits=(Limit("attention_bias", (False,), False), Limit("attn_output_gate", (True,), True)),
        feeds=(Feed(T.ATTN_NORM, ("attention",)), Feed(T.ATTN_POST_NORM, ("feed_forward",))),
        text_prefix="model." if more.get("nested") else "",
        recurrent_period=4,
        sections=(11, 11, 10),
        partial_default=0.25,
        partial=True,
        count_rope=True,
        own_head_dim=True,
        **more,
    )


_MIXTURE: dict[str, Any] = {
    "dense": False,
    "defaults": {
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
    },
}
_MIXED = (_ROUTER, *experts("layers.{}.mlp.experts"), *_SHARED_EXPERT)

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
            *_SHARED_EXPERT,
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
    _hybrid("qwen3_5_text", "qwen35", "Qwen3_5ForCausalLM", gated(), defaults={"num_key_value_heads": 4}),
    _hybrid(
        "qwen3_5",
        "qwen35",
        "Qwen3_5ForConditionalGeneration",
        gated(),
        defaults={"num_key_value_heads": 4},
        nested=True,
    ),
    _hybrid("qwen3_5_moe_text", "qwen35moe", "Qwen3_5MoeForCausalLM", _MIXED, **_MIXTURE),
    _hybrid("qwen3_5_moe", "qwen35moe", "Qwen3_5MoeForConditionalGeneration", _MIXED, nested=True, **_MIXTURE),
)
