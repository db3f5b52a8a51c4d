"""CTranslate2's model.bin: laid out before anything is written, and read as data from strangers.

All numbers are little-endian; a text is its length with a closing zero byte (uint16), its bytes, the zero byte:

    uint32   6, the version of the container
    text     the kind of network; uint32 its revision
    uint32   how many variables, then each: text name, uint8 rank, uint32 per dimension, uint8 element type
             (its place in TYPES), uint32 bytes of data, the data; in the order of names
    uint32   how many aliases, then each: text alias, text name of the variable that it stands for

Read from ctranslate2 4.8 (specs/model_spec.py). Data is not aligned, and headers stand between the data.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from llm_quantize.errors import MalformedInputError, UnsupportedError, printable
from llm_quantize.io.paths import opened, pread_into

MODEL_FILE = "model.bin"
VERSION = 6
TYPES: Mapping[str, int] = {"float32": 4, "int8": 1, "int16": 2, "int32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of an element, by name; the place in this order is the type's number."""

_MOST_VARIABLES = 1 << 20
_MOST_RANK = 8
_LARGEST = (1 << 32) - 1


@dataclass(frozen=True)
class Variable:
    """A variable to be written: ``value``, where its bytes are known before any work (scalars); None: data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    value: bytes | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * TYPES[self.dtype]


@dataclass(frozen=True)
class Layout:
    """``size`` of the whole file. ``header``: the bytes in front of the first data, ``between``: (offset, bytes) of
    what stands behind it and is no data. ``offsets``: {variable of data: absolute}."""

    size: int
    header: bytes
    between: tuple[tuple[int, bytes], ...]
    offsets: Mapping[str, int]


def layout_model(kind: str, revision: int, variables: Sequence[Variable], aliases: Mapping[str, str]) -> Layout:
    """The file of ``variables``, in whatever order they are given, and ``aliases`` {alias: variable}.

    Raises UnsupportedError for a variable of 4 GiB or more, of which the format cannot tell the size.
    """
    offsets: dict[str, int] = {}
    parts: list[tuple[int, bytes]] = []
    at = 0
    pending = struct.pack("<I", VERSION) + _text(kind) + struct.pack("<II", revision, len(variables))
    for variable in sorted(variables, key=lambda one: one.name):
        if variable.nbytes > _LARGEST:
            raise UnsupportedError(
                "a variable is too large for CTranslate2's format",
                tensor=variable.name,
                expected=f"at most {_LARGEST:,} bytes",
                found=f"{variable.nbytes:,} bytes",
                remedy="take a level with smaller numbers: -q int8",
            )
        rank = len(variable.shape)
        pending += _text(variable.name) + struct.pack(f"<B{rank}I", rank, *variable.shape)
        pending += struct.pack("<BI", list(TYPES).index(variable.dtype), variable.nbytes)
        if variable.value is not None:
            pending += variable.value
            continue
        parts.append((at, pending))
        offsets[variable.name] = at + len(pending)
        at, pending = offsets[variable.name] + variable.nbytes, b""
    pending += struct.pack("<I", len(aliases))
    for alias, name in sorted(aliases.items()):
        pending += _text(alias) + _text(name)
    parts.append((at, pending))
    return Layout(at + len(pending), parts[0][1], tuple(parts[1:]), offsets)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<H", len(data) + 1) + data + b"\0"


@dataclass(frozen=True)
class Entry:
    """A variable in a file: its type (a name of TYPES), shape, and place."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class ModelFile:
    """A model.bin whose structure is proved. ``known``: (offset, bytes) of all that is no data: headers, scalars,
    aliases. ``variables`` by name; ``aliases`` {alias: variable}."""

    path: Path
    size: int
    kind: str
    revision: int
    variables: Mapping[str, Entry]
    aliases: Mapping[str, str]
    known: tuple[tuple[int, int], ...]

    def find(self, name: str) -> Entry | None:
        """The variable ``name``, or the one that the alias ``name`` stands for."""
        return self.variables.get(self.aliases.get(name, name))

    def is_data(self, entry: Entry) -> bool:
        """Whether a variable follows from weights: not a scalar of the network, but perhaps the scale of a matrix."""
        return _is_data(entry, self.variables)


def _is_data(entry: Entry, variables: Mapping[str, Entry]) -> bool:
    return bool(entry.shape) or (entry.name.endswith("_scale") and entry.name.removesuffix("_scale") in variables)


