"""Artifacts that say sizes which cost them nothing: verify asks for no such memory, and opens nothing outside them."""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf.constants import GGMLQuantizationType

from llm_quantize import memory
from llm_quantize.artifacts import immense
from llm_quantize.artifacts.manifest import manifest_bytes
from llm_quantize.artifacts.verify import verify
from llm_quantize.errors import MalformedInputError, ResourceError
from llm_quantize.formats.gguf.metadata import text
from llm_quantize.io.gguf_file import layout_gguf
from llm_quantize.io.safetensors_file import TensorInfo
from llm_quantize.runtimes.base import is_model_directory
from tests.artifacts.test_verify_directory import seal
from tests.oracles.packed_formats import Form, write_packed
from tests.tiny_models import make_tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("made")
    model = make_tiny("llama", folder / "model")
    write_packed(model, folder / "packed", Form("compressed-tensors", scale=torch.bfloat16))
    return {"model": model, "packed": folder / "packed"}


@pytest.fixture
def copy(made: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(made[name], tmp_path / name))


def grown(folder: Path, tensors: dict[str, tuple[str, list[int], int]]) -> Path:
    """More tensors {name: (dtype, shape, bytes)} at the end of the file, all of them a hole."""
    file = folder / "model.safetensors"
    assert file.stat().st_size < 10 << 20
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, end = json.loads(data[8 : 8 + length]), len(data) - 8 - length
    for name, (dtype, shape, nbytes) in tensors.items():
        if name in header:
            header[f"{name}.before"] = header.pop(name)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    os.truncate(file, 8 + len(text) + end)
    return folder


def checked(folder: Path, *, source: Path | None = None, most: int = 3 << 30) -> tuple[int, str]:
    """(exit code, stderr) of verify in a process that may map only a little."""
    words = ["verify", str(folder), *(["--source", str(source)] if source else [])]
    code = f"from llm_quantize.cli import run; raise SystemExit(run({words!r}))"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=limit, check=False)
    return done.returncode, done.stderr


def test_a_long_vector_of_holes(made: dict[str, Path], copy: Callable[[str], Path]) -> None:
    """Gigabytes in one row, a few kilobytes on disk: its values are looked at in pieces."""
    folder = grown(copy("model"), {"extra.weight": ("BF16", [700_000_000], 1_400_000_000)})
    assert sum(file.stat().st_blocks for file in folder.iterdir()) * 512 < 10 << 20
    code, told = checked(folder)
    assert code == 0, told
    code, told = checked(folder, source=made["model"])
    assert code == 4, told
    assert "extra.weight" in told
    assert "Traceback" not in told


def test_packed_matrices_of_holes(copy: Callable[[str], Path]) -> None:
    folder, name = copy("packed"), "model.layers.0.self_attn.q_proj"
    rows, columns = 1 << 20, 20_000
    holes = {
        f"{name}.weight_packed": ("I32", [rows, columns // 8], rows * columns // 2),
        f"{name}.weight_scale": ("BF16", [rows, columns // 32], rows * columns // 16),
        f"{name}.weight_shape": ("I64", [2], 16),
    }
    grown(folder, holes)
    data = struct.pack("<qq", rows, columns)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-16, os.SEEK_END)
        file.write(data)
    code, told = checked(folder)
    assert code == 4, told
    assert "larger than any" in told
    assert f"{name}.weight_packed" in told


def test_what_does_not_fit_the_limit_is_refused_before(
    copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "cgroup_limits", lambda *_: [64 << 20])
    with pytest.raises(ResourceError, match="too small for the tensors"):
        verify(copy("packed"))


def test_values_that_are_not_finite_are_counted_in_every_type(tmp_path: Path) -> None:
    values = torch.tensor([1.0, float("nan"), float("inf"), -float("inf"), 0.0, 65504.0])
    for dtype, word in (
        (torch.bfloat16, "BF16"),
        (torch.float16, "F16"),
        (torch.float32, "F32"),
        (torch.float64, "F64"),
    ):
        stored = values.to(dtype).repeat(300_000)
        file = tmp_path / word
        file.write_bytes(b"head" + stored.view(torch.uint8).numpy().tobytes())
        info = TensorInfo("x", word, (stored.numel(),), file, 4, stored.nbytes)
        assert immense.nonfinite(info) == 900_000


def reseal(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_bytes())
    manifest.pop("manifest_sha256")
    change(manifest)
    (folder / "manifest.json").write_bytes(manifest_bytes(manifest))


@pytest.mark.parametrize("name", ["../secret", "{absolute}", "sub/../../secret", "link", "a\nb"])
def test_files_outside_that_a_manifest_names_are_not_opened(
    copy: Callable[[str], Path], name: str, tmp_path: Path
) -> None:
    folder = copy("packed")
    (tmp_path / "secret").write_text("secret")
    (folder / "link").symlink_to(tmp_path / "secret")
    seal(folder)
    absolute = name.format(absolute=tmp_path / "secret")
    reseal(folder, lambda manifest: manifest["files"].append({"name": absolute, "size": 6}))
    opened: list[str] = []
    listening = [True]

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if listening and event == "open" and isinstance(arguments[0], str | os.PathLike):
            opened.append(os.path.realpath(arguments[0]))

    sys.addaudithook(hear)
    problems = verify(folder).problems
    listening.clear()  # a hook cannot be taken away
    assert any("is not opened" in text for text in problems), problems
    assert str(tmp_path / "secret") not in opened


def test_a_tokenizer_of_many_gigabytes(copy: Callable[[str], Path]) -> None:
    model, folder = copy("model"), copy("packed")
    for place in (model, folder):
        os.truncate(place / "tokenizer.json", 1_000_000_000)
    code, told = checked(folder, source=model, most=2 << 30)
    assert code in (0, 8), told
    assert "Traceback" not in told
    with pytest.raises(MalformedInputError, match="larger than its kind"):
        is_model_directory(folder)


def test_a_gguf_file_of_holes(tmp_path: Path) -> None:
    name, columns = "blk.0.ffn_norm.weight", immense.MOST_COLUMNS + 1
    layout = layout_gguf({"general.architecture": text("llama")}, [(name, (columns,), GGMLQuantizationType.F32)])
    path = tmp_path / "m.gguf"
    path.write_bytes(layout.header)
    os.truncate(path, layout.size)
    code, told = checked(path)
    assert code == 4, told
    assert name in told
