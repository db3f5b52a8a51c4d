"""Configurations as they stand on the hub, old spellings and sparse ones included: opened, with the values that
convert_hf_to_gguf writes for them. Only the entries that matter here are kept."""

from __future__ import annotations

from typing import Any

import pytest

from llm_quantize.architectures import open_architecture

LLAMA2 = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
MISTRAL = {
    "model_type": "mistral",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 32000,
}
NEMO = {
    **MISTRAL,
    "head_dim": 128,
    "hidden_size": 5120,
    "num_hidden_layers": 40,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "vocab_size": 131072,
}
MIXTRAL = {
    **MISTRAL,
    "model_type": "mixtral",
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "rope_theta": 1000000.0,
    "sliding_window": None,
}
QWEN25 = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GEMMA = {
    "model_type": "gemma",
    "head_dim": 256,
    "hidden_act": "gelu",
    "hidden_activation": None,
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "max_position_embeddings": 8192,
    "num_attention_heads": 8,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "vocab_size": 256000,
}
GEMMA2 = {
    "model_type": "gemma2",
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 30.0,
    "head_dim": 128,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 4608,
    "intermediate_size": 36864,
    "max_position_embeddings": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 46,
    "num_key_value_heads": 16,
    "query_pre_attn_scalar": 144,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "sliding_window_size": 4096,
    "vocab_size": 256000,
}
GEMMA3 = {
    "model_type": "gemma3",
    "mm_tokens_per_image": 256,
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "num_hidden_layers": 27},
}
PHI35 = {
    "model_type": "phi3",
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"long_factor": [1.5] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "vocab_size": 32064,
}
PHI4 = {
    **PHI35,
    "hidden_size": 5120,
    "intermediate_size": 17920,
    "max_position_embeddings": 16384,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 10,
    "original_max_position_embeddings": 16384,
    "rope_scaling": None,
    "rope_theta": 250000,
    "sliding_window": None,
    "vocab_size": 100352,
}
GPT2 = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-05,
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
}
PYTHIA = {
    "model_type": "gpt_neox",
    "hidden_act": "gelu",
    "hidden_size": 512,
    "intermediate_size": 2048,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "num_attention_heads": 8,
    "num_hidden_layers": 6,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
    "vocab_size": 50304,
}
FALCON = {
    "model_type": "falcon",
    "alibi": False,
    "bias": False,
    "hidden_size": 4544,
    "layer_norm_epsilon": 1e-05,
    "multi_query": True,
    "new_decoder_architecture": False,
    "num_attention_heads": 71,
    "num_hidden_layers": 32,
    "num_kv_heads": 71,
    "parallel_attn": True,
    "vocab_size": 65024,
}
FALCON_40B = {
    **FALCON,
    "hidden_size": 8192,
    "new_decoder_architecture": True,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_kv_heads": 8,
}
SMOLLM3 = {
    "model_type": "smollm3",
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "layer_types": ["full_attention"] * 36,
    "max_position_embeddings": 65536,
    "max_window_layers": 28,
    "mlp_bias": False,
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9,
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "sliding_window": None,
    "use_sliding_window": False,
    "vocab_size": 128256,
}

MINISTRAL3 = {
    "model_type": "mistral3",
    "architectures": ["Mistral3ForConditionalGeneration"],
    "text_config": {
        "model_type": "ministral3",
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 3072,
        "intermediate_size": 9216,
        "max_position_embeddings": 262144,
        "num_attention_heads": 32,
        "num_hidden_layers": 26,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 16.0,
            "llama_4_scaling_beta": 0.1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 16384,
            "rope_theta": 1000000.0,
            "rope_type": "yarn",
        },
        "sliding_window": None,
        "tie_word_embeddings": True,
        "vocab_size": 131072,
    },
    "vision_config": {"model_type": "pixtral"},
}

