"""The GGUF container: what we lay out, its owner reads; what is hostile is refused, with an offset, soon and small."""

from __future__ import annotations

import os
import struct
import time
import tracemalloc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_quantize import pipeline
from llm_quantize.errors import AccessError, LlmQuantizeError, MalformedInputError, UnsupportedError, UsageError
from llm_quantize.io import gguf_file
from llm_quantize.io.gguf_file import MetaValue, layout_gguf, read_gguf, tensor_bytes
from llm_quantize.pipeline import Options
from llm_quantize.runtimes.llama_cpp import LlamaCpp

V = GGUFValueType
T = GGMLQuantizationType

METADATA: dict[str, MetaValue] = {
    "general.architecture": MetaValue(V.STRING, "llama"),
    "general.name": MetaValue(V.STRING, "名前 🦙"),
    "a.u8": MetaValue(V.UINT8, 255),
    "a.i8": MetaValue(V.INT8, -128),
    "a.u16": MetaValue(V.UINT16, 65_535),
    "a.i16": MetaValue(V.INT16, -32_768),
    "a.u32": MetaValue(V.UINT32, 2**32 - 1),
    "a.i32": MetaValue(V.INT32, -(2**31)),
    "a.u64": MetaValue(V.UINT64, 2**64 - 1),
    "a.i64": MetaValue(V.INT64, -(2**63)),
    "a.f32": MetaValue(V.FLOAT32, 1.5),
    "a.f64": MetaValue(V.FLOAT64, 1e300),
    "a.bool": MetaValue(V.BOOL, True),
    "a.strings": MetaValue(V.ARRAY, ["", "x", "日本"], V.STRING),
    "a.numbers": MetaValue(V.ARRAY, [1, -2, 3], V.INT32),
    "a.floats": MetaValue(V.ARRAY, [0.5, -0.25], V.FLOAT32),
    "a.bools": MetaValue(V.ARRAY, [True, False], V.BOOL),
    "a.empty": MetaValue(V.ARRAY, [], V.STRING),
}
TENSORS: list[tuple[str, tuple[int, ...], GGMLQuantizationType]] = [
    ("token_embd.weight", (3, 256), T.Q4_K),
    ("norm.weight", (5,), T.F32),
    ("experts.weight", (2, 3, 64), T.Q8_0),
    ("four.weight", (2, 1, 3, 32), T.BF16),
    ("n" * 63, (1, 1), T.F16),
]


def write(path: Path, metadata: Mapping[str, MetaValue], tensors: Sequence[Any], **options: Any) -> Path:
    layout = layout_gguf(metadata, tensors, **options)
    body = bytearray(layout.size)
    body[: len(layout.header)] = layout.header
    for number, entry in enumerate(layout.tensors):
        body[entry.offset : entry.offset + entry.nbytes] = bytes([number + 1]) * entry.nbytes
    path.write_bytes(body)
    return path


@pytest.mark.parametrize("alignment", [32, 8, 256])
def test_the_owner_reads_what_we_lay_out(tmp_path: Path, alignment: int) -> None:
    metadata = {**METADATA, "general.alignment": MetaValue(V.UINT32, alignment)}
    path = write(tmp_path / "m.gguf", metadata, TENSORS, alignment=alignment)
    layout = layout_gguf(metadata, TENSORS, alignment=alignment)
    owner = GGUFReader(path)
    for key, value in metadata.items():
        assert owner.fields[key].contents() == value.value, key
        assert owner.fields[key].types[0] == value.type
    ours = read_gguf(path)
    assert dict(ours.metadata) == metadata
    assert ours.tensors == layout.tensors
    assert (ours.data_start, ours.file_size, ours.alignment) == (len(layout.header), layout.size, alignment)
    assert len(owner.tensors) == len(TENSORS)
    for number, (entry, theirs) in enumerate(zip(ours.tensors, owner.tensors, strict=True)):
        assert entry.name == theirs.name
        assert entry.type == theirs.tensor_type
        assert list(reversed(entry.shape)) == theirs.shape.tolist()
        assert (entry.offset, entry.nbytes) == (int(theirs.data_offset), int(theirs.n_bytes))
        assert set(theirs.data.tobytes()) == {number + 1}
        assert entry.offset % alignment == 0


def test_every_type_has_the_owner_s_size(tmp_path: Path) -> None:
    tensors = [(kind.name, (3, 2 * GGML_QUANT_SIZES[kind][0]), kind) for kind in T]
    path = write(tmp_path / "m.gguf", {}, tensors)
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(path).tensors}
    assert {entry.name: entry.nbytes for entry in read_gguf(path).tensors} == sizes
    with pytest.raises(ValueError, match="multiple"):
        tensor_bytes((2, 255), T.Q6_K)


