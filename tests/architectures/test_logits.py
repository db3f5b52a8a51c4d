"""Every family in the real llama.cpp: the artifact computes what transformers computes from the checkpoint.

Lengths go past one turn of the slowest rotary pair and past the sliding window of the tiny models.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_quantize.architectures import ARCHITECTURES, open_architecture
from llm_quantize.errors import UnsupportedError
from llm_quantize.models.safetensors import open_checkpoint
from llm_quantize.pipeline import Options, quantize
from llm_quantize.runtimes.llama_cpp import LlamaCpp

from ..oracles.rounded_linear import rounding
from ..tiny_models import TINY, VOCABULARY, WINDOW, make_tiny, reference_logits, reference_model, row_lengths_of_256

LENGTHS = (1, 40, 300)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tokens(count: int) -> list[int]:
    return np.random.Generator(np.random.PCG64(count)).integers(0, VOCABULARY, count).tolist()


def artifacts(model: Path, *levels: str) -> list[Path]:
    """The model through the whole pipeline, at every level. (No model here is called after its family: llama.cpp
    looks for "phi3" in a model's name, and then for that family's tokens in the vocabulary.)"""
    results = quantize(str(model), "gguf", levels=levels, output_dir=model / "out", options=Options(threads=1))
    return [result.path for result in results]


def distance(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference as a share of the logit range."""
    assert np.isfinite(got).all()
    return float(np.abs(got - expected).max() / np.ptp(expected))


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def test_every_family_has_a_tiny_model() -> None:
    assert {model_type for model_type, _ in TINY.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("variant", TINY)
def test_f32_computes_the_same_logits(variant: str, tmp_path: Path) -> None:
    model = make_tiny(variant, tmp_path / "model")
    reference = reference_model(model)
    (artifact,) = artifacts(model, "F32")
    with LlamaCpp(artifact, context=512, threads=1) as llama:
        for length in LENGTHS:
            expected = reference_logits(reference, tokens(length))
            assert np.ptp(expected) > 4, "flat logits prove nothing"
            assert distance(llama.logits(tokens(length)), expected) < 1e-3


@pytest.mark.parametrize("variant", TINY)
def test_bf16_and_q8_0_differ_by_their_rounding_alone(variant: str, tmp_path: Path) -> None:
    """llama.cpp also rounds activations to the type of the matrix. The oracle does both roundings; what remains is
    values that fall on the other side of a rounding boundary, which must stay below what rounding itself does."""
    model = make_tiny(variant, tmp_path / "model", dtype="float32")
    reference = reference_model(model)
    ids = tokens(100)
    exact = reference_logits(reference, ids)
    for level, artifact in zip(("BF16", "Q8_0"), artifacts(model, "BF16", "Q8_0"), strict=True):
        with rounding(reference, level):
            expected = reference_logits(reference, ids)
        with LlamaCpp(artifact, context=256, threads=1) as llama:
            got = llama.logits(ids)
        allowed = rms(expected - exact)
        assert 0 < allowed < 1e-2 * np.ptp(exact)
        assert rms(got - expected) < 0.8 * allowed, level


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_the_output_matrix_tied_or_not(family: str, tied: bool, tmp_path: Path) -> None:
    variant = next(name for name, (model_type, _) in TINY.items() if model_type == family)
    model = make_tiny(variant, tmp_path / "model", tie_word_embeddings=tied)
    if not tied and not ARCHITECTURES[family].output:
        with pytest.raises(UnsupportedError, match="ties the output"):
            artifacts(model, "F32")
        return
    expected = reference_logits(reference_model(model), tokens(30))
    with LlamaCpp(artifacts(model, "F32")[0], context=64, threads=1) as llama:
        assert distance(llama.logits(tokens(30)), expected) < 1e-3


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_k_quant_runs(family: str, tmp_path: Path) -> None:
    """Four bits on random weights are coarse; what is shown is that no tensor is misplaced or fell back."""
    model = make_tiny(family, tmp_path / "model", **row_lengths_of_256(family))
    results = quantize(str(model), "gguf", levels=["Q4_K_M"], output_dir=model / "out", options=Options(threads=1))
    assert results[0].degraded == {}
    expected = reference_logits(reference_model(model), tokens(40))
    with LlamaCpp(results[0].path, context=64, threads=1) as llama:
        got = llama.logits(tokens(40))
    assert np.corrcoef(got.ravel(), expected.ravel())[0, 1] > 0.93


def test_longrope_beyond_the_original_context(tmp_path: Path) -> None:
    """llama.cpp takes the long factors when the context is larger than the original one, transformers when the
    sequence is."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5, 3.1, 3.8]}
    rope = {"rope_type": "longrope", "rope_theta": 50.0, "original_max_position_embeddings": 256, **factors}
    model = make_tiny("phi3-longrope", tmp_path / "model", rope_parameters=rope, original_max_position_embeddings=256)
    reference = reference_model(model)
    (artifact,) = artifacts(model, "F32")
    for context, length in ((256, 200), (512, 300)):
        with LlamaCpp(artifact, context=context, threads=1) as llama:
            assert distance(llama.logits(tokens(length)), reference_logits(reference, tokens(length))) < 1e-3


_YARN = {"rope_type": "yarn", "rope_theta": 50.0, "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    "extra",
    [{"attention_factor": 1.3}, {"mscale": 0.7, "mscale_all_dim": 1.4}, {"beta_fast": 16.0}],
    ids=["attention", "mscale", "same-ramp"],
)
def test_yarn_with_factors_of_its_own(extra: dict[str, float], tmp_path: Path) -> None:
    model = make_tiny("llama-yarn", tmp_path / "yarn", rope_parameters={**_YARN, **extra})
    expected = reference_logits(reference_model(model), tokens(200))
    with LlamaCpp(artifacts(model, "F32")[0], context=256, threads=1) as llama:
        assert distance(llama.logits(tokens(200)), expected) < 1e-3


def test_a_yarn_ramp_that_llama_cpp_would_ignore_is_refused(tmp_path: Path) -> None:
    model = make_tiny("llama-yarn", tmp_path / "yarn", rope_parameters={**_YARN, "beta_fast": 8.0, "beta_slow": 2.0})
    with pytest.raises(UnsupportedError, match="ramp"):
        artifacts(model, "F32")


def test_a_sliding_window_that_llama_cpp_lacks_is_said(tmp_path: Path) -> None:
    model = make_tiny("mistral", tmp_path / "mistral", sliding_window=WINDOW)
    config = json.loads((model / "config.json").read_text())
    assert any(str(WINDOW) in note for note in open_architecture(config).notes)
    reference = reference_model(model)
    with LlamaCpp(artifacts(model, "F32")[0], context=256, threads=1) as llama:
        inside = tokens(WINDOW)
        assert distance(llama.logits(inside), reference_logits(reference, inside)) < 1e-3
        beyond = tokens(200)
        assert distance(llama.logits(beyond), reference_logits(reference, beyond)) > 1e-2


@pytest.mark.parametrize("variant", ["llama", "qwen3", "gemma3_text", "gpt_neox", "falcon-new", "gpt2"])
def test_one_wrong_value_anywhere_is_seen(variant: str, tmp_path: Path) -> None:
    """The comparison has teeth: any layer tensor of the checkpoint changed moves the logits past the limit."""
    model = make_tiny(variant, tmp_path / "model")
    reference = reference_model(model)
    expected = reference_logits(reference, tokens(60))
    with open_checkpoint(str(model)) as checkpoint:
        names = [name for name in checkpoint.tensors if ".0." in name]
    parameters = dict(reference.named_parameters())
    for name in names:
        value = parameters.get(name)
        assert value is not None, name
        before = value.detach().clone()
        with torch.no_grad():
            value.copy_(value.roll(1, 0))
        if not torch.equal(before, value):
            assert distance(reference_logits(reference, tokens(60)), expected) > 1e-3, name
        with torch.no_grad():
            value.copy_(before)
