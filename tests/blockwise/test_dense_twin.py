"""A whole run against its dense twin: the inputs of every matrix, the correction, the codes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_quantize.artifacts.opening import open_decoded
from llm_quantize.formats.table import FORMATS
from llm_quantize.grids import grid_type
from llm_quantize.methods.gptq_options import GptqOptions
from llm_quantize.models.opening import open_source

from ..oracles.dense_blocks import dense_run
from ..tiny_models import make_tiny
from .tiny import ids_of, options, run, write_text

STAGES: dict[str, Any] = {"refit": False, "compare": False, "sweeps": 1, "refine": False}
SAFE = 1e-3  # rows with a choice closer than this share of a step may go either way in float32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("twin") / "model", dtype="float32")


@pytest.mark.parametrize(
    ("format", "level", "inputs", "correction"),
    [
        ("gguf", "Q4_0", "sequential", 1.0),
        ("gguf", "Q4_0", "sequential", None),
        ("gptq", "4bit", "block", None),
        ("gguf", "Q4_1", "block", 0.5),
        ("gguf", "IQ4_NL", "sequential", 0.0),
        ("gguf", "Q5_0", "source", 0.0),
        ("compressed-tensors", "W4A16", "sequential", 1.0),
        ("gptq", "4bit", "block", 1.0),
    ],
)
def test_a_run_gives_the_codes_of_its_dense_twin(
    model: Path, tmp_path: Path, format: str, level: str, inputs: str, correction: float | None
) -> None:
    group = {} if format == "gguf" else {"group_size": 32}
    chosen = options(
        write_text(tmp_path), samples=6, length=64, inputs=inputs, correction=correction, **STAGES, **group
    )
    result, _ = run(model, tmp_path / "out", chosen, format, level)
    stages = dataclasses.replace(GptqOptions(**STAGES), correction=correction)
    source = open_source(str(model))
    with source.checkpoint:
        ids = ids_of(source, chosen)
        kind = FORMATS[format].store(result.plan).grid_type(result.plan.matrices[0].qtype)
        artifact = open_decoded(source, result.path)
        decoded = {name: artifact.read(name).float().numpy() for name in artifact.names}
        artifact.close()
    agree, compared, rows = [], 0, 0
    for name, expected in dense_run(model, ids, decoded, kind, stages, inputs):
        found = decoded[name]
        # Where the search for a scale comes to two that are equally good, float32 sums may take the other.
        safe = (expected.margins > SAFE) & expected.on_grid(found)
        np.testing.assert_array_equal(found[safe], expected.values[safe], err_msg=name)
        agree.append((found == expected.values).mean())
        compared, rows = compared + int(safe.sum()), rows + len(safe)
    assert len(agree) == 14
    assert compared > 0.85 * rows
    assert np.mean(agree) > 0.99
    assert min(agree) > 0.95


def test_the_twin_is_able_to_differ(model: Path, tmp_path: Path) -> None:
    """What the comparison is worth: another correction, or inputs of another stage, leave hardly a row equal."""
    chosen = options(write_text(tmp_path), samples=6, length=64, **STAGES)
    result, _ = run(model, tmp_path / "out", chosen)
    source = open_source(str(model))
    with source.checkpoint:
        ids = ids_of(source, chosen)
        artifact = open_decoded(source, result.path)
        decoded = {name: artifact.read(name).float().numpy() for name in artifact.names}
        artifact.close()
    stages = GptqOptions(**STAGES)
    for inputs, correction in (("sequential", 0.9), ("block", None)):
        other = dataclasses.replace(stages, correction=correction)
        run_ = list(dense_run(model, ids, decoded, grid_type("q4_0"), other, inputs))
        equal = [(decoded[name] == expected.values).all(1).mean() for name, expected in run_[9:]]
        assert np.mean(equal) < 0.5
