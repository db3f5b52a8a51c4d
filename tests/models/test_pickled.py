"""Models in pytorch_model.bin: the same artifacts as from safetensors, byte for byte, and the refusals."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llm_quantize.architectures.rows import to_float32
from llm_quantize.errors import IntegrityError, LlmQuantizeError, MalformedInputError, UnsupportedError
from llm_quantize.models.opening import open_model, open_source
from llm_quantize.options import Options
from llm_quantize.pipeline import plan, quantize
from tests.io.torch_by_hand import name, state_dict, text, write_zip
from tests.tiny_models import make_tiny

SAFE, PICKLED, INDEX = "model.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json"


def pickled(place: Path, variant: str = "llama", **options: Any) -> Path:
    """A tiny model with its weights in pytorch_model.bin, and the same as safetensors beside it."""
    source = make_tiny(variant, place / "safe" / "model")
    copy = shutil.copytree(source, place / "bin" / "model")
    torch.save(load_file(source / SAFE), copy / PICKLED, **options)
    (copy / SAFE).unlink()
    return copy


def made(model: Path, place: Path, format: str = "gguf", level: str = "Q8_0", **options: Any) -> dict[str, bytes]:
    (result,) = quantize(str(model), format, levels=[level], output_dir=place, options=Options(**options))
    files = [result.path] if result.path.is_file() else sorted(result.path.iterdir())
    return {path.name: path.read_bytes() for path in files if path.name != "manifest.json"}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("variant", ["llama", "gpt2", "llama3"])
def test_the_same_bytes_as_from_safetensors(tmp_path: Path, variant: str, legacy: bool) -> None:
    """GPT-2 is stored (in, out); llama3 is tied."""
    model = pickled(tmp_path, variant, _use_new_zipfile_serialization=not legacy)
    found = made(model, tmp_path / "a", threads=2)
    assert found == made(tmp_path / "safe" / "model", tmp_path / "b")
    assert found


def test_a_directory_of_them(tmp_path: Path) -> None:
    model = pickled(tmp_path)
    found, twin = (
        made(model, tmp_path / "a", "safetensors", "F16"),
        made(tmp_path / "safe" / "model", tmp_path / "b", "safetensors", "F16"),
    )
    assert found == twin
    assert {"model.safetensors", "tokenizer.json"} <= found.keys()
    assert not any(file.endswith(".bin") for file in found)


def test_shards(tmp_path: Path) -> None:
    model = pickled(tmp_path)
    tensors = torch.load(model / PICKLED, weights_only=True)
    owners = {key: f"pytorch_model-0000{number % 2 + 1}-of-00002.bin" for number, key in enumerate(tensors)}
    for shard in set(owners.values()):
        torch.save({key: value for key, value in tensors.items() if owners[key] == shard}, model / shard)
    (model / PICKLED).unlink()
    (model / INDEX).write_text(json.dumps({"weight_map": owners}))
    assert made(model, tmp_path / "a") == made(tmp_path / "safe" / "model", tmp_path / "b")
    with open_model(str(model)) as opened:
        assert {path.name for path in opened.files} == set(owners.values())
    owners["lm_head.weight"] = "../x.bin"
    (model / INDEX).write_text(json.dumps({"weight_map": owners}))
    with pytest.raises(LlmQuantizeError, match="outside the model directory"):
        open_model(str(model))


def test_tied_weights_in_one_storage(tmp_path: Path) -> None:
    model = pickled(tmp_path, "llama3")
    tensors = torch.load(model / PICKLED, weights_only=True)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    torch.save(tensors, model / PICKLED)
    assert made(model, tmp_path / "a") == made(tmp_path / "safe" / "model", tmp_path / "b")


def test_views(tmp_path: Path) -> None:
    """Each way in which a matrix may lie, by rows in any pieces, both ways round."""
    model = pickled(tmp_path)
    w = torch.randn(40, 56).to(torch.bfloat16)
    views = {
        "turned": w.T, "columns": w[:, 3:20], "rows": w[5:9], "turned columns": w[:, 3:20].T, "column": w[:, 3:4],
        "experts": w.reshape(4, 10, 56).transpose(1, 2), "part of experts": w.reshape(4, 10, 56)[:, 1:4],
        "inner": w.reshape(4, 10, 56)[1:3, :, 7:9], "one row": w[7:8, 2:], "row of a turned one": w.T[3:4],
    }  # fmt: skip
    torch.save({**torch.load(model / PICKLED, weights_only=True), **views}, model / PICKLED)
    with open_model(str(model)) as opened:
        for key, value in views.items():
            for transpose in (False, True):
                whole = value.mT if transpose else value
                twin = whole.float().reshape(-1, whole.shape[-1]).numpy()
                rows, columns = opened.matrix(key, transpose=transpose)
                assert (rows, columns) == twin.shape
                for step in (1, 3, rows):
                    parts = [
                        to_float32(opened.read_rows(key, at, min(rows, at + step), transpose=transpose))
                        for at in range(0, rows, step)
                    ]
                    np.testing.assert_array_equal(np.concatenate(parts), twin, err_msg=f"{key} {transpose} {step}")
            raw = bytes(opened.raw_rows(key, 0, opened.matrix(key)[0], buffer=bytearray(1 << 16)))
            assert raw == value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(8, 8)[::2, ::2],
        torch.zeros(4).expand(3, 4),
        torch.zeros(12).as_strided((4, 4), (2, 1)),
        torch.zeros(4, 6).to(torch.float8_e4m3fn).T,
    ],
)
def test_views_that_are_refused(tmp_path: Path, value: torch.Tensor) -> None:
    model = pickled(tmp_path)
    torch.save({"w": value}, model / PICKLED)
    with pytest.raises(UnsupportedError, match="view") as caught:
        open_model(str(model))
    assert (caught.value.tensor, caught.value.file) == ("w", str(model / PICKLED))


def test_a_vector_with_gaps(tmp_path: Path) -> None:
    model = pickled(tmp_path)
    torch.save({"w": torch.arange(9.0)[1::2]}, model / PICKLED)
    with open_model(str(model)) as opened:
        assert opened.read_rows("w", 0, 1).tolist() == [[1, 3, 5, 7]]


def test_safetensors_win_and_other_files_do_not_count(tmp_path: Path) -> None:
    model = pickled(tmp_path)
    shutil.copy(tmp_path / "safe" / "model" / SAFE, model)
    (model / PICKLED).write_bytes(b"broken")
    for stray in ("training_args.bin", "optimizer.pt", "scheduler.pt"):
        (model / stray).write_bytes(b"broken")
    with open_model(str(model)) as opened:
        assert [path.name for path in opened.files] == [SAFE]
    (model / SAFE).unlink()
    (model / PICKLED).unlink()
    torch.save({"w": torch.zeros(2, 3)}, model / "consolidated.00.pth")
    with open_model(str(model)) as opened:
        assert [path.name for path in opened.files] == ["consolidated.00.pth"]
    shutil.copy(model / "consolidated.00.pth", model / "consolidated.01.pth")
    with pytest.raises(UnsupportedError, match="several files of pickled weights"):
        open_model(str(model))


def test_a_plan_reads_headers_and_a_changed_file_is_noticed(tmp_path: Path) -> None:
    model = pickled(tmp_path)
    assert plan(str(model), levels=["Q8_0"])[0].weights > 0
    source = open_source(str(model), headers_only=True)
    with source.checkpoint, pytest.raises(LlmQuantizeError, match="headers only"):
        source.checkpoint.read_rows("lm_head.weight", 0, 1)
    with open_model(str(model)) as opened:
        torch.save({"w": torch.zeros(2, 3)}, model / PICKLED)
        with pytest.raises(IntegrityError, match=r"changed|shorter"):
            opened.read_rows("lm_head.weight", 0, 1)


def test_what_runs_code_is_refused_through_the_whole_path(tmp_path: Path) -> None:
    model, marker = pickled(tmp_path), tmp_path / "ran"
    write_zip(model / PICKLED, state_dict(w=name("os", "system") + text(f"touch {marker}") + b"\x85R"))
    with pytest.raises(UnsupportedError) as caught:
        quantize(str(model), levels=["Q8_0"], output_dir=tmp_path / "out")
    assert caught.value.found == "os.system"
    assert not marker.exists()


def test_a_quantized_model_in_pickled_files_says_so(tmp_path: Path) -> None:
    model = pickled(tmp_path)
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="a quantized model, only safetensors"):
        open_model(str(model))


def test_the_command_that_saves_it_again_works(tmp_path: Path) -> None:
    """What a refusal tells to do, done."""
    model = pickled(tmp_path)
    tensors = torch.load(model / PICKLED, weights_only=True)
    torch.save({**tensors, "odd": torch.arange(64.0).reshape(8, 8)[::2, ::2]}, model / PICKLED)
    with pytest.raises(UnsupportedError, match="view") as caught:
        open_model(str(model))
    words = shlex.split(str(caught.value.remedy).partition("save it again: ")[2])
    places = [{"IN": PICKLED}.get(word, word) for word in words[1:]]
    subprocess.run([sys.executable, *places], cwd=model, check=True, capture_output=True, timeout=300)
    with open_model(str(model)) as opened:
        assert [path.name for path in opened.files] == [SAFE]
        assert opened.read_rows("odd", 0, 4).tolist() == [
            [0, 2, 4, 6],
            [16, 18, 20, 22],
            [32, 34, 36, 38],
            [48, 50, 52, 54],
        ]


def test_no_tensors(tmp_path: Path) -> None:
    model = pickled(tmp_path)
    torch.save({}, model / PICKLED)
    with pytest.raises(MalformedInputError, match="no tensors"):
        open_model(str(model))