def test_layout_refuses_what_the_runtime_cannot_hold() -> None:
    with pytest.raises(UsageError):
        layout_gguf({}, [("n" * 64, (1,), T.F32)])
    for value in (MetaValue(V.UINT8, 256), MetaValue(V.ARRAY, [1, 2**40], V.INT32), MetaValue(V.FLOAT32, "x")):
        with pytest.raises(MalformedInputError, match="fit"):
            layout_gguf({"key": value}, [])
    with pytest.raises(ValueError, match="item type"):
        layout_gguf({"key": MetaValue(V.ARRAY, [[1]], V.ARRAY)}, [])


def test_llama_cpp_loads_a_split_model(demo_model: Path, tmp_path: Path) -> None:
    (whole,) = pipeline.quantize(str(demo_model), levels=["Q8_0"], output_dir=tmp_path / "whole")
    (split,) = pipeline.quantize(
        str(demo_model), levels=["Q8_0"], output_dir=tmp_path, options=Options(split_max_size=2_500_000)
    )
    parts = sorted(split.path.glob("*.gguf"))
    assert len(parts) > 1
    counts = {key: [read_gguf(part).metadata[f"split.{key}"].value for part in parts] for key in ("no", "count")}
    assert counts == {"no": list(range(len(parts))), "count": [len(parts)] * len(parts)}
    with LlamaCpp(whole.path, threads=1) as one, LlamaCpp(parts[0], threads=1) as several:
        ids = one.tokenize("It is a truth universally acknowledged", add_special=True, parse_special=False)
        np.testing.assert_array_equal(one.logits(ids), several.logits(ids))


# hostile files, written field by field


def text(value: bytes | str) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def key(name: bytes | str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: bytes | str = "t", dims: Sequence[int] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def file(
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    *,
    counts: tuple[int, int] | None = None,
    data: int = 4096,
) -> bytes:
    tensor_count, key_count = counts or (len(tensors), len(keys))
    head = b"GGUF" + struct.pack("<IQQ", 3, tensor_count, key_count) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


U32, STRING, ARRAY = 4, 8, 9
HUGE = (1 << 32, 1 << 62, 1 << 63, (1 << 64) - 1)

HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "three bytes": b"GGU",
    "not GGUF": b"PK\3\4" + bytes(100),
    "only magic": b"GGUF",
    "ends inside counts": b"GGUF" + struct.pack("<IQ", 3, 1),
    "ends inside a key": file(counts=(0, 1), data=0)[:-1] + b"\xff",
    "key that is not UTF-8": file([key(b"\xff\xfe", U32, bytes(4))]),
    "string that is not UTF-8": file([key("k", STRING, text(b"\xc0\x80"))]),
    "string in an array that is not UTF-8": file([key("k", ARRAY, struct.pack("<IQ", STRING, 1) + text(b"\xff"))]),
    "duplicate key": file([key("k", U32, bytes(4))] * 2),
    "empty key": file([key("", U32, bytes(4))]),
    "NUL in key": file([key("a\0b", U32, bytes(4))]),
    "1 MB key": file([key("k" * (1 << 20), U32, bytes(4))]),
    "unknown value type": file([key("k", 13, bytes(8))]),
    "huge value type": file([key("k", 0xFFFFFFFF, bytes(8))]),
    "nested array": file([key("k", ARRAY, struct.pack("<IQ", ARRAY, 1) + struct.pack("<IQ", U32, 1) + bytes(4))]),
    "deeply nested arrays": file([key("k", ARRAY, struct.pack("<IQ", ARRAY, 1) * 200_000)]),
    "array of unknown items": file([key("k", ARRAY, struct.pack("<IQ", 99, 1))]),
    "alignment 0": file([key("general.alignment", U32, struct.pack("<I", 0))]),
    "alignment 3": file([key("general.alignment", U32, struct.pack("<I", 3))]),
    "alignment 4": file([key("general.alignment", U32, struct.pack("<I", 4))]),
    "alignment 2^31": file([key("general.alignment", U32, struct.pack("<I", 1 << 31))]),
    "alignment as text": file([key("general.alignment", STRING, text("32"))]),
    "alignment as array": file([key("general.alignment", ARRAY, struct.pack("<IQ", U32, 1) + bytes(4))]),
    "no dimensions": file(tensors=[tensor(dims=())]),
    "five dimensions": file(tensors=[tensor(dims=(1,) * 5)]),
    "dimension 0": file(tensors=[tensor(dims=(32, 0))]),
    "product overflows to little": file(tensors=[tensor(dims=(1 << 32, 1 << 32))]),
    "product overflows to one": file(tensors=[tensor(dims=(1 << 63, 2, 1 << 63, 2))]),
    "row not whole blocks": file(tensors=[tensor(dims=(31,), kind=8)]),
    "removed type": file(tensors=[tensor(kind=4)]),
    "removed repacked type": file(tensors=[tensor(kind=31)]),
    "type out of range": file(tensors=[tensor(kind=1000)]),
    "type -1": file(tensors=[tensor(kind=0xFFFFFFFF)]),
    "empty tensor name": file(tensors=[tensor(name="")]),
    "NUL in tensor name": file(tensors=[tensor(name="a\0")]),
    "1 MB tensor name": file(tensors=[tensor(name="t" * (1 << 20))]),
    "tensor name not UTF-8": file(tensors=[tensor(name=b"\x80")]),
    "duplicate tensor": file(tensors=[tensor(), tensor(offset=128)]),
    "overlap": file(tensors=[tensor("a"), tensor("b", offset=96)]),
    "same place": file(tensors=[tensor("a"), tensor("b")]),
    "unaligned": file(tensors=[tensor(offset=4)]),
    "offset at the end": file(tensors=[tensor(offset=4096)]),
    "truncated data": file(tensors=[tensor(dims=(1024,))], data=4095),
    "one byte short": file(tensors=[tensor(dims=(1024,))])[:-1],
    "million keys declared": file(counts=(0, 1_000_000), data=20_000_000),
    "million tensors declared": file(counts=(1_000_000, 0), data=40_000_000),
    "too many array items": file([key("k", ARRAY, struct.pack("<IQ", 0, 5_000_000) + bytes(5_000_000))]),
    "too many items in all arrays": file(
        [key(f"k{n}", ARRAY, struct.pack("<IQ", 0, 1_000_000) + bytes(1_000_000)) for n in range(5)]
    ),
}
for number in HUGE:
    HOSTILE |= {
        f"{number:#x} keys": file(counts=(0, number)),
        f"{number:#x} tensors": file(counts=(number, 0)),
        f"key of {number:#x} bytes": file(counts=(0, 1), data=0)[:24] + struct.pack("<Q", number) + bytes(64),
        f"string of {number:#x} bytes": file([key("k", STRING, struct.pack("<Q", number))]),
        f"array of {number:#x} bytes": file([key("k", ARRAY, struct.pack("<IQ", 0, number))]),
        f"array of {number:#x} strings": file([key("k", ARRAY, struct.pack("<IQ", STRING, number))]),
        f"dimension {number:#x}": file(tensors=[tensor(dims=(number,))]),
        f"offset {number:#x}": file(tensors=[tensor(offset=number & ~31)]),
    }


