"""The safetensors container, read: a header proved right before a byte of any tensor is touched.

Format (huggingface/safetensors, "Format"): 8 bytes N, little-endian; N bytes of JSON beginning with "{", of at
most 100 MB, {name: {dtype, shape, data_offsets: [begin, end)}}, an optional "__metadata__" of strings; then the
data, which the tensors cover without overlap or hole, to the end of the file. Offsets count from the end of the
header. All sizes are Python's unbounded integers: no product or sum can overflow.
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from llm_quantize.errors import MalformedInputError, UnsupportedError, printable
from llm_quantize.io.json_file import parse_json
from llm_quantize.io.paths import opened, pread_into

MAX_HEADER_BYTES = 100_000_000
MAX_RANK = 32

DTYPE_BITS: dict[str, int] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
"""Every element type the format knows, with its size in bits."""

_AGAIN = "fetch this file again; it is damaged or was not written by safetensors"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: ``nbytes`` at absolute ``offset`` of ``file``, row-major, little-endian.

    ``dtype`` is the format's own word ("BF16").
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """One file's header. ``tensors`` in the order of their bytes; ``header_bytes`` = where the data begins;
    ``sha256`` of those first bytes; ``mtime_ns``, ``device`` and ``inode`` tell whether the file was changed."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    header_bytes: int
    file_size: int
    mtime_ns: int
    device: int
    inode: int
    sha256: str


def read_header(path: str | Path) -> Header:
    """Read and prove the header of the safetensors file at ``path``.

    Raises MalformedInputError (any rule of the format broken, with tensor and offset), UnsupportedError (an
    element type the format does not know), AccessError, ResourceError.
    """
    path = Path(path)
    with opened(path) as descriptor:
        facts = os.fstat(descriptor)
        size = facts.st_size
        if size < 8:
            _refuse(
                "too short for a safetensors file", path, offset=0, expected="8 bytes or more", found=f"{size} bytes"
            )
        raw = bytearray(8)
        pread_into(descriptor, memoryview(raw), 0, path)
        if raw == b"version ":
            remedy = "run `git lfs pull` in the model's directory"
            _refuse("a Git LFS pointer stands in the file's place", path, offset=0, remedy=remedy)
        length = int.from_bytes(raw, "little")
        _check_length(length, size, path)
        raw += bytes(length)
        pread_into(descriptor, memoryview(raw)[8:], 8, path)
    digest = hashlib.sha256(raw).hexdigest()
    del raw[:8]
    if raw[:1] != b"{":
        _refuse("the header must begin with '{'", path, offset=8, expected="'{'", found=repr(bytes(raw[:1])))
    fields = parse_json(raw, file=path, base_offset=8)
    del raw
    metadata = _metadata(fields.pop("__metadata__", {}), path)
    tensors = _tensors(fields, path, 8 + length, size)
    return Header(path, tensors, metadata, 8 + length, size, facts.st_mtime_ns, facts.st_dev, facts.st_ino, digest)


def _refuse(what: str, path: Path, **facts: Any) -> NoReturn:
    facts.setdefault("remedy", _AGAIN)
    raise MalformedInputError(what, file=path, **facts)


def _check_length(length: int, size: int, path: Path) -> None:
    if length > MAX_HEADER_BYTES:
        _refuse(
            "the header's length is beyond what the format allows",
            path,
            offset=0,
            expected=f"at most {MAX_HEADER_BYTES:,} bytes",
            found=f"{length:,} bytes",
        )
    if length > size - 8:
        _refuse(
            f"the file is truncated inside its header: {length - size + 8:,} bytes are missing, no tensor is whole",
            path,
            offset=0,
            expected=f"a header of {length:,} bytes",
            found=f"a file of {size:,} bytes",
        )
    if length < 2:
        _refuse("the header is empty", path, offset=0, expected="a JSON object", found=f"{length} bytes")


def _metadata(value: Any, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        _refuse("__metadata__ must map strings to strings", path, offset=8, found=type(value).__name__)
    return value


def _tensors(fields: dict[str, Any], path: Path, base: int, size: int) -> dict[str, TensorInfo]:
    found = [_tensor(name, entry, path, base) for name, entry in fields.items()]
    found.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    end = base
    before = "the header"
    for tensor in found:
        if tensor.offset != end:
            named = printable(before, 120)
            _refuse(
                f"a tensor overlaps {named}" if tensor.offset < end else f"a tensor leaves a hole after {named}",
                path,
                tensor=tensor.name,
                offset=tensor.offset,
                expected=f"data from byte {end:,}",
                found=f"data from byte {tensor.offset:,}",
            )
        end += tensor.nbytes
        before = tensor.name
    if end > size:
        _refuse_truncated(found, path, end, size)
    if end < size:
        _refuse(
            "bytes follow the last tensor that belong to none",
            path,
            offset=end,
            expected=f"a file of {end:,} bytes",
            found=f"{size:,} bytes",
        )
    return {tensor.name: tensor for tensor in found}


def _refuse_truncated(tensors: list[TensorInfo], path: Path, end: int, size: int) -> NoReturn:
    whole = [tensor for tensor in tensors if tensor.offset + tensor.nbytes <= size]
    broken = next(tensor for tensor in tensors if tensor.offset + tensor.nbytes > size)
    last = f", up to {printable(whole[-1].name, 120)}" if whole else ""
    _refuse(
        f"the file is truncated: {end - size:,} bytes are missing; "
        f"{len(whole)} of {len(tensors)} tensors are whole{last}",
        path,
        tensor=broken.name,
        offset=broken.offset,
        expected=f"a file of {end:,} bytes",
        found=f"{size:,} bytes",
        remedy="fetch this file again; the download or copy was cut short",
    )


def _tensor(name: str, entry: Any, path: Path, base: int) -> TensorInfo:
    if not isinstance(entry, dict):
        _refuse("a tensor's entry must be an object", path, tensor=name, offset=8, found=type(entry).__name__)
    missing = [key for key in ("dtype", "shape", "data_offsets") if key not in entry]
    if missing:
        _refuse("a tensor's entry is incomplete", path, tensor=name, offset=8, expected=", ".join(missing))
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise UnsupportedError(
            "the safetensors format knows no such element type",
            file=path,
            tensor=name,
            offset=8,
            expected=", ".join(DTYPE_BITS),
            found=dtype,
            remedy="save the model again with a current safetensors, in BF16, F16 or F32",
        )
    if type(shape) is not list or len(shape) > MAX_RANK or not all(type(n) is int and n >= 0 for n in shape):
        _refuse(
            "a shape must be a list of whole numbers, none negative",
            path,
            tensor=name,
            offset=8,
            expected=f"at most {MAX_RANK} dimensions",
            found=printable(repr(shape), 120),
        )
    if type(span) is not list or len(span) != 2 or not all(type(n) is int for n in span) or not 0 <= span[0] <= span[1]:
        _refuse(
            "data_offsets must be two whole numbers, 0 <= begin <= end",
            path,
            tensor=name,
            offset=8,
            found=printable(repr(span), 120),
        )
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    nbytes = span[1] - span[0]
    if nbytes * 8 != bits:
        _refuse(
            "shape and element type do not give the tensor's number of bytes",
            path,
            tensor=name,
            offset=base + span[0],
            expected=f"{bits / 8:,.6g} bytes for {dtype} {shape}"
            if bits % 8
            else f"{bits // 8:,} bytes for {dtype} {shape}",
            found=f"{nbytes:,} bytes",
        )
    return TensorInfo(name, dtype, tuple(shape), path, base + span[0], nbytes)
