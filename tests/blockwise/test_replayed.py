"""Skipping what was computed before changes no byte: columns in an order of their own, rescaled channels, experts that
share the input of their router."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llm_quantize.blockwise.inputs import FullInputs
from tests.blockwise.tiny import options, run, write_text
from tests.tiny_models import make_tiny


@pytest.mark.parametrize(
    ("variant", "format", "level"),
    [("qwen3_5_text", "gguf", "Q4_0"), ("qwen2_moe", "awq", "4bit"), ("llama", "compressed-tensors", "W4A16")],
)
def test_the_same_bytes_as_without(
    variant: str, format: str, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny(variant, tmp_path / "model", dtype="float32")
    size = {} if format == "gguf" else {"group_size": 16}
    chosen = options(write_text(tmp_path), samples=3, **size)
    leave, left = FullInputs.leave, set[str]()

    def noting(self: FullInputs, tap: str, windows: Sequence[int], inputs: Any) -> None:
        left.add(tap)
        leave(self, tap, windows, inputs)

    monkeypatch.setattr(FullInputs, "leave", noting)
    _, quick = run(model, tmp_path / "quick", chosen, format, level)
    assert left
    monkeypatch.setattr(FullInputs, "leave", lambda *_: None)
    _, whole = run(model, tmp_path / "whole", chosen, format, level)
    assert quick["matrices"] == whole["matrices"]
    assert quick["files"] == whole["files"]
