"""Packed matrices from words to words: the same bytes as through codes, proved each time, and the hash of their source.

What is exact is judged elsewhere (test_convert.py); here, that the short way is taken, and that it is not believed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_quantize import api
from llm_quantize.artifacts import origin
from llm_quantize.artifacts.manifest import read_manifest
from llm_quantize.artifacts.result import ArtifactResult
from llm_quantize.artifacts.rounding import Rounding, Unit
from llm_quantize.artifacts.verify import verify
from llm_quantize.blockwise import keeping
from llm_quantize.blockwise.run import Matrices
from llm_quantize.errors import IntegrityError
from llm_quantize.formats import compressed_tensors
from llm_quantize.io.artifact_paths import manifest_path
from llm_quantize.kernels import repack
from llm_quantize.models.opening import open_model
from llm_quantize.options import MethodOptions, Options
from llm_quantize.provenance.rederive import ready, rederive
from tests.oracles.reference_directories import Layout, write_directory
from tests.tiny_models import make_tiny, row_lengths_of_256

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("source") / "tiny", **row_lengths_of_256("llama"))


@pytest.fixture(scope="module")
def gptq(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(llama, tmp_path_factory.mktemp("gptq"), "gptq", "4bit")


def quantized(model: Path, place: Path, format: str, level: str, **method: Any) -> Path:
    options = Options(threads=1, method=MethodOptions(method="rtn", **method))
    (result,) = api.quantize(model, format, levels=level, output_dir=place, options=options)
    return result.path


def converted(source: Path, place: Path, target: str, level: str | None = None, threads: int = 1) -> ArtifactResult:
    return api.convert(source, target, level, output_dir=place, options=Options(threads=threads))


def weights(made: ArtifactResult) -> dict[str, bytes]:
    """{file: its bytes} of an artifact, but for the manifest and what copies it."""
    files = {file.name: file for file in made.path.iterdir() if file.name != "manifest.json"}
    return {name: file.read_bytes() for name, file in sorted(files.items())}


def no_codes(*_: object) -> None:
    raise AssertionError("codes were unpacked")


PAIRS = [
    *(("gptq", f"{bits}bit", {}, "compressed-tensors") for bits in (2, 3, 4, 8)),
    *(("gptq", f"{bits}bit", {"symmetric": False}, "compressed-tensors") for bits in (3, 4)),
    ("gptq", "8bit", {"group_size": -1}, "compressed-tensors"),
    ("gptq", "4bit", {"group_size": 32}, "gptq"),
    ("gptq", "4bit", {}, "awq"),
    ("gptq", "4bit", {"group_size": 32}, "mlx"),
    ("gptq", "8bit", {"group_size": 64}, "mlx"),
    ("awq", "4bit", {}, "compressed-tensors"),
    ("awq", "4bit", {"group_size": 32}, "gptq"),
    ("awq", "4bit", {}, "awq"),
]


@pytest.mark.parametrize(("format", "level", "method", "target"), PAIRS)
def test_words_make_the_same_bytes_as_codes(
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    format: str,
    level: str,
    method: dict[str, Any],
    target: str,
) -> None:
    source = quantized(llama, tmp_path / "source", format, level, **method)
    with monkeypatch.context() as patch:
        patch.setattr(keeping, "_held", no_codes)
        short = converted(source, tmp_path / "short", target)
    with monkeypatch.context() as patch:
        patch.setattr(keeping, "_repacked", lambda *_: None)
        long = converted(source, tmp_path / "long", target)
    assert weights(short) == weights(long)
    assert short.conversion == long.conversion
    assert short.conversion is not None
    assert short.conversion["verdict"] == "exact"
    assert verify(short.path, source=str(source)).ok


def test_signed_scales_and_both_of_gptqs_formats(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "_held", no_codes)
    for version in ("gptq", "gptq_v2"):
        for symmetric in (True, False):
            place = tmp_path / f"{version}{symmetric}"
            layout = Layout("gptq", group=32, symmetric=symmetric, signed_scales=symmetric, version=version)
            expected = write_directory(llama, place, layout)
            made = converted(place, tmp_path / "made", "compressed-tensors")
            with open_model(str(made.path)) as model:
                for name, rows in expected.items():
                    assert np.array_equal(model.read_rows(name, 0, len(rows)), rows)


@pytest.mark.parametrize("target", ["compressed-tensors", "mlx"])
@pytest.mark.parametrize("at", [(0, 0), (-1, -1)])
def test_a_word_that_went_wrong_is_not_taken(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, at: tuple[int, int]
) -> None:
    """Where moving errs, the first code or the last, the proof finds it, and codes go the long way."""
    source = quantized(llama, tmp_path / "source", "gptq", "4bit", group_size=32)
    wanted = weights(converted(source, tmp_path / "wanted", target))
    moved = repack.moved
    told = []

    def wrong(*args: Any) -> np.ndarray:
        words = moved(*args).copy()
        words[at] ^= 1 << 28
        told.append(at)
        return words

    for module in ("compressed_tensors", "mlx"):
        monkeypatch.setattr(f"llm_quantize.formats.{module}.moved", wrong)
    assert weights(converted(source, tmp_path / "made", target)) == wanted
    assert len(told) == 14


@pytest.mark.parametrize("field", [1, 3])
def test_numbers_of_groups_are_held_against_the_source_too(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: int
) -> None:
    """The scale, or the word of zero points, of the last rows is another."""
    source = quantized(llama, tmp_path / "source", "awq", "4bit")
    wanted = weights(converted(source, tmp_path / "wanted", "compressed-tensors"))
    honest, long = compressed_tensors.repack, keeping._held
    told: list[str] = []

    def last_is_another(*args: Any) -> Any:
        fields = honest(*args)
        assert fields is not None
        fields[field].view(np.uint16 if field == 1 else np.uint32)[-1, -1] ^= 1 << 8
        return fields

    def taken(*args: Any) -> Any:
        told.append("codes")
        return long(*args)

    monkeypatch.setattr(compressed_tensors, "repack", last_is_another)
    monkeypatch.setattr(keeping, "_held", taken)
    assert weights(converted(source, tmp_path / "made", "compressed-tensors")) == wanted
    assert len(told) == 14


def older(patch: pytest.MonkeyPatch) -> None:
    """As versions did that hashed the values of a packed source."""
    patch.setattr(origin, "stamped", lambda *_: False)


def recorded(made: ArtifactResult) -> Iterator[tuple[str, str]]:
    manifest = read_manifest(manifest_path(made.path))
    assert manifest is not None
    return ((entry["name"], unit["source_sha256"]) for entry in manifest["tensors"] for unit in entry["units"])


@pytest.mark.parametrize(("target", "level"), [("compressed-tensors", None), ("safetensors", "BF16"), ("gguf", "Q4_0")])
def test_manifests_of_older_versions_are_held_against_values(
    gptq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, level: str | None
) -> None:
    now = converted(gptq, tmp_path / "now", target, level)
    with monkeypatch.context() as patch:
        older(patch)
        made = converted(gptq, tmp_path / "then", target, level)
    was, is_now = dict(recorded(made)), dict(recorded(now))
    packed = {name for name, sha256 in is_now.items() if sha256.startswith(origin.FIELDS)}
    assert packed
    assert not any(sha256.startswith(origin.FIELDS) for sha256 in was.values())
    assert {name for name in was if was[name] != is_now[name]} == packed
    before = manifest_path(made.path).read_bytes()
    assert converted(gptq, tmp_path / "then", target, level).status == "already complete"
    assert manifest_path(made.path).read_bytes() == before
    assert verify(made.path, source=str(gptq)).ok
    for one in (made, now):
        outcome = rederive(ready(one.path, source=str(gptq)), threads=1)
        assert outcome.same, outcome


@pytest.mark.parametrize("kind", [older, lambda patch: None])
@pytest.mark.parametrize("target", ["compressed-tensors", "safetensors"])
def test_a_code_of_the_source_that_changed_is_seen(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, target: str
) -> None:
    source, level = quantized(llama, tmp_path / "source", "gptq", "4bit"), "F32" if target == "safetensors" else None
    with monkeypatch.context() as patch:
        kind(patch)
        made = converted(source, tmp_path / "made", target, level)
    with open_model(str(source)) as model:
        info = next(header.tensors[f"{UP.removesuffix('.weight')}.qweight"] for header in model.headers)
        before, stamp = (model.read_rows(UP, 0, 8), model.stamp(UP))
    data = bytearray(info.file.read_bytes())
    data[info.offset + 5] ^= 16
    info.file.write_bytes(data)
    with open_model(str(source)) as model:
        assert not np.array_equal(model.read_rows(UP, 0, 8), before)
        assert model.stamp(UP) != stamp
        with pytest.raises(ValueError, match="no fields"):
            model.stamp("model.norm.weight")
    with pytest.raises(IntegrityError, match="changed since the artifact was made"):
        converted(source, tmp_path / "made", target, level)
    assert not verify(made.path, source=str(source)).ok
    outcome = rederive(ready(made.path, source=str(source)), threads=1)
    assert not outcome.same
    assert outcome.sources


@pytest.mark.parametrize("target", ["compressed-tensors", "safetensors"])
def test_a_run_that_an_older_version_left_goes_on(
    gptq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    """Records of both kinds in one journal, then in one manifest."""
    level = "BF16" if target == "safetensors" else None
    wanted = converted(gptq, tmp_path / "wanted", target, level)
    with monkeypatch.context() as patch:
        older(patch)
        done: list[str] = []
        if target == "safetensors":
            _stop_after_units(patch, done)
        else:
            _stop_after_matrices(patch, done)
        with pytest.raises(KeyboardInterrupt):
            converted(gptq, tmp_path / "made", target, level)
    made = converted(gptq, tmp_path / "made", target, level)
    assert weights(made) == weights(wanted)
    kinds = {sha256.startswith(origin.FIELDS) for name, sha256 in recorded(made) if UP.rpartition(".")[0][-7:] in name}
    assert kinds == {True, False}
    assert verify(made.path, source=str(gptq)).ok
    assert converted(gptq, tmp_path / "made", target, level).status == "already complete"
    assert rederive(ready(made.path, source=str(gptq)), threads=1).same


def _stop_after_matrices(patch: pytest.MonkeyPatch, done: list[str]) -> None:
    write = Matrices.write

    def stopping(self: Matrices, matrix: Any, *args: Any) -> None:
        if len(done) == 9:
            raise KeyboardInterrupt
        done.append(matrix.name)
        write(self, matrix, *args)

    patch.setattr(Matrices, "write", stopping)


def _stop_after_units(patch: pytest.MonkeyPatch, done: list[str]) -> None:
    call = Rounding.__call__

    def stopping(self: Rounding, unit: Unit) -> Any:
        if len(done) == 12:
            raise KeyboardInterrupt
        done.append(str(unit.tensor))
        return call(self, unit)

    patch.setattr(Rounding, "__call__", stopping)
