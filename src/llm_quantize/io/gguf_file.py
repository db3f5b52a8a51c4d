"""The GGUF container, little-endian: header bytes (version 3) from metadata, and a reader that trusts nothing.

Version 2, of files from 2023, has the same layout; version 3 only added byte orders. Both are read.

Layout (owner: ggml's GGUF specification): magic ``GGUF``, u32 version, u64 tensor count, u64 key count; each key is
string, u32 value type, value; each tensor is name, u32 number of dimensions, u64 dimensions (fastest first), u32 ggml
type, u64 offset from the start of the data; then padding to ``general.alignment`` and the data, each tensor padded too.
Sizes of types come from the ``gguf`` package.
"""

from __future__ import annotations

import itertools
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gguf.constants import (
    GGUF_DEFAULT_ALIGNMENT,
    GGUF_MAGIC,
    GGUFValueType,
    Keys,
)

from llm_quantize.errors import (
    IntegrityError,
    MalformedInputError,
    UnsupportedError,
    UsageError,
    printable,
)
from llm_quantize.io.paths import open_argument, read_failure
from llm_quantize.qtypes.ggml_types import BLOCK_SIZES, GgmlType

VERSION = 3
READ_VERSIONS = (2, VERSION)
MAX_METADATA_BYTES = 256 << 20
MAX_DIMENSIONS = 4
MAX_NAME_BYTES = 65_535
MAX_STRING_BYTES = 64 << 20
MAX_ENTRIES = 65_536  # keys, and tensors
MAX_ARRAY_ITEMS = 1 << 22  # of all arrays together: what Python makes of them is larger than the file
MAX_ALIGNMENT = 1 << 16
LLAMA_CPP_NAME_BYTES = 63  # ggml keeps tensor names in 64 bytes with the closing zero

_SCALARS: dict[GGUFValueType, str] = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


class MetaValue(NamedTuple):
    """A GGUF value: its type, the Python value, and for an ARRAY the type of its items."""

    type: GGUFValueType
    value: Any
    item: GGUFValueType | None = None


