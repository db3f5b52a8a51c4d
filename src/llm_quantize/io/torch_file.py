"""Files that ``torch.save`` wrote, read without unpickling: a table of tensors and where each lies.

Two containers hold the same pickle. The zip one (torch 1.6 and later): NAME/data.pkl, and each storage as the bytes of
a member NAME/data/KEY, not compressed. The one before it: pickles one after another (a magic number, the version of the
protocol, facts of the machine, the object, the keys of the storages), then of each storage the number of its elements
in 8 bytes, little-endian, and its bytes. The pickle itself is read by ``io/state_dict_pickle.py``.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_quantize.errors import MalformedInputError, UnsupportedError, printable
from llm_quantize.io.paths import opened, pread_into
from llm_quantize.io.safetensors_file import DTYPE_BITS, MAX_RANK, Header, TensorInfo
from llm_quantize.io.state_dict_pickle import SAVE_AGAIN, Pickle, Storage, Tensor, read_pickle

MAX_PICKLE = 32 << 20
MAX_DIRECTORY = 64 << 20
_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_END, _END64, _LOCATOR64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_ENTRY, _LOCAL = b"PK\x01\x02", b"PK\x03\x04"
_AGAIN = "fetch this file again; it is damaged or was not written by torch.save"
_ESCAPED = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class View:
    """How a tensor lies in its file: ``strides`` in elements between neighbours of each dimension."""

    info: TensorInfo
    strides: tuple[int, ...]

    @property
    def contiguous(self) -> bool:
        """Whether its elements stand in the order of its shape, one after another."""
        expected = 1
        for size, stride in zip(reversed(self.info.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True


@dataclass(frozen=True, slots=True)
class TorchFile:
    """``header``: as of any file of weights, its tensors in the order of their bytes (tensors that share memory are
    all there); ``views``: {tensor: how it lies}, of those that are not contiguous."""

    header: Header
    views: Mapping[str, View]


@dataclass(frozen=True, slots=True)
class _Span:
    """Bytes of the file."""

    offset: int
    nbytes: int
    crc: int | None = None


def read_torch_file(path: str | Path) -> TorchFile:
    """The tensors of the state dict in the file at ``path``, proved to lie inside it; nothing is run and no tensor is
    read.

    Raises MalformedInputError (any rule of the container or of the pickle broken), UnsupportedError (a compressed
    member, a name in the pickle that no state dict needs, an element type that is not known here), AccessError,
    ResourceError; each names the file and the offset.
    """
    path = Path(path)
    with opened(path) as descriptor:
        facts = os.fstat(descriptor)
        front = _read(descriptor, path, 0, min(8, facts.st_size))
        if front[:4] == _LOCAL:
            tensors, places, digest = _zip(descriptor, path, facts.st_size)
        elif front[:1] == b"\x80":
            tensors, places, digest = _plain(descriptor, path, facts.st_size)
        else:
            remedy = "run `git lfs pull` in the model's directory" if front == b"version " else _AGAIN
            raise _broken("not a file of torch.save", path, 0, "a zip file or a pickle", repr(front), remedy)
    found = [_placed(name, tensor, places, path) for name, tensor in tensors.items()]
    found.sort(key=lambda view: (view.info.offset, view.info.nbytes, view.info.name))
    infos = {view.info.name: view.info for view in found}
    start = min((info.offset for info in infos.values()), default=facts.st_size)
    times = (facts.st_mtime_ns, facts.st_dev, facts.st_ino)
    header = Header(path, infos, {}, start, facts.st_size, *times, digest)
    return TorchFile(header, {view.info.name: view for view in found if not view.contiguous})


def _placed(name: str, tensor: Tensor, places: Mapping[str, _Span], path: Path) -> View:
    """Where a tensor lies, and that it lies inside its storage."""
    storage = tensor.storage
    place = places.get(storage.key)
    if place is None:
        raise _broken("the storage of a tensor is missing", path, tensor.at, storage.key, "no such part", tensor=name)
    width = DTYPE_BITS[tensor.dtype] // 8
    if storage.nbytes > place.nbytes:
        raise _broken(
            "the storage of a tensor is shorter than the pickle says", path, place.offset,
            f"{storage.nbytes:,} bytes", f"{place.nbytes:,} bytes", tensor=name,
        )  # fmt: skip
    if len(tensor.shape) > MAX_RANK or len(tensor.shape) != len(tensor.strides):
        raise _broken(
            "shape and strides of a tensor do not fit each other", path, tensor.at,
            f"{len(tensor.strides)} dimensions, at most {MAX_RANK}", f"{len(tensor.shape)}", tensor=name,
        )  # fmt: skip
    elements = math.prod(tensor.shape)
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    end = tensor.offset + (span if elements else 0)
    if end * width > storage.nbytes:
        raise _broken(
            "a tensor leads beyond its storage", path, place.offset,
            f"{storage.nbytes // width:,} elements", f"{end:,}", tensor=name,
        )  # fmt: skip
    info = TensorInfo(name, tensor.dtype, tensor.shape, path, place.offset + tensor.offset * width, elements * width)
    return View(info, tensor.strides)


def _state_dict(pickle: Pickle, path: Path, base: int) -> dict[str, Tensor]:
    """The tensors of what was pickled, by name."""
    value = pickle.value
    if not isinstance(value, dict):
        raise UnsupportedError(
            "this file holds no state dict",
            file=path,
            offset=base,
            expected="a dictionary of tensors",
            found=type(value).__name__.lower(),
            remedy=SAVE_AGAIN,
        )
    for name, tensor in value.items():
        if not isinstance(tensor, Tensor) or not isinstance(name, str):
            raise UnsupportedError(
                "something else than a tensor stands in the dictionary",
                file=path,
                tensor=printable(str(name), 200),
                offset=base,
                expected="{name: tensor}, as model.state_dict() gives it",
                found=type(tensor).__name__.lower(),
                remedy=SAVE_AGAIN,
            )
    return value


# The zip container (APPNOTE.TXT of PKWARE, sections 4.3 and 4.5.3)


def _zip(descriptor: int, path: Path, size: int) -> tuple[dict[str, Tensor], dict[str, _Span], str]:
    """(tensors, places of the storages, hash of what says so)."""
    directory, start = _directory(descriptor, path, size)
    members = _members(descriptor, path, directory, start)
    pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise _broken("a file of torch.save has one data.pkl", path, start, "NAME/data.pkl", f"{len(pickles)} of them")
    (name,) = pickles
    root = name.removesuffix("data.pkl")
    span = members[name]
    if span.nbytes > MAX_PICKLE:
        raise _broken("data.pkl is too large", path, span.offset, f"{MAX_PICKLE:,} bytes", f"{span.nbytes:,} bytes")
    data = _read(descriptor, path, span.offset, span.nbytes)
    if zlib.crc32(data) != span.crc:
        raise _broken("data.pkl is damaged: its checksum is wrong", path, span.offset, span.crc, zlib.crc32(data))
    order = members.get(f"{root}byteorder")
    if order is not None and (said := _read(descriptor, path, order.offset, min(order.nbytes, 16))) != b"little":
        raise UnsupportedError(
            "the numbers in this file have another byte order",
            file=path,
            offset=order.offset,
            expected="little",
            found=repr(said),
            remedy=SAVE_AGAIN,
        )
    front = f"{root}data/"
    places = {key.removeprefix(front): span for key, span in members.items() if key.startswith(front)}
    digest = hashlib.sha256(directory + data).hexdigest()
    return _state_dict(read_pickle(data, path, span.offset), path, span.offset), places, digest


def _directory(descriptor: int, path: Path, size: int) -> tuple[bytes, int]:
    """(the central directory, where it begins)."""
    tail = min(size, 22 + 0xFFFF)
    end = _read(descriptor, path, size - tail, tail)
    at = end.rfind(_END)
    if at < 0 or len(end) - at < 22:
        raise _broken("the end of the zip file is missing", path, size - tail, "a central directory", "none")
    disk, first, here, count, nbytes, start, comment = struct.unpack_from("<HHHHIIH", end, at + 4)
    bound = size - tail + at
    if bound + 22 + comment != size:
        raise _broken(
            "bytes follow the end of the zip file", path, bound, f"{bound + 22 + comment:,} bytes", f"{size:,}"
        )
    if bound >= 20 and _read(descriptor, path, bound - 20, 4) == _LOCATOR64:
        bound, (disk, first, here, count, nbytes, start) = _directory64(descriptor, path, bound)
    if disk or first or here != count:
        raise _broken("a zip file in several parts", path, bound, "one file", f"part {disk} of several")
    if start + nbytes != bound:
        raise _broken(
            "the central directory is not where the end of the zip file says", path, bound, bound, start + nbytes
        )
    if nbytes > MAX_DIRECTORY or count * 46 > nbytes:
        raise _broken("the central directory lies about its size", path, start, f"{MAX_DIRECTORY:,} bytes at most",
                      f"{nbytes:,} bytes for {count:,} members")  # fmt: skip
    return _read(descriptor, path, start, nbytes), start


def _directory64(descriptor: int, path: Path, bound: int) -> tuple[int, tuple[int, ...]]:
    """(where the record begins, the same facts as the short record has)."""
    if bound < 20 + 56:
        raise _broken("the end of a large zip file is missing", path, bound, "a zip64 record", "none")
    locator = _read(descriptor, path, bound - 20, 20)
    mark, _, at, _ = struct.unpack("<4sIQI", locator)
    if mark != _LOCATOR64 or at > bound - 20 - 56:
        raise _broken("the end of a large zip file is missing", path, bound - 20, "a zip64 locator", repr(mark))
    record = _read(descriptor, path, at, 56)
    mark, length, _, _, disk, first, here, count, nbytes, start = struct.unpack("<4sQHHIIQQQQ", record)
    if mark != _END64 or at + 12 + length != bound - 20:
        raise _broken("the end of a large zip file is damaged", path, at, "a zip64 record", repr(mark))
    return at, (disk, first, here, count, nbytes, start)


def _members(descriptor: int, path: Path, directory: bytes, start: int) -> dict[str, _Span]:
    """{name: the bytes of the member}: none of them compressed, all before ``start``, no two over each other."""
    members: dict[str, _Span] = {}
    spans: list[tuple[int, int, str]] = []
    for name, local, span, at in _entries(path, directory, start):
        if name in members:
            raise _broken("two members of the zip file have one name", path, at, "one", printable(name, 120))
        if local + 30 > start:
            raise _broken("a member of the zip file begins outside it", path, at, f"before {start:,}", local)
        head = _read(descriptor, path, local, 30)
        if head[:4] != _LOCAL:
            raise _broken("a member of the zip file has no header", path, local, "PK\\3\\4", repr(head[:4]))
        lengths = struct.unpack_from("<HH", head, 26)
        begin = local + 30 + sum(lengths)
        if begin + span.nbytes > start:
            raise _broken(
                "a member of the zip file leads beyond its end", path, local,
                f"up to byte {start:,}", f"{begin + span.nbytes:,}",
            )  # fmt: skip
        members[name] = _Span(begin, span.nbytes, span.crc)
        spans.append((local, begin + span.nbytes, name))
    spans.sort()
    for (_, end, one), (begin, _, other) in itertools.pairwise(spans):
        if begin < end:
            raise _broken(
                "members of the zip file lie over each other", path, begin,
                f"{printable(other, 80)} after {printable(one, 80)}", f"{end - begin:,} bytes in common",
            )  # fmt: skip
    return members


def _entries(path: Path, directory: bytes, start: int) -> Iterator[tuple[str, int, _Span, int]]:
    """Of each member: (name, where its own header is, its size, where the directory says so)."""
    at = 0
    while at < len(directory):
        place = start + at
        if len(directory) - at < 46 or directory[at : at + 4] != _ENTRY:
            raise _broken("the central directory is damaged", path, place, "an entry", repr(directory[at : at + 4]))
        flags, method, _, _, crc, packed, nbytes, named, more, comment = struct.unpack_from(
            "<HHHHIIIHHH", directory, at + 8
        )
        (local,) = struct.unpack_from("<I", directory, at + 42)
        stop = at + 46 + named + more + comment
        if stop > len(directory):
            raise _broken("the central directory is cut short", path, place, f"{stop:,} bytes", f"{len(directory):,}")
        try:
            name = directory[at + 46 : at + 46 + named].decode()
        except UnicodeDecodeError as error:
            raise _broken("the name of a member is not UTF-8", path, place, "UTF-8", error.reason) from error
        extra = directory[at + 46 + named : at + 46 + named + more]
        nbytes, packed, local = _large(extra, (nbytes, packed, local), path, place)
        if method != 0 or flags & 1 or packed != nbytes:
            raise UnsupportedError(
                "a member of the zip file is compressed or encrypted; torch.save writes neither",
                file=path,
                tensor=printable(name, 120),
                offset=place,
                expected="a stored member",
                found=f"method {method}, {packed:,} bytes for {nbytes:,}",
                remedy=SAVE_AGAIN,
            )
        yield name, local, _Span(0, nbytes, crc), place
        at = stop


def _large(extra: bytes, sizes: tuple[int, int, int], path: Path, place: int) -> tuple[int, int, int]:
    """Size, size as packed, and offset of a member: those that do not fit 32 bits stand in its zip64 field."""
    if _ESCAPED not in sizes:
        return sizes
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1 and at + 4 + length <= len(extra):
            numbers = iter(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
            found = [next(numbers, -1) if size == _ESCAPED else size for size in sizes]
            if min(found) >= 0:
                return found[0], found[1], found[2]
        at += 4 + length
    raise _broken("a large member does not say its size", path, place, "a zip64 field", "none")


# The container before it (torch/serialization.py, _legacy_save)


def _plain(descriptor: int, path: Path, size: int) -> tuple[dict[str, Tensor], dict[str, _Span], str]:
    """As ``_zip``."""
    front = _read(descriptor, path, 0, min(size, MAX_PICKLE))
    at, pickles, steps = 0, [], 0
    for _ in range(5):
        pickles.append(read_pickle(front, path, 0, start=at, steps=steps))
        at, steps = pickles[-1].end, pickles[-1].steps
    magic, protocol, machine, _, keys = (pickle.value for pickle in pickles)
    if magic != _MAGIC or protocol != _PROTOCOL:
        raise _broken("not a file of torch.save", path, 0, f"magic number {_MAGIC:x}", "another pickle")
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise UnsupportedError(
            "the numbers in this file have another byte order", file=path, expected="little", remedy=SAVE_AGAIN
        )
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or len(set(keys)) != len(keys):
        raise _broken("the keys of the storages are no list of names", path, at, "a list", type(keys).__name__)
    tensors = _state_dict(pickles[3], path, 0)
    widths = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
    digest = hashlib.sha256(front[:at])
    places: dict[str, _Span] = {}
    for key in keys:
        count = int.from_bytes(_read(descriptor, path, at, 8), "little") if at + 8 <= size else -1
        storage = widths.get(key)
        if storage is None:
            raise _broken("a storage belongs to no tensor", path, at, "a key of a tensor", printable(key, 80))
        nbytes = count * storage.width
        if count < 0 or at + 8 + nbytes > size:
            raise _broken("the file is truncated in a storage", path, at, f"{nbytes:,} bytes", f"{size - at:,} bytes")
        places[key] = _Span(at + 8, nbytes)
        at += 8 + nbytes
    if at != size:
        raise _broken("bytes follow the last storage", path, at, f"a file of {at:,} bytes", f"{size:,} bytes")
    return tensors, places, digest.hexdigest()


def _read(descriptor: int, path: Path, offset: int, nbytes: int) -> bytes:
    data = bytearray(nbytes)
    pread_into(descriptor, memoryview(data), offset, path)
    return bytes(data)


def _broken(
    what: str, path: Path, offset: int, expected: Any, found: Any, remedy: str = _AGAIN, tensor: str | None = None
) -> MalformedInputError:
    named = None if tensor is None else printable(tensor, 200)
    return MalformedInputError(
        what, file=path, tensor=named, offset=offset, expected=expected, found=found, remedy=remedy
    )


__all__ = ["Storage", "TorchFile", "View", "read_torch_file"]
