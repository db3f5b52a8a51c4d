"""Gemma 1 to 4 (text). Norms of the first three are stored minus one; GGUF holds them whole.

Gemma 4: layers without a window have larger heads and may have no values of their own; the last layers may take keys
and values of earlier ones; each layer may be given a share of an embedding of its own; experts stand beside the dense
feed-forward network.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gguf import Keys

from .base import Family, Feed, Limit, Value
from .kinds import Kind as T
from .parts import EDGES, EMBEDDING, HEAD, ROTARY, TOWER_PREFIXES, VISION, attention, experts, gated, norm, one

_GELU = ("gelu_pytorch_tanh", "gelu")
_EDGES = (EMBEDDING, norm(T.OUTPUT_NORM, "norm", add=1.0), HEAD)
_FOUR_NORMS = (
    norm(T.ATTN_NORM, "layers.{}.input_layernorm", add=1.0),
    norm(T.ATTN_POST_NORM, "layers.{}.post_attention_layernorm", add=1.0),
    norm(T.FFN_PRE_NORM, "layers.{}.pre_feedforward_layernorm", add=1.0),
    norm(T.FFN_POST_NORM, "layers.{}.post_feedforward_layernorm", add=1.0),
)
# The norms after attention and after the feed-forward block feed the residual stream alone.
_FEEDS = (Feed(T.ATTN_NORM, ("attention",)), Feed(T.FFN_PRE_NORM, ("feed_forward",)))
_CAUSAL = Limit("use_bidirectional_attention", (False,), False)
_GEMMA3_WEIGHTS = (
    *_EDGES,
    *_FOUR_NORMS,
    norm(T.ATTN_Q_NORM, "layers.{}.self_attn.q_norm", "head", add=1.0),
    norm(T.ATTN_K_NORM, "layers.{}.self_attn.k_norm", "head", add=1.0),
    *attention(),
    *gated(),
)
_GEMMA3_DEFAULTS: dict[str, object] = {
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
}
_GEMMA3_VALUES = (
    Value(Keys.LLM.FINAL_LOGIT_SOFTCAPPING, "final_logit_softcapping", "float"),
    Value(Keys.Attention.SLIDING_WINDOW, "sliding_window", "int", required=True),
)
_GEMMA3_LIMITS = (_CAUSAL, Limit("attn_logit_softcapping", (None,)), Limit("attention_bias", (False,), False))

_PER_LAYER, _MIXED, _LAYER = "has_per_layer_input", "enable_moe_block", "layers.{}."
_GEMMA4_WEIGHTS = (
    *EDGES,
    one(T.PER_LAYER_TOKEN_EMBD, "embed_tokens_per_layer.weight", "per_layer_vocab", "per_layer_all", when=_PER_LAYER),
    one(T.PER_LAYER_MODEL_PROJ, "per_layer_model_projection.weight", "per_layer_all", "embd", when=_PER_LAYER),
    norm(T.PER_LAYER_PROJ_NORM, "per_layer_projection_norm", "per_layer", when=_PER_LAYER),
    norm(T.ATTN_NORM, _LAYER + "input_layernorm"),
    norm(T.ATTN_POST_NORM, _LAYER + "post_attention_layernorm"),
    norm(T.FFN_PRE_NORM, _LAYER + "pre_feedforward_layernorm"),
    norm(T.FFN_POST_NORM, _LAYER + "post_feedforward_layernorm"),
    norm(T.ATTN_Q_NORM, _LAYER + "self_attn.q_norm", "head"),
    one(T.ATTN_K_NORM, _LAYER + "self_attn.k_norm.weight", "head", layers="own_keys"),
    one(T.ATTN_Q, _LAYER + "self_attn.q_proj.weight", "q", "embd"),
    one(T.ATTN_K, _LAYER + "self_attn.k_proj.weight", "kv", "embd", layers="own_keys"),
    one(T.ATTN_V, _LAYER + "self_attn.v_proj.weight", "kv", "embd", layers="own_values"),
    one(T.ATTN_OUT, _LAYER + "self_attn.o_proj.weight", "embd", "q"),
    *gated(),
    one(T.PER_LAYER_INP_GATE, _LAYER + "per_layer_input_gate.weight", "per_layer", "embd", when=_PER_LAYER),
    one(T.PER_LAYER_PROJ, _LAYER + "per_layer_projection.weight", "embd", "per_layer", when=_PER_LAYER),
    norm(T.PER_LAYER_POST_NORM, _LAYER + "post_per_layer_input_norm", when=_PER_LAYER),
    one(T.LAYER_OUT_SCALE, _LAYER + "layer_scalar", "one"),
    one(T.FFN_GATE_INP, _LAYER + "router.proj.weight", "experts", "embd", when=_MIXED),
    one(T.FFN_GATE_INP, _LAYER + "router.scale", "embd", when=_MIXED, ending=".scale"),
    one(T.FFN_DOWN_EXP, _LAYER + "router.per_expert_scale", "experts", when=_MIXED, ending=".scale"),
    norm(T.FFN_POST_NORM_1, _LAYER + "post_feedforward_layernorm_1", when=_MIXED),
    norm(T.FFN_POST_NORM_2, _LAYER + "post_feedforward_layernorm_2", when=_MIXED),
    norm(T.FFN_PRE_NORM_2, _LAYER + "pre_feedforward_layernorm_2", when=_MIXED),
    *(replace(w, when=_MIXED) for w in experts(_LAYER + "experts", fused=_LAYER + "experts")),
)


def _gemma4(model_type: str, generator: str, **more: Any) -> Family:
    """Gemma 4, with towers or without."""
    return Family(
        model_type,
        "gemma4",
        generator=generator,
        words={"hidden_act": "hidden_activation", "num_experts_per_tok": "top_k_experts"},
        weights=_GEMMA4_WEIGHTS,
        activations=("gelu_pytorch_tanh",),
        defaults={
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "global_head_dim": 512,
            "vocab_size": 262144,
            "vocab_size_per_layer_input": 262144,
            "hidden_size_per_layer_input": 256,
            "max_position_embeddings": 131072,
            "sliding_window": 512,
            "rope_parameters": {
                "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        values=_GEMMA3_VALUES,
        limits=(
            Limit("use_bidirectional_attention", (None, "vision")),
            Limit("attention_bias", (False,), False),
        ),
        feeds=(),
        layer_types=6,
        sliding_pattern=True,
        rope=frozenset({"proportional"}),
        rope_default=1e6,
        rope_local_default=1e4,
        own_head_dim=True,
        uneven=True,
        **more,
    )


FAMILIES = (
    Family(
        "gemma",
        "gemma",
        generator="GemmaForCausalLM",
        weights=(
            *_EDGES,
            norm(T.ATTN_NORM, "layers.{}.input_layernorm", add=1.0),
            norm(T.FFN_NORM, "layers.{}.post_attention_layernorm", add=1.0),
            *attention(),
            *gated(),
        ),
        activations=_GELU,
        defaults={"rms_norm_eps": 1e-6, "tie_word_embeddings": True, "head_dim": 256},
        left_out=(ROTARY,),
        limits=(_CAUSAL, Limit("attention_bias", (False,), False)),
        own_head_dim=True,
        output=False,
    ),
    Family(
        "gemma2",
        "gemma2",
        generator="Gemma2ForCausalLM",
        words={"hidden_act": "hidden_activation"},
        weights=(*_EDGES, *_FOUR_NORMS, *attention(), *gated()),
        activations=_GELU,
        defaults={
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        left_out=(ROTARY,),
        values=(
            Value(Keys.LLM.ATTN_LOGIT_SOFTCAPPING, "attn_logit_softcapping", "float", required=True),
            Value(Keys.LLM.FINAL_LOGIT_SOFTCAPPING, "final_logit_softcapping", "float", required=True),
            Value(Keys.Attention.SLIDING_WINDOW, "sliding_window", "int", required=True),
        ),
        limits=(_CAUSAL, Limit("attention_bias", (False,), False)),
        feeds=_FEEDS,
        layer_types=2,
        own_head_dim=True,
        output=False,
        score_layers=46,
    ),
    Family(
        "gemma3_text",
        "gemma3",
        generator="Gemma3ForCausalLM",
        words={"hidden_act": "hidden_activation"},
        weights=_GEMMA3_WEIGHTS,
        activations=_GELU,
        defaults=_GEMMA3_DEFAULTS,
        left_out=(ROTARY,),
        values=_GEMMA3_VALUES,
        limits=_GEMMA3_LIMITS,
        feeds=_FEEDS,
        layer_types=6,
        rope=frozenset({"linear", "dynamic"}),
        rope_default=1e6,
        rope_local_default=1e4,
        own_head_dim=True,
        score_layers=62,
    ),
    Family(
        "gemma3",
        "gemma3",
        generator="Gemma3ForConditionalGeneration",
        words={"hidden_act": "hidden_activation"},
        weights=_GEMMA3_WEIGHTS,
        activations=_GELU,
        defaults=_GEMMA3_DEFAULTS,
        prefixes=TOWER_PREFIXES,
        left_out=(ROTARY, *VISION),
        values=_GEMMA3_VALUES,
        limits=_GEMMA3_LIMITS,
        feeds=_FEEDS,
        layer_types=6,
        rope=frozenset({"linear", "dynamic"}),
        rope_default=1e6,
        rope_local_default=1e4,
        own_head_dim=True,
        nested=True,
        score_layers=62,
    ),
    _gemma4("gemma4_text", "Gemma4ForCausalLM", left_out=(ROTARY,)),
    _gemma4(
        "gemma4",
        "Gemma4ForConditionalGeneration",
        prefixes=(("model.language_model.", ""), ("model.", "")),
        left_out=(
            ROTARY,
            (
                r"^model\.(vision_tower|embed_vision)\.",
                "the vision tower: this artifact holds the language model alone",
            ),
            (r"^model\.(audio_tower|embed_audio)\.", "the audio tower: this artifact holds the language model alone"),
        ),
        nested=True,
        text_prefix="model.",
    ),
)