class TensorEntry(NamedTuple):
    """A tensor of a GGUF file. ``shape`` is row-major (out, in); ``offset`` counts from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: GgmlType
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """The parsed header of one GGUF file."""

    path: Path
    metadata: Mapping[str, MetaValue]
    tensors: tuple[TensorEntry, ...]
    data_start: int
    file_size: int
    alignment: int


@dataclass(frozen=True)
class GgufLayout:
    """Where every byte of a GGUF file to be written goes: ``header`` stands at 0, tensors at absolute offsets."""

    header: bytes
    tensors: tuple[TensorEntry, ...]
    size: int


def tensor_bytes(shape: Sequence[int], ggml_type: GgmlType) -> int:
    """Bytes of a tensor of row-major ``shape``; ValueError where a row is not whole blocks."""
    block, block_bytes = BLOCK_SIZES[ggml_type]
    columns = int(shape[-1])
    if columns % block:
        raise ValueError(f"row length {columns} is not a multiple of {ggml_type.name}'s block of {block}")
    return int(math.prod(shape[:-1]) * (columns // block) * block_bytes)


def _pad(size: int, alignment: int) -> int:
    return -size % alignment


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _value_bytes(key: str, value: MetaValue) -> bytes:
    if value.type == GGUFValueType.STRING:
        return _string(value.value)
    if value.type != GGUFValueType.ARRAY:
        try:
            return struct.pack("<" + _SCALARS[value.type], value.value)
        except struct.error as error:
            raise MalformedInputError(
                f"the value of {key} does not fit the type the file format gives it",
                expected=value.type.name,
                found=value.value,
                remedy="correct the value in the model's configuration files",
            ) from error
    item = value.item
    if item is None or item == GGUFValueType.ARRAY:
        raise ValueError(f"{key}: an array needs a scalar or string item type")
    head = struct.pack("<IQ", item, len(value.value))
    if item == GGUFValueType.STRING:
        return head + b"".join(_string(text) for text in value.value)
    try:
        return head + struct.pack(f"<{len(value.value)}{_SCALARS[item]}", *value.value)
    except struct.error as error:
        raise MalformedInputError(
            f"a value of {key} does not fit the type the file format gives it", expected=item.name
        ) from error


def layout_gguf(
    metadata: Mapping[str, MetaValue],
    tensors: Sequence[tuple[str, tuple[int, ...], GgmlType]],
    *,
    alignment: int = GGUF_DEFAULT_ALIGNMENT,
) -> GgufLayout:
    """The exact layout of a file with this metadata and these tensors (name, row-major shape, type), in order.

    Raises UsageError where a tensor name is longer than the runtime can hold.
    """
    parts = [struct.pack("<IIQQ", GGUF_MAGIC, VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key), struct.pack("<I", value.type), _value_bytes(key, value)]
    relative = 0
    offsets: list[tuple[int, int]] = []
    for name, shape, ggml_type in tensors:
        if len(name.encode()) > LLAMA_CPP_NAME_BYTES:
            raise UsageError(
                "a tensor name is longer than llama.cpp can hold",
                tensor=name,
                expected=f"at most {LLAMA_CPP_NAME_BYTES} bytes",
            )
        parts.append(_string(name))
        parts.append(struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), ggml_type, relative))
        nbytes = tensor_bytes(shape, ggml_type)
        offsets.append((relative, nbytes))
        relative += nbytes + _pad(nbytes, alignment)
    header = b"".join(parts)
    header += bytes(_pad(len(header), alignment))
    entries = tuple(
        TensorEntry(name, tuple(shape), ggml_type, len(header) + offset, nbytes)
        for (name, shape, ggml_type), (offset, nbytes) in zip(tensors, offsets, strict=True)
    )
    return GgufLayout(header, entries, len(header) + relative)


class _Cursor:
    """Bounded reads from the front of a file; every failure names the file and the offset."""

    def __init__(self, path: Path, descriptor: int, size: int) -> None:
        self.path, self.size, self.offset = path, size, 0
        self.items = 0
        self._descriptor = descriptor
        self._window = b""
        self._window_start = 0

    def fail(self, what: str, **facts: Any) -> MalformedInputError:
        facts.setdefault("remedy", "download or make the file again")
        return MalformedInputError(what, file=self.path, offset=self.offset, **facts)

    def take(self, count: int, meaning: str) -> bytes:
        if count > self.size - self.offset:
            raise self.fail(
                f"the file ends inside {meaning}",
                expected=f"{count} bytes",
                found=f"{self.size - self.offset} bytes to the end of the file",
            )
        if self.offset + count > MAX_METADATA_BYTES:
            raise self.fail(f"the metadata is larger than {MAX_METADATA_BYTES} bytes")
        start = self.offset - self._window_start
        if start < 0 or start + count > len(self._window):
            self._window_start = self.offset
            self._window = self._read(self.offset, max(count, 1 << 20))
            start = 0
            if len(self._window) < count:
                raise IntegrityError("the file became shorter while it was read", file=self.path, offset=self.offset)
        self.offset += count
        return self._window[start : start + count]

    def _read(self, offset: int, count: int) -> bytes:
        parts = []
        while count > 0:
            try:
                part = os.pread(self._descriptor, count, offset)
            except OSError as error:
                raise read_failure(error, self.path, offset=offset) from error
            if not part:
                break
            parts.append(part)
            offset += len(part)
            count -= len(part)
        return b"".join(parts)

    def number(self, code: str, meaning: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), meaning))[0]

    def string(self, meaning: str, limit: int = MAX_STRING_BYTES) -> str:
        length = self.number("Q", f"the length of {meaning}")
        if length > limit:
            raise self.fail(f"{meaning} is too long", expected=f"at most {limit} bytes", found=length)
        data = self.take(length, meaning)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            self.offset -= length
            raise self.fail(f"{meaning} is not UTF-8", found=printable(repr(data[:40]))) from error

    def name(self, meaning: str) -> str:
        name = self.string(meaning, MAX_NAME_BYTES)
        if not name or "\0" in name:
            raise self.fail(f"{meaning} is empty or holds a zero byte", found=printable(name))
        return name

    def strings(self, count: int, meaning: str) -> list[str]:
        """``count`` strings: those that lie whole in the window at once, the others (and the bad ones) with care."""
        found: list[str] = []
        length_at = struct.Struct("<Q").unpack_from
        while len(found) < count:
            window, at = self._window, self.offset - self._window_start
            while len(found) < count and 0 <= at <= len(window) - 8:
                end = at + 8 + length_at(window, at)[0]
                if end > len(window):
                    break
                try:
                    found.append(window[at + 8 : end].decode("utf-8"))
                except UnicodeDecodeError:
                    break
                at = end
            self.offset = self._window_start + at
            if len(found) < count:
                found.append(self.string(meaning))
        return found


def _read_type(cursor: _Cursor, meaning: str) -> GGUFValueType:
    code = cursor.number("I", meaning)
    try:
        return GGUFValueType(code)
    except ValueError as error:
        raise cursor.fail("unknown metadata value type", found=code, expected="0 to 12") from error


def _read_value(cursor: _Cursor, key: str) -> MetaValue:
    kind = _read_type(cursor, f"the type of {printable(key)}")
    meaning = f"the value of {printable(key)}"
    if kind == GGUFValueType.STRING:
        return MetaValue(kind, cursor.string(meaning))
    if kind != GGUFValueType.ARRAY:
        return MetaValue(kind, cursor.number(_SCALARS[kind], meaning))
    item = _read_type(cursor, f"the item type of {printable(key)}")
    count = cursor.number("Q", f"the length of {printable(key)}")
    if item == GGUFValueType.ARRAY:
        raise cursor.fail("nested arrays are not supported", found=printable(key))
    least = 8 if item == GGUFValueType.STRING else struct.calcsize("<" + _SCALARS[item])
    if count * least > cursor.size - cursor.offset:
        raise cursor.fail(
            f"the array {printable(key)} is longer than the file",
            found=f"{count} items",
            expected=f"at most {(cursor.size - cursor.offset) // least}",
        )
    cursor.items += count
    if cursor.items > MAX_ARRAY_ITEMS:
        raise cursor.fail("the arrays have too many items", found=cursor.items, expected=f"at most {MAX_ARRAY_ITEMS}")
    if item == GGUFValueType.STRING:
        return MetaValue(kind, cursor.strings(count, meaning), item)
    data = cursor.take(count * least, meaning)
    return MetaValue(kind, list(struct.unpack(f"<{count}{_SCALARS[item]}", data)), item)


def _read_tensor(cursor: _Cursor) -> tuple[str, tuple[int, ...], GgmlType, int, int]:
    name = cursor.name("a tensor name")
    count = cursor.number("I", "a number of dimensions")
    if not 1 <= count <= MAX_DIMENSIONS:
        raise cursor.fail("bad number of dimensions", tensor=name, expected="1 to 4", found=count)
    shape = tuple(reversed([cursor.number("Q", "a dimension") for _ in range(count)]))
    if 0 in shape or math.prod(shape) >= 1 << 62:
        raise cursor.fail("bad tensor dimensions", tensor=name, found=shape)
    code = cursor.number("I", "a tensor type")
    try:
        kind = GgmlType(code)
    except ValueError as error:
        raise cursor.fail("unknown or removed tensor type", tensor=name, found=code) from error
    try:
        nbytes = tensor_bytes(shape, kind)
    except ValueError as error:
        raise cursor.fail(str(error), tensor=name, found=shape) from error
    return name, shape, kind, cursor.number("Q", "a tensor offset"), nbytes


def read_gguf(path: str | Path) -> GgufFile:
    """Read the header of a GGUF file; every tensor is proved to lie inside the file, aligned, without overlap.

    Raises MalformedInputError (what, offset, expected, found), UnsupportedError for other versions and byte orders.
    """
    path = Path(path)
    descriptor, size = open_argument(path, "GGUF file")
    try:
        cursor = _Cursor(path, descriptor, size)
        magic = cursor.take(4, "the magic number")
        if magic != struct.pack("<I", GGUF_MAGIC):
            cursor.offset = 0
            raise cursor.fail("not a GGUF file", expected="GGUF", found=printable(repr(magic)))
        version = cursor.number("I", "the version")
        if version not in READ_VERSIONS:
            big_endian = version == int.from_bytes(struct.pack(">I", VERSION), "little")
            raise UnsupportedError(
                "a big-endian GGUF file" if big_endian else "an unsupported GGUF version",
                file=path,
                offset=4,
                expected=f"version {READ_VERSIONS[0]} or {VERSION}, little-endian",
                found=version,
                remedy="convert the file with a current llama.cpp",
            )
        return _read_body(cursor)
    finally:
        os.close(descriptor)


def _read_body(cursor: _Cursor) -> GgufFile:
    tensor_count = cursor.number("Q", "the number of tensors")
    key_count = cursor.number("Q", "the number of keys")
    room = cursor.size - cursor.offset
    if tensor_count * 32 > room or key_count * 13 > room or max(tensor_count, key_count) > MAX_ENTRIES:
        raise cursor.fail("more tensors or keys than the file can hold", found=(tensor_count, key_count))
    metadata: dict[str, MetaValue] = {}
    for _ in range(key_count):
        key = cursor.name("a key")
        if key in metadata:
            raise cursor.fail("a key stands twice", found=printable(key))
        metadata[key] = _read_value(cursor, key)
    alignment = _alignment(cursor, metadata)
    raw = [_read_tensor(cursor) for _ in range(tensor_count)]
    data_start = cursor.offset + _pad(cursor.offset, alignment)
    entries: list[TensorEntry] = []
    seen: set[str] = set()
    for name, shape, kind, relative, nbytes in raw:
        if name in seen:
            raise cursor.fail("a tensor name stands twice", tensor=name)
        seen.add(name)
        if relative % alignment:
            raise cursor.fail("a tensor offset is not aligned", tensor=name, expected=alignment, found=relative)
        if data_start + relative + nbytes > cursor.size:
            raise cursor.fail(
                "the file is truncated: a tensor ends beyond it",
                tensor=name,
                expected=f"{data_start + relative + nbytes} bytes",
                found=f"{cursor.size} bytes",
            )
        entries.append(TensorEntry(name, shape, kind, data_start + relative, nbytes))
    ordered = sorted(entries, key=lambda entry: entry.offset)
    for left, right in itertools.pairwise(ordered):
        if left.offset + left.nbytes > right.offset:
            raise cursor.fail("two tensors overlap", tensor=right.name, found=f"{left.name} and {right.name}")
    return GgufFile(cursor.path, metadata, tuple(entries), data_start, cursor.size, alignment)


def _alignment(cursor: _Cursor, metadata: Mapping[str, MetaValue]) -> int:
    value = metadata.get(Keys.General.ALIGNMENT)
    if value is None:
        return int(GGUF_DEFAULT_ALIGNMENT)
    number = value.value if value.type == GGUFValueType.UINT32 else 0
    if not 8 <= number <= MAX_ALIGNMENT or number & (number - 1):
        expected = f"a power of two from 8 to {MAX_ALIGNMENT}, of type UINT32"
        raise cursor.fail("bad alignment", expected=expected, found=printable(str(value.value)))
    return int(number)
