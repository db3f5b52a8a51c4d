"""Configurations are not trusted: wrong ones are refused by name, and nothing they hold makes us fail otherwise."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFValueType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_quantize.architectures import ARCHITECTURES, open_architecture
from llm_quantize.errors import MalformedInputError, UnsupportedError
from llm_quantize.io.gguf_file import MetaValue

FILE = Path("model/config.json")
PLAIN: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "layer_norm_eps": 1e-5,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "sliding_window": 24,
}


def plain(model_type: str, **changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = {**PLAIN, "model_type": model_type, **changes}
    if ARCHITECTURES[model_type].arch in ("qwen2moe", "qwen3moe"):
        config |= {"num_experts": 4, "moe_intermediate_size": 48}
    if model_type == "qwen2_moe":
        config |= {"norm_topk_prob": False}
    if model_type == "olmoe":
        config |= {"norm_topk_prob": False, "num_key_value_heads": 4}
    if ARCHITECTURES[model_type].activations[0] == "relu2":
        config |= {"hidden_act": "relu2"}
    return {**config, **changes}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_plain_configuration_opens(model_type: str) -> None:
    architecture = open_architecture(plain(model_type), file=FILE)
    name = architecture.gguf_name
    found = architecture.metadata(None)
    assert name == ARCHITECTURES[model_type].arch
    assert found[f"{name}.block_count"] == MetaValue(GGUFValueType.UINT32, 6)
    assert found[f"{name}.embedding_length"] == MetaValue(GGUFValueType.UINT32, 64)
    assert all(isinstance(value, MetaValue) and key.startswith(f"{name}.") for key, value in found.items())
    eps = [key for key in found if key.endswith("epsilon")]
    assert len(eps) == 1
    assert found[eps[0]].type == GGUFValueType.FLOAT32


def use(config: dict[str, Any]) -> None:
    """All that is ever done with a configuration."""
    architecture = open_architecture(config, file=FILE)
    for value in architecture.metadata({"anything": 1}).values():
        if value.type == GGUFValueType.UINT32:
            assert 0 <= value.value < 2**32
        if value.type == GGUFValueType.FLOAT32:
            assert np.isfinite(np.float32(value.value))
    architecture.map_tensors({})


WRONG = [
    ("num_hidden_layers", 0),
    ("num_hidden_layers", -1),
    ("num_hidden_layers", 2**80),
    ("num_hidden_layers", 10**5),
    ("num_hidden_layers", True),
    ("num_hidden_layers", "32"),
    ("num_hidden_layers", [32]),
    ("num_hidden_layers", 2.5),
    ("num_hidden_layers", math.nan),
    ("num_attention_heads", 0),
    ("num_attention_heads", 3),
    ("num_key_value_heads", 0),
    ("num_key_value_heads", 3),
    ("num_key_value_heads", 8),
    ("hidden_size", None),
    ("hidden_size", math.inf),
    ("vocab_size", -320),
    ("vocab_size", {}),
    ("max_position_embeddings", None),
    ("rms_norm_eps", "1e-6"),
    ("rms_norm_eps", math.nan),
    ("rms_norm_eps", 10**400),
    ("head_dim", 17),
    ("head_dim", 0),
    ("rope_theta", 0),
    ("rope_theta", math.inf),
    ("rope_theta", [1]),
    ("rope_scaling", 5),
    ("rope_scaling", {"type": 5}),
    ("rope_scaling", {"type": "linear"}),
    ("rope_scaling", {"type": "linear", "factor": "2"}),
    ("rope_scaling", {"type": "linear", "factor": -2}),
    ("rope_scaling", {"type": "llama3", "factor": 8}),
    (
        "rope_scaling",
        {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1},
    ),
    ("rope_parameters", {"full_attention": 7}),
    ("tie_word_embeddings", "yes"),
    ("attention_bias", 1),
    ("hidden_act", 4),
    ("layer_types", "full_attention"),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_value_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(MalformedInputError) as caught:
        use(plain("llama", **{name: value}))
    error = caught.value
    assert error.exit_code == 3
    assert error.file == str(FILE)
    if name == "attention_bias":
        assert "attention_bias" in str(error)
    else:
        words = {"rope_scaling": ("factor", "rope_scaling", "type"), "rope_parameters": ("full_attention",)}
        assert any(word in str(error) for word in (name, *words.get(name, ()), "num_attention_heads", "rotated"))


UNSUPPORTED = [
    ("llama", {"hidden_act": "gelu"}),
    ("llama", {"rope_scaling": {"type": "spiral"}}),
    ("llama", {"partial_rotary_factor": 0.5}),
    ("qwen2", {"use_sliding_window": True}),
    ("qwen2", {"rope_scaling": {"type": "llama3", "factor": 8}}),
    ("qwen2", {"head_dim": 128}),
    ("qwen3_moe", {"decoder_sparse_step": 2}),
    ("qwen3_moe", {"mlp_only_layers": [0]}),
    ("qwen3_moe", {"norm_topk_prob": False}),
    ("gemma2", {"query_pre_attn_scalar": 144}),
    ("gemma2", {"layer_types": ["full_attention"] * 6}),
    ("gemma3_text", {"sliding_window_pattern": 3}),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}),
    ("smollm3", {"no_rope_layer_interval": 3}),
    ("smollm3", {"no_rope_layers": [1, 1, 1, 1, 1, 1]}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ("falcon", {"alibi": True}),
    ("falcon", {"parallel_attn": False}),
]


@pytest.mark.parametrize(("model_type", "changes"), UNSUPPORTED)
def test_a_variant_that_llama_cpp_cannot_compute_has_a_limit(model_type: str, changes: dict[str, Any]) -> None:
    limits = open_architecture(plain(model_type, **changes), file=FILE).limits
    assert limits
    assert limits[0].exit_code == 4
    assert limits[0].found is not None
    assert "llama.cpp" in str(limits[0])


def test_plain_configurations_have_no_limits() -> None:
    for model_type in {model_type for model_type, _ in UNSUPPORTED}:
        assert not open_architecture(plain(model_type), file=FILE).limits


@pytest.mark.parametrize(
    ("model_type", "nearest"), [("qwen3_mo", "qwen3_moe"), ("Llama", "llama"), ("gptneox", "gpt_neox")]
)
def test_an_unknown_family_names_the_nearest(model_type: str, nearest: str) -> None:
    with pytest.raises(UnsupportedError, match=f"nearest supported one is '{nearest}'"):
        open_architecture({"model_type": model_type}, file=FILE)


def test_a_classifier_is_not_a_language_model() -> None:
    with pytest.raises(UnsupportedError, match="generates text"):
        open_architecture(plain("llama", architectures=["LlamaForSequenceClassification"]), file=FILE)
    for odd in ([], [3], "LlamaModel", {}):
        assert open_architecture(plain("llama", architectures=odd), file=FILE).gguf_name == "llama"


@pytest.mark.parametrize("config", [{}, {"model_type": None}, {"model_type": 3}, {"model_type": ""}])
def test_no_model_type(config: dict[str, Any]) -> None:
    with pytest.raises(MalformedInputError, match="what kind of model"):
        open_architecture(config, file=FILE)


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=2**60),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(
        st.sampled_from(["rope_type", "type", "factor", "rope_theta", "full_attention", "long_factor"]),
        st.one_of(st.none(), st.floats(), st.integers(), st.text(max_size=4), st.sampled_from(["yarn", "longrope"])),
        max_size=4,
    ),
)
NAMES = [
    *PLAIN,
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "tie_word_embeddings",
    "attention_bias",
    "layer_types",
    "text_config",
    "num_experts",
    "moe_intermediate_size",
    "sliding_window_pattern",
    "final_logit_softcapping",
    "original_max_position_embeddings",
    "new_decoder_architecture",
    "no_rope_layers",
    "hidden_act",
    "num_nextn_predict_layers",
    "attention_multiplier",
]


@given(st.sampled_from(sorted(ARCHITECTURES)), st.dictionaries(st.sampled_from(NAMES), JUNK, max_size=4))
@settings(max_examples=600, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_no_configuration_fails_otherwise(model_type: str, changes: dict[str, Any]) -> None:
    with pytest.raises((MalformedInputError, UnsupportedError)):
        use(plain(model_type, **changes))


def test_metadata_of_a_llama_3_as_the_converter_writes_it() -> None:
    scaling = {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    config = {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": scaling,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    architecture = open_architecture(config)
    assert {key: value.value for key, value in architecture.metadata(None).items()} == {
        "llama.block_count": 16,
        "llama.context_length": 131072,
        "llama.embedding_length": 2048,
        "llama.feed_forward_length": 8192,
        "llama.attention.head_count": 32,
        "llama.attention.head_count_kv": 8,
        "llama.vocab_size": 128256,
        "llama.attention.key_length": 64,
        "llama.attention.value_length": 64,
        "llama.rope.freq_base": 500000.0,
        "llama.rope.dimension_count": 64,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }
    (divisors,) = architecture.constants.values()
    assert divisors.shape == (32,)
    assert divisors[0] == 1
    assert divisors[-1] == 32
    assert np.all(np.diff(divisors) >= 0)


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, llm_quantize.architectures; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
