"""The full product behind test_byte_oracle.py: every tiny model and level, with and without importance, at row lengths
of 256 and at odd ones where fallbacks decide.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_quantize.formats.gguf.levels import LEVELS

from .test_byte_oracle import NEED_IMPORTANCE, NEWER, compare_pipeline, wide_model
from .tiny_models import TINY, make_tiny

pytestmark = pytest.mark.heavy


@pytest.mark.parametrize("rows", ["wide", "odd"])
@pytest.mark.parametrize("importance", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("variant", TINY)
def test_every_level_of_every_model(variant: str, importance: bool, rows: str, tmp_path: Path) -> None:
    model = wide_model(variant, tmp_path / "model") if rows == "wide" else make_tiny(variant, tmp_path / "model")
    levels = [level for level in LEVELS if level not in NEWER and (importance or level not in NEED_IMPORTANCE)]
    base = "BF16" if variant.startswith("gemma4") else "F32"
    compared = compare_pipeline(model, levels, tmp_path / "out", importance=importance, base=base)
    if rows == "wide":
        assert compared == levels
    assert {"F32", "F16", "BF16"} <= set(compared)
