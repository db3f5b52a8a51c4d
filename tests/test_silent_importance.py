"""Importance that says nothing of a tensor, an expert or some channels: nothing is erased, it is named, the run ends
in 20."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_quantize import pipeline
from llm_quantize.artifacts.manifest import read_manifest
from llm_quantize.artifacts.result import ArtifactResult
from llm_quantize.artifacts.verify import verify
from llm_quantize.cli import run
from llm_quantize.io.artifact_paths import manifest_path
from llm_quantize.io.imatrix_file import PARTLY, UNREACHED, ZERO
from llm_quantize.models.opening import open_source
from llm_quantize.pipeline import Options
from tests.oracles.legacy_imatrix import random_entry, write_gguf_imatrix, write_legacy
from tests.tiny_models import make_tiny, row_lengths_of_256

Entries = dict[str, tuple[np.ndarray, np.ndarray]]
DOWN, GATE = "blk.0.ffn_down.weight", "blk.1.ffn_gate.weight"
EXPERTS = "blk.0.ffn_up_exps.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen2", tmp_path_factory.mktemp("model") / "tiny", **row_lengths_of_256("qwen2"))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen3_moe", tmp_path_factory.mktemp("model") / "tiny", **row_lengths_of_256("qwen3_moe"))


def entries(model: Path) -> Entries:
    """Importance of every matrix, none of it zero."""
    chance = np.random.default_rng(5)
    with (source := open_source(str(model))).checkpoint:
        shapes = {o.name: o.shape for o in source.tensors.outputs if len(o.shape) > 1 and o.name.startswith("blk.")}
    return {name: random_entry(chance, int(np.prod(shape[:-2])), shape[-1]) for name, shape in shapes.items()}


def make(model: Path, directory: Path, level: str, found: Entries) -> ArtifactResult:
    directory.mkdir(exist_ok=True)
    imatrix = write_gguf_imatrix(directory / "i.gguf", found)
    (result,) = pipeline.quantize(
        str(model), levels=[level], output_dir=directory, options=Options(imatrix=imatrix, threads=1)
    )
    return result


def errors(model: Path, result: ArtifactResult) -> Mapping[str, float | None]:
    outcome = verify(result.path, source=str(model))
    assert outcome.ok
    return {check.name: check.relative_error for check in outcome.tensors}


def unit_hashes(result: ArtifactResult, name: str) -> list[str]:
    manifest: Mapping[str, Any] = read_manifest(manifest_path(result.path)) or {}
    (entry,) = [entry for entry in manifest["tensors"] if entry["name"] == name]
    return [unit["sha256"] for unit in entry["units"]]


@pytest.mark.parametrize("level", ["Q4_K_M", "Q2_K", "IQ2_M", "Q4_0", "IQ3_XXS", "IQ1_S"])
def test_an_entry_of_zeros_erases_nothing_and_is_named(model: Path, tmp_path: Path, level: str) -> None:
    sound = entries(model)
    usual = errors(model, make(model, tmp_path / "sound", level, sound))
    silent = sound | {name: (np.zeros_like(sound[name][0]), sound[name][1]) for name in (DOWN, GATE)}
    result = make(model, tmp_path / "silent", level, silent)
    assert result.fallbacks == {ZERO: [DOWN, GATE]}
    found = errors(model, result)
    for name in (DOWN, GATE):
        assert (found[name] or 0) < 1.3 * (usual[name] or 0)
    assert result.degradations() == [f"{DOWN} and 1 more: {ZERO}"]
    manifest = read_manifest(manifest_path(result.path)) or {}
    assert manifest["fallbacks"] == {ZERO: [DOWN, GATE]}


def test_what_is_not_silent_has_the_bytes_that_it_had_and_the_rest_those_without_importance(
    model: Path, tmp_path: Path
) -> None:
    sound = entries(model)
    result = make(model, tmp_path / "sound", "Q4_K_S", sound)
    silent = make(model, tmp_path / "silent", "Q4_K_S", sound | {DOWN: (np.zeros_like(sound[DOWN][0]), sound[DOWN][1])})
    without = make(model, tmp_path / "without", "Q4_K_S", {name: one for name, one in sound.items() if name != DOWN})
    assert unit_hashes(silent, DOWN) == unit_hashes(without, DOWN) != unit_hashes(result, DOWN)
    assert unit_hashes(silent, GATE) == unit_hashes(result, GATE)


def test_whole_blocks_of_zeros_are_named_and_kept(model: Path, tmp_path: Path) -> None:
    sound = entries(model)
    sound[DOWN][0][:, 64:128] = 0
    result = make(model, tmp_path, "Q3_K_S", sound)
    assert list(result.fallbacks) == [PARTLY]
    assert (errors(model, result)[DOWN] or 0) < 0.2


def test_experts_are_named_by_number(mixture: Path, tmp_path: Path) -> None:
    found = entries(mixture)
    found[EXPERTS][0][1] = 0
    found[EXPERTS][1][2] = 0  # llama.cpp counts no token of it
    result = make(mixture, tmp_path, "Q4_K_S", found)
    assert dict(result.fallbacks) == {ZERO: [f"{EXPERTS} (expert 1)"], UNREACHED: [f"{EXPERTS} (expert 2)"]}
    assert (errors(mixture, result)[EXPERTS] or 0) < 0.1


def test_the_run_ends_in_20_says_it_in_a_line_and_does_so_again(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = entries(model)
    values = [(name, 1, sums.reshape(-1) * (name not in (DOWN, GATE))) for name, (sums, _) in found.items()]
    imatrix = write_legacy(tmp_path / "i.dat", [(name, calls, v.astype(np.float32)) for name, calls, v in values])
    command = ["quantize", str(model), "gguf", "-q", "Q4_K_M", "--imatrix", str(imatrix), "-o", str(tmp_path / "out")]
    assert run(command) == 20
    told = capfd.readouterr()
    lines = [line for line in (told.out + told.err).splitlines() if ZERO in " ".join(line.split())]
    assert [line.split(":")[0].strip() for line in lines] == ["degraded", "warning"]  # the result, and the plan
    assert f"{DOWN} and 1 more" in lines[0]
    assert run(command) == 20  # already complete
    capfd.readouterr()
    assert run([*command, "--json", "--strict"]) == 9
    facts = json.loads(capfd.readouterr().out)
    assert facts["artifacts"][0]["fallbacks"] == {ZERO: [DOWN, GATE]}
    assert run([*command[:-2], "--dry-run"]) == 0
    assert ZERO in " ".join(capfd.readouterr().out.split())


def test_an_artifact_that_was_made_before_zeros_were_told_is_another(model: Path, tmp_path: Path) -> None:
    """Its identity differs, so that a command does not find erased tensors complete, or go on with them."""
    sound = entries(model)
    assert "importance_gaps" not in make(model, tmp_path / "sound", "Q4_K_S", sound).plan.identity
    sound[DOWN][0][:] = 0
    assert "importance_gaps" in make(model, tmp_path / "silent", "Q4_K_S", sound).plan.identity
