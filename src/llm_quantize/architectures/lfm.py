"""LFM2: short convolutions in most layers, attention in the others."""

from __future__ import annotations

from gguf import Keys

from .base import Family, Feed, Form, Limit, Value, Weight
from .kinds import Kind as T
from .parts import EMBEDDING, HEAD, ROTARY, norm, one

_CONV, _ATTENTION, _FEED = "layers.{}.conv.", "layers.{}.self_attn.", "layers.{}.feed_forward."

FAMILIES = (
    Family(
        "lfm2",
        "lfm2",
        generator="Lfm2ForCausalLM",
        words={"rms_norm_eps": "norm_eps", "head_dim": "", "hidden_act": ""},
        weights=(
            EMBEDDING,
            norm(T.TOKEN_EMBD_NORM, "embedding_norm"),
            HEAD,
            norm(T.ATTN_NORM, "layers.{}.operator_norm"),
            norm(T.FFN_NORM, "layers.{}.ffn_norm"),
            Weight(
                T.SHORTCONV_CONV,
                ("embd", "kernel"),
                (Form(_CONV + "conv.weight", ("embd", "one", "kernel")),),
                layers="recurrent",
            ),
            one(T.SHORTCONV_INPROJ, _CONV + "in_proj.weight", "3embd", "embd", layers="recurrent"),
            one(T.SHORTCONV_OUTPROJ, _CONV + "out_proj.weight", "embd", "embd", layers="recurrent"),
            one(T.ATTN_Q, _ATTENTION + "q_proj.weight", "q", "embd", layers="attention"),
            one(T.ATTN_K, _ATTENTION + "k_proj.weight", "kv", "embd", layers="attention"),
            one(T.ATTN_V, _ATTENTION + "v_proj.weight", "kv", "embd", layers="attention"),
            one(T.ATTN_OUT, _ATTENTION + "out_proj.weight", "embd", "q", layers="attention"),
            one(T.ATTN_Q_NORM, _ATTENTION + "q_layernorm.weight", "head", layers="attention"),
            one(T.ATTN_K_NORM, _ATTENTION + "k_layernorm.weight", "head", layers="attention"),
            one(T.FFN_GATE, _FEED + "w1.weight", "ff", "embd"),
            one(T.FFN_UP, _FEED + "w3.weight", "ff", "embd"),
            one(T.FFN_DOWN, _FEED + "w2.weight", "embd", "ff"),
        ),
        activations=("silu",),
        defaults={
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": 8,
            "conv_L_cache": 3,
            "tie_word_embeddings": True,
            "block_auto_adjust_ff_dim": True,
            "block_ffn_dim_multiplier": 1.0,
            "block_multiple_of": 256,
        },
        left_out=(ROTARY,),
        values=(Value(Keys.ShortConv.L_CACHE, "conv_L_cache", "int", required=True),),
        limits=(Limit("conv_bias", (False,), False),),
        feeds=(Feed(T.ATTN_NORM, ("attention",)), Feed(T.FFN_NORM, ("feed_forward",))),
        rope_default=1e6,
        convolutions=True,
        thirds=True,
    ),
)
