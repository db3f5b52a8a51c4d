"""The older line: GPT-2, GPT-NeoX, Falcon, StarCoder 2, with biases, layer norms and fused projections."""

from __future__ import annotations

from gguf import Keys

from .base import Family, Feed, Limit, Value
from .kinds import Kind as T
from .parts import EMBEDDING, HEAD, ROTARY, SLIDING, attention, one, pair

_MASK = "a causal mask kept as a buffer, not a weight"

FAMILIES = (
    Family(
        "gpt2",
        "gpt2",
        generator="GPT2LMHeadModel",
        words={
            "num_hidden_layers": "n_layer",
            "hidden_size": "n_embd",
            "intermediate_size": "n_inner",
            "num_attention_heads": "n_head",
            "num_key_value_heads": "",
            "max_position_embeddings": "n_positions",
            "layer_norm_eps": "layer_norm_epsilon",
            "hidden_act": "activation_function",
        },
        weights=(
            one(T.TOKEN_EMBD, "wte.weight", "vocab", "embd"),
            one(T.POS_EMBD, "wpe.weight", "context", "embd"),
            *pair(T.OUTPUT_NORM, "ln_f", "embd"),
            one(T.OUTPUT, "lm_head.weight", "vocab", "embd"),
            *pair(T.ATTN_NORM, "h.{}.ln_1", "embd"),
            *pair(T.ATTN_QKV, "h.{}.attn.c_attn", "embd", "qkv", transpose=True),
            *pair(T.ATTN_OUT, "h.{}.attn.c_proj", "q", "embd", transpose=True),
            *pair(T.FFN_NORM, "h.{}.ln_2", "embd"),
            *pair(T.FFN_UP, "h.{}.mlp.c_fc", "embd", "ff", transpose=True),
            *pair(T.FFN_DOWN, "h.{}.mlp.c_proj", "ff", "embd", transpose=True),
        ),
        activations=("gelu_new", "gelu_pytorch_tanh"),
        defaults={"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
        prefixes=(("transformer.", ""),),
        left_out=((r"\.attn\.(masked_)?bias$", _MASK),),
        limits=(
            Limit("scale_attn_weights", (True,), True),
            Limit("scale_attn_by_inverse_layer_idx", (False,), False),
            Limit("add_cross_attention", (False,), False),
        ),
        norm="layer",
        rope_default=None,
        feed_multiple=4,
    ),
    Family(
        "gpt_neox",
        "gptneox",
        generator="GPTNeoXForCausalLM",
        words={"num_key_value_heads": ""},
        weights=(
            one(T.TOKEN_EMBD, "embed_in.weight", "vocab", "embd"),
            *pair(T.OUTPUT_NORM, "final_layer_norm", "embd"),
            one(T.OUTPUT, "embed_out.weight", "vocab", "embd"),
            *pair(T.ATTN_NORM, "layers.{}.input_layernorm", "embd"),
            *pair(T.ATTN_QKV, "layers.{}.attention.query_key_value", "qkv", "embd", order="grouped_qkv"),
            *pair(T.ATTN_OUT, "layers.{}.attention.dense", "embd", "q"),
            *pair(T.FFN_NORM, "layers.{}.post_attention_layernorm", "embd"),
            *pair(T.FFN_UP, "layers.{}.mlp.dense_h_to_4h", "ff", "embd"),
            *pair(T.FFN_DOWN, "layers.{}.mlp.dense_4h_to_h", "embd", "ff"),
        ),
        activations=("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"),
        defaults={"layer_norm_eps": 1e-5, "use_parallel_residual": True},
        prefixes=(("gpt_neox.", ""),),
        left_out=(
            (r"\.attention\.(masked_)?bias$", _MASK),
            (r"\.attention\.rotary_emb\.inv_freq$", ROTARY[1]),
        ),
        values=(Value(Keys.LLM.USE_PARALLEL_RESIDUAL, "use_parallel_residual", "bool"),),
        limits=(Limit("attention_bias", (True,), True),),
        norm="layer",
        partial_default=0.25,
        partial=True,
        count_rope=True,
        needs_output=True,
    ),
    Family(
        "falcon",
        "falcon",
        generator="FalconForCausalLM",
        words={
            "intermediate_size": "ffn_hidden_size",
            "num_key_value_heads": "num_kv_heads",
            "layer_norm_eps": "layer_norm_epsilon",
            "hidden_act": "activation",
        },
        weights=(
            one(T.TOKEN_EMBD, "word_embeddings.weight", "vocab", "embd"),
            *pair(T.OUTPUT_NORM, "ln_f", "embd"),
            one(T.OUTPUT, "lm_head.weight", "vocab", "embd"),
            *pair(T.ATTN_NORM, "h.{}.input_layernorm", "embd", when="!two_norms"),
            # Falcon 40B: the runtime feeds attention from the second norm, the feed-forward block from the first.
            *pair(T.ATTN_NORM, "h.{}.ln_mlp", "embd", when="two_norms"),
            *pair(T.ATTN_NORM_2, "h.{}.ln_attn", "embd", when="two_norms"),
            one(T.ATTN_QKV, "h.{}.self_attention.query_key_value.weight", "qkv", "embd", order="grouped_qkv"),
            one(T.ATTN_OUT, "h.{}.self_attention.dense.weight", "embd", "q"),
            one(T.FFN_UP, "h.{}.mlp.dense_h_to_4h.weight", "ff", "embd"),
            one(T.FFN_DOWN, "h.{}.mlp.dense_4h_to_h.weight", "embd", "ff"),
        ),
        activations=("gelu",),
        defaults={
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
            "multi_query": True,
            "max_position_embeddings": 2048,
        },
        prefixes=(("transformer.", ""),),
        left_out=(ROTARY, (r"\.self_attention\.rotary\.inv_freq$", ROTARY[1])),
        limits=(
            Limit("alibi", (False,), False),
            Limit("bias", (False,), False),
            Limit("parallel_attn", (True,), True),
        ),
        feeds=(
            Feed(T.ATTN_NORM, ("attention", "feed_forward"), when="!two_norms"),
            Feed(T.ATTN_NORM, ("feed_forward",), when="two_norms"),
            Feed(T.ATTN_NORM_2, ("attention",), when="two_norms"),
        ),
        norm="layer",
        feed_multiple=4,
        falcon_heads=True,
    ),
    Family(
        "starcoder2",
        "starcoder2",
        generator="Starcoder2ForCausalLM",
        words={"layer_norm_eps": "norm_epsilon"},
        weights=(
            EMBEDDING,
            HEAD,
            *pair(T.OUTPUT_NORM, "norm", "embd"),
            *pair(T.ATTN_NORM, "layers.{}.input_layernorm", "embd"),
            *pair(T.FFN_NORM, "layers.{}.post_attention_layernorm", "embd"),
            *attention(qkv_bias="", out_bias=""),
            *pair(T.FFN_UP, "layers.{}.mlp.c_fc", "ff", "embd"),
            *pair(T.FFN_DOWN, "layers.{}.mlp.c_proj", "embd", "ff"),
        ),
        activations=("gelu_pytorch_tanh", "gelu_new"),
        defaults={"norm_epsilon": 1e-5, "layer_norm_eps": 1e-5, "tie_word_embeddings": True},
        left_out=(ROTARY,),
        limits=(Limit("use_bias", (True,), True),),
        notes=(SLIDING,),
        norm="layer",
    ),
)
