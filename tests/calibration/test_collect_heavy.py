"""Calibration under a limit of address space several times smaller than the checkpoint, and of every family."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llm_quantize.calibration import choose
from llm_quantize.models.opening import open_source
from llm_quantize.options import CalibrationOptions
from llm_quantize.pipeline import Options

from ..faults.forking import QUIET_MACHINE
from ..faults.tiny_llama import write_sparse_llama
from ..tiny_models import STREAMED, make_tiny

pytestmark = pytest.mark.heavy

LIMIT = 1_500_000_000


def _run(model: Path, root: Path, text: Path, *more: str, limit: int = LIMIT) -> tuple[int, dict[str, Any], str]:
    words = [sys.executable, "-m", "llm_quantize", "--json", "analyze", "importance", str(model), "-o"]
    words += [str(root / "i.gguf"), "--calibration-data", str(text), "--calibration-samples", "4", *more]
    done = subprocess.run(
        [*words, "--sequence-length", "64", "--threads", "2"],
        capture_output=True,
        text=True,
        env={**os.environ, **QUIET_MACHINE, "LLM_QUANTIZE_CACHE": str(root / "cache")},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    return done.returncode, json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}, done.stderr


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text("the cat sat on a mat by the river " * 200)
    return file


def test_a_checkpoint_four_times_larger_than_the_limit(tmp_path: Path, text: Path) -> None:
    model = write_sparse_llama(tmp_path / "model", layers=48, hidden=2048, inner=8192, key_value_heads=4)
    assert (model / "model.safetensors").stat().st_size > 3.5 * LIMIT
    code, result, errors = _run(model, tmp_path, text)
    assert code == 0, errors
    assert result["memory_peak"] <= result["memory_planned"]
    assert result["memory_peak"] < LIMIT
    code, error, _ = _run(model, tmp_path / "refused", text, "--collect", "imatrix,hessian")
    assert code == 5
    assert "do not fit the memory limit" in error["what"]


@pytest.mark.parametrize("variant", sorted(STREAMED))
def test_foreseen_names_are_those_of_every_family(variant: str, text: Path, tmp_path: Path) -> None:
    options = Options(
        calibration=CalibrationOptions(data=(str(text),), samples=2, length=64, expert_minimum=0), calibrate=True
    )
    source = open_source(str(make_tiny(variant, tmp_path / "model")))
    with source.checkpoint:
        foreseen = choose.foresee(source, "gguf", ["Q4_K_M"], options)
        real = choose.collected(source, "gguf", options, lambda event: None)
        rows = choose.rows_of(source, real)
    assert isinstance(foreseen, choose.Foreseen)
    assert foreseen.names == set(real.names) == rows.keys()
