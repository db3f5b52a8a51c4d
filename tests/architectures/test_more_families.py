"""What families of 2025 and 2026 have of their own, beyond the tests that every family passes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llm_quantize.models.opening import open_source
from llm_quantize.pipeline import Options, quantize
from llm_quantize.runtimes.llama_cpp import LlamaCpp

from ..tiny_models import VOCABULARY, WINDOW, make_tiny, reference_logits, reference_model


def distance(model: Path, length: int) -> float:
    """From transformers' logits to those of the F32 file in llama.cpp, as a share of their range."""
    (made,) = quantize(str(model), "gguf", levels=["F32"], output_dir=model / "out", options=Options(threads=1))
    ids = np.random.Generator(np.random.PCG64(length)).integers(0, VOCABULARY, length).tolist()
    expected = reference_logits(reference_model(model), ids)
    with LlamaCpp(made.path, context=512, threads=1) as llama:
        return float(np.abs(llama.logits(ids) - expected).max() / np.ptp(expected))


def test_exaone_slides_in_its_model_of_64_layers(tmp_path: Path) -> None:
    """llama.cpp knows that model by the number of its layers; the fourth layers are not rotated."""
    changes = {"sliding_window": WINDOW, "layer_types": None}
    model = make_tiny("exaone4", tmp_path / "model", num_hidden_layers=64, **changes)
    with (source := open_source(str(model))).checkpoint:
        assert source.architecture.sliding == [(layer + 1) % 4 != 0 for layer in range(64)]
    assert distance(model, 3 * WINDOW) < 1e-3


def test_exaone_of_fewer_layers_that_slide_is_refused_for_llama_cpp(tmp_path: Path) -> None:
    model = make_tiny("exaone4", tmp_path / "model", sliding_window=WINDOW, layer_types=["sliding_attention"] * 2)
    with (source := open_source(str(model))).checkpoint:
        (limit,) = source.architecture.limits
    assert "order of layer_types" in str(limit)


@pytest.mark.parametrize("alpha", [1000.0, 50.0])
def test_hunyuan_stretches_its_base(alpha: float, tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "alpha": alpha, "factor": 1.0, "rope_theta": 10.0}
    model = make_tiny("hunyuan_v1_dense", tmp_path / "model", rope_parameters=rope)
    assert distance(model, 300) < 1e-3