CASES: list[tuple[str, dict[str, Any], bool, dict[str, object]]] = [
    ("Llama 2 7B", LLAMA2, False, {"llama.rope.freq_base": 10000.0, "llama.rope.dimension_count": 128}),
    ("Mistral 7B", MISTRAL, False, {"llama.attention.head_count_kv": 8, "llama.context_length": 32768}),
    ("Mistral Nemo", NEMO, False, {"llama.attention.key_length": 128, "llama.rope.dimension_count": 128}),
    ("Mixtral 8x7B", MIXTRAL, False, {"llama.expert_count": 8, "llama.expert_used_count": 2}),
    ("Qwen 2.5 0.5B", QWEN25, True, {"qwen2.rope.freq_base": 1000000.0, "qwen2.attention.head_count_kv": 2}),
    (
        "Qwen 3 30B A3B",
        QWEN3_MOE,
        False,
        {"qwen3moe.expert_feed_forward_length": 768, "qwen3moe.feed_forward_length": 6144},
    ),
    ("Gemma 2B", GEMMA, True, {"gemma.attention.key_length": 256, "gemma.attention.head_count_kv": 1}),
    (
        "Gemma 2 27B",
        GEMMA2,
        True,
        {"gemma2.attn_logit_softcapping": 50.0, "gemma2.attention.sliding_window": 4096},
    ),
    (
        "Gemma 3 4B",
        GEMMA3,
        True,
        {
            "gemma3.attention.head_count": 8,
            "gemma3.attention.head_count_kv": 4,
            "gemma3.attention.key_length": 256,
            "gemma3.attention.sliding_window": 1024,
            "gemma3.context_length": 131072,
            "gemma3.rope.freq_base": 1000000.0,
            "gemma3.rope.freq_base_swa": 10000.0,
            "gemma3.rope.scaling.factor": 8.0,
            "gemma3.rope.scaling.type": "linear",
            "gemma3.vocab_size": 262208,
        },
    ),
    (
        "Phi 3.5 mini",
        PHI35,
        False,
        {
            "phi3.rope.scaling.original_context_length": 4096,
            "phi3.rope.scaling.attn_factor": pytest.approx(1.1902380714),
            "phi3.attention.sliding_window": 262144,
            "phi3.rope.dimension_count": 96,
        },
    ),
    ("Phi 4", PHI4, False, {"phi3.attention.sliding_window": 0, "phi3.rope.freq_base": 250000.0}),
    ("GPT-2", GPT2, True, {"gpt2.feed_forward_length": 3072, "gpt2.context_length": 1024}),
    ("Pythia 70M", PYTHIA, False, {"gptneox.rope.dimension_count": 16, "gptneox.use_parallel_residual": True}),
    ("Falcon 7B", FALCON, True, {"falcon.attention.head_count_kv": 1, "falcon.feed_forward_length": 18176}),
    ("Falcon 40B", FALCON_40B, True, {"falcon.attention.head_count_kv": 8, "falcon.context_length": 2048}),
    (
        "Ministral 3 3B",
        MINISTRAL3,
        True,
        {
            "mistral3.attention.temperature_scale": 0.1,
            "mistral3.context_length": 262144,
            "mistral3.rope.scaling.original_context_length": 16384,
            "mistral3.rope.scaling.yarn_log_multiplier": 1.0,
            "mistral3.rope.scaling.yarn_beta_fast": 32.0,
            "mistral3.rope.scaling.attn_factor": None,
        },
    ),
    ("SmolLM3 3B", SMOLLM3, True, {"smollm3.rope.freq_base": 5000000.0, "smollm3.rope.dimension_count": 128}),
]


@pytest.mark.parametrize(("config", "tied", "expected"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_opened_with_the_right_values(config: dict[str, Any], tied: bool, expected: dict[str, object]) -> None:
    architecture = open_architecture(config)
    found = {key: value.value for key, value in architecture.metadata(None).items()}
    assert {key: found.get(key) for key in expected} == expected
    assert architecture.hyper.tied == tied


def test_notes_only_where_a_window_is_lost() -> None:
    noted = {name for name, config, *_ in CASES if open_architecture(config).notes}
    assert noted == {"Mistral 7B", "Phi 3.5 mini"}
