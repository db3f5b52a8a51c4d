"""Matrices that keep the codes and scales of their source.

What is held is asked of the format (``Store.hold``), not of names; that it is the same is not believed of it either:
what was packed is decoded again, as a runtime reads it, and held against what the source reads. Where values are not
the same but NEAR, only numbers of groups were rounded: codes are kept, and the record does not say exact.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llm_quantize.architectures.rows import (
    chunk_ranges,
    chunk_rows,
    held_output_rows,
    matrix_shape,
    read_output_rows,
    to_float32,
)
from llm_quantize.artifacts.origin import stamped
from llm_quantize.artifacts.verdict import EXACT, Difference
from llm_quantize.grids.held import joined
from llm_quantize.kernels import repack
from llm_quantize.models.base import Model
from llm_quantize.plan import MatrixPlan
from llm_quantize.qtypes.held import HeldWords
from llm_quantize.streams.pool import Pool

if TYPE_CHECKING:
    from llm_quantize.blockwise.run import Matrices

Fields = list[npt.NDArray[Any]]


NEAR, RUN, LEAST = 2.0**-7, 16, 2.0**-18
"""How far values may be from the source's where codes are kept under rounded scales and offsets: of the largest of RUN
columns, and by itself. bfloat16 has eight bits, the subnormal numbers of float16 end at 2^-24; a code of 4 bits that is
another is further off, and codes chosen anew lose more."""


@dataclass(frozen=True)
class Kept:
    """Fields with the codes of the source, what to record of them, and the hash of the source's rows (``source_hash``)
    where they were read for it."""

    fields: Fields
    facts: Mapping[str, Any]
    origin: str = ""


def keep(matrices: Matrices, matrix: MatrixPlan, pool: Pool) -> Kept | None:
    """The fields of ``matrix`` with the source's own codes and scales, proved to decode to its values or NEAR them;
    None where the artifact's grid does not hold them, or the source has none."""
    repacked = _repacked(matrices, matrix)
    if repacked is not None:
        return repacked
    fields = _copied(matrices, matrix) or _held(matrices, matrix, pool)
    if fields is None:
        return None
    digest = None if stamped(matrices.source.checkpoint, matrix.weight) else hashlib.sha256()
    if _same(matrices, matrix, fields, digest):
        return Kept(fields, {"kept": True, "verdict": EXACT}, "" if digest is None else digest.hexdigest())
    if not _is_near(matrices, matrix, fields):
        return None
    return Kept(fields, {"kept": True, **difference(matrices, matrix, fields).verdict()})


def _repacked(matrices: Matrices, matrix: MatrixPlan) -> Kept | None:
    """The fields of a matrix whose codes go from words to words, proved in three steps: every code of what was made,
    taken by its place, is the source's; so are all numbers of groups, or what each code of each group is decoded to;
    and the first rows, decoded to float32 by the readers of both, are the same. None where that is not to be had."""
    weight, checkpoint = matrix.weight, matrices.source.checkpoint
    rows, _ = matrix_shape(weight.shape)
    if len(weight.pieces) != 1 or weight.constant is not None or matrix.cache is not None:
        return None
    (piece,) = weight.pieces
    if (
        piece.transpose
        or piece.altered
        or piece.start
        or piece.deal[1] > 1
        or not (piece.order is None and piece.columns is None)
    ):
        return None
    held = checkpoint.held_words(piece.source) if checkpoint.matrix(piece.source)[0] == rows else None
    made = None if held is None else matrices.store.repack(matrix, held)
    if held is None or made is None or not _decode_alike(held, made.back):
        return None
    first = to_float32(read_output_rows(checkpoint, weight, 0, len(made.first)))
    return Kept(made.fields, {"kept": True, "verdict": EXACT}) if np.array_equal(first, made.first) else None


def _decode_alike(one: HeldWords, other: HeldWords) -> bool:
    """Whether both decode to the same values, by their codes and the numbers of their groups: one function of equal
    arguments, or where a side has offsets, the same value of every code that there can be in every group."""
    if (one.bits, one.group, one.scales.shape) != (other.bits, other.group, other.scales.shape):
        return False
    if not repack.same(one.words, one.layout, other.words, other.layout):
        return False
    if one.zeros is not None and other.zeros is not None:
        return np.array_equal(one.scales, other.scales) and np.array_equal(one.zeros, other.zeros)
    return all(np.array_equal(one.value(place), other.value(place)) for place in range(1 << one.bits))


