"""Reading source models: values equal numpy's and torch's, threads and changes of the file, FP8."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_quantize.errors import (
    IntegrityError,
    MalformedInputError,
    NumericPolicyError,
    ResourceError,
    UnsupportedError,
    UsageError,
)
from llm_quantize.io import tensor_reader
from llm_quantize.models import safetensors as module
from llm_quantize.models.safetensors import open_checkpoint
from tests.safetensors_by_hand import entries, write_model, write_raw

RNG = np.random.default_rng(7)
ARRAYS: dict[str, np.ndarray] = {
    "f32": RNG.standard_normal((7, 5)).astype(np.float32),
    "f16": RNG.standard_normal((4, 6)).astype(np.float16),
    "bf16": RNG.integers(0, 1 << 16, (3, 4, 5), dtype=np.uint16),
    "f64": RNG.standard_normal((3, 4)),
    "vector": RNG.standard_normal(11).astype(np.float32),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "no_columns": np.zeros((3, 0), np.float32),
    "ints": np.arange(6).reshape(2, 3),
}


def expected(name: str) -> np.ndarray:
    """The whole tensor as read_rows must return it."""
    array = ARRAYS[name]
    array = array.reshape(int(np.prod(array.shape[:-1])), array.shape[-1] if array.ndim else 1)
    return array.astype(np.float32) if array.dtype == np.float64 else array


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", {"model.safetensors": ARRAYS}, config={"model_type": "llama", "n": 1})


@pytest.mark.parametrize("name", [name for name in ARRAYS if name != "ints"])
def test_rows(model: Path, name: str) -> None:
    whole = expected(name)
    with open_checkpoint(str(model)) as checkpoint:
        rows, columns = checkpoint.matrix(name)
        assert (rows, columns) == whole.shape
        for start in range(rows + 1):
            for stop in range(start, rows + 1):
                digest = hashlib.sha256()
                found = checkpoint.read_rows(name, start, stop, digest=digest)
                assert found.dtype == whole.dtype == checkpoint.stored_dtype(name)
                assert found.flags.c_contiguous
                np.testing.assert_array_equal(found, whole[start:stop])
                raw = ARRAYS[name].reshape(whole.shape)[start:stop].tobytes()
                assert digest.digest() == hashlib.sha256(raw).digest()
                assert checkpoint.raw_rows(name, start, stop) == raw
        for start, stop in ((-1, 0), (0, rows + 1), (1, 0)):
            with pytest.raises(ValueError, match="not inside"):
                checkpoint.read_rows(name, start, stop)


@pytest.mark.parametrize("name", ["f32", "f16", "bf16", "f64", "empty", "no_columns"])
@pytest.mark.parametrize("sparse", [0, 1 << 20])
def test_columns_as_rows(model: Path, name: str, sparse: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_reader, "_SPARSE", sparse)
    monkeypatch.setattr(tensor_reader, "_BLOCK", 24)
    array = ARRAYS[name]
    turned = np.ascontiguousarray(np.swapaxes(array, -1, -2))
    rows = turned.size // turned.shape[-1] if turned.shape[-1] else 0
    if name == "empty":
        rows = 3
    turned = turned.reshape(rows, array.shape[-2])
    with open_checkpoint(str(model)) as checkpoint:
        assert checkpoint.matrix(name, transpose=True) == turned.shape
        for start in range(rows + 1):
            for stop in range(start, rows + 1):
                digest = hashlib.sha256()
                found = checkpoint.read_rows(name, start, stop, transpose=True, digest=digest)
                wanted = turned[start:stop]
                np.testing.assert_array_equal(found, wanted.astype(found.dtype))
                assert digest.digest() == hashlib.sha256(wanted.tobytes()).digest()


def test_a_vector_has_no_transpose(model: Path) -> None:
    with open_checkpoint(str(model)) as checkpoint, pytest.raises(ValueError, match="dimensions"):
        checkpoint.read_rows("vector", 0, 1, transpose=True)


def test_facts(model: Path) -> None:
    (model / "generation_config.json").write_text('{"top_k": 5}')
    with open_checkpoint(str(model)) as checkpoint:
        assert checkpoint.name == "model"
        assert checkpoint.directory == model
        assert checkpoint.revision is None
        assert checkpoint.config == {"model_type": "llama", "n": 1}
        assert checkpoint.generation_config == {"top_k": 5}
        assert checkpoint.files == (model / "model.safetensors",)
        assert list(checkpoint.tensors) == list(ARRAYS)
        facts = checkpoint.fingerprint()
        raw = (model / "model.safetensors").read_bytes()
        header = raw[: 8 + int.from_bytes(raw[:8], "little")]
        assert [(fact.name, fact.size) for fact in facts] == [("model.safetensors", len(raw))]
        assert facts[0].header_sha256 == hashlib.sha256(header).hexdigest()
        assert facts[0].mtime_ns == (model / "model.safetensors").stat().st_mtime_ns


def test_integers_are_listed_but_not_read(model: Path) -> None:
    with open_checkpoint(str(model)) as checkpoint:
        with pytest.raises(UnsupportedError) as caught:
            checkpoint.read_rows("ints", 0, 1)
        assert (caught.value.tensor, caught.value.found) == ("ints", "I64")
        assert caught.value.offset == checkpoint.tensors["ints"].offset


def test_buffer_is_reused(model: Path) -> None:
    buffer = bytearray(200)
    with open_checkpoint(str(model)) as checkpoint:
        rows = checkpoint.read_rows("f32", 1, 4, buffer=buffer)
        np.testing.assert_array_equal(rows, ARRAYS["f32"][1:4])
        assert np.shares_memory(rows, np.frombuffer(buffer, np.uint8))
        with pytest.raises(ValueError, match="buffer"):
            checkpoint.read_rows("f32", 0, 7, buffer=bytearray(10))
        with pytest.raises(ValueError, match="buffer"):
            checkpoint.read_rows("f32", 0, 1, buffer=bytes(100))


def test_shards_in_subfolders(tmp_path: Path) -> None:
    shards = {
        "b-1.safetensors": {"x": ARRAYS["f32"]},
        "part/a_2.safetensors": {"y": ARRAYS["f16"], "z": ARRAYS["bf16"]},
    }
    model = write_model(tmp_path, shards)
    with open_checkpoint(str(model)) as checkpoint:
        assert list(checkpoint.tensors) == ["x", "y", "z"]
        np.testing.assert_array_equal(checkpoint.read_rows("z", 0, 12), expected("bf16"))
        assert [fact.name for fact in checkpoint.fingerprint()] == ["b-1.safetensors", "part/a_2.safetensors"]


def test_hub_cache_links_are_followed(tmp_path: Path) -> None:
    real = write_model(tmp_path / "made", {"model.safetensors": ARRAYS})
    commit = "c" * 40
    snapshot = tmp_path / "models--org--name" / "snapshots" / commit
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, name in enumerate(("config.json", "model.safetensors")):
        (real / name).rename(blobs / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    with open_checkpoint(str(snapshot)) as checkpoint:
        assert checkpoint.name == "org/name"
        np.testing.assert_array_equal(checkpoint.read_rows("f32", 0, 7), ARRAYS["f32"])
    link = tmp_path / "link"
    link.symlink_to(snapshot)
    with open_checkpoint(str(link)) as checkpoint:
        assert checkpoint.tensors


def test_float64_beyond_float32(tmp_path: Path) -> None:
    array = np.array([[1.0, np.inf], [np.nan, 1e300]])
    with open_checkpoint(str(write_model(tmp_path, {"model.safetensors": {"w": array}}))) as checkpoint:
        assert np.isinf(checkpoint.read_rows("w", 0, 1)[0, 1])  # the pipeline's policy speaks of those
        with pytest.raises(NumericPolicyError) as caught:
            checkpoint.read_rows("w", 0, 2)
    assert (caught.value.tensor, caught.value.found) == ("w", "1e+300")


# Files that change, fail, or are read by many


def test_file_replaced_or_changed_or_cut_while_reading(model: Path) -> None:
    path = model / "model.safetensors"
    raw = path.read_bytes()

    def cut() -> None:
        with path.open("rb+") as stream:
            stream.truncate(len(raw) // 2)

    def touch() -> None:
        os.utime(path, ns=(1, 1))

    def replace() -> None:
        path.rename(model / "old")
        path.write_bytes(raw)

    def drop() -> None:
        path.unlink()

    for change in (cut, touch, replace, drop):
        path.write_bytes(raw)
        with open_checkpoint(str(model)) as checkpoint:
            change()
            wanted = MalformedInputError if change is drop else IntegrityError
            with pytest.raises(wanted) as caught:
                checkpoint.read_rows("scalar", 0, 1)
            assert caught.value.file == str(path)
            assert caught.value.remedy


def test_cut_after_the_first_read_names_tensor_and_offset(model: Path) -> None:
    with open_checkpoint(str(model)) as checkpoint:
        checkpoint.read_rows("f32", 0, 1)
        with (model / "model.safetensors").open("rb+") as stream:
            stream.truncate(checkpoint.tensors["f16"].offset + 5)
        with pytest.raises(IntegrityError) as caught:
            checkpoint.read_rows("f16", 0, 4)
        assert caught.value.tensor == "f16"
        assert caught.value.offset == checkpoint.tensors["f16"].offset + 5


def test_short_reads_are_continued(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.preadv

    def short(descriptor: int, views: list[memoryview], offset: int) -> int:
        return whole(descriptor, [views[0][: max(1, len(views[0]) // 3)]], offset)

    monkeypatch.setattr(os, "preadv", short)
    with open_checkpoint(str(model)) as checkpoint:
        for name in ("f32", "bf16", "f64"):
            np.testing.assert_array_equal(checkpoint.read_rows(name, 0, len(expected(name))), expected(name))


@pytest.mark.parametrize("k", range(4))
def test_a_failing_disk(model: Path, monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    with open_checkpoint(str(model)) as checkpoint:
        whole, calls = os.preadv, iter(range(10))

        def fail(descriptor: int, views: list[memoryview], offset: int) -> int:
            if next(calls) == k:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return whole(descriptor, [views[0][:8]], offset)

        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(ResourceError) as caught:
            checkpoint.read_rows("f32", 1, 7)
        error = caught.value
        assert (error.file, error.tensor) == (str(model / "model.safetensors"), "f32")
        assert error.offset == checkpoint.tensors["f32"].offset + 20 + 8 * k


def test_threads_share_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_reader, "_KEPT_OPEN", 2)
    shards = {f"s{i}.safetensors": {f"t{i}": np.full((64, 33), i, np.float32)} for i in range(6)}
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
    with open_checkpoint(str(write_model(tmp_path, shards))) as checkpoint:
        barrier = threading.Barrier(4)

        def work(seed: int) -> bool:
            barrier.wait()
            rng = np.random.default_rng(seed)
            for _ in range(200):
                which, start = int(rng.integers(6)), int(rng.integers(60))
                if not (checkpoint.read_rows(f"t{which}", start, start + 4) == which).all():
                    return False
            return True

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(4)))
    if before:
        assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_closed(model: Path) -> None:
    checkpoint = open_checkpoint(str(model))
    checkpoint.read_rows("f32", 0, 1)
    checkpoint.close()
    checkpoint.close()
    with pytest.raises(ValueError, match="closed"):
        checkpoint.read_rows("f32", 0, 1)


def test_a_sparse_large_tensor_is_read_in_bounded_memory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    path = write_raw(tmp_path / "model.safetensors", entries({"w": ("BF16", (1 << 15, 1 << 13))}))
    with path.open("rb+") as stream:
        stream.truncate(path.stat().st_size + (1 << 29))
    with open_checkpoint(str(tmp_path)) as checkpoint:
        buffer = bytearray(1 << 20)
        tracemalloc.start()
        try:
            for start in range(0, 1 << 15, 1 << 12):
                assert checkpoint.read_rows("w", start, start + 64, buffer=buffer).shape == (64, 1 << 13)
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
            assert checkpoint.read_rows("w", 5, 9, transpose=True).shape == (4, 1 << 15)
            assert tracemalloc.get_traced_memory()[1] < 16 << 20
        finally:
            tracemalloc.stop()


# FP8

FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


def dense(codes: np.ndarray, scale: np.ndarray, blocks: tuple[int, int]) -> np.ndarray:
    """The obvious twin: every scale spread over its block by indexing, one value at a time in float32."""
    import torch

    values = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    lead = codes.shape[:-2]
    rows, columns = codes.shape[-2:]
    spread = np.empty(codes.shape, np.float32)
    for at in np.ndindex(*lead):
        for i in range(rows):
            for j in range(columns):
                spread[(*at, i, j)] = scale[(*at, i // blocks[0], j // blocks[1])]
    return values * spread


def test_every_e4m3_code_equals_torch(tmp_path: Path) -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(2, 128)
    model = write_model(tmp_path, {"model.safetensors": {"w": codes}}, dtypes={"w": "F8_E4M3"})
    with open_checkpoint(str(model)) as checkpoint:
        found = checkpoint.read_rows("w", 0, 2)
    np.testing.assert_array_equal(found, dense(codes, np.ones((2, 1), np.float32), (1, 128)))


@pytest.mark.parametrize(
    ("shape", "scale_shape", "blocks", "suffix"),
    [
        ((10, 12), (3, 3), (4, 5), "_scale_inv"),
        ((8, 10), (2, 2), (4, 5), "_scale_inv"),
        ((3, 6, 7), (3, 2, 3), (4, 3), "_scale_inv"),
        ((5, 6), (5, 1), None, "_scale"),
        ((5, 6), (5,), None, "_scale"),
        ((5, 6), (), None, "_scale"),
        ((5, 6), (1,), None, "_scale"),
        ((2, 5, 6), (2,), None, "_scale"),
        ((2, 5, 6), (2, 1, 1), None, "_scale"),
        ((2, 5, 6), (2, 5, 1), None, "_scale"),
    ],
)
@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
def test_scales(
    tmp_path: Path,
    shape: tuple[int, ...],
    scale_shape: tuple[int, ...],
    blocks: tuple[int, int] | None,
    suffix: str,
    scale_dtype: str,
) -> None:
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 127, shape, dtype=np.uint8) | rng.integers(0, 2, shape, dtype=np.uint8) << 7
    scale = np.exp2(rng.integers(-9, 3, scale_shape)).astype(np.float32) * np.float32(1.5)
    stored = scale if scale_dtype == "float32" else (scale.view(np.uint32) >> 16).astype(np.uint16)
    config = {"quantization_config": {"quant_method": "fp8", **({"weight_block_size": list(blocks)} if blocks else {})}}
    shards = {"m1.safetensors": {"a.weight": codes}, "m2.safetensors": {"a.weight" + suffix: stored}}
    model = write_model(tmp_path, shards, config=config, dtypes={"a.weight": "F8_E4M3"})
    if blocks:
        twin = dense(codes, scale, blocks)
    else:
        lead, rows = shape[:-2], shape[-2]
        per = scale.reshape(*lead, -1, 1) if scale.size > 1 else np.full((*lead, 1, 1), scale.reshape(-1)[0])
        twin = dense(codes, per, (1 if per.shape[-2] == rows else rows, shape[-1]))
    twin = twin.reshape(-1, shape[-1])
    with open_checkpoint(str(model)) as checkpoint:
        assert list(checkpoint.tensors) == ["a.weight"]
        assert checkpoint.folded == {"a.weight" + suffix: "a.weight"}
        for start in range(0, len(twin), 3):
            stop = min(len(twin), start + 4)
            found = checkpoint.read_rows("a.weight", start, stop)
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found, twin[start:stop])


def test_activation_scales_are_left_out_with_the_reason(tmp_path: Path) -> None:
    arrays = {"a.weight": np.ones((2, 3), np.uint8), "a.weight_scale": np.float32(2), "a.input_scale": np.float32(3)}
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    config = {"quantization_config": {"quant_method": "compressed-tensors", "format": "float-quantized"}}
    model = write_model(tmp_path, {"model.safetensors": arrays}, config=config, dtypes={"a.weight": "F8_E4M3"})
    with open_checkpoint(str(model)) as checkpoint:
        assert list(checkpoint.tensors) == ["a.weight"]
        assert list(checkpoint.left_out) == ["a.input_scale"]


@pytest.mark.parametrize(
    ("scale", "error"),
    [
        (None, MalformedInputError),
        (np.ones((2, 2), np.float32), MalformedInputError),
        (np.ones(0, np.float32), MalformedInputError),
        (np.ones((1, 1), np.int64), UnsupportedError),
    ],
)
def test_wrong_scales(tmp_path: Path, scale: np.ndarray | None, error: type[Exception]) -> None:
    arrays: dict[str, np.ndarray] = {"a.weight": np.ones((128, 100), np.uint8)}
    if scale is not None:
        arrays["a.weight_scale_inv"] = scale
    model = write_model(tmp_path, {"model.safetensors": arrays}, config=FP8, dtypes={"a.weight": "F8_E4M3"})
    with pytest.raises(error) as caught:
        open_checkpoint(str(model))
    assert caught.value.tensor in arrays  # type: ignore[attr-defined]


@pytest.mark.parametrize("blocks", [[0, 128], [128], "128", [1.5, 2], [True, 1], [1 << 70, 1], {}])
def test_wrong_block_size(tmp_path: Path, blocks: Any) -> None:
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": blocks}}
    arrays = {"a.weight": np.ones((2, 3), np.uint8), "a.weight_scale_inv": np.ones((1, 1), np.float32)}
    model = write_model(tmp_path, {"model.safetensors": arrays}, config=config, dtypes={"a.weight": "F8_E4M3"})
    with pytest.raises(MalformedInputError, match="block size"):
        open_checkpoint(str(model))


def test_few_scales_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SCALES_KEPT", 2)
    arrays: dict[str, np.ndarray] = {}
    for i in range(5):
        arrays[f"{i}.weight"] = np.full((2, 3), 0x38, np.uint8)  # 1.0
        arrays[f"{i}.weight_scale"] = np.array(float(i + 1), np.float32)
    dtypes = {f"{i}.weight": "F8_E4M3" for i in range(5)}
    config = {"quantization_config": {"quant_method": "fp8"}}
    model = write_model(tmp_path, {"model.safetensors": arrays}, config=config, dtypes=dtypes)
    with open_checkpoint(str(model)) as checkpoint:
        for i in (0, 1, 2, 3, 4, 0, 4, 1):
            assert (checkpoint.read_rows(f"{i}.weight", 0, 2) == i + 1).all()
            assert len(checkpoint._scales) <= 2


# Which model


@pytest.mark.parametrize(
    "name", ["./nowhere", "/nowhere/at/all", "a/b/c", "", "~/nowhere-at-all", "a/", "..", "a\0b/c/d"]
)
def test_no_such_directory(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((UsageError, MalformedInputError)) as caught:
        open_checkpoint(name)
    assert caught.value.remedy


def test_a_file_is_not_a_model(model: Path) -> None:
    with pytest.raises(UsageError, match="directory"):
        open_checkpoint(str(model / "model.safetensors"))
    (model / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(UsageError, match="a file of another kind"):
        open_checkpoint(str(model / "x.gguf"))


def test_a_directory_has_no_revision(model: Path) -> None:
    with pytest.raises(UsageError, match="revision"):
        open_checkpoint(str(model), revision="main")


@given(st.integers(0, 3), st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutated_model_directories_raise_only_ours(model: Path, which: int, data: st.DataObject) -> None:
    from llm_quantize.errors import LlmQuantizeError

    shards = {"a.safetensors": {"x": ARRAYS["f32"]}, "b.safetensors": {"y": ARRAYS["f16"]}}
    place = write_model(model / "sharded", shards, config=FP8)
    name = ["config.json", "model.safetensors.index.json", "a.safetensors", "b.safetensors"][which]
    raw = bytearray((place / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw)))
        raw[at : at + data.draw(st.integers(0, 4))] = data.draw(
            st.binary(max_size=4) | st.sampled_from([b"../", b"null"])
        )
    (place / name).write_bytes(raw)
    reading: Callable[..., Any] = open_checkpoint
    try:
        with reading(str(place)) as checkpoint:
            for tensor in checkpoint.tensors:
                checkpoint.read_rows(tensor, 0, checkpoint.matrix(tensor)[0])
    except LlmQuantizeError as error:
        assert error.exit_code in (3, 4, 6), json.dumps(error.to_dict())  # noqa: PT017


def test_the_built_in_model_has_a_name_of_its_own(demo_model: Path) -> None:
    with open_checkpoint("builtin:demo-llama") as checkpoint:
        assert (checkpoint.directory, checkpoint.name) == (demo_model, "demo-llama")
    with pytest.raises(UsageError, match="revisions"):
        open_checkpoint("builtin:demo-llama", revision="main")
