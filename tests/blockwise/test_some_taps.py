"""Blocks of which only some inputs matter: matrices left out, or finished by an earlier run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm_quantize.blockwise.run import Matrices
from tests.blockwise.tiny import matrices, options, run, write_text
from tests.tiny_models import make_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("model") / "llama")


@pytest.mark.parametrize("inputs", ["sequential", "block", "source"])
def test_matrices_left_out(model: Path, tmp_path: Path, inputs: str) -> None:
    chosen = options(write_text(tmp_path), inputs=inputs, ignore=("down_proj$",), group_size=32)
    _, manifest = run(model, tmp_path / "out", chosen, "gptq", "4bit")
    found = matrices(manifest)
    assert found
    assert not any("down_proj" in name for name in found)
    assert all(entry["tokens"] == 96 for entry in found.values())


@pytest.mark.parametrize("finished", [1, 4, 6])
def test_a_block_half_done(model: Path, tmp_path: Path, finished: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = options(write_text(tmp_path), inputs="block", group_size=32)
    _, undisturbed = run(model, tmp_path / "whole", chosen, "gptq", "4bit")
    write, calls = Matrices.write, []

    def failing(self: Matrices, *arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) > finished:
            raise OSError("power lost")
        write(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Matrices, "write", failing)
        with pytest.raises(OSError, match="power lost"):
            run(model, tmp_path / "stopped", chosen, "gptq", "4bit")
    _, resumed = run(model, tmp_path / "stopped", chosen, "gptq", "4bit")
    assert resumed == undisturbed
