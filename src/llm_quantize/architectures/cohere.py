"""Cohere's Command R and R7B, GLM-4, ERNIE 4.5, EXAONE 4, Hunyuan."""

from __future__ import annotations

from gguf import Keys

from .base import Family, Feed, Limit, Value
from .kinds import Kind as T
from .parts import EDGES, LAYER_NORMS, ROTARY, attention, gated, norm, one

_LOGITS = Value(Keys.LLM.LOGIT_SCALE, "logit_scale", "float", required=True)
_NO_BIAS = Limit("attention_bias", (False,), False)
_PARALLEL = (Feed(T.ATTN_NORM, ("attention", "feed_forward")),)
_COHERE = (*EDGES, norm(T.ATTN_NORM, "layers.{}.input_layernorm"), *attention(), *gated())

FAMILIES = (
    Family(
        "cohere",
        "command-r",
        generator="CohereForCausalLM",
        words={"model_max_length": ""},
        weights=_COHERE,
        activations=("silu",),
        defaults={"layer_norm_eps": 1e-5, "tie_word_embeddings": True, "logit_scale": 0.0625},
        left_out=(ROTARY,),
        # Command R's max_position_embeddings is shorter than what the model was trained for.
        values=(_LOGITS, Value(Keys.LLM.CONTEXT_LENGTH, "model_max_length", "int")),
        limits=(_NO_BIAS, Limit("use_qk_norm", (False,), False)),
        feeds=_PARALLEL,
        norm="layer",
        rope=frozenset({"linear", "dynamic"}),
        rope_default=5e5,
        output=False,
    ),
    Family(
        "cohere2",
        "cohere2",
        generator="Cohere2ForCausalLM",
        weights=_COHERE,
        activations=("silu",),
        defaults={
            "layer_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "logit_scale": 0.0625,
            "sliding_window": 4096,
        },
        left_out=(ROTARY,),
        values=(_LOGITS, Value(Keys.Attention.SLIDING_WINDOW, "sliding_window", "int", required=True)),
        limits=(_NO_BIAS,),
        feeds=_PARALLEL,
        norm="layer",
        layer_types=4,
        rope=frozenset(),
        count_rope=True,
        own_head_dim=True,
        output=False,
    ),
    Family(
        "glm4",
        "glm4",
        generator="Glm4ForCausalLM",
        weights=(
            *EDGES,
            norm(T.ATTN_NORM, "layers.{}.input_layernorm"),
            norm(T.ATTN_POST_NORM, "layers.{}.post_self_attn_layernorm"),
            norm(T.FFN_NORM, "layers.{}.post_attention_layernorm"),
            norm(T.FFN_POST_NORM, "layers.{}.post_mlp_layernorm"),
            *attention(qkv_bias="attention_bias"),
            one(T.FFN_UP, "layers.{}.mlp.gate_up_proj.weight", "2ff", "embd"),
            one(T.FFN_DOWN, "layers.{}.mlp.down_proj.weight", "embd", "ff"),
        ),
        activations=("silu",),
        defaults={"rms_norm_eps": 1.5625e-07, "attention_bias": True, "head_dim": 128, "num_key_value_heads": 2},
        left_out=(ROTARY,),
        partial_default=0.5,
        partial=True,
        count_rope=True,
        own_head_dim=True,
    ),
    Family(
        "ernie4_5",
        "ernie4_5",
        generator="Ernie4_5ForCausalLM",
        weights=(*EDGES, *LAYER_NORMS, *attention(), *gated()),
        activations=("silu",),
        defaults={"rms_norm_eps": 1e-5, "tie_word_embeddings": True},
        left_out=(ROTARY,),
        limits=(Limit("use_bias", (False,), False),),
        rope_default=5e5,
        own_head_dim=True,
    ),
    Family(
        "exaone4",
        "exaone4",
        generator="Exaone4ForCausalLM",
        weights=(
            *EDGES,
            norm(T.ATTN_POST_NORM, "layers.{}.post_attention_layernorm"),
            norm(T.FFN_POST_NORM, "layers.{}.post_feedforward_layernorm"),
            norm(T.ATTN_Q_NORM, "layers.{}.self_attn.q_norm", "head"),
            norm(T.ATTN_K_NORM, "layers.{}.self_attn.k_norm", "head"),
            *attention(),
            *gated(),
        ),
        activations=("silu",),
        defaults={"rms_norm_eps": 1e-5, "sliding_window": 4096},
        left_out=(ROTARY,),
        values=(Value(Keys.Attention.SLIDING_WINDOW, "sliding_window", "int"),),
        rope=frozenset({"linear", "llama3"}),
        feeds=(),
        layer_types=4,
        sliding_at=64,
    ),
    Family(
        "hunyuan_v1_dense",
        "hunyuan-dense",
        generator="HunYuanDenseV1ForCausalLM",
        weights=(
            *EDGES,
            *LAYER_NORMS,
            norm(T.ATTN_Q_NORM, "layers.{}.self_attn.query_layernorm", "head"),
            norm(T.ATTN_K_NORM, "layers.{}.self_attn.key_layernorm", "head"),
            *attention(),
            *gated(),
        ),
        activations=("silu",),
        defaults={"rms_norm_eps": 1e-5},
        left_out=(ROTARY,),
        limits=(_NO_BIAS,),
        rope=frozenset({"alpha"}),
        own_head_dim=True,
    ),
)
