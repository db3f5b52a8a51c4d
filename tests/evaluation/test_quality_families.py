"""Every family: its unquantized artifact is its source, streamed; and the real llama.cpp agrees with both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llm_quantize.evaluation.quality import measure_quality
from llm_quantize.models.opening import open_source
from llm_quantize.pipeline import Options, quantize

from ..tiny_models import STREAMED, VOCABULARY, make_tiny


@pytest.mark.parametrize("variant", STREAMED)
def test_f32_is_the_source_here_and_in_llama_cpp(variant: str, tmp_path: Path) -> None:
    """llama.cpp looks some activation functions up in a table of float16: 1e-6 where it does, 1e-11 elsewhere."""
    model = make_tiny(variant, tmp_path / "model")
    (result,) = quantize(str(model), "gguf", levels=["F32"], output_dir=tmp_path, options=Options(threads=1))
    windows = np.random.Generator(np.random.PCG64(7)).integers(0, VOCABULARY, (2, 60)).astype(np.int32)
    source = open_source(str(model))
    with source.checkpoint:
        found = measure_quality(source, [result.path], windows, threads=1, runtime="llama.cpp")
    (artifact,) = found.artifacts
    assert artifact.divergence.kld == 0
    assert artifact.divergence.same_top == 1
    assert artifact.notes == ()
    assert 0 < found.noise.kld < 1e-10
    assert artifact.runtime is not None
    assert artifact.runtime.explained
    assert artifact.runtime.rounding.kld < 2e-6
