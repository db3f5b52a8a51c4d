"""Tiny random models of every family, made by transformers, with a tokenizer, in a directory as the hub has them.

The weights are not transformers' initial ones, whose logits are nearly flat: matrices keep the variance of what
passes through them, norms and biases are perturbed, so a swapped, shifted or forgotten tensor moves the logits.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

VOCABULARY = 320  # rows of the embedding; the tokenizer below has fewer, as padded checkpoints do
WINDOW = 24
THETA = 50.0  # one turn of the slowest rotary pair within about 200 positions
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LINEAR = {"rope_type": "linear", "factor": 3.0}
_EIGHT = [1.0, 1.05, 1.2, 1.4, 1.7, 2.0, 2.5, 3.0]

# What every family shares, under its usual names.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_ROPE = {"rope_type": "default", "rope_theta": THETA}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_GEMMA3: dict[str, Any] = {
    "head_dim": 16,
    "sliding_window": WINDOW,
    "num_hidden_layers": 7,
    "layer_types": ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 2 * THETA},
        "sliding_attention": _ROPE,
    },
    "query_pre_attn_scalar": 16,
}
_GEMMA4: dict[str, Any] = {
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": WINDOW,
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": VOCABULARY,
    "final_logit_softcapping": 30.0,
    "rope_parameters": {
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 2 * THETA},
        "sliding_attention": _ROPE,
    },
}
_GEMMA4_KEYS: dict[str, Any] = {
    **_GEMMA4,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
    "hidden_size_per_layer_input": 0,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
}

_HYBRID: dict[str, Any] = {
    "num_hidden_layers": 5,
    "head_dim": 32,
    "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1], "mrope_interleaved": True},
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
_HYBRID_EXPERTS = {
    **{**_HYBRID, **_EXPERTS},
    "num_hidden_layers": 4,
    "num_experts_per_tok": 3,  # of four: another choice changes less
    "shared_expert_intermediate_size": 80,
    "intermediate_size": None,
}

_TEMPERED = {
    **{**YARN, "rope_theta": THETA, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32.0, "beta_slow": 1.0},
    "original_max_position_embeddings": 64,
    "llama_4_scaling_beta": 0.1,
}
_MINISTRAL: dict[str, Any] = {"rope_parameters": _TEMPERED, "head_dim": 24}

# variant -> (model_type, what differs from _COMMON; None removes a key)
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": _ROPE}),
    "llama-bias": ("llama", {"rope_parameters": _ROPE, "attention_bias": True}),
    "llama3": ("llama", {"rope_parameters": {**_LLAMA3, "rope_theta": 500.0}, "tie_word_embeddings": True}),
    "llama-linear": ("llama", {"rope_parameters": {**LINEAR, "rope_theta": THETA}, "head_dim": 32}),
    "llama-yarn": ("llama", {"rope_parameters": {**YARN, "rope_theta": THETA}}),
    "llama-dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": THETA}},
    ),
    "mistral": ("mistral", {"rope_parameters": _ROPE, "sliding_window": None, "head_dim": 24}),
    "lfm2": (
        "lfm2",
        {
            "rope_parameters": _ROPE,
            "intermediate_size": 144,
            "block_multiple_of": 32,
            "num_hidden_layers": 4,
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        },
    ),
    "ministral3": ("ministral3", _MINISTRAL),
    "ministral3-yarn": (
        "ministral3",
        {
            **_MINISTRAL,
            "rope_parameters": {**_TEMPERED, "mscale": 0.7, "mscale_all_dim": 1.4, "beta_fast": 8.0, "beta_slow": 2.0},
        },
    ),
    "mistral3": ("mistral3", _MINISTRAL),
    "mixtral": (
        "mixtral",
        {"rope_parameters": _ROPE, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "qwen2": ("qwen2", {"rope_parameters": _ROPE}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": {**YARN, "rope_theta": THETA}, "tie_word_embeddings": True}),
    "qwen2_moe": (
        "qwen2_moe",
        {**_EXPERTS, "rope_parameters": _ROPE, "shared_expert_intermediate_size": 80},
    ),
    "qwen3": ("qwen3", {"rope_parameters": _ROPE, "head_dim": 32, "tie_word_embeddings": True}),
    "qwen3_moe": (
        "qwen3_moe",
        {**_EXPERTS, "rope_parameters": _ROPE, "head_dim": 32, "norm_topk_prob": True},
    ),
    "gemma": ("gemma", {"rope_parameters": _ROPE, "head_dim": 32}),
    "gemma2": (
        "gemma2",
        {
            "rope_parameters": _ROPE,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 12.0,
            "sliding_window": WINDOW,
            "num_hidden_layers": 4,
        },
    ),
    "gemma3_text": ("gemma3_text", _GEMMA3),
    "gemma3": ("gemma3", _GEMMA3),
    "gemma4_text": ("gemma4_text", _GEMMA4),
    "gemma4_text-keys": ("gemma4_text", _GEMMA4_KEYS),
    "gemma4": ("gemma4", _GEMMA4),
    "phi3": ("phi3", {"rope_parameters": _ROPE, "sliding_window": None}),
    "phi3-longrope": (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": THETA,
                "short_factor": _EIGHT,
                "long_factor": [4 * f for f in _EIGHT],
                "original_max_position_embeddings": 512,
            },
            "max_position_embeddings": 2048,
            "original_max_position_embeddings": 512,
            "sliding_window": None,
        },
    ),
    "gpt2": (
        "gpt2",
        {
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 512,
            "hidden_size": None,
            "intermediate_size": None,
            "num_key_value_heads": None,
            "num_hidden_layers": None,
            "num_attention_heads": None,
            "max_position_embeddings": None,
        },
    ),
    "gpt_neox": (
        "gpt_neox",
        {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5}, "num_key_value_heads": None},
    ),
    "gpt_neox-serial": (
        "gpt_neox",
        {
            "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.25},
            "num_key_value_heads": None,
            "use_parallel_residual": False,
        },
    ),
    "stablelm": ("stablelm", {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.25}}),
    "stablelm-12b": (
        "stablelm",
        {
            "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.25},
            "use_parallel_residual": True,
            "qk_layernorm": True,
        },
    ),
    "stablelm-bias": (
        "stablelm",
        {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5}, "use_qkv_bias": True},
    ),
    "olmo2": ("olmo2", {"rope_parameters": _ROPE}),
    "granite": (
        "granite",
        {
            "rope_parameters": _ROPE,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.2,
            "tie_word_embeddings": True,
        },
    ),
    "smollm3": ("smollm3", {"rope_parameters": _ROPE, "num_hidden_layers": 5}),
    "falcon": (
        "falcon",
        {
            "rope_parameters": _ROPE,
            "multi_query": True,
            "new_decoder_architecture": False,
            "num_key_value_heads": None,
            "intermediate_size": None,
            "parallel_attn": True,
        },
    ),
    "falcon-new": (
        "falcon",
        {
            "rope_parameters": _ROPE,
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "num_key_value_heads": None,
            "intermediate_size": None,
        },
    ),
    "granitemoe": (
        "granitemoe",
        {
            "rope_parameters": _ROPE,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "embedding_multiplier": 2.0,
            "logits_scaling": 1.5,
            "residual_multiplier": 0.8,
            "attention_multiplier": 0.3,
        },
    ),
    "seed_oss": ("seed_oss", {"rope_parameters": _ROPE, "head_dim": 24}),
    "arcee": ("arcee", {"rope_parameters": _ROPE}),
    "phi": ("phi", {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5}, "num_key_value_heads": 4}),
    "olmo": ("olmo", {"rope_parameters": _ROPE, "clip_qkv": 0.9}),
    "olmo3": (
        "olmo3",
        {
            "rope_parameters": {
                "full_attention": {**YARN, "rope_theta": THETA},
                "sliding_attention": _ROPE,
            },
            "sliding_window": WINDOW,
            "num_hidden_layers": 5,
        },
    ),
    "olmo3-pattern": (
        "olmo3",
        {
            "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE},
            "sliding_window": WINDOW,
            "num_hidden_layers": 3,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    ),
    "olmoe": (
        "olmoe",
        {"rope_parameters": _ROPE, "num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4},
    ),
    "nemotron": ("nemotron", {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5}}),
    "starcoder2": ("starcoder2", {"rope_parameters": _ROPE, "sliding_window": None}),
    "cohere": ("cohere", {"rope_parameters": _ROPE, "logit_scale": 0.5}),
    "cohere2": (
        "cohere2",
        {"rope_parameters": _ROPE, "logit_scale": 0.5, "sliding_window": WINDOW, "num_hidden_layers": 5},
    ),
    "glm4": ("glm4", {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5}, "head_dim": 32}),
    "ernie4_5": ("ernie4_5", {"rope_parameters": _ROPE, "head_dim": 32}),
    "exaone4": (
        "exaone4",
        {
            "rope_parameters": {**_LLAMA3, "rope_theta": 500.0},
            "sliding_window": None,
            "layer_types": ["full_attention"] * 2,
            "head_dim": 16,
        },
    ),
    "hunyuan_v1_dense": (
        "hunyuan_v1_dense",
        {"rope_parameters": {"rope_type": "dynamic", "alpha": 8.0, "factor": 1.0, "rope_theta": 10.0}, "head_dim": 32},
    ),
    "glm4_moe": (
        "glm4_moe",
        {
            "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5},
            "head_dim": 32,
            "attention_bias": True,
            "use_qk_norm": True,
            "moe_intermediate_size": 48,
            "n_routed_experts": 4,
            "num_experts_per_tok": 3,
            "routed_scaling_factor": 1.5,
            "num_hidden_layers": 3,
        },
    ),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {
            "rope_parameters": _ROPE,
            "moe_intermediate_size": 48,
            "moe_num_experts": 4,
            "moe_k": 3,
            "num_hidden_layers": 3,
            "tie_word_embeddings": True,
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        {
            "rope_parameters": {**YARN, "rope_theta": THETA},
            "head_dim": 16,
            "sliding_window": WINDOW,
            "num_local_experts": 4,
            "num_experts_per_tok": 3,
            "num_hidden_layers": 3,
        },
    ),
    "qwen3_5_text": ("qwen3_5_text", _HYBRID),
    "qwen3_5_text-equal": (
        "qwen3_5_text",
        {**_HYBRID, "linear_num_value_heads": 2, "tie_word_embeddings": True, "num_hidden_layers": 4},
    ),
    "qwen3_5_text-yarn": (
        "qwen3_5_text",
        {
            **_HYBRID,
            "rope_parameters": {
                **YARN,
                "rope_theta": THETA,
                "partial_rotary_factor": 0.5,
                "mrope_section": [3, 3, 2],
                "mrope_interleaved": True,
            },
            "linear_conv_kernel_dim": 3,
            "num_hidden_layers": 4,
        },
    ),
    "qwen3_5": ("qwen3_5", _HYBRID),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", _HYBRID_EXPERTS),
    "qwen3_5_moe": ("qwen3_5_moe", _HYBRID_EXPERTS),
}
WITH_TOWERS = ("gemma3", "gemma4", "mistral3", "qwen3_5", "qwen3_5_moe")
"""Variants of which the checkpoint holds more than a language model."""
STREAMED = tuple(variant for variant in TINY if not variant.startswith("gemma4"))
"""Variants that can be run block by block."""


def row_lengths_of_256(variant: str) -> dict[str, Any]:
    """Overrides that make every matrix row a multiple of 256 long, as K-quants want."""
    changes = TINY[variant][1]
    if TINY[variant][0] == "gpt2":
        return {"n_embd": 256}
    wide: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512}
    if "linear_key_head_dim" in changes:
        heads = 2 * changes["linear_num_key_heads"]
        wide |= {"linear_num_value_heads": heads, "linear_key_head_dim": 64, "linear_value_head_dim": 64}
    if "moe_intermediate_size" in changes:
        wide |= {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 256}
    if changes.get("head_dim"):
        wide["head_dim"] = 64
    if "global_head_dim" in changes:
        wide |= {"global_head_dim": 256, "hidden_size_per_layer_input": 256}
    if "global_head_dim" in changes and not changes["hidden_size_per_layer_input"]:
        wide["hidden_size_per_layer_input"] = 0
    if "query_pre_attn_scalar" in changes:
        wide["query_pre_attn_scalar"] = 64
    if "short_factor" in changes.get("rope_parameters", {}):
        rope = changes["rope_parameters"]
        wide["rope_parameters"] = {
            **rope,
            **{name: [f for f in rope[name] for _ in range(4)] for name in ("short_factor", "long_factor")},
        }
    return {k: v for k, v in wide.items() if changes.get(k, 0) is not None}


def _config(variant: str, overrides: Mapping[str, Any]) -> transformers.PreTrainedConfig:
    model_type, changes = TINY[variant]
    values = {k: v for k, v in {**_COMMON, **changes, **overrides}.items() if v is not None or k in overrides}
    for name in changes:
        if changes[name] is None and name == "sliding_window" and name not in overrides:
            values[name] = None
    if model_type == "gemma3":
        text = transformers.Gemma3TextConfig(**values)
        vision = {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        }
        tied = values.get("tie_word_embeddings", True)
        return transformers.Gemma3Config(
            text_config=text, vision_config=vision, mm_tokens_per_image=4, tie_word_embeddings=tied
        )
    if model_type == "mistral3":
        vision = {
            "model_type": "pixtral",
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "head_dim": 16,
            "image_size": 32,
            "patch_size": 8,
        }
        tied = values.get("tie_word_embeddings", False)
        text = {"model_type": "ministral3", **values}
        return transformers.Mistral3Config(text_config=text, vision_config=vision, tie_word_embeddings=tied)
    if model_type == "gemma4":
        small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        vision = {**small, "intermediate_size": 32, "head_dim": 16, "patch_size": 4, "position_embedding_size": 16}
        return transformers.Gemma4Config(
            text_config={**values, "model_type": "gemma4_text"},
            vision_config=vision,
            audio_config={**small, "subsampling_conv_channels": (8, 4), "output_proj_dims": 32},
            tie_word_embeddings=values.get("tie_word_embeddings", True),
        )
    if model_type in ("qwen3_5", "qwen3_5_moe"):
        vision = {
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": values["hidden_size"],
            "num_position_embeddings": 16,
        }
        return transformers.AutoConfig.for_model(
            model_type,
            text_config={**values, "model_type": f"{model_type}_text"},
            vision_config=vision,
            tie_word_embeddings=values.get("tie_word_embeddings", False),
        )
    return transformers.AutoConfig.for_model(model_type, **values)


def _randomize(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # These store norm weights minus one.
    kind = type(model).__name__.lower()
    centred = any(word in kind for word in ("gemma", "nemotron")) and "gemma4" not in kind

    for name, value in sorted(model.named_parameters()):
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim == 1 and "norm" in name + type(model).__name__ and name.endswith("weight"):
            hybrid = "qwen3_5" in kind and ".linear_attn." not in name and ".visual." not in name
            new = 0.2 * noise if hybrid or (centred and "vision" not in name) else 1 + 0.2 * noise
        elif name.endswith("A_log"):
            new = 0.3 * noise - 2.0  # states that remember some tens of tokens
        elif value.ndim == 1 and ("ln_" in name or "layernorm" in name) and name.endswith("weight"):
            new = 1 + 0.2 * noise
        elif value.ndim == 1:
            new = 0.3 * noise
        elif "embed" in name or name.endswith(("wte.weight", "wpe.weight")):
            new = (0.3 if "gemma" in kind or centred else 1.0) * noise
        else:
            conv = type(model).__name__.startswith("GPT2") and "lm_head" not in name
            fan_in = value.shape[0] if conv else value.shape[-1]
            # What leaves a delta rule is normed, so small values are made large: with less of it, less of their noise.
            usual = 0.42 if name.endswith("linear_attn.out_proj.weight") else 1.2
            new = noise * ((2.0 if "gate.weight" in name else usual) / fan_in**0.5)
        with torch.no_grad():
            value.copy_(new)
    for name, value in sorted(model.named_buffers()):
        if name.endswith("e_score_correction_bias"):
            value.copy_(0.2 * torch.randn(value.shape, generator=generator))
        if name.endswith("layer_scalar"):
            value.copy_(0.9 + 0.2 * torch.rand(value.shape, generator=generator))
    model.tie_weights()


def _tokenizer(directory: Path) -> None:
    """A minimal byte-level BPE tokenizer: GPT-2's splitting rule, 256 bytes, a few merges, three specials."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("i", "n"), ("a", "n"), ("Ġ", "the"), ("1", "2")]
    words = [*alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<s>", "</s>", "<pad>")])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "model_max_length": 512,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def make_tiny(
    variant: str, directory: Path, *, dtype: str = "bfloat16", seed: int = 0, **config_overrides: Any
) -> Path:
    """A tiny model of ``variant`` (a key of TINY) in ``directory``, which is made and returned."""
    directory.mkdir(parents=True, exist_ok=True)
    words = len(pre_tokenizers.ByteLevel.alphabet()) + 6
    ids = {"bos_token_id": words, "eos_token_id": words + 1, "pad_token_id": words + 2}
    config = _config(variant, {**ids, **config_overrides})
    kind = _class_of(TINY[variant][0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (kind(config) if kind is not transformers.AutoModelForCausalLM else kind.from_config(config)).eval()
    _randomize(model, seed)
    model = model.to(getattr(torch, dtype))
    with quiet():
        model.save_pretrained(directory)
    _tokenizer(directory)
    return directory


@contextlib.contextmanager
def quiet() -> Any:
    """transformers without its progress bars."""
    transformers.utils.logging.disable_progress_bar()
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(before)


def _class_of(model_type: str) -> Any:
    """transformers' class of the whole model, towers included."""
    whole = {
        "gemma3": "Gemma3ForConditionalGeneration",
        "mistral3": "Mistral3ForConditionalGeneration",
        "gemma4": "Gemma4ForConditionalGeneration",
        "qwen3_5": "Qwen3_5ForConditionalGeneration",
        "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
    }
    return getattr(transformers, whole.get(model_type, "AutoModelForCausalLM"))


def auto_class(directory: Path) -> Any:
    """transformers' automatic class for the text of the model in ``directory``."""
    read = transformers.AutoConfig.from_pretrained(directory)
    known = type(read) in transformers.AutoModelForCausalLM._model_mapping
    return transformers.AutoModelForCausalLM if known else transformers.AutoModelForImageTextToText


def reference_model(directory: Path) -> Any:
    """The checkpoint in transformers, float32, exact attention."""
    kind = _class_of(json.loads((directory / "config.json").read_text())["model_type"])
    with quiet():
        return kind.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        ).eval()


def reference_logits(model: Any, ids: list[int]) -> Any:
    """float32 (n, vocabulary)."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids])).logits[0].float().numpy()


def to_version_4(directory: Path) -> None:
    """Rewrites config.json as transformers 4.x spells it: rope_theta, rope_scaling, torch_dtype."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["torch_dtype"] = config.pop("dtype", "bfloat16")
    rope = config.pop("rope_parameters", None) or {}
    if "full_attention" in rope:
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    rope = dict(rope)
    config["rope_theta"] = rope.pop("rope_theta", 10000.0)
    if (partial := rope.pop("partial_rotary_factor", None)) is not None:
        config["rotary_pct" if config["model_type"] == "gpt_neox" else "partial_rotary_factor"] = partial
    if config["model_type"] == "gpt_neox":
        config["rotary_emb_base"] = config.pop("rope_theta")
    if rope.keys() - {"rope_type"} or rope.get("rope_type", "default") != "default":
        if rope["rope_type"] == "longrope":
            config["original_max_position_embeddings"] = rope.pop("original_max_position_embeddings")
        rope["type"] = rope.pop("rope_type")
        config["rope_scaling"] = rope
    else:
        config["rope_scaling"] = None
    config["transformers_version"] = "4.46.0"
    path.write_text(json.dumps(config, indent=1))
