"""Mixtures whose first layers have none, with experts that every token sees: GLM-4.5 and later, ERNIE 4.5.

Routers choose by scores plus a bias that balances the load (auxiliary-loss-free, DeepSeek-V3), and weigh by the scores.
"""

from __future__ import annotations

from gguf import Keys

from .base import Family, Feed, Form, Limit, Value, Weight
from .kinds import Kind as T
from .parts import EDGES, LAYER_NORMS, ROTARY, attention, experts, gated, norm, one, shared_experts, within

SIGMOID = 2
"""llama.cpp's number for routers whose scores are sigmoids."""

_ONE_GROUP = (Limit("n_group", (1,), 1), Limit("topk_group", (1,), 1))

FAMILIES = (
    Family(
        "glm4_moe",
        "glm4moe",
        generator="Glm4MoeForCausalLM",
        words={"num_experts": "n_routed_experts"},
        weights=(
            *EDGES,
            norm(T.ATTN_NORM, "layers.{}.input_layernorm"),
            norm(T.ATTN_POST_NORM, "layers.{}.post_attention_layernorm"),
            norm(T.ATTN_Q_NORM, "layers.{}.self_attn.q_norm", "head", when="use_qk_norm"),
            norm(T.ATTN_K_NORM, "layers.{}.self_attn.k_norm", "head", when="use_qk_norm"),
            *attention(qkv_bias="attention_bias"),
            *within("dense", gated()),
            *within(
                "experts",
                (
                    one(T.FFN_GATE_INP, "layers.{}.mlp.gate.weight", "experts", "embd"),
                    one(T.FFN_EXP_PROBS_B, "layers.{}.mlp.gate.e_score_correction_bias", "experts", ending=".bias"),
                    *experts("layers.{}.mlp.experts"),
                    *shared_experts("layers.{}.mlp.shared_experts"),
                ),
            ),
        ),
        activations=("silu",),
        defaults={
            "rms_norm_eps": 1e-5,
            "attention_bias": False,
            "use_qk_norm": False,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 1.0,
            "norm_topk_prob": True,
        },
        left_out=(ROTARY,),
        values=(
            Value(Keys.LLM.LEADING_DENSE_BLOCK_COUNT, "first_k_dense_replace", "int", required=True),
            Value(Keys.LLM.EXPERT_SHARED_COUNT, "n_shared_experts", "int", required=True),
            Value(Keys.LLM.EXPERT_WEIGHTS_SCALE, "routed_scaling_factor", "float", required=True),
            Value(Keys.LLM.EXPERT_WEIGHTS_NORM, "norm_topk_prob", "bool", required=True),
        ),
        limits=_ONE_GROUP,
        feeds=(Feed(T.ATTN_NORM, ("attention",)), Feed(T.ATTN_POST_NORM, ("feed_forward",))),
        partial_default=0.5,
        partial=True,
        count_rope=True,
        own_head_dim=True,
        leading="first_k_dense_replace",
        shared="n_shared_experts",
        fixed={Keys.LLM.EXPERT_GATING_FUNC: SIGMOID},
    ),
    Family(
        "ernie4_5_moe",
        "ernie4_5-moe",
        generator="Ernie4_5_MoeForCausalLM",
        words={"num_experts": "moe_num_experts"},
        weights=(
            *EDGES,
            *LAYER_NORMS,
            *attention(),
            *within("dense", gated()),
            *within(
                "experts",
                (
                    one(T.FFN_GATE_INP, "layers.{}.mlp.gate.weight", "experts", "embd"),
                    Weight(
                        T.FFN_EXP_PROBS_B,
                        ("experts",),
                        tuple(
                            Form(f"layers.{{}}.mlp.{name}moe_statics.e_score_correction_bias", ("one", "experts"))
                            for name in ("", "gate.")
                        ),
                        ending=".bias",
                    ),
                    *experts("layers.{}.mlp.experts"),
                    *shared_experts("layers.{}.mlp.shared_experts"),
                ),
            ),
        ),
        activations=("silu",),
        defaults={
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
            "moe_layer_interval": 1,
        },
        left_out=(ROTARY, (r"(^|\.)mtp_", "a head that predicts several tokens at once, not part of the model proper")),
        values=(
            Value(Keys.LLM.LEADING_DENSE_BLOCK_COUNT, "moe_layer_start_index", "int", required=True),
            Value(Keys.LLM.EXPERT_SHARED_COUNT, "moe_num_shared_experts", "int", required=True),
            Value(Keys.LLM.INTERLEAVE_MOE_LAYER_STEP, "moe_layer_interval", "int", required=True),
        ),
        limits=(Limit("use_bias", (False,), False), Limit("moe_layer_interval", (1,), 1)),
        rope_default=5e5,
        own_head_dim=True,
        leading="moe_layer_start_index",
        shared="moe_num_shared_experts",
    ),
)
