"""Kinds of tensors and their names in GGUF, as llama.cpp reads them: facts of that format, owned here.

The gguf package has such a table too, of the day it was made; llama.cpp goes on under it. A test holds this one
against the package wherever that knows the name.
"""

from __future__ import annotations

from enum import StrEnum


class Kind(StrEnum):
    """A kind of tensor; its value is the name in GGUF without ending, ``{bid}`` for the layer. The members are called
    as in the gguf package; two of the same name in GGUF are one."""

    TOKEN_EMBD = "token_embd"
    PER_LAYER_TOKEN_EMBD = "per_layer_token_embd"
    PER_LAYER_MODEL_PROJ = "per_layer_model_proj"
    PER_LAYER_PROJ_NORM = "per_layer_proj_norm"
    POS_EMBD = "position_embd"
    OUTPUT = "output"
    OUTPUT_NORM = "output_norm"
    TOKEN_EMBD_NORM = "token_embd_norm"
    ROPE_FREQS = "rope_freqs"
    ROPE_FACTORS_LONG = "rope_factors_long"
    ROPE_FACTORS_SHORT = "rope_factors_short"
    ATTN_NORM = "blk.{bid}.attn_norm"
    ATTN_NORM_2 = "blk.{bid}.attn_norm_2"
    ATTN_Q = "blk.{bid}.attn_q"
    ATTN_K = "blk.{bid}.attn_k"
    ATTN_V = "blk.{bid}.attn_v"
    ATTN_QKV = "blk.{bid}.attn_qkv"
    ATTN_OUT = "blk.{bid}.attn_output"
    ATTN_Q_NORM = "blk.{bid}.attn_q_norm"
    ATTN_K_NORM = "blk.{bid}.attn_k_norm"
    ATTN_POST_NORM = "blk.{bid}.post_attention_norm"
    ATTN_SINKS = "blk.{bid}.attn_sinks"
    ATTN_GATE = "blk.{bid}.attn_gate"
    SSM_CONV1D = "blk.{bid}.ssm_conv1d"
    SSM_A = "blk.{bid}.ssm_a"
    SSM_DT = "blk.{bid}.ssm_dt"
    SSM_ALPHA = "blk.{bid}.ssm_alpha"
    SSM_BETA = "blk.{bid}.ssm_beta"
    SSM_NORM = "blk.{bid}.ssm_norm"
    SSM_OUT = "blk.{bid}.ssm_out"
    SHORTCONV_CONV = "blk.{bid}.shortconv.conv"
    SHORTCONV_INPROJ = "blk.{bid}.shortconv.in_proj"
    SHORTCONV_OUTPROJ = "blk.{bid}.shortconv.out_proj"
    FFN_NORM = "blk.{bid}.ffn_norm"
    FFN_PRE_NORM = "blk.{bid}.ffn_norm"
    FFN_POST_NORM = "blk.{bid}.post_ffw_norm"
    FFN_GATE = "blk.{bid}.ffn_gate"
    FFN_UP = "blk.{bid}.ffn_up"
    FFN_DOWN = "blk.{bid}.ffn_down"
    FFN_PRE_NORM_2 = "blk.{bid}.pre_ffw_norm_2"
    FFN_POST_NORM_1 = "blk.{bid}.post_ffw_norm_1"
    FFN_POST_NORM_2 = "blk.{bid}.post_ffw_norm_2"
    PER_LAYER_INP_GATE = "blk.{bid}.inp_gate"
    PER_LAYER_PROJ = "blk.{bid}.proj"
    PER_LAYER_POST_NORM = "blk.{bid}.post_norm"
    LAYER_OUT_SCALE = "blk.{bid}.layer_output_scale"
    FFN_GATE_INP = "blk.{bid}.ffn_gate_inp"
    FFN_GATE_EXP = "blk.{bid}.ffn_gate_exps"
    FFN_UP_EXP = "blk.{bid}.ffn_up_exps"
    FFN_DOWN_EXP = "blk.{bid}.ffn_down_exps"
    FFN_EXP_PROBS_B = "blk.{bid}.exp_probs_b"
    FFN_GATE_INP_SHEXP = "blk.{bid}.ffn_gate_inp_shexp"
    FFN_GATE_SHEXP = "blk.{bid}.ffn_gate_shexp"
    FFN_UP_SHEXP = "blk.{bid}.ffn_up_shexp"
    FFN_DOWN_SHEXP = "blk.{bid}.ffn_down_shexp"

    @property
    def steers(self) -> bool:
        """Whether it gives a few numbers for each head, by which a recurrent state decays and learns. Model directories
        keep these as floats, as vLLM wants them; llama.cpp's levels quantize them."""
        return self in (Kind.SSM_ALPHA, Kind.SSM_BETA)

    def of(self, layer: int | None, ending: str = ".weight") -> str:
        """The name of this kind's tensor in ``layer``, None for one outside the layers."""
        return self.value.replace("{bid}", str(layer)) + ending
