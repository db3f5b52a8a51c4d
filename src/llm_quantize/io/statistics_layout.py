"""Where every byte of our file of calibration statistics goes: what a model's linear layers were fed with over a text.

Legend: a *tap* is one input X (tokens, columns) that one or more weights W (out, columns) share; a tap of experts has
one X for each of its ``matrices``. n = tokens, per matrix.

    TAP.counts       I64 (matrices,)                     n
    TAP.sum_squares  F64 (matrices, columns)             sum over tokens of x^2                      kind imatrix
    TAP.sums         F64 (matrices, columns)             sum over tokens of x                        kind absmax
    TAP.absmax       F32 (matrices, columns)             largest |x|, 0 where nothing was seen       kind absmax
    TAP.hessian      F32 (matrices, columns, columns)    X^T X, not divided by n                     kind hessian
    content.sha256   U8  (1 + matrices of all arrays, 32)
                                                         SHA-256 of the header, then of each matrix of each array

The container is safetensors; ``__metadata__`` holds format, version, and canonical JSON for model, text, kinds, taps.
Arrays stand block by block, so that a block is one contiguous piece of the file, and every place follows from the
layout before any work; the hashes stand last, as they are known last. Hessians are kept in float32: they are sums of
float32 products (relative error about 1e-6), so the last rounding (6e-8) costs nothing that twice the disk would buy;
sums run in float64 (calibration/statistics.py).
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llm_quantize.errors import UsageError
from llm_quantize.io.journal import canonical_json

FORMAT = "llm-quantize-statistics"
VERSION = 3  # 1 had no hashes, 2 knew the model by some rows of its tensors
CONTENT = "content.sha256"
KINDS = ("imatrix", "hessian", "absmax")
_PIECE_BYTES = 8 << 20
NUMPY_TYPES: Mapping[str, np.dtype[Any]] = {
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "U8": np.dtype("u1"),
}

# suffix -> (kind that asks for it, None: every one; element type; dimensions after (matrices,) that are columns).
# Eight-byte values stand first in a block, so that they are aligned.
ARRAYS: Mapping[str, tuple[str | None, str, int]] = {
    "counts": (None, "I64", 0),
    "sum_squares": ("imatrix", "F64", 1),
    "sums": ("absmax", "F64", 1),
    "absmax": ("absmax", "F32", 1),
    "hessian": ("hessian", "F32", 2),
}


class TapLike(Protocol):
    """What this file wants to know of a tap (``calibration.forward.Tap`` is one)."""

    @property
    def name(self) -> str: ...
    @property
    def columns(self) -> int: ...
    @property
    def matrices(self) -> int: ...
    @property
    def tensors(self) -> Mapping[str, int | None]: ...


@dataclass(frozen=True)
class StatisticsIdentity:
    """What the statistics are of, JSON-ready. ``model`` has "sha256"; ``text`` has "sha256", "datasets" (names), and
    the numbers "windows", "tokens" and "length" (tokens of the longest window); whatever else they say is kept."""

    model: Mapping[str, Any]
    text: Mapping[str, Any]


@dataclass(frozen=True)
class ArrayPlace:
    """One array of the file: safetensors element type, shape, absolute offset."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * NUMPY_TYPES[self.dtype].itemsize


@dataclass(frozen=True)
class StatisticsLayout:
    """Where every byte goes. ``spans[block]``: (absolute offset, bytes), contiguous; (offset, 0) without taps.
    ``content``: the place of the hashes, after all blocks."""

    header: bytes
    size: int
    spans: tuple[tuple[int, int], ...]
    places: tuple[tuple[ArrayPlace, ...], ...]
    content: ArrayPlace

    def block_pieces(
        self, block: int, array: Callable[[str], npt.NDArray[Any]], digests: list[bytes]
    ) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """(position in the block, contiguous array to write there), in order, at most some MB at a time. The hash of
        every matrix that was handed out is added to ``digests``; ``content_bytes`` wants those of all blocks in order.

        ``array``: array name -> values of the place's shape, in any numeric type; what has the place's type already
        is not copied. Raises ValueError for an array of another shape.
        """
        for place in self.places[block]:
            values, dtype = array(place.name), NUMPY_TYPES[place.dtype]
            if values.shape != place.shape:
                raise ValueError(f"{place.name}: {values.shape} where the layout has {place.shape}")
            at = place.offset - self.spans[block][0]
            for matrix in values.reshape(place.shape[0], -1):
                digest = hashlib.sha256()
                step = _PIECE_BYTES // dtype.itemsize
                for first in range(0, matrix.size, step):
                    piece = np.ascontiguousarray(matrix[first : first + step], dtype).view(np.uint8)
                    digest.update(piece.data)
                    yield at, piece
                    at += piece.nbytes
                digests.append(digest.digest())

    def content_bytes(self, digests: Sequence[bytes]) -> bytes:
        """What stands at ``content``. Raises ValueError where hashes of blocks are missing."""
        data = b"".join((hashlib.sha256(self.header).digest(), *digests))
        if len(data) != self.content.nbytes:
            raise ValueError(f"{len(digests)} hashes of {self.content.shape[0] - 1}")
        return data

    def whole(self, array: Callable[[str], npt.NDArray[Any]]) -> Iterator[memoryview]:
        """The whole file, piece by piece. Raises as ``block_pieces``."""
        digests: list[bytes] = []
        yield memoryview(self.header)
        for block in range(len(self.places)):
            for _, piece in self.block_pieces(block, array, digests):
                yield piece.data
        yield memoryview(self.content_bytes(digests))


