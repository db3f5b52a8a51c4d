"""The claim of ``--refine``, on the built-in trained model: at the same bytes, less is lost on text not seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llm_quantize.calibration.tokens import TextTokenizer
from llm_quantize.evaluation.quality import measure_quality
from llm_quantize.measures.perplexity import cut_windows
from llm_quantize.models.opening import open_source
from llm_quantize.options import CalibrationOptions, MethodOptions
from llm_quantize.pipeline import Options

from .tiny import run


@pytest.mark.heavy
def test_refined_blocks_lose_less_on_text_not_seen(demo_model: Path, tmp_path: Path) -> None:
    paths = []
    for steps in (0, 64):
        options = Options(
            method=MethodOptions(method="gptq", refinement=steps), calibration=CalibrationOptions(samples=64)
        )
        result, _ = run(demo_model, tmp_path / str(steps), options, "gptq", "2bit")
        paths.append(result.path)
    sizes = [(path / "model.safetensors").stat().st_size for path in paths]
    assert sizes[0] == sizes[1]
    source = open_source(str(demo_model))
    with source.checkpoint:
        tokenizer = TextTokenizer(source)
        texts = sorted((demo_model.parent / "texts").glob("*.txt"))
        assert len(texts) == 2
        held_out = np.concatenate(
            [
                cut_windows(tokenizer.encode(text.read_text(encoding="utf-8")), 256, bos=tokenizer.bos, limit=6)
                for text in texts
            ]
        )
        quality = measure_quality(source, paths, held_out)
    (pair,) = (pair for pair in quality.pairs if (pair.first, pair.second) == (0, 1))
    assert pair.kld_ratio - 3 * pair.kld_ratio_sem > 1.0, pair
