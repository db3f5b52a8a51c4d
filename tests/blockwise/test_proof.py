"""What a method made is proved before it is written: a run never ends in 0 with what ``verify --source`` refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_quantize.artifacts.verify import verify
from llm_quantize.cli import run as command
from llm_quantize.grids import grid_type
from llm_quantize.methods import gptq
from llm_quantize.methods.gptq import Solution, factorize, losses, solve
from llm_quantize.methods.gptq_options import GptqOptions

from ..tiny_models import make_tiny
from .tiny import write_text

WAYS = {
    "gguf": ("gguf -q Q4_0 --method gptq", "blk.0.ffn_down.weight"),
    "gptq": ("gptq -q 4bit --group-size 32", "model.layers.0.mlp.down_proj"),
    "compressed-tensors": ("compressed-tensors -q 4bit --group-size 32", "model.layers.0.mlp.down_proj"),
}


def _spoilt(found: Solution) -> Solution:
    """The same grid, and codes from its other end; what was lost is told as it was."""
    return replace(found, codes=int(found.codes.max()) - found.codes)


@pytest.mark.parametrize("way", WAYS)
def test_codes_that_break_the_promise_end_the_run(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = make_tiny("qwen2", tmp_path / "model"), tmp_path / "out"
    words, name = WAYS[way]
    text = ["--calibration-data", str(write_text(tmp_path)), "--calibration-samples", "2", "--sequence-length", "48"]
    made = ["quantize", str(model), *words.split(), *text, "--threads", "1", "-o", str(out)]
    wide = 96  # columns of down_proj alone

    def broken(weight: torch.Tensor, *more: Any) -> Solution:
        found = solve(weight, *more)
        return _spoilt(found) if weight.shape[1] == wide else found

    with monkeypatch.context() as patch:
        patch.setattr(gptq, "solve", broken)
        assert command(made) == 13
    told = " ".join(capsys.readouterr().err.split())
    assert f"tensor: {name}" in told
    assert "neither near its weights nor better than plain rounding" in told
    assert "in rows 0 to 63" in told
    assert [path.name for path in out.iterdir() if not path.name.endswith((".partial", ".journal"))] == []
    assert command(made) in (0, 20), capsys.readouterr().err  # goes on from what was finished
    (artifact,) = [path for path in out.iterdir() if path.is_dir() or path.suffix == ".gguf"]
    assert verify(artifact, source=str(model)).ok


def test_a_loss_told_anew_is_the_solvers() -> None:
    random = torch.Generator().manual_seed(1)
    inputs = torch.randn(500, 64, generator=random)
    weight = torch.randn(40, 64, generator=random)
    drift = 0.1 * torch.randn(64, 64, generator=random)
    factor = replace(factorize(inputs.T @ inputs, 500, GptqOptions()), correction=drift)
    found = solve(weight, grid_type("int4_g32"), factor, GptqOptions())
    assert torch.allclose(losses(weight, found.grid, found.codes, factor), found.loss, rtol=1e-4)
    spoilt = _spoilt(found)
    assert bool((losses(weight, spoilt.grid, spoilt.codes, factor) > found.plain_loss).all())
