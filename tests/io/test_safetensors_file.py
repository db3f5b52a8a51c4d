"""The safetensors header: every rule of the format, broken one at a time."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from llm_quantize.errors import AccessError, LlmQuantizeError, MalformedInputError, ResourceError, UnsupportedError
from llm_quantize.io.safetensors_file import DTYPE_BITS, read_header
from tests.safetensors_by_hand import entries, write_raw

A, B = ("F32", (2, 3)), ("BF16", (5,))
GOOD = entries({"a": A, "b": B})
DATA = bytes(34)


def changed(**tensors: Any) -> dict[str, Any]:
    """GOOD with fields of its tensors replaced."""
    return {name: {**GOOD[name], **tensors.get(name, {})} for name in GOOD}


def refused(path: Path, error: type[LlmQuantizeError] = MalformedInputError) -> LlmQuantizeError:
    began = time.process_time()
    with pytest.raises(error) as caught:
        read_header(path)
    assert time.process_time() - began < 1
    assert caught.value.file == str(path)
    assert caught.value.remedy
    return caught.value


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    arrays = {
        "f64": np.arange(6.0).reshape(2, 3),
        "f16": np.ones((3, 1, 2), np.float16),
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
        "i": np.arange(5),
        "名前": np.ones(1, np.uint8),
    }
    path = tmp_path / "x.safetensors"
    save_file(arrays, path, metadata={"format": "pt", "k": "v"})
    header = read_header(path)
    raw = path.read_bytes()
    assert set(header.tensors) == set(arrays)
    assert header.metadata == {"format": "pt", "k": "v"}
    assert header.file_size == len(raw)
    assert header.header_bytes == 8 + int.from_bytes(raw[:8], "little")
    assert header.sha256 == hashlib.sha256(raw[: header.header_bytes]).hexdigest()
    for name, info in header.tensors.items():
        assert (info.shape, info.nbytes, info.elements) == (arrays[name].shape, arrays[name].nbytes, arrays[name].size)
        assert raw[info.offset : info.offset + info.nbytes] == arrays[name].tobytes()
    spans = [(info.offset, info.nbytes) for info in header.tensors.values()]
    assert spans == sorted(spans)


def test_order_of_names_is_not_order_of_bytes(tmp_path: Path) -> None:
    header = dict(reversed(GOOD.items()))
    assert list(read_header(write_raw(tmp_path / "x", header, DATA)).tensors) == ["a", "b"]


def test_padding_after_the_header_and_no_tensors(tmp_path: Path) -> None:
    assert read_header(write_raw(tmp_path / "x", json.dumps(GOOD).encode() + b"   ", DATA)).tensors
    assert read_header(write_raw(tmp_path / "y", b"{}")).tensors == {}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "too short"),
        (b"\x02\0\0\0", "too short"),
        ((0).to_bytes(8, "little"), "empty"),
        ((1).to_bytes(8, "little") + b"{", "empty"),
        ((50).to_bytes(8, "little") + b"{}", "48 bytes are missing"),
        ((1 << 63).to_bytes(8, "little") + b"{}", "beyond"),
        (((1 << 64) - 1).to_bytes(8, "little") + b"{}", "beyond"),
        ((100_000_001).to_bytes(8, "little") + b"{}", "beyond"),
    ],
)
def test_length_field(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    error = refused(path)
    assert says in error.what
    assert error.offset == 0


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (b'{"a": "\xff\xfe"}', "UTF-8"),
        (b"{not json}", "not JSON"),
        (b"[1, 2]", "begin with"),
        (b' {"a": 1}', "begin with"),
        (b"\xef\xbb\xbf{}", "begin with"),
        (b"\0\0\0\0", "begin with"),
        (b'{"a":' * 200_000, "deeply"),
        (b'{"a": ' + json.dumps(GOOD["a"]).encode() + b', "a": ' + json.dumps(GOOD["b"]).encode() + b"}", "twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": 5}', "must be an object"),
        (b'{"__metadata__": 5}', "__metadata__"),
        (b'{"__metadata__": {"a": 5}}', "__metadata__"),
    ],
)
def test_header_text(tmp_path: Path, header: bytes, says: str) -> None:
    error = refused(write_raw(tmp_path / "x.safetensors", header))
    assert says in error.what
    assert error.offset is not None
    assert error.offset >= 8


@pytest.mark.parametrize(
    ("header", "tensor", "says"),
    [
        (changed(b={"data_offsets": [20, 30]}), "b", "overlaps"),
        (changed(b={"data_offsets": [0, 10]}), "a", "overlaps"),
        (changed(b={"data_offsets": [25, 35]}), "b", "hole"),
        (changed(a={"data_offsets": [4, 28]}), "a", "hole"),
        (changed(b={"data_offsets": [34, 24]}), "b", "data_offsets"),
        (changed(a={"data_offsets": [-24, 0]}), "a", "data_offsets"),
        (changed(a={"data_offsets": [0.0, 24]}), "a", "data_offsets"),
        (changed(a={"data_offsets": [0, "24"]}), "a", "data_offsets"),
        (changed(a={"data_offsets": [False, 24]}), "a", "data_offsets"),
        (changed(a={"data_offsets": [0, 24, 30]}), "a", "data_offsets"),
        (changed(a={"data_offsets": None}), "a", "data_offsets"),
        (changed(a={"data_offsets": {"0": 24}}), "a", "data_offsets"),
        (changed(a={"shape": [2, 4]}), "a", "number of bytes"),
        (changed(a={"shape": [-2, -3]}), "a", "shape"),
        (changed(a={"shape": [2.0, 3]}), "a", "shape"),
        (changed(a={"shape": [True, 6]}), "a", "shape"),
        (changed(a={"shape": "23"}), "a", "shape"),
        (changed(a={"shape": [6] + [1] * 40}), "a", "shape"),
        (changed(a={"shape": [1 << 62, 1 << 62]}), "a", "number of bytes"),
        (changed(a={"shape": [(1 << 64) + 2, 3]}), "a", "number of bytes"),
        (changed(a={"dtype": "F4", "shape": [47]}), "a", "number of bytes"),
        ({"a": {"dtype": "F32", "shape": []}}, "a", "incomplete"),
        ({"a": {"shape": [], "data_offsets": [0, 4]}}, "a", "incomplete"),
        ({"a": None}, "a", "object"),
        ({"x\x1b[31m" + "y" * 5000: {}}, None, "incomplete"),
    ],
)
def test_tensor_fields(tmp_path: Path, header: dict[str, Any], tensor: str | None, says: str) -> None:
    error = refused(write_raw(tmp_path / "x.safetensors", header, DATA))
    assert says in error.what
    assert error.offset is not None
    if tensor is not None:
        assert error.tensor == tensor
    text = str(error)
    assert "\x1b" not in text
    assert len(text) < 2000


@pytest.mark.parametrize("dtype", ["F12", "bf16", "", "torch.float32", 5, None, ["F32"], "\x1b[2J"])
def test_unknown_element_type(tmp_path: Path, dtype: Any) -> None:
    error = refused(write_raw(tmp_path / "x.safetensors", changed(a={"dtype": dtype}), DATA), UnsupportedError)
    assert error.tensor == "a"
    assert error.expected is not None
    assert "BF16" in error.expected
    assert "\x1b" not in str(error)


def test_every_known_element_type_is_read(tmp_path: Path) -> None:
    for dtype, bits in DTYPE_BITS.items():
        header = {"t": {"dtype": dtype, "shape": [4, 2], "data_offsets": [0, bits]}}
        assert read_header(write_raw(tmp_path / dtype, header, bytes(bits))).tensors["t"].nbytes == bits


def test_truncated_says_how_much_and_what_is_whole(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "x.safetensors", GOOD, DATA)
    size = path.stat().st_size
    with path.open("rb+") as stream:
        stream.truncate(size - 7)
    error = refused(path)
    assert "7 bytes are missing; 1 of 2 tensors are whole, up to a" in error.what
    assert error.tensor == "b"
    assert error.offset == size - 10
    with path.open("rb+") as stream:
        stream.truncate(size - 34)
    assert "34 bytes are missing; 0 of 2" in refused(path).what


def test_trailing_bytes(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "x.safetensors", GOOD, DATA + b"z")
    error = refused(path)
    assert "belong to none" in error.what
    assert error.offset == path.stat().st_size - 1


@pytest.mark.parametrize("kind", ["fifo", "directory", "absent"])
def test_not_a_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.safetensors"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    refused(path)


@pytest.mark.parametrize(
    ("number", "error"), [(errno.EACCES, AccessError), (errno.EIO, ResourceError), (errno.EMFILE, ResourceError)]
)
def test_the_system_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[LlmQuantizeError]
) -> None:
    path = write_raw(tmp_path / "x.safetensors", GOOD, DATA)

    def refuse(*_args: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    assert os.strerror(number) in refused(path, error).what
    monkeypatch.undo()
    monkeypatch.setattr(os, "preadv", refuse)
    refused(path, error)


def test_a_huge_announced_header_allocates_nothing(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "x.safetensors", b"{}", length=99_999_999)
    tracemalloc.start()
    try:
        refused(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_hundred_thousand_tensors_of_a_sparse_70b_file(tmp_path: Path) -> None:
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {f"layers.{i}.w": ("BF16", (8192, 85)) for i in range(100_000)}
    path = write_raw(tmp_path / "x.safetensors", entries(shapes))
    with path.open("rb+") as stream:
        try:
            stream.truncate(path.stat().st_size + 100_000 * 8192 * 85 * 2)
        except OSError:
            pytest.skip("this file system has no files of 139 GB, not even sparse ones")
    began = time.process_time()
    assert len(read_header(path).tensors) == 100_000
    assert time.process_time() - began < 4  # about 1 s; the bound only catches a quadratic step


@given(st.data())
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutated_files_raise_only_ours_and_never_pass_what_the_library_refuses(
    tmp_path: Path, data: st.DataObject
) -> None:
    raw = bytearray(write_raw(tmp_path / "good", GOOD, DATA).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw)))
        piece = data.draw(st.binary(max_size=3) | st.sampled_from([b"-", b"9", b'"', b"[", b"0.5", b"1e3", b",", b" "]))
        raw[at : at + data.draw(st.integers(0, 3))] = piece
    path = tmp_path / "mutated.safetensors"
    path.write_bytes(raw)
    try:
        header = read_header(path)
    except LlmQuantizeError as error:
        seen = (error.exit_code in (3, 4), error.file)
        assert seen == (True, str(path))
        return
    for info in header.tensors.values():
        assert header.header_bytes <= info.offset <= info.offset + info.nbytes <= len(raw)
        assert info.nbytes * 8 == info.elements * DTYPE_BITS[info.dtype]
    with safe_open(path, framework="numpy") as library:
        assert set(library.keys()) == set(header.tensors)


@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "c"]),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "BF16", "U8", "F4", "X"]),
                "shape": st.lists(st.integers(-1, 4) | st.sampled_from([1 << 63, 10**70, 1.5, None]), max_size=3),
                "data_offsets": st.lists(st.integers(-1, 40) | st.sampled_from([1 << 64, 2.0, "1"]), max_size=3),
            }
        ),
    ),
    st.integers(0, 64),
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_generated_headers(tmp_path: Path, header: dict[str, Any], size: int) -> None:
    path = write_raw(tmp_path / "x.safetensors", header, bytes(size))
    try:
        spans = [(info.offset, info.nbytes) for info in read_header(path).tensors.values()]
    except (MalformedInputError, UnsupportedError):
        return
    assert sum(nbytes for _, nbytes in spans) == size
