"""Directories as ``quantize`` writes them: sound to ``verify``, read alike by the format's module and the decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_quantize import memory
from llm_quantize.artifacts.manifest import read_manifest
from llm_quantize.artifacts.opening import open_decoded
from llm_quantize.artifacts.verify import verify
from llm_quantize.calibration import choose
from llm_quantize.errors import IntegrityError, MissingExtraError
from llm_quantize.evaluation.tensor_errors import tensor_errors
from llm_quantize.formats.base import scheme_from_dict
from llm_quantize.formats.packed_formats import PACKED
from llm_quantize.io.safetensors_file import read_header
from llm_quantize.models.opening import open_source
from llm_quantize.options import MethodOptions
from llm_quantize.pipeline import Options, plan, quantize
from tests.artifacts.test_decoded_directory import fused
from tests.formats.grids import unpacked

from .tiny_models import make_tiny

MADE = [
    ("gptq", "4bit", {}),
    ("gptq", "2bit", {"symmetric": False}),
    ("gptq", "3bit", {}),
    ("gptq", "8bit", {"group_size": -1}),
    ("awq", "4bit", {}),
    ("compressed-tensors", "W4A16", {}),
    ("compressed-tensors", "W3A16", {}),
    ("mlx", "5bit", {}),
    ("mlx", "mxfp8", {}),
    ("compressed-tensors", "W8A16_ASYM", {}),
]


def made(model: Path, folder: Path, format: str, level: str, **method: Any) -> Path:
    options = Options(threads=1, method=MethodOptions(method="rtn", **{"group_size": 32, **method}))
    (result,) = quantize(str(model), format, levels=[level], output_dir=folder, options=options)
    return result.path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("source") / "model")


@pytest.mark.parametrize(("format", "level", "method"), MADE)
def test_sound_and_read_alike(format: str, level: str, method: Any, llama: Path, tmp_path: Path) -> None:
    path = made(llama, tmp_path, format, level, **method)
    outcome = verify(path, source=str(llama))
    assert outcome.ok, outcome.all_problems()
    assert {check.hash for check in outcome.tensors} == {"ok"}
    manifest = read_manifest(path / "manifest.json")
    assert manifest is not None
    scheme = scheme_from_dict(manifest["identity"]["scheme"])
    stored = {name: value for file in path.glob("*.safetensors") for name, value in load_file(file).items()}
    source = open_source(str(llama))
    with source.checkpoint:
        artifact = open_decoded(source, path)
        assert artifact.notes == ()
        for matrix in manifest["matrices"]:
            fields = {name.rpartition(".")[2]: stored[name] for name in matrix["fields"]}
            arrays = {
                suffix: value.view(torch.uint16).numpy() if value.dtype == torch.bfloat16 else value.numpy()
                for suffix, value in fields.items()
            }
            found = artifact.read(f"{matrix['name']}.weight").numpy()
            expected = unpacked(PACKED[format], scheme, arrays, *found.shape)
            assert np.array_equal(found, expected), matrix["name"]
            kind = artifact.types()[f"{matrix['name']}.weight"]
            assert kind.removesuffix("_asym") == scheme.qtype.name.removesuffix("_asym")
        artifact.close()


def test_memory_of_rounding_is_planned(llama: Path) -> None:
    options = Options(method=MethodOptions(method="rtn", group_size=32))
    (planned,) = plan(str(llama), "gptq", levels=["4bit"], options=options)
    (phase,) = planned.phases
    assert 200 << 20 < memory.of_run(phase, 1) < 300 << 20
    assert not plan(str(llama), "gguf", levels=["Q4_0"], options=Options())[0].phases


def test_without_torch_nothing_is_begun(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="--method rtn"):
        made(llama, tmp_path / "out", "gptq", "4bit")
    assert not (tmp_path / "out").exists()


def test_any_flipped_bit_is_found(llama: Path, tmp_path: Path) -> None:
    path = made(llama, tmp_path, "awq", "4bit")
    file = path / "model.safetensors"
    whole, header = file.read_bytes(), read_header(file)
    random = np.random.default_rng(2)
    for at in random.integers(header.header_bytes, len(whole), 6).tolist():
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(random.integers(0, 8))
        file.write_bytes(damaged)
        owner = next(info.name for info in header.tensors.values() if info.offset <= at < info.offset + info.nbytes)
        bad = [check.name for check in verify(path).tensors if check.hash == "mismatch"]
        assert bad == [owner]
    file.write_bytes(whole)
    for name in ("config.json", "README.md", "tokenizer.json"):
        kept = (path / name).read_bytes()
        place = kept.find(b"a", len(kept) // 2)
        (path / name).write_bytes(kept[:place] + b"e" + kept[place + 1 :])
        assert verify(path).problems == [f"{name} does not match the manifest's hash"]
        (path / name).write_bytes(kept)
    manifest = path / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"awq"', b'"awQ"', 1))
    with pytest.raises(IntegrityError, match="manifest was changed"):
        verify(path)


def test_experts_that_the_source_stacks(tmp_path: Path) -> None:
    model = make_tiny("qwen3_moe", tmp_path / "model")
    save_file(fused(load_file(model / "model.safetensors")), model / "model.safetensors", {"format": "pt"})
    path = made(model, tmp_path, "gptq", "8bit", group_size=16)
    assert verify(path, source=str(model)).ok
    source = open_source(str(model))
    with source.checkpoint:
        artifact = open_decoded(source, path)
        errors = {loss.name: loss.relative for loss in tensor_errors(source, artifact, threads=1)}
        artifact.close()
    assert 0 < errors["model.layers.0.mlp.experts.*.down_proj.weight"] < 0.01
    assert errors["model.layers.0.mlp.gate.weight"] == 0
