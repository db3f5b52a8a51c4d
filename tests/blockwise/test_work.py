"""What a run does not do twice: passes counted by the attention that they run, and the same bytes as with all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llm_quantize.blockwise.estimate import HELD_OUT_WINDOWS
from llm_quantize.streams import network

from ..faults.forking import hashes
from ..tiny_models import make_tiny
from .tiny import options, run, write_text

WINDOWS, BLOCKS = 5, 2


def attended(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch, text: Path, **more: Any) -> int:
    """How often attention was computed over real numbers in a run."""
    real, count = torch.nn.functional.scaled_dot_product_attention, 0

    def counted(query: torch.Tensor, *positional: Any, **named: Any) -> torch.Tensor:
        nonlocal count
        count += query.device.type != "meta"
        return real(query, *positional, **named)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
        run(model, out, options(text, samples=WINDOWS, length=40, group_size=32, **more), "gptq", "4bit")
    return count


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("llm_quantize.blockwise.inputs.CHUNK_TOKENS", 80)  # windows come in several chunks
    return make_tiny("llama", tmp_path / "model")


@pytest.mark.parametrize("more", [{}, {"correction": 1.0}, {"transform": "awq"}], ids=str)
def test_attention_is_computed_once_for_each_stream(
    more: dict[str, Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = write_text(tmp_path)
    found = attended(model, tmp_path / "out", monkeypatch, text, **more)
    everywhere = WINDOWS + HELD_OUT_WINDOWS
    searched = WINDOWS * BLOCKS if more.get("transform") else 0  # what the transform looks at
    assert found == 2 * everywhere * BLOCKS + searched
    monkeypatch.setattr(network, "find_endings", lambda *_: ())
    again = attended(model, tmp_path / "whole", monkeypatch, text, **more)
    assert again > found
    assert hashes(tmp_path / "whole") == hashes(tmp_path / "out")


def test_the_source_s_own_inputs_are_seen_on_the_way(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pass: nothing follows the last block, and no text is held out where nothing is compared."""
    text = write_text(tmp_path)
    found = attended(model, tmp_path / "out", monkeypatch, text, inputs="source")
    assert found == WINDOWS * BLOCKS
