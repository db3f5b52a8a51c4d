"""Our statistics file: exact layout before the work, hostile files refused, merging, and whose model it is."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from llm_quantize.errors import (
    AccessError,
    IntegrityError,
    LlmQuantizeError,
    MalformedInputError,
    UnsupportedError,
    UsageError,
)
from llm_quantize.io.safetensors_file import read_header
from llm_quantize.io.statistics_file import (
    KINDS,
    StatisticsIdentity,
    StatisticsLayout,
    StoredTap,
    check_kinds,
    layout_statistics,
    merge_statistics,
    read_statistics,
    refuse_other_model,
)
from llm_quantize.io.statistics_layout import CONTENT, VERSION
from llm_quantize.io.whole_file import write_file

# Odd columns, so that the four-byte arrays end off the eight-byte grid; a block without taps between two with.
BLOCKS = [
    [StoredTap("l0.q", 0, 7, 1, {"q": None, "k": None}), StoredTap("l0.experts", 0, 5, 3, {"e0": 0, "e1": 1, "e2": 2})],
    [],
    [StoredTap("l2.down", 2, 9, 1, {"d": None})],
]
MODEL = {"sha256": "a" * 64, "name": "tiny"}


def identity(text: str = "t", **changes: Any) -> StatisticsIdentity:
    facts = {"sha256": text, "datasets": [f"{text}.txt"], "windows": 4, "tokens": 40, "length": 10}
    return StatisticsIdentity(MODEL, {**facts, **changes})


def values_of(layout: StatisticsLayout, seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    found = {}
    for place in (place for block in layout.places for place in block):
        kind = place.name.rpartition(".")[2]
        values = random.normal(size=place.shape)
        found[place.name] = random.integers(1, 99, place.shape) if kind == "counts" else values
        if kind in ("sum_squares", "absmax"):
            found[place.name] = np.abs(values).astype(np.float32 if kind == "absmax" else np.float64)
    return found


def write(path: Path, *, seed: int = 1, kinds: tuple[str, ...] = KINDS, **text: Any) -> dict[str, np.ndarray]:
    layout = layout_statistics(identity(**text), BLOCKS, kinds)
    arrays = values_of(layout, seed)
    with path.open("wb") as file:
        for piece in layout.whole(arrays.__getitem__):
            file.write(piece)
    assert path.stat().st_size == layout.size
    return arrays


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write(tmp_path / "s.safetensors")
    return tmp_path / "s.safetensors"


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    arrays = write(path)
    with read_statistics(path) as found:
        assert found.kinds == KINDS
        assert found.identity == identity()
        assert found.blocks() == BLOCKS
        for tap in found.taps:
            np.testing.assert_array_equal(found.counts(tap), arrays[f"{tap}.counts"])
            np.testing.assert_array_equal(found.sum_squares(tap), arrays[f"{tap}.sum_squares"])
            np.testing.assert_array_equal(found.sums(tap), arrays[f"{tap}.sums"])
            np.testing.assert_array_equal(found.absmax(tap), arrays[f"{tap}.absmax"])
            hessian = arrays[f"{tap}.hessian"].astype(np.float32)
            np.testing.assert_array_equal(found.array(tap, "hessian"), hessian)
            for matrix in range(found.taps[tap].matrices):
                np.testing.assert_array_equal(found.hessian(tap, matrix), hessian[matrix])
        with pytest.raises(IndexError):
            found.hessian("l0.experts", 3)


def test_the_containers_owner_reads_it(tmp_path: Path) -> None:
    arrays = write(tmp_path / "s.safetensors")
    theirs = load_file(tmp_path / "s.safetensors")
    assert theirs.keys() == arrays.keys() | {CONTENT}
    for name, values in arrays.items():
        np.testing.assert_array_equal(theirs[name], values.astype(theirs[name].dtype))


def test_blocks_are_contiguous_and_cover_the_file() -> None:
    layout = layout_statistics(identity(), BLOCKS, ("imatrix", "absmax"))
    assert [nbytes > 0 for _, nbytes in layout.spans] == [True, False, True]
    at = len(layout.header)
    assert at % 8 == 0
    for offset, nbytes in layout.spans:
        assert offset == at
        at += nbytes
    assert (layout.content.offset, layout.size) == (at, at + layout.content.nbytes)
    assert layout == layout_statistics(identity(), BLOCKS, ("absmax", "imatrix", "imatrix"))


def test_large_arrays_are_written_in_pieces_without_copies() -> None:
    tap = StoredTap("wide", 0, 2048, 1, {"w": None})
    layout = layout_statistics(identity(), [[tap]], ("hessian",))
    hessian = np.ones((1, 2048, 2048), np.float32)
    arrays = {"wide.counts": np.ones(1, np.int64), "wide.hessian": hessian}
    digests: list[bytes] = []
    pieces = list(layout.block_pieces(0, arrays.__getitem__, digests))
    assert digests == [hashlib.sha256(values).digest() for values in arrays.values()]
    assert len(pieces) == 3
    assert max(piece.nbytes for _, piece in pieces) <= 8 << 20
    assert all(np.shares_memory(piece, hessian) for _, piece in pieces[1:])


def test_a_wrong_shape_is_a_bug_of_the_caller() -> None:
    layout = layout_statistics(identity(), BLOCKS, ("imatrix",))
    arrays = values_of(layout, 1) | {"l2.down.counts": np.ones(2, np.int64)}
    with pytest.raises(ValueError, match=r"l2\.down\.counts"):
        list(layout.block_pieces(2, arrays.__getitem__, []))
    with pytest.raises(ValueError, match="0 hashes of 10"):
        layout.content_bytes([])
    twice = [[StoredTap("a", 0, 2, 1, {"w": None}), StoredTap("b", 0, 2, 1, {"w": None})]]
    with pytest.raises(ValueError, match="w stands in two places"):
        layout_statistics(identity(), twice, ("imatrix",))


def test_kinds(tmp_path: Path) -> None:
    assert check_kinds(["absmax", "imatrix", "absmax"]) == ("imatrix", "absmax")
    for wrong in ([], ["imatrix", "median"]):
        with pytest.raises(UsageError, match="no such statistic"):
            check_kinds(wrong)
    write(tmp_path / "s", kinds=("imatrix",))
    with read_statistics(tmp_path / "s") as found, pytest.raises(UsageError, match="no hessian") as refused:
        found.hessian("l0.q")
    assert "--collect imatrix,hessian" in str(refused.value)


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the header, keeping the data."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    fields = json.loads(data[8 : 8 + length])
    change(fields)
    header = json.dumps(fields).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])


def reseal(path: Path) -> None:
    """The hashes of what stands in the file now, as if it had been written so."""
    header = read_header(path)
    digests = [hashlib.sha256(path.read_bytes()[: header.header_bytes]).digest()]
    data = bytearray(path.read_bytes())
    for name, info in header.tensors.items():
        if name != CONTENT:
            each = info.nbytes // info.shape[0]
            parts = [data[info.offset + i * each :][:each] for i in range(info.shape[0])]
            digests += [hashlib.sha256(part).digest() for part in parts]
    at = header.tensors[CONTENT].offset
    data[at:] = b"".join(digests)
    path.write_bytes(data)


def edit_taps(path: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    def apply(fields: dict[str, Any]) -> None:
        taps = json.loads(fields["__metadata__"]["taps"])
        change(taps)
        fields["__metadata__"]["taps"] = json.dumps(taps)

    edit(path, apply)


def put(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda fields: fields["__metadata__"].update({key: value if isinstance(value, str) else json.dumps(value)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fields: fields.pop("__metadata__"), "does not hold calibration statistics"),
        (put("format", "something else"), "does not hold calibration statistics"),
        (lambda fields: fields["__metadata__"].pop("taps"), "no taps"),
        (put("taps", "["), "not JSON"),
        (put("taps", "{}"), "not a number and a list"),
        (put("blocks", -1), "not a number and a list"),
        (put("blocks", True), "not a number and a list"),
        (put("blocks", 0), "not a number and a list"),
        (put("taps", []), "not a number and a list"),
        (lambda fields: fields.update({"other": fields.pop(CONTENT)}), "do not belong together"),
        (lambda fields: fields.update({"other": fields.pop("l0.q.counts")}), "do not belong together"),
        (put("model", {"name": "x"}), "model has no sha256"),
        (put("text", []), "text has no sha256"),
        (put("text", {"sha256": "t", "datasets": [3]}), "datasets"),
        (put("text", {"sha256": "t", "datasets": [], "windows": -1}), "windows"),
        (put("text", {"sha256": "t", "datasets": [], "windows": 1, "tokens": "many"}), "tokens"),
        (put("kinds", []), "kinds"),
        (put("kinds", ["median"]), "kinds"),
        (put("kinds", ["imatrix"]), "do not belong together"),
        (put("kinds", [["imatrix"]]), "kinds"),
        (put("blocks", 2), "block is out of bounds"),
    ],
)
def test_damaged_metadata_is_refused(path: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    edit(path, change)
    with pytest.raises(MalformedInputError, match=message):
        read_statistics(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda taps: taps[0].pop("columns"), "incomplete"),
        (lambda taps: taps[0].update(columns=8), "not what its tap calls for"),
        (lambda taps: taps[0].update(columns=1 << 40), "columns is out of bounds"),
        (lambda taps: taps[0].update(matrices=0), "matrices is out of bounds"),
        (lambda taps: taps[0].update(columns=7.0), "columns is out of bounds"),
        (lambda taps: taps[1]["tensors"].update(e2=3), "no such matrix"),
        (lambda taps: taps[1]["tensors"].update(q=1), "stands twice"),
        (lambda taps: taps[1].update(tensors=["e"]), "wrong type"),
        (lambda taps: taps[1].update(name=3), "wrong type"),
        (lambda taps: taps.append(taps[0]), "stands twice"),
        (lambda taps: taps.pop(), "do not belong together"),
        (lambda taps: taps[0].update(name="other"), "do not belong together"),
    ],
)
def test_damaged_taps_are_refused(path: Path, change: Callable[[list[dict[str, Any]]], None], message: str) -> None:
    edit_taps(path, change)
    with pytest.raises(MalformedInputError, match=message):
        read_statistics(path)


@pytest.mark.parametrize("version", [VERSION - 1, VERSION + 1])
def test_another_version_is_refused(path: Path, version: int) -> None:
    edit(path, put("format_version", str(version)))
    with pytest.raises(UnsupportedError, match="another version"):
        read_statistics(path)


def test_every_truncation_is_refused(path: Path) -> None:
    data = path.read_bytes()
    for size in [*range(0, 64, 7), len(data) // 2, len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(MalformedInputError):
            read_statistics(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
@pytest.mark.parametrize("suffix", ["sum_squares", "sums", "absmax", "hessian", "counts"])
def test_impossible_values_are_refused_with_their_place(path: Path, suffix: str, value: float) -> None:
    layout = layout_statistics(identity(), BLOCKS, KINDS)
    place = next(p for block in layout.places for p in block if p.name == f"l0.experts.{suffix}")
    size = place.nbytes // int(np.prod(place.shape))
    at = place.offset + 2 * size
    if suffix == "counts":
        value = -1
    dtype = {"F64": "<d", "F32": "<f", "I64": "<q"}[place.dtype]
    with path.open("r+b") as file:
        file.seek(at)
        file.write(struct.pack(dtype, value))
    with read_statistics(path) as found, pytest.raises(IntegrityError, match="changed") as changed:
        found.array("l0.experts", suffix)
    assert changed.value.tensor == f"l0.experts.{suffix}"
    reseal(path)
    with read_statistics(path) as found:
        if value == -1 and suffix in ("sums", "hessian"):
            found.array("l0.experts", suffix)
            return
        with pytest.raises(MalformedInputError, match="cannot be") as refused:
            found.array("l0.experts", suffix)
    assert refused.value.offset == at


def test_a_file_that_changes_while_it_is_open_is_noticed(path: Path) -> None:
    with read_statistics(path) as found:
        write(path, seed=2)
        os.utime(path, ns=(1, 1))
        with pytest.raises(IntegrityError, match="changed"):
            found.counts("l0.q")


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such"):
        read_statistics(tmp_path / "absent")
    with pytest.raises(AccessError):
        read_statistics(tmp_path)


def test_another_model_is_refused_naming_both(path: Path) -> None:
    with read_statistics(path) as found:
        refuse_other_model(found, "a" * 64)
        with pytest.raises(IntegrityError) as refused:
            refuse_other_model(found, "b" * 64)
    assert "a" * 64 in str(refused.value)
    assert "b" * 64 in str(refused.value)


def test_merging_adds_in_order(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("one", "two", "three")]
    arrays = [write(path, seed=seed, text=path.name) for seed, path in enumerate(paths)]
    merge_statistics(paths, tmp_path / "all")
    with read_statistics(tmp_path / "all") as found:
        assert found.blocks() == BLOCKS
        assert found.identity.model == MODEL
        text = found.identity.text
        assert (text["tokens"], text["windows"], text["length"]) == (120, 12, 10)
        assert text["datasets"] == ["one.txt", "two.txt", "three.txt"]
        assert [part["sha256"] for part in text["parts"]] == ["one", "two", "three"]
        for name in arrays[0]:
            tap, suffix = name.rsplit(".", 1)
            parts = [found_[name] for found_ in arrays]
            if suffix == "hessian":
                parts = [part.astype(np.float32).astype(np.float64) for part in parts]
            expected = parts[0]
            for part in parts[1:]:
                expected = np.maximum(expected, part) if suffix == "absmax" else expected + part
            values = found.array(tap, suffix)
            np.testing.assert_array_equal(values, expected.astype(values.dtype))
    merge_statistics(paths[::-1], tmp_path / "other order")
    assert (tmp_path / "all").read_bytes() != (tmp_path / "other order").read_bytes()
    mine = identity("mine", tokens=7)
    merge_statistics(paths, tmp_path / "mine", identity=mine)
    with read_statistics(tmp_path / "mine") as found:
        assert found.identity == mine


def test_what_cannot_be_merged(tmp_path: Path) -> None:
    write(tmp_path / "one", text="one")
    write(tmp_path / "kinds", text="two", kinds=("imatrix",))
    write(tmp_path / "model", text="three")
    edit(tmp_path / "model", put("model", {"sha256": "b" * 64}))
    reseal(tmp_path / "model")
    with pytest.raises(UsageError, match="two files"):
        merge_statistics([tmp_path / "one"], tmp_path / "out")
    with pytest.raises(UsageError, match="count twice"):
        merge_statistics([tmp_path / "one", tmp_path / "one"], tmp_path / "out")
    with pytest.raises(UsageError, match="different kinds"):
        merge_statistics([tmp_path / "one", tmp_path / "kinds"], tmp_path / "out")
    with pytest.raises(IntegrityError, match="another model"):
        merge_statistics([tmp_path / "one", tmp_path / "model"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def read_all(path: Path) -> None:
    with read_statistics(path) as found:
        for tap in found.taps:
            for suffix in ("counts", "sum_squares", "sums", "absmax", "hessian"):
                found.array(tap, suffix)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_flipped_byte_is_refused(path: Path, data: st.DataObject) -> None:
    """Whatever is changed, in header, values or hashes, reading everything ends in one of our errors."""
    whole = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    other = path.with_name("flipped")
    other.write_bytes(whole)
    with pytest.raises(LlmQuantizeError):
        read_all(other)


def test_a_flipped_bit_of_a_hessian_is_named(path: Path) -> None:
    header = read_header(path)
    info = header.tensors["l0.experts.hessian"]
    data = bytearray(path.read_bytes())
    data[info.offset + 100 + 7] ^= 1  # of the second of three matrices of 100 bytes
    path.write_bytes(data)
    with read_statistics(path) as found:
        found.hessian("l0.experts", 0)
        found.hessian("l0.experts", 2)
        with pytest.raises(IntegrityError, match="changed") as refused:
            found.hessian("l0.experts", 1)
    assert (refused.value.tensor, refused.value.offset) == ("l0.experts.hessian", info.offset + 100)
    assert refused.value.exit_code == 8


def test_the_hash_of_the_content_is_of_all_values_and_of_nothing_else(tmp_path: Path) -> None:
    def content(name: str, **more: Any) -> str:
        write(tmp_path / name, **more)
        with read_statistics(tmp_path / name) as found:
            return found.content_sha256

    first = content("one")
    assert content("two", text="another name of the text") == first
    assert content("three", seed=2) != first
    data = bytearray((tmp_path / "one").read_bytes())
    data[read_header(tmp_path / "one").tensors["l2.down.hessian"].offset + 4] ^= 1  # not on the diagonal
    (tmp_path / "one").write_bytes(data)
    reseal(tmp_path / "one")
    with read_statistics(tmp_path / "one") as found:
        assert found.content_sha256 != first


def test_a_dense_input_that_saw_no_token_is_refused(path: Path) -> None:
    data = bytearray(path.read_bytes())
    info = read_header(path).tensors["l0.q.counts"]
    data[info.offset : info.offset + 8] = bytes(8)
    path.write_bytes(data)
    reseal(path)
    with read_statistics(path) as found, pytest.raises(MalformedInputError, match="no token") as refused:
        found.counts("l0.q")
    assert (refused.value.tensor, refused.value.exit_code) == ("l0.q.counts", 3)


def test_statistics_of_version_1_are_refused_saying_why(path: Path) -> None:
    edit(path, put("format_version", "1"))
    with pytest.raises(UnsupportedError, match="earlier versions could not tell every damage") as refused:
        read_statistics(path)
    assert "analyze importance" in str(refused.value)


def test_a_whole_file_or_none(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file"
    assert write_file(target, [b"abc", memoryview(b"de")]) == 5
    assert target.read_bytes() == b"abcde"
    with pytest.raises(UsageError, match="exists"):
        write_file(target, [b"x"])

    def broken() -> Any:
        yield b"half"
        raise MalformedInputError("a part is bad")

    with pytest.raises(MalformedInputError):
        write_file(target, broken(), replace=True)
    assert target.read_bytes() == b"abcde"
    assert write_file(target, [b""], replace=True) == 0
    assert [entry.name for entry in target.parent.iterdir()] == ["file"]
    (tmp_path / "link").symlink_to(target)
    for wrong in (tmp_path / "link", tmp_path / "new"):
        with pytest.raises(AccessError, match="not a regular file"):
            write_file(wrong, [b"x"], replace=True)
