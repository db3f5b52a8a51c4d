"""gpt-oss: experts with biases and a clamped gate, attention with sinks, a window in every other layer.

A checkpoint has the experts of a layer in one tensor, (experts, in, out), gate and up dealt out in turn; OpenAI's files
have them in MXFP4, (experts, out, in), which is read as the same.
"""

from __future__ import annotations

import gguf

from .base import Family, Feed, Form, Limit, Value, Weight
from .kinds import Kind as T
from .parts import EDGES, ROTARY, attention, norm, one

_EXPERTS = "layers.{}.mlp.experts."
_BOTH = ("experts", "embd", "2expert_ff")


def _dealt(tensor: T, index: int) -> tuple[Weight, Weight]:
    """Gate (0) or up (1) of all experts, and their biases."""
    name = _EXPERTS + "gate_up_proj"
    return (
        Weight(tensor, ("experts", "expert_ff", "embd"), (Form(name, _BOTH, transpose=True, deal=(index, 2)),)),
        Weight(
            tensor,
            ("experts", "expert_ff"),
            (Form(name + "_bias", ("experts", "2expert_ff"), deal=(index, 2)),),
            ending=".bias",
        ),
    )


FAMILIES = (
    Family(
        "gpt_oss",
        "gpt-oss",
        generator="GptOssForCausalLM",
        weights=(
            *EDGES,
            norm(T.ATTN_NORM, "layers.{}.input_layernorm"),
            norm(T.ATTN_POST_NORM, "layers.{}.post_attention_layernorm"),
            *attention(qkv_bias="attention_bias", out_bias="attention_bias"),
            one(T.ATTN_SINKS, "layers.{}.self_attn.sinks", "heads", ending=".weight"),
            one(T.FFN_GATE_INP, "layers.{}.mlp.router.weight", "experts", "embd"),
            one(T.FFN_GATE_INP, "layers.{}.mlp.router.bias", "experts"),
            *_dealt(T.FFN_GATE_EXP, 0),
            *_dealt(T.FFN_UP_EXP, 1),
            Weight(
                T.FFN_DOWN_EXP,
                ("experts", "embd", "expert_ff"),
                (Form(_EXPERTS + "down_proj", ("experts", "expert_ff", "embd"), transpose=True),),
            ),
            one(T.FFN_DOWN_EXP, _EXPERTS + "down_proj_bias", "experts", "embd", ending=".bias"),
        ),
        activations=("silu",),
        defaults={
            "rms_norm_eps": 1e-5,
            "head_dim": 64,
            "attention_bias": True,
            "sliding_window": 128,
            "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
        },
        left_out=(ROTARY,),
        values=(
            Value(gguf.Keys.Attention.SLIDING_WINDOW, "sliding_window", "int", required=True),
            Value(gguf.Keys.LLM.EXPERT_FEED_FORWARD_LENGTH, "intermediate_size", "int", required=True),
        ),
        limits=(
            Limit("attention_bias", (True,), True),
            Limit("swiglu_alpha", (1.702,), 1.702),
            Limit("swiglu_limit", (7.0,), 7.0),
        ),
        feeds=(Feed(T.ATTN_NORM, ("attention",)),),
        rope_default=150000.0,
        layer_types=2,
        own_head_dim=True,
        needs_output=True,
        plain_gate=False,
        rounds_ramp=True,
        words={"num_experts": "num_local_experts", "moe_intermediate_size": ""},
    ),
)
