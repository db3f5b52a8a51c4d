"""Gemma 1, 2 and 3 (text). Their norms are stored minus one; GGUF holds them whole."""

from __future__ import annotations

from gguf import Keys

from .base import Family, Feed, Limit, Value
from .kinds import Kind as T
from .parts import EMBEDDING, HEAD, ROTARY, attention, gated, norm

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
        prefixes=(
            ("language_model.model.", ""),
            ("language_model.lm_head.", "lm_head."),
            ("model.language_model.", ""),
            ("model.", ""),
        ),
        left_out=(
            ROTARY,
            (r"^(model\.)?vision_tower\.", "the vision tower: this artifact holds the language model alone"),
            (r"^(model\.)?multi_modal_projector\.", "the bridge from the vision tower to the language model"),
        ),
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
)
