"""Phi-3 (and Phi-4, which is built like it)."""

from __future__ import annotations

from gguf import MODEL_ARCH as A
from gguf import MODEL_TENSOR as T
from gguf import Keys

from .base import Family, Value
from .parts import EDGES, LAYER_NORMS, ROTARY, one

FAMILIES = (
    Family(
        "phi3",
        A.PHI3,
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
        defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096, "sliding_window": 0},
        left_out=(ROTARY,),
        values=(Value(Keys.Attention.SLIDING_WINDOW, "sliding_window", "int"),),
        notes=(
            (
                "sliding_window",
                "llama.cpp has no sliding window for this family: beyond {value} tokens it attends to more than "
                "the model did",
            ),
        ),
        rope=frozenset({"longrope"}),
        partial=True,
        count_rope=True,
    ),
)