def _is_near(matrices: Matrices, matrix: MatrixPlan, fields: Fields) -> bool:
    """Whether no value is further from the source's than the rounding of a scale explains."""
    for start, values in matrices.store.decoded(matrix, fields):
        wanted = matrices.present_rows(matrix, start, start + len(values))
        run = RUN if wanted.shape[1] % RUN == 0 else wanted.shape[1]
        most = np.abs(wanted).reshape(len(wanted), -1, run).max(axis=2, keepdims=True)
        off = np.abs(values - wanted).reshape(len(wanted), -1, run)
        if not (off <= NEAR * most + LEAST).all():
            return False
    return True


def _copied(matrices: Matrices, matrix: MatrixPlan) -> Fields | None:
    """The fields of a matrix that the source stores in the very blocks."""
    checkpoint, weight = matrices.source.checkpoint, matrix.weight
    stored = {checkpoint.block_type(piece.source, transpose=piece.transpose) for piece in weight.pieces}
    if stored != {matrix.qtype}:
        return None
    blocks = _Blocks(checkpoint)
    return matrices.store.blocks(matrix, lambda first, last: read_output_rows(blocks, weight, first, last))


def _held(matrices: Matrices, matrix: MatrixPlan, pool: Pool) -> Fields | None:
    """The fields of a matrix with the source's codes, on the grid on which the source stores them."""
    if not all(
        matrices.source.checkpoint.held(piece.source, transpose=piece.transpose) for piece in matrix.weight.pieces
    ):
        return None
    rows, columns = matrix_shape(matrix.weight.shape)
    step = chunk_rows(columns)
    ranges = [(start, min(rows, start + step)) for start in range(0, rows, step)]
    parts = list(pool.in_order(lambda part: held_output_rows(matrices.source.checkpoint, matrix.weight, *part), ranges))
    found = [part for part in parts if part is not None]
    whole = joined(found) if len(found) == len(parts) else None
    if whole is None:
        return None
    held = matrices.store.hold(matrix, *whole) or matrices.store.hold(matrix, *whole, exact=False)
    del whole, found, parts
    return None if held is None else matrices.store.join(matrix, [matrices.store.piece(matrix, *held)])


@dataclass(frozen=True)
class _Blocks:
    """The rows of a source as it stores them, in blocks of ggml (``architectures.rows.RowSource``)."""

    model: Model

    def matrix(self, name: str, *, transpose: bool = False) -> tuple[int, int]:
        """(rows, columns)."""
        return self.model.matrix(name, transpose=transpose)

    def read_rows(
        self, name: str, start: int, stop: int, *, transpose: bool = False, buffer: Any = None, digest: Any = None
    ) -> npt.NDArray[np.uint8]:
        """uint8 (stop - start, row_bytes)."""
        del buffer, digest
        return self.model.block_rows(name, start, stop, transpose=transpose)


def _same(matrices: Matrices, matrix: MatrixPlan, fields: Fields, digest: Any) -> bool:
    """Whether ``fields`` decode to the source's values; ``digest``, if any, is updated as ``source_hash`` does."""
    decoded = matrices.store.decoded(matrix, fields)
    ready: list[npt.NDArray[np.float32]] = []
    for _, start, stop in chunk_ranges(matrix.weight.shape, 0, matrix_shape(matrix.weight.shape)[0]):
        rows = to_float32(read_output_rows(matrices.source.checkpoint, matrix.weight, start, stop, digest=digest))
        while sum(map(len, ready)) < len(rows):
            ready.append(next(decoded)[1])
        have = ready[0] if len(ready) == 1 else np.concatenate(ready)
        if not np.array_equal(have[: len(rows)], rows):
            return False
        ready = [have[len(rows) :]]
    return True


def difference(matrices: Matrices, matrix: MatrixPlan, fields: Sequence[npt.NDArray[Any]]) -> Difference:
    """How far what ``fields`` decode to is from the weight, as a transform left it."""
    found = Difference()
    for start, values in matrices.store.decoded(matrix, list(fields)):
        found.add(values, matrices.present_rows(matrix, start, start + len(values)))
    return found
