"""Importance matrices: the values llama-quantize would use, and hostile files refused by name and place."""

from __future__ import annotations

import errno
import hashlib
import os
import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_quantize.errors import AccessError, MalformedInputError, ResourceError, UnsupportedError, UsageError
from llm_quantize.io import imatrix_file
from llm_quantize.io.imatrix_file import read_imatrix

from ..oracles.legacy_imatrix import random_entry, slow_means, write_gguf_imatrix, write_legacy

DOWN, EXPERTS = "blk.0.ffn_down.weight", "blk.1.ffn_down_exps.weight"


def test_gguf_values_equal_the_slow_twin(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    entries = {DOWN: random_entry(random, 1, 96), EXPERTS: random_entry(random, 5, 64)}
    entries[EXPERTS][1][3] = 0
    path = write_gguf_imatrix(tmp_path / "i.gguf", entries, datasets=["a.txt", "b.txt"], chunks=9)
    found = read_imatrix(path)
    assert (found.datasets, found.chunks) == (("a.txt", "b.txt"), 9)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert set(found.values) == set(entries)
    for name, (sums, counts) in entries.items():
        assert found.values[name].dtype == np.float32
        np.testing.assert_array_equal(found.values[name], slow_means(sums, counts))
    np.testing.assert_array_equal(found.values[EXPERTS][3], 1.0)


def test_legacy_values_equal_float32_division(tmp_path: Path) -> None:
    values = np.random.default_rng(2).lognormal(0, 2, 64).astype(np.float32)
    entries = [(DOWN, 7, values), ("blk.0.attn_q.weight", 0, values[:5]), (EXPERTS, 3, values)]
    found = read_imatrix(write_legacy(tmp_path / "i.dat", entries, chunks=12, dataset="wiki.txt"))
    assert (found.datasets, found.chunks) == (("wiki.txt",), 12)
    np.testing.assert_array_equal(found.values[DOWN][0], [v / np.float32(7) for v in values])
    np.testing.assert_array_equal(found.values["blk.0.attn_q.weight"][0], values[:5])
    rows = found.rows(EXPERTS, (4, 2, 16))
    assert rows is not None
    np.testing.assert_array_equal(rows, (values / np.float32(3)).reshape(4, 16))


def test_a_legacy_file_may_end_after_its_entries(tmp_path: Path) -> None:
    found = read_imatrix(write_legacy(tmp_path / "i.dat", [(DOWN, 1, np.ones(4, np.float32))]))
    assert (found.datasets, found.chunks) == ((), 0)


def test_a_tensor_of_another_size_is_named(tmp_path: Path) -> None:
    entries = {name: random_entry(np.random.default_rng(3), 1, 32) for name in (DOWN, "token_embd.weight")}
    found = read_imatrix(write_gguf_imatrix(tmp_path / "i.gguf", entries))
    assert found.rows("blk.9.attn_q.weight", (8, 32)) is None
    rows = found.rows(DOWN, (8, 32))
    assert rows is not None
    assert rows.shape == (1, 32)
    with pytest.raises(MalformedInputError, match=DOWN):
        found.rows(DOWN, (8, 64))
    with pytest.raises(MalformedInputError, match="4 x 32"):
        found.rows(DOWN, (4, 8, 32))
    assert found.rows("token_embd.weight", (8, 64)) is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
@pytest.mark.parametrize("where", ["sums", "counts", "legacy"])
def test_impossible_values_are_refused(value: float, where: str, tmp_path: Path) -> None:
    sums, counts = random_entry(np.random.default_rng(4), 2, 8)
    if where == "legacy":
        sums[0, 5] = value
        path = write_legacy(tmp_path / "i", [(DOWN, 2, sums[0])])
        assert path.read_bytes()[4 + 4 + len(DOWN) + 8 + 20 :][:4] == struct.pack("<f", value)
    else:
        (sums if where == "sums" else counts).reshape(-1)[1] = value
        path = write_gguf_imatrix(tmp_path / "i", {DOWN: (sums, counts)})
    with pytest.raises(MalformedInputError, match=DOWN) as refused:
        read_imatrix(path)
    if where == "legacy":
        assert refused.value.offset == 4 + 4 + len(DOWN) + 8 + 20


def _gguf(path: Path, *, tensors: dict[str, np.ndarray], keys: bool = True, kind: str = "imatrix") -> Path:
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_type(kind)
    if keys:
        writer.add_array("imatrix.datasets", ["a"])
        writer.add_uint32("imatrix.chunk_count", 1)
        writer.add_uint32("imatrix.chunk_size", 1)
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


ONES = np.ones((2, 8), np.float32)
HOSTILE_GGUF = {
    "no counts": ({"tensors": {"x.in_sum2": ONES}}, "pair of F32"),
    "no sums": ({"tensors": {"x.counts": ONES}}, "pair of F32"),
    "half floats": ({"tensors": {"x.in_sum2": ONES.astype(np.float16), "x.counts": ONES}}, "F16"),
    "sizes": ({"tensors": {"x.in_sum2": ONES, "x.counts": np.ones((3, 1), np.float32)}}, "fit together"),
    "nothing": ({"tensors": {"x.weight": ONES}}, "no entries"),
    "no keys": ({"tensors": {"x.in_sum2": ONES, "x.counts": ONES}, "keys": False}, "imatrix.datasets"),
    "a model": ({"tensors": {"x.in_sum2": ONES, "x.counts": ONES}, "kind": "model"}, "not an importance matrix"),
}


@pytest.mark.parametrize("name", HOSTILE_GGUF)
def test_hostile_gguf(name: str, tmp_path: Path) -> None:
    arguments, message = HOSTILE_GGUF[name]
    with pytest.raises(MalformedInputError, match=message):
        read_imatrix(_gguf(tmp_path / "i.gguf", **arguments))


def _i(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}i", *numbers)


FLOAT = struct.pack("<f", 1.0)
HOSTILE_LEGACY = {
    "empty": b"",
    "two bytes": b"\1\0",
    "no entries": _i(0) + bytes(40),
    "negative entries": _i(-1) + bytes(40),
    "more entries than bytes": _i(1 << 30) + bytes(40),
    "another format": b"PK\x03\x04" + bytes(100),
    "negative name": _i(1, -5) + bytes(40),
    "empty name": _i(1, 0) + bytes(40),
    "huge name": _i(1, 1 << 30) + bytes(40),
    "name not utf-8": _i(1, 2) + b"\xff\xfe" + _i(1, 1) + FLOAT * 4,
    "name with zero": _i(1, 2) + b"a\0" + _i(1, 1) + FLOAT * 4,
    "negative values": _i(1, 2) + b"ab" + _i(1, -1) + FLOAT * 4,
    "no values": _i(1, 2) + b"ab" + _i(1, 0) + FLOAT * 4,
    "huge values": _i(1, 2) + b"ab" + _i(1, (1 << 31) - 1) + FLOAT * 4,
    "values cut": _i(1, 2) + b"ab" + _i(1, 5) + FLOAT * 4,
    "name twice": _i(2) + (_i(2) + b"ab" + _i(1, 2) + FLOAT * 2) * 2,
    "trailer cut": _i(1, 2) + b"ab" + _i(1, 2) + FLOAT * 2 + b"\1\0\0",
    "huge data set": _i(1, 2) + b"ab" + _i(1, 2) + FLOAT * 2 + _i(1, 1 << 30),
}


@pytest.mark.parametrize("name", HOSTILE_LEGACY)
def test_hostile_legacy(name: str, tmp_path: Path) -> None:
    path = tmp_path / "i.dat"
    path.write_bytes(HOSTILE_LEGACY[name])
    with pytest.raises(MalformedInputError) as refused:
        read_imatrix(path)
    assert refused.value.file == str(path)
    assert refused.value.remedy


def test_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        read_imatrix(tmp_path / "absent")
    os.mkfifo(tmp_path / "pipe")
    for name in (".", "pipe"):
        with pytest.raises(AccessError):
            read_imatrix(tmp_path / name)
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    started = time.monotonic()
    with pytest.raises(ResourceError):
        read_imatrix(tmp_path / "sparse")
    assert time.monotonic() - started < 1


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_end_in_our_errors(tmp_path: Path, data: st.DataObject) -> None:
    entries = {DOWN: random_entry(np.random.default_rng(5), 2, 8)}
    kind = data.draw(st.sampled_from(["gguf", "legacy"]))
    path = tmp_path / "i"
    if kind == "gguf":
        write_gguf_imatrix(path, entries)
    else:
        write_legacy(path, [(DOWN, 3, entries[DOWN][0])], chunks=2, dataset="x")
    raw = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(raw) - 1))
    if data.draw(st.booleans()):
        del raw[place:]
    else:
        raw[place] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        values = read_imatrix(path).values
    except (MalformedInputError, UnsupportedError):
        values = {}
    assert all(np.isfinite(rows).all() for rows in values.values())


def test_a_disk_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_legacy(tmp_path / "i", [(DOWN, 2, np.ones(8, np.float32))])

    def fails(_path: Path, _file: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(imatrix_file, "_read_legacy", fails)
    with pytest.raises(ResourceError, match="reading failed") as refused:
        read_imatrix(path)
    assert refused.value.file == str(path)
