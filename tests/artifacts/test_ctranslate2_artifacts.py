"""CTranslate2 models read back: under their source's names, against their source, and damaged."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llm_quantize.advice.describe import describe
from llm_quantize.artifacts.opening import open_decoded
from llm_quantize.artifacts.verify import verify
from llm_quantize.cli import run
from llm_quantize.errors import IntegrityError, MalformedInputError
from llm_quantize.evaluation.tensor_errors import tensor_errors
from llm_quantize.formats.ctranslate2.families import FAMILIES
from llm_quantize.io.ctranslate2_file import MODEL_FILE, read_model_file
from llm_quantize.models.ctranslate2 import is_ctranslate2
from llm_quantize.models.opening import open_source
from llm_quantize.options import MethodOptions, Options
from llm_quantize.pipeline import quantize
from tests.tiny_models import make_tiny

RTN = Options(threads=1, method=MethodOptions(method="rtn"))
VARIANTS = (
    "llama",
    "llama-bias",
    "llama3",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma3_text",
    "gemma3",
    "phi3",
    "gpt2",
    "gpt_neox",
    "falcon",
)
QUERIES = "decoder/layer_1/self_attention/linear_0/weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {variant: make_tiny(variant, folder / variant) for variant in VARIANTS}


@pytest.fixture(scope="module")
def made(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    folder, found = tmp_path_factory.mktemp("made"), {}
    for variant, model in models.items():
        levels = ("int8", "int16", "float16", "bfloat16", "float32") if variant == "llama" else ("int8", "float32")
        results = quantize(str(model), "ctranslate2", levels=levels, output_dir=folder, options=RTN)
        found |= {(variant, level): result.path for level, result in zip(levels, results, strict=True)}
    return found


@pytest.fixture
def copy(made: dict[tuple[str, str], Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda level: Path(shutil.copytree(made["llama", level], tmp_path / level))


def test_every_family_is_read_back() -> None:
    assert {variant.partition("-")[0].replace("llama3", "llama") for variant in VARIANTS} == set(FAMILIES)


@pytest.mark.parametrize("variant", VARIANTS)
def test_floats_come_back_as_they_were(
    models: dict[str, Path], made: dict[tuple[str, str], Path], variant: str
) -> None:
    """Joined, reordered and transposed weights too, under the checkpoint's names."""
    source = open_source(str(models[variant]))
    with source.checkpoint:
        artifact = open_decoded(source, made[variant, "float32"])
        values = load_file(models[variant] / "model.safetensors")
        used = {piece.source for output in source.tensors.outputs for piece in output.pieces}
        assert set(artifact.names) == used
        for name in used:
            assert torch.equal(artifact.read(name), values[name].float()), name
        table = next(output.pieces[0].source for output in source.tensors.outputs if output.name == "token_embd.weight")
        rows = torch.tensor([3, 0, 77])
        assert torch.equal(artifact.read_rows(table, rows), values[table].float()[rows])
        assert artifact.notes == ()
        assert [one for one in tensor_errors(source, artifact, threads=1) if one.relative > 0] == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_codes_come_back_as_the_runtime_computes_with_them(
    models: dict[str, Path], made: dict[tuple[str, str], Path], variant: str
) -> None:
    source = open_source(str(models[variant]))
    with source.checkpoint:
        artifact = open_decoded(source, made[variant, "int8"])
        found = {one.name: one for one in tensor_errors(source, artifact, threads=1)}
        coded = {name for name, one in found.items() if one.qtype == "line8"}
        outputs = [output for output in source.tensors.outputs if output.constant is None]
        matrices = {o.pieces[0].source for o in outputs if len(o.shape) > 1 and o.name != "position_embd.weight"}
        assert {name for name, kind in artifact.types().items() if kind == "line8"} == matrices
        assert all(0 < found[name].relative < 0.02 for name in coded)
        assert all(one.relative == 0 for name, one in found.items() if name not in coded)


