"""How a GGUF file keeps one matrix: ggml's blocks, rounded or from codes on a grid, and back to values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llm_quantize import kernels
from llm_quantize.architectures.rows import chunk_rows, matrix_shape
from llm_quantize.formats.base import ReadRows
from llm_quantize.formats.gguf.plan import TOO_LARGE
from llm_quantize.formats.gguf.scales import count_of, decode
from llm_quantize.grids import ggml_held, grid_type, has_grid, pack_ggml
from llm_quantize.grids.grid import Grid, GridType
from llm_quantize.plan import MatrixPlan, TensorPlan
from llm_quantize.qtypes import QTYPES
from llm_quantize.qtypes.held import HeldWords
from llm_quantize.qtypes.inputs import InputGrid
from llm_quantize.qtypes.range import refusal

Floats = npt.NDArray[np.float32]
Fields = list[npt.NDArray[Any]]
Piece = tuple[npt.NDArray[np.uint8], Floats]
"""Blocks uint8 (rows, row_bytes), and what is beside those of each row, float32 (rows,)."""


class GgufStore:
    """ggml's blocks: a tensor is its packed rows."""

    rounds = "fit"
    fits_unseen = True

    def grid_type(self, qtype: str) -> GridType | None:
        return grid_type(qtype) if has_grid(qtype) else None

    def grid_of(self, matrix: MatrixPlan, start: int, stop: int, read: ReadRows) -> GridType | None:
        del start, stop, read
        return self.grid_type(matrix.qtype)

    def hold(
        self, matrix: MatrixPlan, grid: Grid, codes: torch.Tensor, *, exact: bool = True
    ) -> tuple[Grid, torch.Tensor] | None:
        found = ggml_held.hold(matrix.qtype, grid, codes, exact=exact)
        return None if found is None or not _fits(matrix, found[0]) else found

    def blocks(self, matrix: MatrixPlan, read: Callable[[int, int], npt.NDArray[np.uint8]]) -> Fields:
        return [read(0, matrix_shape(matrix.weight.shape)[0])]

    def repack(self, matrix: MatrixPlan, held: HeldWords) -> None:
        """As ``Store.repack``: words of directories are not taken over as they stand."""
        del matrix, held

    def inputs(self, matrix: MatrixPlan) -> None:
        """As ``Store.inputs``: llama.cpp rounds them to 8 bits, which is not followed here."""
        del matrix

    def numbers(self, matrix: MatrixPlan, inputs: InputGrid) -> Fields:
        raise ValueError(f"nothing of the inputs of {matrix.name} is calibrated")

    def largest(self, qtype: str) -> float:
        return QTYPES[qtype].largest

    def piece(self, matrix: MatrixPlan, grid: Grid, codes: torch.Tensor) -> Piece:
        return pack_ggml(matrix.qtype, grid, codes), _steps(grid)

    def plain(self, matrix: MatrixPlan, rows: Floats, importance: Floats | None) -> Piece:
        packed = kernels.quantize(matrix.qtype, rows, importance)
        qtype = QTYPES[matrix.qtype]
        bad = qtype.infinite_blocks(packed)
        if bad.size:
            block = rows.reshape(-1, qtype.block_size)[bad[0]]
            worst = int(np.argmax(np.abs(block)))
            row, column = divmod(int(bad[0]) * qtype.block_size + worst, rows.shape[1])
            value = float(block[worst])
            raise refusal(matrix.name, qtype.name, row, column, value, limit=qtype.largest, remedy=TOO_LARGE)
        return packed, np.ones(len(packed), np.float32)

    def join(self, matrix: MatrixPlan, pieces: Sequence[Piece]) -> Fields:
        packed = np.concatenate([packed for packed, _ in pieces])
        if len(matrix.fields) == 1:
            return [packed]
        steps = np.concatenate([steps for _, steps in pieces])
        return [packed, np.ascontiguousarray(steps[:: len(steps) // count_of(matrix.weight.shape)])]

    def typed(self, tensor: TensorPlan, data: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        return data.reshape(-1, tensor.row_bytes)

    def decode(self, matrix: MatrixPlan, fields: Fields) -> Floats:
        return np.concatenate([values for _, values in self.decoded(matrix, fields)])

    def decoded(self, matrix: MatrixPlan, fields: Fields) -> Iterator[tuple[int, Floats]]:
        columns = matrix.weight.shape[-1]
        packed = fields[0].reshape(-1, QTYPES[matrix.qtype].row_bytes(columns))
        scales = None
        if len(fields) > 1:
            whole = np.ascontiguousarray(fields[1]).reshape(-1).view(np.uint8).view(np.float32)
            scales = np.repeat(whole, len(packed) // len(whole))[:, None]
        for first in range(0, len(packed), step := chunk_rows(columns)):
            some = slice(first, first + step)
            yield first, decode(matrix.qtype, packed[some], columns, None if scales is None else scales[some])


def _steps(grid: Grid) -> Floats:
    """float32 (rows,): what the scales of groups are multiplied with, ones where nothing is."""
    if grid.ladder is None:
        return np.ones(grid.shape[0], np.float32)
    steps: Floats = grid.ladder.steps[:, 0].numpy().astype(np.float32)
    return steps


def _fits(matrix: MatrixPlan, grid: Grid) -> bool:
    """Whether a number beside the blocks of each matrix of a stack, if there is a place for it, is all that the scales
    of groups are multiplied with."""
    steps = _steps(grid)
    if len(matrix.fields) == 1:
        return bool((steps == 1).all())
    each = steps.reshape(count_of(matrix.weight.shape), -1)
    return bool((each == each[:, :1]).all() and np.isfinite(each).all() and (each > 0).all())
