"""Phi 1 and 2; Phi-3 (and Phi-4, which is built like it)."""

from __future__ import annotations

from gguf import Keys

from .base import Family, Feed, Limit, Value
from .kinds import Kind as T
from .parts import EDGES, EMBEDDING, LAYER_NORMS, ROTARY, SLIDING, attention, one, pair

FAMILIES = (
    Family(
        "phi",
        "phi2",
        generator="PhiForCausalLM",
        weights=(
            EMBEDDING,
            *pair(T.OUTPUT_NORM, "final_layernorm", "embd"),
            *pair(T.OUTPUT, "lm_head", "vocab", "embd"),
            *pair(T.ATTN_NORM, "layers.{}.input_layernorm", "embd"),
            *attention(qkv_bias="", out_bias="", out="dense"),
            *pair(T.FFN_UP, "layers.{}.mlp.fc1", "ff", "embd"),
            *pair(T.FFN_DOWN, "layers.{}.mlp.fc2", "embd", "ff"),
        ),
        activations=("gelu_new", "gelu_pytorch_tanh"),
        defaults={"layer_norm_eps": 1e-5},
        left_out=(ROTARY,),
        limits=(Limit("qk_layernorm", (False,), False),),
        feeds=(Feed(T.ATTN_NORM, ("attention", "feed_forward")),),
        norm="layer",
        partial_default=0.5,
        partial=True,
        count_rope=True,
        needs_output=True,
    ),
    Family(
        "phi3",
        "phi3",
        generator="Phi3ForCausalLM",
        weights=(
            *EDGES,
            *LAYER_NORMS,
            one(T.ATTN_QKV, "layers.{}.self_attn.qkv_proj.weight", "qkv", "embd"),
            one(T.ATTN_OUT, "layers.{}.self_attn.o_proj.weight", "embd", "q"),
            # Gate and up stay one tensor in GGUF.
            one(T.FFN_UP, "layers.{}.mlp.gate_up_proj.weight", "2ff", "embd"),
            one(T.FFN_DOWN, "layers.{}.mlp.down_proj.weight", "embd", "ff"),
        ),
        activations=("silu",),
        defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
        left_out=(ROTARY,),
        values=(Value(Keys.Attention.SLIDING_WINDOW, "sliding_window", "int", empty=0),),
        notes=(SLIDING,),
        rope=frozenset({"longrope"}),
        partial=True,
        count_rope=True,
    ),
)
