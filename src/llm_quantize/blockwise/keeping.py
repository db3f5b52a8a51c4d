"""Matrices that keep the codes and scales of their source.

What is held is asked of the grid (``GridType.hold``), not of names; that it is the same is not believed of it either:
what was packed is decoded again, as a runtime reads it, and held against what the source reads. Where one value is
another, the matrix is not exact; codes alone are kept where that is near.
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
from llm_quantize.artifacts.verdict import EXACT, Difference
from llm_quantize.grids.held import joined
from llm_quantize.plan import MatrixPlan
from llm_quantize.streams.pool import Pool

if TYPE_CHECKING:
    from llm_quantize.blockwise.run import Matrices

Fields = list[npt.NDArray[Any]]


@dataclass(frozen=True)
class Kept:
    """Fields with the source's codes; ``facts`` of their record; ``origin``: the hash of the source's rows, where it
    is known (``source_hash``)."""

    fields: Fields
    facts: Mapping[str, Any]
    origin: str = ""


NEAR = 0.01
"""The relative error up to which codes are kept whose scales or offsets had to be rounded; beyond it, rounding anew is
as good."""


def keep(matrices: Matrices, matrix: MatrixPlan, pool: Pool) -> Kept | None:
    """The fields of ``matrix`` with the source's own codes and scales, proved to decode to its values, or near them
    where only floats had to be rounded; None where the artifact's grid does not hold them, or the source has none."""
    kind = matrices.store.grid_type(matrix.qtype)
    if kind is None or not all(matrices.source.checkpoint.held(piece.source) for piece in matrix.weight.pieces):
        return None
    rows, columns = matrix_shape(matrix.weight.shape)
    step = chunk_rows(columns)
    ranges = [(start, min(rows, start + step)) for start in range(0, rows, step)]
    parts = list(pool.in_order(lambda part: held_output_rows(matrices.source.checkpoint, matrix.weight, *part), ranges))
    found = [part for part in parts if part is not None]
    whole = joined(found) if len(found) == len(parts) else None
    if whole is None:
        return None
    del found, parts
    held = kind.hold(*whole)
    if held is not None:
        fields, digest = matrices.store.join(matrix, [matrices.store.piece(matrix, *held)]), hashlib.sha256()
        if _same(matrices, matrix, fields, digest):
            return Kept(fields, {"kept": True, "verdict": EXACT}, digest.hexdigest())
    near = kind.near(*whole)
    if near is None:
        return None
    fields = matrices.store.join(matrix, [matrices.store.piece(matrix, *near)])
    off = difference(matrices, matrix, fields)
    return Kept(fields, {"kept": True, **off.verdict()}) if off.relative <= NEAR else None


def _same(matrices: Matrices, matrix: MatrixPlan, fields: Fields, digest: Any) -> bool:
    """Whether ``fields`` decode to the source's values; ``digest`` is updated as ``source_hash`` does."""
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
