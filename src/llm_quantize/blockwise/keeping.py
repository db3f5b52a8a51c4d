"""Matrices that keep the codes and the scales of their source, where the format of the artifact holds them.

What is held is asked of the grid (``GridType.hold``), not of names; that it is the same is not believed of it either:
what was packed is decoded again, as a runtime reads it, and held against what the source reads. Where one value is
another, nothing of the matrix is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llm_quantize.architectures.rows import chunk_rows, held_output_rows, matrix_shape, read_output_rows
from llm_quantize.artifacts.verdict import EXACT, Difference
from llm_quantize.grids.held import joined
from llm_quantize.models.base import Model
from llm_quantize.plan import MatrixPlan
from llm_quantize.streams.pool import Pool

if TYPE_CHECKING:
    import torch

    from llm_quantize.blockwise.run import Matrices
    from llm_quantize.grids.grid import Grid

NEAR = 2.0**-9
"""The relative error below which codes are kept under rounded scales: float16 has eleven bits."""

Fields = list[npt.NDArray[Any]]


def keep(matrices: Matrices, matrix: MatrixPlan, pool: Pool) -> tuple[Fields, dict[str, Any]] | None:
    """The fields of ``matrix`` with the source's own codes, and what to record; None where the artifact's grid does not
    hold them, or the source has none.

    Its scales too, proved to decode to the source's values. Where the artifact cannot hold these, but numbers so near
    that codes chosen anew would lose more (NEAR), the codes are kept under them, and the record does not say exact.
    """
    checkpoint, weight = matrices.source.checkpoint, matrix.weight
    store = matrices.store
    stored = {checkpoint.block_type(piece.source, transpose=piece.transpose) for piece in weight.pieces}
    if stored == {matrix.qtype}:
        blocks = _Blocks(checkpoint)
        fields = store.blocks(matrix, lambda first, last: read_output_rows(blocks, weight, first, last))
        if fields is not None and not difference(matrices, matrix, fields).unequal:
            return fields, {"kept": True, "verdict": EXACT}
    whole = _whole(matrices, matrix, pool)
    if whole is None:
        return None
    held = store.hold(matrix, *whole) or store.hold(matrix, *whole, exact=False)
    if held is None:
        return None
    fields = store.join(matrix, [store.piece(matrix, *held)])
    off = difference(matrices, matrix, fields)
    return (fields, {"kept": True, **off.verdict()}) if off.relative < NEAR else None


def _whole(matrices: Matrices, matrix: MatrixPlan, pool: Pool) -> tuple[Grid, torch.Tensor] | None:
    """All rows of a matrix on the grid on which the source stores them."""
    if not all(matrices.source.checkpoint.held(piece.source) for piece in matrix.weight.pieces):
        return None
    rows, columns = matrix_shape(matrix.weight.shape)
    step = chunk_rows(columns)
    ranges = [(start, min(rows, start + step)) for start in range(0, rows, step)]
    parts = list(pool.in_order(lambda part: held_output_rows(matrices.source.checkpoint, matrix.weight, *part), ranges))
    found = [part for part in parts if part is not None]
    return joined(found) if len(found) == len(parts) else None


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


def difference(matrices: Matrices, matrix: MatrixPlan, fields: Sequence[npt.NDArray[Any]]) -> Difference:
    """How far what ``fields`` decode to is from the weight, as a transform left it."""
    found = Difference()
    for start, values in matrices.store.decoded(matrix, list(fields)):
        found.add(values, matrices.present_rows(matrix, start, start + len(values)))
    return found