def array_shapes(tap: TapLike, kinds: Sequence[str]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name, element type, shape) of each array that a tap has."""
    for suffix, (kind, dtype, dimensions) in ARRAYS.items():
        if kind is None or kind in kinds:
            yield f"{tap.name}.{suffix}", dtype, (tap.matrices, *([tap.columns] * dimensions))


def layout_statistics(
    identity: StatisticsIdentity, blocks: Sequence[Sequence[TapLike]], kinds: Sequence[str]
) -> StatisticsLayout:
    """The exact layout of the file for taps per block, in order. Pure: the same arguments give the same bytes.

    Raises UsageError for an unknown kind, ValueError for taps or tensors that stand twice.
    """
    kinds = check_kinds(kinds)
    _refuse_twice([tap.name for taps in blocks for tap in taps])
    _refuse_twice([name for taps in blocks for tap in taps for name in tap.tensors])
    arrays = [
        sorted(
            (array for tap in taps for array in array_shapes(tap, kinds)),
            key=lambda array: -NUMPY_TYPES[array[1]].itemsize,
        )
        for taps in blocks
    ]
    fields: dict[str, Any] = {"__metadata__": _metadata(identity, blocks, kinds)}
    at = 0
    relative: list[list[ArrayPlace]] = []
    for block in arrays:
        relative.append([])
        for name, dtype, shape in block:
            place = ArrayPlace(name, dtype, shape, at)
            fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + place.nbytes]}
            relative[-1].append(place)
            at += place.nbytes
    hashes = 1 + sum(place.shape[0] for block in relative for place in block)
    content = ArrayPlace(CONTENT, "U8", (hashes, 32), at)
    at += content.nbytes
    fields[CONTENT] = {"dtype": "U8", "shape": list(content.shape), "data_offsets": [content.offset, at]}
    text = canonical_json(fields)
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    places = tuple(
        tuple(ArrayPlace(place.name, place.dtype, place.shape, len(header) + place.offset) for place in block)
        for block in relative
    )
    spans = []
    start = len(header)
    for found in places:
        nbytes = sum(place.nbytes for place in found)
        spans.append((start, nbytes))
        start += nbytes
    content = replace(content, offset=len(header) + content.offset)
    return StatisticsLayout(header, len(header) + at, tuple(spans), places, content)


def check_kinds(kinds: Sequence[str]) -> tuple[str, ...]:
    """``kinds`` once each, in the order of KINDS. Raises UsageError for none or an unknown one."""
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise UsageError("there is no such statistic", expected=", ".join(KINDS), found=", ".join(unknown) or "none")
    return tuple(kind for kind in KINDS if kind in kinds)


def _refuse_twice(names: Sequence[str]) -> None:
    if len(set(names)) != len(names):
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} stands in two places")


def _metadata(
    identity: StatisticsIdentity, blocks: Sequence[Sequence[TapLike]], kinds: Sequence[str]
) -> dict[str, str]:
    taps = [
        {
            "name": tap.name,
            "block": block,
            "columns": tap.columns,
            "matrices": tap.matrices,
            "tensors": dict(tap.tensors),
        }
        for block, found in enumerate(blocks)
        for tap in found
    ]
    values = {"model": identity.model, "text": identity.text, "kinds": list(kinds), "blocks": len(blocks), "taps": taps}
    return {"format": FORMAT, "format_version": str(VERSION)} | {
        key: canonical_json(value).decode() for key, value in values.items()
    }
