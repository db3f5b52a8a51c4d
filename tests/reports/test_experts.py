"""The picture of what experts saw: a square for each, blue where that was too little, darker the more it was."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from llm_quantize.api import calibrate
from llm_quantize.calibration.imatrix import TapCoverage
from llm_quantize.errors import UsageError
from llm_quantize.options import CalibrationOptions
from llm_quantize.reports.experts import picture
from tests.tiny_models import make_tiny

SQUARE = "{http://www.w3.org/2000/svg}rect"


def squares(text: str) -> dict[str, str]:
    """{title: colour} of everything that has one."""
    found = {}
    for square in ElementTree.fromstring(text).iter(SQUARE):
        title = square.find("{http://www.w3.org/2000/svg}title")
        if title is not None and title.text:
            found[title.text] = square.attrib["fill"]
    return found


def test_a_square_for_each_expert_and_colours_by_tokens() -> None:
    rows = [TapCoverage("a", 1, (0, 15, 16, 400), (0, 1)), TapCoverage("b", 2, (20, 9000, 3, 300), (2,))]
    found = squares(picture("a <model> & more", rows, 16))
    assert len(found) == 8
    none, few, least, some = (
        found[f"layer 1, expert {index}: {tokens} tokens"] for index, tokens in enumerate((0, 15, 16, 400))
    )
    assert len({none, few, least, some}) == 4
    assert found["layer 2, expert 2: 3 tokens"] == few
    assert found["layer 2, expert 0: 20 tokens"] == least
    most = found["layer 2, expert 1: 9.00 K tokens"]
    lightness = [int(colour[1:3], 16) for colour in (least, some, most)]
    assert lightness == sorted(lightness, reverse=True)
    assert len(set(lightness)) == 3


def test_all_alike_and_a_minimum_of_none() -> None:
    assert len(set(squares(picture("m", [TapCoverage("a", 0, (7, 7), ())], 0)).values())) == 1
    assert len(squares(picture("m", [TapCoverage("a", 0, (0, 0), ())], 0))) == 2
    assert len(squares(picture("m", [TapCoverage("a", 0, (5,) * 512, (0,))], 9))) == 512


def test_a_calibration_of_experts_is_drawn_and_told(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The sea was calm and the night was long. " * 200)
    chosen = CalibrationOptions(data=(str(text),), samples=2, length=32, expert_minimum=0)
    model = make_tiny("qwen3_moe", tmp_path / "model")
    result = calibrate(model, tmp_path / "experts.svg", options=chosen)
    layers = sorted({row.block for row in result.experts})
    assert [row.block for row in result.experts] == layers
    assert all(sum(row.tokens) == 2 * 32 * 2 for row in result.experts)
    drawn = squares((tmp_path / "experts.svg").read_text())
    assert len(drawn) == sum(len(row.tokens) for row in result.experts)
    assert [one["tokens"] for one in result.to_dict()["experts"]] == [list(row.tokens) for row in result.experts]
    least = min(min(row.tokens) for row in result.experts)
    assert any(line.startswith(f"experts saw {least:,} to ") for line in result.sentences())
    assert sum(line.startswith("layer ") for line in result.sentences(in_full=True)) == len(layers)
    with pytest.raises(UsageError, match="no experts to draw"):
        calibrate(make_tiny("llama", tmp_path / "dense"), tmp_path / "dense.svg", options=chosen)