def refused(path: Path) -> LlmQuantizeError:
    """The error of reading ``path``, which comes within a second and 64 MiB."""
    tracemalloc.start()
    began = time.process_time()
    try:
        with pytest.raises((MalformedInputError, UnsupportedError)) as caught:
            read_gguf(path)
        seconds, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert seconds < 1.0
    assert peak < 64 << 20
    assert caught.value.file == str(path)
    assert caught.value.offset is not None
    return caught.value


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(HOSTILE[kind])
    error = refused(path)
    assert type(error) is MalformedInputError
    assert len(str(error)) < 2000
    assert 0 <= (error.offset or 0) <= len(HOSTILE[kind])


@pytest.mark.parametrize("version", [0, 1, 4, 99, 0x03000000, 0xFFFFFFFF])
def test_other_versions_are_unsupported(tmp_path: Path, version: int) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", version, 0, 0) + bytes(64))
    error = refused(path)
    assert type(error) is UnsupportedError
    assert error.offset == 4
    assert ("big-endian" in error.what) == (version == 0x03000000)


def test_truncated_anywhere(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.gguf", METADATA, TENSORS).read_bytes()
    path = tmp_path / "m.gguf"
    last = read_gguf(tmp_path / "whole.gguf").tensors[-1]
    path.write_bytes(whole[: last.offset + last.nbytes])
    assert read_gguf(path).tensors[-1] == last
    for length in reversed(range(last.offset + last.nbytes)):
        os.truncate(path, length)
        with pytest.raises(MalformedInputError) as caught:
            read_gguf(path)
        assert caught.value.offset is not None
        assert caught.value.offset <= length


def test_large_metadata_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(file([key("k", STRING, struct.pack("<Q", 60 << 20))], data=0))
    os.truncate(path, 1 << 40)  # a hole: 1 TB that is not there
    assert read_gguf_peak(path) < 200 << 20
    path.write_bytes(file([key("k", STRING, struct.pack("<Q", 1 << 30))], data=0))
    os.truncate(path, 1 << 40)
    assert "too long" in refused(path).what
    monkeypatch.setattr(gguf_file, "MAX_METADATA_BYTES", 3 << 20)
    path.write_bytes(file([key(f"k{n}", STRING, text(b"x" * (1 << 20))) for n in range(4)]))
    assert "metadata is larger" in refused(path).what


def read_gguf_peak(path: Path) -> int:
    tracemalloc.start()
    try:
        read_gguf(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_real_vocabularies_fit_the_limits(tmp_path: Path) -> None:
    """As many items as the largest vocabularies have, strings over every window's edge, in about a second."""
    tokens = [f"token {number}" + "é" * (number % 7) for number in range(260_000)]
    metadata = {
        "t": MetaValue(V.ARRAY, tokens, V.STRING),
        "m": MetaValue(V.ARRAY, tokens * 2, V.STRING),
        "s": MetaValue(V.ARRAY, [0.5] * len(tokens), V.FLOAT32),
    }
    path = write(tmp_path / "m.gguf", metadata, TENSORS)
    began = time.process_time()
    found = read_gguf(path)
    assert time.process_time() - began < 3.0
    assert found.metadata["t"].value == tokens
    assert found.metadata["m"].value == tokens * 2


def test_things_that_are_not_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        read_gguf(tmp_path / "absent.gguf")
    os.mkfifo(tmp_path / "fifo.gguf")
    for path in (tmp_path / "fifo.gguf", tmp_path):
        with pytest.raises(AccessError, match="regular"):
            read_gguf(path)


def test_file_that_shrinks_or_fails_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "m.gguf", METADATA, TENSORS)
    monkeypatch.setattr(os, "pread", lambda *_: b"")
    with pytest.raises(LlmQuantizeError) as caught:
        read_gguf(path)
    assert caught.value.exit_code == 8

    def broken(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", broken)
    with pytest.raises(LlmQuantizeError) as caught:
        read_gguf(path)
    assert caught.value.exit_code == 5


WHOLE = layout_gguf({k: v for k, v in METADATA.items() if k != "a.strings"}, TENSORS)
BODY = WHOLE.header + bytes(WHOLE.size - len(WHOLE.header))
INTERESTING = st.sampled_from(
    [0, 1, 2, 3, 8, 9, 31, 32, 127, 128, 255, 1 << 16, 1 << 31, 1 << 32, 1 << 62, (1 << 64) - 1]
)


def _outcome(path: Path) -> str:
    """Whether it was read or refused; anything else that a file can do to its reader fails the test."""
    try:
        found = read_gguf(path)
    except (MalformedInputError, UnsupportedError) as error:
        return "refused" if error.offset is not None else "refused without an offset"
    for entry in found.tensors:
        assert found.data_start <= entry.offset <= found.file_size - entry.nbytes
    return "read"


@settings(max_examples=800, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(
        st.tuples(st.integers(0, len(WHOLE.header) - 1), INTERESTING, st.sampled_from(["<B", "<I", "<Q"])),
        min_size=1,
        max_size=4,
    ),
    cut=st.one_of(st.none(), st.integers(0, len(BODY))),
)
def test_mutated_headers(tmp_path: Path, edits: list[tuple[int, int, str]], cut: int | None) -> None:
    data = bytearray(BODY)
    for at, value, form in edits:
        raw = struct.pack(form, value & ((1 << 8 * struct.calcsize(form)) - 1))
        data[at : at + len(raw)] = raw
    path = tmp_path / "m.gguf"
    path.write_bytes(data[:cut])
    assert _outcome(path) in ("read", "refused")


@settings(max_examples=300, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    keys=st.lists(st.builds(key, st.binary(max_size=6), st.integers(0, 14), st.binary(max_size=24)), max_size=4),
    tensors=st.lists(
        st.builds(
            tensor,
            st.text(max_size=4),
            st.lists(INTERESTING, max_size=5),
            st.integers(0, 42),
            INTERESTING,
        ),
        max_size=4,
    ),
)
def test_structured_files(tmp_path: Path, keys: list[bytes], tensors: list[bytes]) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(file(keys, tensors))
    assert _outcome(path) in ("read", "refused")


def test_every_bit_of_the_header(tmp_path: Path) -> None:
    outcomes: dict[str, int] = {}
    path = tmp_path / "m.gguf"
    for bit in range(0, 8 * len(WHOLE.header), 7):
        data = bytearray(BODY)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        outcome = _outcome(path)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    assert outcomes.keys() == {"refused", "read"}
    assert outcomes["refused"] > 200
    assert outcomes["read"] > 50  # names and values may be anything
