"""What recommend says of formats that it does not rank: sizes as planned, or why there are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_quantize import data
from llm_quantize.advice.other_formats import directories_note
from llm_quantize.formats.packed_formats import PACKED
from llm_quantize.pipeline import open_source, plan
from llm_quantize.reports.numbers import bytes_text
from tests.tiny_models import make_tiny


def test_sizes_are_those_of_the_plans() -> None:
    model = str(data.demo_model())
    source = open_source(model)
    with source.checkpoint:
        note = directories_note(source)
    assert len(PACKED) == 5
    for format, level in ((form.NAME, form.EXAMPLE) for form in PACKED.values()):
        (planned,) = plan(model, format, levels=[level])
        assert f"{format} -q {level}: {bytes_text(planned.size)}" in note


def test_a_model_that_the_grids_do_not_divide(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    make_tiny("llama", tmp_path / "32", intermediate_size=96)
    make_tiny("llama", tmp_path / "8", intermediate_size=200)
    for size, refused in (("32", ["bitsandbytes -q NF4"]), ("8", [f"{form.NAME} -q" for form in PACKED.values()])):
        source = open_source(str(tmp_path / size))
        with source.checkpoint:
            note = directories_note(source)
        assert note.count("cannot be made of this model") == len(refused)
        assert all(name in note for name in refused)
