"""What quantize ends with 0, verify finds sound: by the layer's loss where feedback moved weights far, by the function
where a transform moved scales."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from llm_quantize import kernels
from llm_quantize.artifacts.deviation import Deviation, Made, error_bound, judge_part, judge_whole, made_how
from llm_quantize.artifacts.manifest import manifest_bytes, read_manifest
from llm_quantize.artifacts.verification import TensorCheck
from llm_quantize.artifacts.verify import verify
from llm_quantize.cli import run as command
from llm_quantize.io.artifact_paths import manifest_path
from llm_quantize.options import MethodOptions

from ..blockwise.tiny import options, run, write_text
from ..tiny_models import make_tiny

FACTOR = 30_000


@pytest.fixture(scope="module")
def outlier(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model with one channel of each feed-forward block far larger than the others: the same function."""
    folder = Path(shutil.copytree(demo_model, tmp_path_factory.mktemp("outlier") / "outlier"))
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("up_proj.weight")]:
        tensors[name][7] *= FACTOR
        tensors[name.replace("up_proj", "down_proj")][:, 7] /= FACTOR
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def made(outlier: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file whose weights are further from the source than any bound on rounding."""
    place = tmp_path_factory.mktemp("made")
    chosen = options(place, samples=8, length=256, threads=2, correction=1.0)
    chosen = replace(chosen, calibration=replace(chosen.calibration, data=()))
    result, _ = run(outlier, place, chosen, "gguf", "Q4_K_M")
    assert not result.degradations()
    return result.path


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """The file and its manifest, which a test may change."""
    for path in made.parent.glob(f"{made.name}*"):
        shutil.copyfile(path, tmp_path / path.name)
    return tmp_path / made.name


def _beyond(artifact: Path, source: Path) -> list[str]:
    return [
        check.name
        for check in verify(artifact, source=str(source)).tensors
        if check.relative_error is not None and check.relative_error > error_bound(check.type, feedback=True)
    ]


def test_a_correction_that_text_held_back_decided_moves_no_weight_far(outlier: Path, tmp_path: Path) -> None:
    chosen = options(tmp_path, samples=8, length=256, threads=2)
    chosen = replace(chosen, calibration=replace(chosen.calibration, data=()))
    result, manifest = run(outlier, tmp_path, chosen, "gguf", "Q4_K_M")
    shares = [entry["correction"]["share"] for entry in manifest["matrices"] if "correction" in entry]
    assert 0 < min(filter(None, shares)) < 0.9
    assert _beyond(result.path, outlier) == []


def test_weights_that_feedback_moved_far_are_judged_by_the_layers_loss(
    outlier: Path, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = verify(made, source=str(outlier))
    assert outcome.ok, outcome.all_problems()
    far = _beyond(made, outlier)
    assert far
    assert all(name.endswith("ffn_down.weight") for name in far)
    assert outcome.notes[0].startswith(f"{len(far)} matrices")
    assert command(["verify", str(made), "--source", str(outlier)]) == 0
    assert outcome.notes[0] in capsys.readouterr().out
    assert command(["--json", "verify", str(made), "--source", str(outlier)]) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == outcome.notes


def test_of_another_source_the_loss_says_nothing(outlier: Path, made: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(outlier, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    (first, *others) = _beyond(made, outlier)
    tensors[f"model.layers.{first.split('.')[1]}.mlp.down_proj.weight"][3] *= 1.01
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert {first, *others} == set(_beyond(made, other))
    bad = [check.name for check in verify(made, source=str(other)).tensors if check.problems]
    assert bad == [first]


@pytest.mark.parametrize("change", ["no manifest", "larger than plain rounding's", "no number", "absent"])
def test_without_a_loss_that_was_kept_the_bound_holds(outlier: Path, copy: Path, change: str) -> None:
    manifest = read_manifest(manifest_path(copy))
    assert manifest is not None
    if change == "no manifest":
        manifest_path(copy).unlink()
        assert verify(copy, source=str(outlier)).notes == []  # GGUF without a manifest is taken for rounded
        assert not verify(copy, source=str(outlier)).ok
        return
    entry: dict[str, Any]
    for entry in manifest["matrices"]:
        if change == "absent":
            del entry["loss"]
        else:
            entry["loss"] = "0" if change == "no number" else entry["plain_loss"] * 1.001
    manifest_path(copy).write_bytes(manifest_bytes(manifest))
    bad = [check.name for check in verify(copy, source=str(outlier)).tensors if check.problems]
    assert bad == _beyond(copy, outlier)


def test_damaged_bytes_are_found_whatever_the_manifest_promises(outlier: Path, copy: Path) -> None:
    data = bytearray(copy.read_bytes())
    data[-100] ^= 0x10
    copy.write_bytes(data)
    outcome = verify(copy, source=str(outlier))
    assert [check.hash for check in outcome.tensors].count("mismatch") == 1
    assert not outcome.ok


def test_any_error_is_judged_so() -> None:
    """The error of an outlier model with a strong correction was 13; rounded weights have no such excuse."""
    far = Deviation()
    far.error, far.norm = 169.0, 1.0
    for made, keeps, ok in ((True, True, True), (True, False, False), (False, True, False)):
        for judge in (judge_part, lambda check, one, _, how, kept: judge_whole(check, [one], how, kept)):
            check = TensorCheck("x", "q4_k")
            judge(check, far, "q4_k", Made(feedback=made), lambda _, kept=keeps: kept)
            assert check.relative_error == 13.0
            assert (not check.problems) == ok


def test_scales_of_matrices_of_one_row_are_taken_out(tmp_path: Path) -> None:
    """A gate of one row has no rows to find a scale from: the artifact's own norms say it."""
    model = make_tiny("qwen2_moe", tmp_path / "model")
    chosen = options(write_text(tmp_path), samples=3, group_size=16)
    result, _ = run(model, tmp_path / "out", chosen, "awq", "4bit")
    outcome = verify(result.path, source=str(model))
    assert outcome.ok, outcome.all_problems()
    gates = [check for check in outcome.tensors if check.name.endswith("shared_expert_gate.weight")]
    assert any(0 < (check.relative_error or 0) < 0.004 for check in gates)
    assert any("of the function" in note for note in outcome.notes)
    packed = [check.relative_error or 0 for check in outcome.tensors if check.name.endswith("qweight")]
    assert 0.02 < max(packed) < error_bound("int4_g16_asym")
    # a gate that is not the source's stays what it is
    tensors = load_file(result.path / "model.safetensors")
    tensors[gates[-1].name][0, :8] *= 1.2
    save_file(tensors, result.path / "model.safetensors", metadata={"format": "pt"})
    manifest_path(result.path).unlink()
    bad = [check.name for check in verify(result.path, source=str(model)).tensors if check.problems]
    assert bad == [gates[-1].name]


@pytest.mark.parametrize("qtype", ["q5_k", "q4_k", "q5_1", "q4_1", "q3_k", "q2_k", "iq4_xs", "iq3_s", "iq2_s"])
def test_importance_that_few_channels_have_is_no_damage(qtype: str) -> None:
    random = np.random.default_rng(3)
    weights = random.standard_normal((32, 1024)).astype(np.float32)
    importance = np.full(1024, 1e-6, np.float32)
    importance[::37] = 1e3
    found = Deviation()
    packed = kernels.quantize(qtype, weights, importance)
    found.add(kernels.dequantize(qtype, packed, weights.shape[1]), weights)
    check = TensorCheck("x", qtype)
    judge_part(check, found, qtype, made_how({"identity": {"imatrix": "ab" * 32}}, Made()))
    assert not check.problems
    assert error_bound(qtype) <= error_bound(qtype, weighed=True) < 1


def test_a_file_says_itself_that_channels_were_weighed(outlier: Path, tmp_path: Path) -> None:
    """Its manifest may be absent; other tools write none."""
    chosen = replace(options(tmp_path, samples=4, length=128), method=MethodOptions(), calibrate=True)
    chosen = replace(chosen, calibration=replace(chosen.calibration, data=()))
    result, manifest = run(outlier, tmp_path, chosen, "gguf", "Q5_K_M")
    assert made_how(manifest, Made()) == Made(weighed=True)
    told: list[Any] = []
    for _ in range(2):
        outcome = verify(result.path, source=str(outlier))
        assert outcome.ok, outcome.all_problems()
        told.append([check.relative_error for check in outcome.tensors])
        manifest_path(result.path).unlink(missing_ok=True)
    assert told[0] == told[1]
