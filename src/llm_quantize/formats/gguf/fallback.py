"""Rows that do not divide into the blocks of the type they should have: which other type loses least, measured.

llama.cpp has one type for each such case (``mixes.FALLBACKS``). Here every type that fits and takes no more bytes is
tried on some rows of the matrix, rounded as a run rounds them, and the least of

    E = sum over rows and channels of h (w - w')^2,  h the importance of the channel, 1 where nothing is known of it

wins: the first-order loss of the matrix's outputs. The rows are slabs spread evenly over the matrix, the same in every
run, the sums are float64 in one order, and the kernels give the same bytes on every machine: so does the choice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from llm_quantize import kernels
from llm_quantize.architectures.base import OutputTensor
from llm_quantize.architectures.rows import chunk_ranges, matrix_shape, read_output_rows, to_float32
from llm_quantize.formats.base import Importance
from llm_quantize.formats.gguf.mixes import YOUNG
from llm_quantize.kernels.weighing import vector_for
from llm_quantize.plan import Substitution
from llm_quantize.qtypes import QTYPES, QType

if TYPE_CHECKING:
    from llm_quantize.models.opening import Source

Floats = npt.NDArray[np.float32]

SLABS, SLAB_ROWS = 8, 32
"""How many runs of rows of a matrix are looked at, and the rows of each."""


def is_known(source: Source, importance: Importance | None) -> bool:
    """Whether losses can be measured: the weights are here, and what weighs them."""
    return not source.checkpoint.headers_only and (importance is None or importance.sha256 != "")


def candidates(columns: int, most: int) -> list[str]:
    """The quantized types that a row of ``columns`` divides into the blocks of, in at most ``most`` bytes, the largest
    first; none that many builds of llama.cpp do not know."""
    fit = [
        kind
        for name, kind in QTYPES.items()
        if kind.block_size > 1 and not kind.needs_importance and columns % kind.block_size == 0 and name not in YOUNG
    ]
    fit = [kind for kind in fit if kind.row_bytes(columns) <= most]
    return [kind.name for kind in sorted(fit, key=lambda kind: -kind.row_bytes(columns))]


def best(
    source: Source, outputs: Sequence[OutputTensor], found: Sequence[Substitution], importance: Importance | None
) -> list[Substitution]:
    """``found`` with the type that loses least in place of llama.cpp's, where that is another."""
    by_name = {output.name: output for output in outputs}
    return [_best(source, by_name[one.tensor], one, importance) for one in found]


def _best(source: Source, output: OutputTensor, one: Substitution, importance: Importance | None) -> Substitution:
    usual = QTYPES[one.taken]
    if usual.block_size == 1:  # no quantized type divides the rows
        return one
    columns = output.shape[-1]
    names = candidates(columns, usual.row_bytes(columns))
    losses = dict.fromkeys(names, 0.0)
    for rows, weights in _slabs(source, output, importance):
        for name in names:
            losses[name] += _loss(QTYPES[name], rows, weights)
    least = min(names, key=lambda name: (losses[name], name != usual.name))
    if least == usual.name or not losses[least] < losses[usual.name]:
        return one
    return replace(one, taken=least, usual=usual.name, share=losses[least] / losses[usual.name])


def ranges(count: int) -> list[tuple[int, int]]:
    """The rows that are looked at, of ``count``."""
    if count <= SLABS * SLAB_ROWS:
        return [(0, count)]
    starts = [index * (count - SLAB_ROWS) // (SLABS - 1) for index in range(SLABS)]
    return [(start, start + SLAB_ROWS) for start in starts]


def _slabs(
    source: Source, output: OutputTensor, importance: Importance | None
) -> Iterator[tuple[Floats, Floats | None]]:
    """(rows float32 without those that are not finite, importance (columns,) or None) of some of the matrix."""
    known = None if importance is None else importance.rows(output.name, output.shape)
    for first, last in ranges(matrix_shape(output.shape)[0]):
        for matrix, start, stop in chunk_ranges(output.shape, first, last):
            rows = to_float32(read_output_rows(source.checkpoint, output, start, stop))
            rows = np.ascontiguousarray(rows[np.isfinite(rows).all(axis=1)])
            if len(rows):
                yield rows, None if known is None else np.ascontiguousarray(known[matrix])


def _loss(kind: QType, rows: Floats, importance: Floats | None) -> float:
    """E of ``rows`` rounded to ``kind``; infinite where a weight is beyond it."""
    packed = kernels.quantize(kind.name, rows, vector_for(kind.name, importance))
    if kind.infinite_blocks(packed).size:
        return math.inf
    error = (kernels.dequantize(kind.name, packed, rows.shape[1]).astype(np.float64) - rows) ** 2
    if importance is not None and importance.any():
        error *= importance
    return float(error.sum())
