"""What is legal but probably not meant is said: names, splits, importance matrices, levels for other models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llm_quantize import pipeline
from llm_quantize.errors import UsageError
from llm_quantize.formats.gguf.levels import Overrides
from llm_quantize.pipeline import Options
from tests.oracles.legacy_imatrix import write_gguf_imatrix


def warnings(model: Path, level: str, **settings: object) -> list[str]:
    name = settings.pop("name", None)
    (planned,) = pipeline.plan(str(model), levels=[level], name=name, options=Options(**settings))  # type: ignore[arg-type]
    return list(planned.warnings)


def test_an_ordinary_plan_warns_of_nothing(demo_model: Path) -> None:
    assert warnings(demo_model, "Q4_K_M") == []
    assert warnings(demo_model, "Q4_K_M", name="mine", split_max_size=2_000_000) == []


@pytest.mark.parametrize(
    ("level", "settings", "text"),
    [
        ("MXFP4_MOE", {}, "no expert tensors"),
        ("TQ2_0", {}, "ternary"),
        ("Q2_0", {}, "ternary"),
        ("Q1_0", {}, "one bit"),
        ("Q8_0", {"overrides": Overrides(tensor_types=(("attn_q", "nvfp4"),))}, "whole tensors ("),
        ("Q8_0", {"split_max_size": 100_000}, "token_embd.weight alone takes 557056 bytes"),
        ("Q8_0", {"name": "../evil name"}, "the output is called evil-name"),
    ],
)
def test_what_is_probably_not_meant(demo_model: Path, level: str, settings: dict, text: str) -> None:
    assert any(text in warning for warning in warnings(demo_model, level, **settings))


def test_an_importance_matrix_that_covers_a_part(demo_model: Path, tmp_path: Path) -> None:
    names = [f"blk.{layer}.attn_q.weight" for layer in range(4)] + ["blk.77.attn_q.weight"]
    file = tmp_path / "part.gguf"
    write_gguf_imatrix(file, {name: (np.ones((1, 256), np.float32), np.ones(1, np.float32)) for name in names})
    found = warnings(demo_model, "Q4_K_S", imatrix=file)
    assert any("covers 4 of the 42 tensors" in text and "blk.0.attn_k.weight" in text for text in found)
    assert any("names 1 tensors not in this model, such as blk.77.attn_q.weight" in text for text in found)


@pytest.mark.parametrize(
    ("key", "changed"),
    [
        ("pure", Options(overrides=Overrides(pure=True))),
        ("output_type", Options(overrides=Overrides(output_type="q8_0"))),
        ("embedding_type", Options(overrides=Overrides(embedding_type="q8_0"))),
        ("tensor_types", Options(overrides=Overrides(tensor_types=(("attn_q", "q8_0"),)))),
        ("split_max_size", Options(split_max_size=2_000_000)),
        ("nonfinite", Options(nonfinite="zero")),
    ],
)
def test_every_choice_is_part_of_the_identity(demo_model: Path, key: str, changed: Options) -> None:
    """An unfinished run with another choice is refused by that name."""
    plain, other = (pipeline.plan(str(demo_model), levels=["Q4_K_M"], options=o)[0] for o in (Options(), changed))
    assert plain.identity[key] != other.identity[key]
    assert plain.digest != other.digest


def test_an_empty_model_name_is_not_the_current_directory(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo_model)
    with pytest.raises(UsageError, match="no such model directory"):
        pipeline.plan("", levels=["Q8_0"])
