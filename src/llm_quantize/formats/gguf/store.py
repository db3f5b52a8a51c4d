"""How a GGUF file keeps one matrix: ggml's blocks, rounded or from codes on a grid, and back to values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llm_quantize import kernels
from llm_quantize.architectures.rows import chunk_rows
from llm_quantize.formats.base import ReadRows
from llm_quantize.formats.gguf.plan import TOO_LARGE
from llm_quantize.grids import grid_type, has_grid, pack_ggml
from llm_quantize.grids.grid import Grid, GridType
from llm_quantize.plan import MatrixPlan, TensorPlan
from llm_quantize.qtypes import QTYPES
from llm_quantize.qtypes.inputs import InputGrid
from llm_quantize.qtypes.range import refusal

Floats = npt.NDArray[np.float32]
Fields = list[npt.NDArray[Any]]


class GgufStore:
    """ggml's blocks: a tensor is its packed rows."""

    rounds = "fit"
    fits_unseen = True

    def grid_type(self, qtype: str) -> GridType | None:
        return grid_type(qtype) if has_grid(qtype) else None

    def grid_of(self, matrix: MatrixPlan, start: int, stop: int, read: ReadRows) -> GridType | None:
        del start, stop, read
        return self.grid_type(matrix.qtype)

    def inputs(self, matrix: MatrixPlan) -> None:
        """As ``Store.inputs``: llama.cpp rounds them to 8 bits, which is not followed here."""
        del matrix

    def numbers(self, matrix: MatrixPlan, inputs: InputGrid) -> Fields:
        raise ValueError(f"nothing of the inputs of {matrix.name} is calibrated")

    def largest(self, qtype: str) -> float:
        return QTYPES[qtype].largest

    def piece(self, matrix: MatrixPlan, grid: Grid, codes: torch.Tensor) -> npt.NDArray[np.uint8]:
        return pack_ggml(matrix.qtype, grid, codes)

    def plain(self, matrix: MatrixPlan, rows: Floats, importance: Floats | None) -> npt.NDArray[np.uint8]:
        packed = kernels.quantize(matrix.qtype, rows, importance)
        qtype = QTYPES[matrix.qtype]
        bad = qtype.infinite_blocks(packed)
        if bad.size:
            block = rows.reshape(-1, qtype.block_size)[bad[0]]
            worst = int(np.argmax(np.abs(block)))
            row, column = divmod(int(bad[0]) * qtype.block_size + worst, rows.shape[1])
            value = float(block[worst])
            raise refusal(matrix.name, qtype.name, row, column, value, limit=qtype.largest, remedy=TOO_LARGE)
        return packed

    def join(self, matrix: MatrixPlan, pieces: Sequence[Any]) -> Fields:
        return [np.concatenate(pieces)]

    def typed(self, tensor: TensorPlan, data: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        return data.reshape(-1, tensor.row_bytes)

    def decode(self, matrix: MatrixPlan, fields: Fields) -> Floats:
        columns = matrix.weight.shape[-1]
        packed = fields[0].reshape(-1, QTYPES[matrix.qtype].row_bytes(columns))
        return kernels.dequantize(matrix.qtype, packed, columns)

    def decoded(self, matrix: MatrixPlan, fields: Fields) -> Iterator[tuple[int, Floats]]:
        columns = matrix.weight.shape[-1]
        packed = fields[0].reshape(-1, QTYPES[matrix.qtype].row_bytes(columns))
        for first in range(0, len(packed), step := chunk_rows(columns)):
            yield first, kernels.dequantize(matrix.qtype, packed[first : first + step], columns)