def read_model_file(path: Path) -> ModelFile:
    """The structure of the model.bin at ``path``; no data is read.

    Raises MalformedInputError (cut off, impossible or repeated names, sizes that contradict each other, an alias of
    nothing, bytes left over), UnsupportedError (another version of the container), AccessError, ResourceError.
    """
    with opened(path) as descriptor:
        return _Reader(path, descriptor, os.fstat(descriptor).st_size).read()


class _Reader:
    def __init__(self, path: Path, descriptor: int, size: int) -> None:
        self._path, self._descriptor, self._size = path, descriptor, size
        self._at = 0

    def read(self) -> ModelFile:
        version = self._numbers("I", "the version")[0]
        if version != VERSION:
            raise UnsupportedError(
                "this version of CTranslate2's container is not read",
                file=self._path,
                expected=VERSION,
                found=version,
                remedy="convert the model again with CTranslate2 4.8",
            )
        kind = self._word("the kind of network")
        revision, count = self._numbers("II", "the number of variables")
        if count > _MOST_VARIABLES:
            self._refuse("an impossible number of variables", expected=f"at most {_MOST_VARIABLES}", found=count)
        variables: dict[str, Entry] = {}
        for entry in (self._variable() for _ in range(count)):
            if entry.name in variables:
                self._refuse("a variable stands twice", tensor=entry.name)
            variables[entry.name] = entry
        aliases = dict(self._aliases(variables))
        if self._at != self._size:
            self._refuse("bytes are left over", expected=f"{self._at} bytes", found=f"{self._size} bytes")
        known, start = [], 0
        for entry in variables.values():
            if _is_data(entry, variables):
                known.append((start, entry.offset - start))
                start = entry.offset + entry.nbytes
        known.append((start, self._size - start))
        return ModelFile(self._path, self._size, kind, revision, variables, aliases, tuple(known))

    def _variable(self) -> Entry:
        name = self._word("the name of a variable")
        rank = self._numbers("B", name)[0]
        if rank > _MOST_RANK:
            self._refuse("a variable has too many dimensions", tensor=name, expected=_MOST_RANK, found=rank)
        shape = self._numbers(f"{rank}I", name)
        number, nbytes = self._numbers("BI", name)
        if number >= len(TYPES):
            self._refuse("a variable has an unknown element type", tensor=name, expected=list(TYPES), found=number)
        dtype = list(TYPES)[number]
        if 0 in shape or math.prod(shape) * TYPES[dtype] != nbytes:
            expected = f"{list(shape)} of {dtype}"
            self._refuse("a variable's size is not its shape's", tensor=name, expected=expected, found=nbytes)
        offset = self._at
        if nbytes > self._size - offset:
            self._refuse("the file is cut off within a variable", tensor=name, expected=offset + nbytes)
        self._at += nbytes
        return Entry(name, dtype, shape, offset, nbytes)

    def _aliases(self, variables: Mapping[str, Entry]) -> Iterator[tuple[str, str]]:
        count = self._numbers("I", "the number of aliases")[0]
        if count > _MOST_VARIABLES:
            self._refuse("an impossible number of aliases", expected=f"at most {_MOST_VARIABLES}", found=count)
        for _ in range(count):
            alias, name = self._word("an alias"), self._word("an alias")
            if alias in variables or name not in variables:
                self._refuse("an alias stands for nothing, or for itself", tensor=alias, found=name)
            yield alias, name

    def _word(self, what: str) -> str:
        length = self._numbers("H", what)[0]
        data = self._bytes(length, what)
        if not data.endswith(b"\0") or not data[:-1].isascii() or not data[:-1].decode("ascii").isprintable():
            self._refuse(f"{what} is no text", found=printable(repr(bytes(data[:60])), 80))
        return data[:-1].decode("ascii")

    def _numbers(self, form: str, what: str) -> tuple[int, ...]:
        layout = struct.Struct(f"<{form}")
        found: tuple[int, ...] = layout.unpack(self._bytes(layout.size, what))
        return found

    def _bytes(self, count: int, what: str) -> bytes:
        if count > self._size - self._at:
            self._refuse(f"the file is cut off before {printable(what, 100)}", expected=self._at + count)
        data = bytearray(count)
        pread_into(self._descriptor, memoryview(data), self._at, self._path)
        self._at += count
        return bytes(data)

    def _refuse(
        self, what: str, *, tensor: str | None = None, expected: object = None, found: object = None
    ) -> NoReturn:
        raise MalformedInputError(
            what,
            file=self._path,
            tensor=tensor,
            offset=self._at,
            expected=expected,
            found=self._size if found is None and expected is not None else found,
            remedy="make or fetch the model again",
        )
