"""What an artifact may ask of the memory of those who verify it: files with holes say any size, and cost nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from llm_quantize import memory
from llm_quantize.architectures.rows import CHUNK_WEIGHTS, chunk_rows, matrix_shape
from llm_quantize.errors import UnsupportedError
from llm_quantize.formats.packed import PackedMatrix
from llm_quantize.io.paths import read_range
from llm_quantize.io.safetensors_file import TensorInfo
from llm_quantize.memory import Sizes

MOST_COLUMNS = 1 << 26
"""Weights of one row: a hundred times more than any model has."""

MOST_PACKED = 4 << 30
"""Bytes of one packed matrix, which is read whole."""

_MARGIN = 32 << 20
_NOT_FINITE = {"BF16": (np.uint16, 0x7F80), "F16": (np.uint16, 0x7C00)}
_WIDER = {"F32": np.float32, "F64": np.float64}

FLOATS = (*_NOT_FINITE, *_WIDER)
"""Element types whose values can be looked at as they are stored."""


def refuse_long_rows(tensors: Iterable[tuple[str, Path, tuple[int, ...]]]) -> None:
    """Raise UnsupportedError for a tensor (name, file, shape) with rows of more than MOST_COLUMNS, ResourceError where
    its rows do not fit the memory limit as float32, beside the source's."""
    most = 0
    for name, file, shape in tensors:
        columns = matrix_shape(shape)[1]
        if columns > MOST_COLUMNS:
            raise UnsupportedError(
                "a row of this tensor is longer than any that is decoded",
                file=file,
                tensor=name,
                expected=f"at most {MOST_COLUMNS:,} weights",
                found=f"{columns:,}",
                remedy="make or fetch the artifact again: no model has such rows",
            )
        most = max(most, columns * chunk_rows(columns))
    _fit(6 * 4 * most)


def refuse_large_matrices(matrices: Iterable[PackedMatrix], scratch: int) -> None:
    """Raise UnsupportedError for a packed matrix of more than MOST_PACKED bytes, ResourceError where ``scratch``, what
    decoding holds, does not fit the memory limit."""
    for matrix in matrices:
        if matrix.nbytes > MOST_PACKED:
            raise UnsupportedError(
                "a packed matrix is larger than any that is decoded",
                file=matrix.main.file,
                tensor=matrix.main.name,
                expected=f"at most {MOST_PACKED:,} bytes",
                found=f"{matrix.nbytes:,} bytes",
                remedy="make or fetch the artifact again: no model has such matrices",
            )
    _fit(scratch)


def _fit(nbytes: int) -> None:
    refusal = (
        "the memory limit is too small for the tensors of this artifact",
        "verify it where there is more memory, or raise the limit of the container",
    )
    memory.fit(Sizes(margin=_MARGIN, each=nbytes, refusal=refusal), threads=1, max_ram=None)


def nonfinite(info: TensorInfo) -> int:
    """How many values of a stored tensor of FLOATS are NaN or infinite; a few megabytes are in memory at a time."""
    return sum(_counts(info))


def _counts(info: TensorInfo) -> Iterator[int]:
    size = info.nbytes // max(1, info.elements)
    for first in range(0, info.elements, CHUNK_WEIGHTS):
        count = min(CHUNK_WEIGHTS, info.elements - first)
        data = read_range(info.file, info.offset + first * size, count * size)
        if info.dtype in _NOT_FINITE:
            kind, mask = _NOT_FINITE[info.dtype]
            yield int(np.count_nonzero((np.frombuffer(data, kind) & mask) == mask))
        else:
            yield count - int(np.count_nonzero(np.isfinite(np.frombuffer(data, _WIDER[info.dtype]))))