@pytest.mark.parametrize("level", ["int8", "int16", "float16", "bfloat16", "float32"])
def test_sound_ones_verify(models: dict[str, Path], made: dict[tuple[str, str], Path], level: str) -> None:
    found = verify(made["llama", level], source=str(models["llama"]))
    assert found.ok, found.all_problems()
    assert found.has_manifest
    assert all(check.hash == "ok" for check in found.tensors)
    assert {check.name for check in found.tensors if check.relative_error is not None} == {
        name
        for name in read_model_file(made["llama", level] / MODEL_FILE).variables
        if name.endswith(("weight", "gamma"))
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_family_verifies(models: dict[str, Path], made: dict[tuple[str, str], Path], variant: str) -> None:
    found = verify(made[variant, "int8"], source=str(models[variant]))
    assert found.ok, found.all_problems()


def change(folder: Path, at: int, data: bytes) -> None:
    whole = bytearray((folder / MODEL_FILE).read_bytes())
    whole[at : at + len(data)] = data
    (folder / MODEL_FILE).write_bytes(bytes(whole))


def test_damage_is_found(
    models: dict[str, Path], copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy("int8")
    entry = read_model_file(folder / MODEL_FILE).variables[QUERIES]
    change(folder, entry.offset + 7, b"\x55")
    assert any(f"{QUERIES}: bytes" in text for text in verify(folder).all_problems())
    assert run(["verify", str(folder)]) == 8
    assert QUERIES in capsys.readouterr().out
    (folder / "manifest.json").unlink()
    assert verify(folder).ok  # nothing says what it should be, and one code is no large error
    assert verify(folder, source=str(models["llama"])).ok
    change(folder, entry.offset, bytes(entry.nbytes))
    assert any("relative error" in text for text in verify(folder, source=str(models["llama"])).all_problems())


def test_a_changed_number_of_the_network_is_found(models: dict[str, Path], copy: Callable[[str], Path]) -> None:
    folder = copy("float16")
    entry = read_model_file(folder / MODEL_FILE).variables["decoder/layer_0/self_attention/rotary_base"]
    change(folder, entry.offset, struct.pack("<f", 51.0))
    assert any("does not match the manifest" in text for text in verify(folder).all_problems())
    (folder / "manifest.json").unlink()
    assert verify(folder).ok
    told = verify(folder, source=str(models["llama"])).all_problems()
    assert "decoder/layer_0/self_attention/rotary_base is 51.0 in the artifact, 50.0 in the reference" in told


def test_scales_that_mean_nothing_are_found(copy: Callable[[str], Path]) -> None:
    folder = copy("int8")
    (folder / "manifest.json").unlink()
    entry = read_model_file(folder / MODEL_FILE).variables[f"{QUERIES}_scale"]
    change(folder, entry.offset, struct.pack("<2f", 0.0, np.nan))
    told = verify(folder).all_problems()
    assert f"{QUERIES}: 2 scales are zero, infinite or NaN" in told


def test_other_files_and_models_are_told(
    models: dict[str, Path], copy: Callable[[str], Path], made: dict[tuple[str, str], Path]
) -> None:
    told = verify(made["llama", "int8"], source=str(models["llama-bias"])).all_problems()
    assert any("not made from this reference model" in text for text in told)
    source = open_source(str(models["qwen3"]))
    with source.checkpoint, pytest.raises(IntegrityError, match="not made from this reference") as caught:
        open_decoded(source, made["llama", "int8"])
    assert caught.value.tensor is not None
    folder = copy("float32")
    (folder / "vocabulary.json").write_text("[]")
    assert any("vocabulary.json has 2 bytes" in text for text in verify(folder).all_problems())
    (folder / MODEL_FILE).write_bytes((folder / MODEL_FILE).read_bytes()[:-5])
    with pytest.raises(MalformedInputError, match="cut off"):
        verify(folder)


def test_a_pickle_of_the_same_name_is_no_such_model(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"\x80\x02}q\x00.")
    (tmp_path / "config.json").write_text("{}")
    assert not is_ctranslate2(tmp_path)
    with pytest.raises(MalformedInputError, match="the pickle is cut short"):
        open_source(str(tmp_path))


def test_what_it_is_from_its_headers(made: dict[tuple[str, str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = made["llama", "int8"]
    assert is_ctranslate2(folder)
    found = describe(str(folder))
    assert (found["format"], found["level"]) == ("ctranslate2", "CT2-int8")
    assert found["size"] == (folder / MODEL_FILE).stat().st_size
    assert run(["info", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["variables"] == len(read_model_file(folder / MODEL_FILE).variables)
    assert run(["info", str(folder)]) == 0
