"""Importance matrices for llama.cpp, written: the GGUF kind and the older ``.dat``. Their layouts: io/imatrix_file.py.

Entries stand in the order of their names, as llama.cpp's own tool sorts them, so the bytes do not depend on the order
in which they are given.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from gguf.constants import GGUFValueType

from llm_quantize.errors import UnsupportedError
from llm_quantize.io.gguf_file import MetaValue, layout_gguf
from llm_quantize.io.whole_file import write_file
from llm_quantize.qtypes.ggml_types import GgmlType

Floats = npt.NDArray[np.float32]


class Entry(Protocol):
    """Sums of squares (matrices, columns), token counts (matrices,) and their quotients (matrices, columns)."""

    @property
    def sums(self) -> Floats: ...
    @property
    def counts(self) -> Floats: ...
    @property
    def importance(self) -> Floats: ...


def write_imatrix_gguf(
    path: str | Path,
    entries: Mapping[str, Entry],
    *,
    datasets: Sequence[str],
    chunks: int,
    chunk_size: int,
    replace: bool = False,
) -> int:
    """Write an importance matrix as llama-imatrix does (GGUF) and return its bytes.

    ``entries``: GGUF tensor name -> sums and counts; ``chunks`` windows of ``chunk_size`` tokens were read. Raises as
    ``write_file``, UsageError for a name that llama.cpp cannot hold.
    """
    metadata = {
        "general.type": MetaValue(GGUFValueType.STRING, "imatrix"),
        "imatrix.datasets": MetaValue(GGUFValueType.ARRAY, list(datasets), GGUFValueType.STRING),
        "imatrix.chunk_count": MetaValue(GGUFValueType.UINT32, chunks),
        "imatrix.chunk_size": MetaValue(GGUFValueType.UINT32, chunk_size),
    }
    tensors: list[tuple[str, tuple[int, ...], GgmlType]] = []
    values: list[Floats] = []
    for name, entry in sorted(entries.items()):
        tensors.append((f"{name}.in_sum2", entry.sums.shape, GgmlType.F32))
        tensors.append((f"{name}.counts", (len(entry.counts), 1), GgmlType.F32))
        values += [entry.sums, entry.counts]
    layout = layout_gguf(metadata, tensors)

    def pieces() -> Iterator[bytes | memoryview]:
        yield layout.header
        at = len(layout.header)
        for place, array in zip(layout.tensors, values, strict=True):
            yield bytes(place.offset - at)
            yield np.ascontiguousarray(array, "<f4").reshape(-1).view(np.uint8).data
            at = place.offset + place.nbytes
        yield bytes(layout.size - at)

    return write_file(path, pieces(), replace=replace)


def write_imatrix_dat(
    path: str | Path, entries: Mapping[str, Entry], *, dataset: str, chunks: int, replace: bool = False
) -> int:
    """Write the older binary kind and return its bytes: mean squares, with one call each, so that no division is left
    to round. Raises as ``write_file``, UnsupportedError for an entry beyond 2^31 values."""

    def pieces() -> Iterator[bytes | memoryview]:
        yield struct.pack("<i", len(entries))
        for name, entry in sorted(entries.items()):
            if entry.sums.size >= 1 << 31:
                raise UnsupportedError(
                    "the older importance matrix cannot hold an entry of this size",
                    tensor=name,
                    expected="fewer than 2^31 values",
                    found=entry.sums.size,
                    remedy="write the GGUF kind",
                )
            data = name.encode()
            yield struct.pack("<i", len(data)) + data + struct.pack("<ii", 1, entry.sums.size)
            yield np.ascontiguousarray(entry.importance, "<f4").reshape(-1).view(np.uint8).data
        text = dataset.encode()
        yield struct.pack("<ii", chunks, len(text)) + text

    return write_file(path, pieces(), replace=replace)
