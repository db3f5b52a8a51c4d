"""Verification of directories of plain weights: those of the safetensors format, and any other against its source."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_quantize.artifacts.verify import Verification, verify
from llm_quantize.cli import run
from llm_quantize.errors import MalformedInputError
from llm_quantize.io.safetensors_file import read_header
from llm_quantize.options import MethodOptions, Options
from llm_quantize.pipeline import quantize
from tests.tiny_models import make_tiny

NORM = "model.layers.1.input_layernorm.weight"
UP = "model.layers.0.mlp.up_proj.weight"
LEVELS = ("BF16", "F16", "F32")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {variant: make_tiny(variant, folder / variant) for variant in ("llama", "qwen3_moe", "gpt2", "gemma3")}


@pytest.fixture(scope="module")
def made(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """llama at every level, in several files."""
    options = Options(method=MethodOptions(shard_size=40_000))
    folder = tmp_path_factory.mktemp("made")
    results = quantize(str(models["llama"]), "safetensors", levels=LEVELS, output_dir=folder, options=options)
    return dict(zip(LEVELS, (result.path for result in results), strict=True))


@pytest.fixture
def copy(made: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda level: Path(shutil.copytree(made[level], tmp_path / level))


def holder(folder: Path, tensor: str) -> Path:
    return next(file for file in sorted(folder.glob("*.safetensors")) if tensor in read_header(file).tensors)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 64
    path.write_bytes(data)


def problems(outcome: Verification, name: str) -> str:
    (check,) = (one for one in outcome.tensors if one.name == name)
    return "; ".join(check.problems)


@pytest.mark.parametrize("level", LEVELS)
def test_a_sound_directory(models: dict[str, Path], made: dict[str, Path], level: str) -> None:
    outcome = verify(made[level], source=str(models["llama"]))
    assert outcome.ok, outcome.all_problems()
    assert outcome.has_manifest
    assert outcome.compared
    assert {check.hash for check in outcome.tensors} == {"ok"}
    assert {check.type for check in outcome.tensors} == {level.lower()}
    names = {name for file in models["llama"].glob("*.safetensors") for name in read_header(file).tensors}
    errors = {check.name: check.relative_error for check in outcome.tensors}
    assert errors.keys() == names
    assert None not in errors.values()
    assert set(errors.values()) == {0}  # float16 holds these weights of bfloat16 too


@pytest.mark.parametrize(("level", "least", "most"), [("BF16", 1e-3, 3e-3), ("F16", 1e-4, 4e-4), ("F32", 0, 0)])
def test_the_error_of_rounding_is_told(level: str, least: float, most: float, tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "wide", dtype="float32")
    (result,) = quantize(str(model), "safetensors", levels=[level], output_dir=tmp_path)
    outcome = verify(result.path, source=str(model))
    assert outcome.ok, outcome.all_problems()
    (check,) = (check for check in outcome.tensors if check.name == UP)
    assert check.relative_error is not None
    assert least <= check.relative_error <= most


@pytest.mark.parametrize("variant", ["qwen3_moe", "gpt2", "gemma3"])
def test_other_families_and_tensors_beside_the_map(models: dict[str, Path], variant: str, tmp_path: Path) -> None:
    results = quantize(str(models[variant]), "safetensors", levels=["F16"], output_dir=tmp_path)
    outcome = verify(results[0].path, source=str(models[variant]))
    assert outcome.ok, outcome.all_problems()
    assert [check.name for check in outcome.tensors if check.relative_error is None] == []


def test_any_directory_against_its_source(models: dict[str, Path], tmp_path: Path) -> None:
    model = models["llama"]
    outcome = verify(model, source=str(model))
    assert outcome.ok, outcome.all_problems()
    assert not outcome.has_manifest
    other = Path(shutil.copytree(model, tmp_path / "other"))
    values = load_file(other / "model.safetensors")
    values["model.layers.0.self_attn.rotary.position_ids"] = torch.arange(8)
    values[UP][3, 4] *= 1.5
    save_file(values, other / "model.safetensors", {"format": "pt"})
    assert verify(other).ok
    outcome = verify(other, source=str(model))
    assert "not made from this reference" in outcome.problems[0]
    del values["model.layers.0.self_attn.rotary.position_ids"]
    save_file(values, other / "model.safetensors", {"format": "pt"})
    outcome = verify(other, source=str(model))
    assert outcome.all_problems() == [f"{UP}: 1 values are not the source's, and nothing says that they were changed"]


def test_a_changed_configuration(models: dict[str, Path], copy: Callable[[str], Path]) -> None:
    folder = copy("BF16")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 77.0
    (folder / "config.json").write_text(json.dumps(config))
    assert "config.json has" in verify(folder).problems[0]
    (folder / "manifest.json").unlink()
    assert verify(folder).ok
    wanted = "config.json: llama.rope.freq_base is 77.0 in the artifact, 50.0 in the reference"
    assert verify(folder, source=str(models["llama"])).problems == [wanted]


def test_a_flipped_bit_is_placed(copy: Callable[[str], Path]) -> None:
    folder = copy("F16")
    file = holder(folder, NORM)
    info = read_header(file).tensors[NORM]
    flip(file, info.offset + 3)
    outcome = verify(folder)
    assert [check.name for check in outcome.tensors if check.hash == "mismatch"] == [NORM]
    assert f"of {file.name} do not match their hash" in problems(outcome, NORM)


def test_what_does_not_belong_and_what_is_missing(copy: Callable[[str], Path]) -> None:
    folder = copy("F32")
    first = sorted(folder.glob("*.safetensors"))[0]
    shutil.copy(first, folder / "more.safetensors")
    assert verify(folder).problems[0] == "more.safetensors is in the directory but not in the manifest"
    (folder / "more.safetensors").unlink()
    (folder / "tokenizer.json").unlink()
    assert verify(folder).problems[0] == "tokenizer.json is in the manifest but not in the directory"
    first.unlink()
    with pytest.raises(MalformedInputError, match="a shard that the index names is missing"):
        verify(folder)


@pytest.mark.parametrize(
    ("level", "tensor", "change", "words"),
    [
        ("BF16", NORM, lambda t: t[:3].fill_(float("nan")), "3 values are NaN or infinite"),
        ("BF16", NORM, lambda t: t[:1].add_(0.25), "1 values are not the source's"),
        ("F32", UP, lambda t: t[:1, :1].add_(1e-3), "is above 0 for f32"),
        ("F16", UP, lambda t: t.copy_(t.roll(1, 0)), "is above 0.005 for f16"),
    ],
)
def test_values_that_are_not_the_sources(
    models: dict[str, Path], copy: Callable[[str], Path], level: str, tensor: str, change: Any, words: str
) -> None:
    folder = copy(level)
    file = holder(folder, tensor)
    values = load_file(file)
    change(values[tensor])
    save_file(values, file, {"format": "pt"})
    (folder / "manifest.json").unlink()
    outcome = verify(folder, source=str(models["llama"]))
    assert words in problems(outcome, tensor)
    assert [check.name for check in outcome.tensors if check.problems] == [tensor]


def test_values_that_are_not_finite_stand_where_the_sources_do(models: dict[str, Path], tmp_path: Path) -> None:
    model = Path(shutil.copytree(models["llama"], tmp_path / "broken"))
    values = load_file(model / "model.safetensors")
    values[UP][2, 5] = float("nan")
    save_file(values, model / "model.safetensors", {"format": "pt"})
    options = Options(nonfinite="keep")
    (kept,) = quantize(str(model), "safetensors", levels=["F16"], output_dir=tmp_path / "kept", options=options)
    assert verify(kept.path, source=str(model)).ok
    outcome = verify(kept.path, source=str(models["llama"]))
    assert "NaN or infinite where the source is finite" in problems(outcome, UP)


def test_the_command(models: dict[str, Path], copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy("BF16")
    assert run(["verify", str(folder), "--source", str(models["llama"])]) == 0
    assert "match the manifest's hashes" in capsys.readouterr().out
    flip(holder(folder, UP), -1)
    assert run(["verify", str(folder), "--json"]) == 8
    assert json.loads(capsys.readouterr().out)["ok"] is False
