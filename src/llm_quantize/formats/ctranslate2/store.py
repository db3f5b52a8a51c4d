"""How CTranslate2 keeps one matrix: codes and scales in variables of their own, and back to values."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llm_quantize.architectures.rows import chunk_rows, matrix_shape
from llm_quantize.errors import NumericPolicyError
from llm_quantize.formats.base import NUMPY_TYPES, ReadRows
from llm_quantize.formats.packing import to_numpy
from llm_quantize.grids import grid_type, has_grid
from llm_quantize.grids.grid import Grid, GridType
from llm_quantize.plan import MatrixPlan, TensorPlan
from llm_quantize.qtypes.codebook import codebook_type
from llm_quantize.qtypes.held import HeldWords
from llm_quantize.qtypes.inputs import InputGrid

Floats = npt.NDArray[np.float32]
Fields = list[npt.NDArray[Any]]

WIDE = np.float32(1 << 10)
"""The largest code of int16: sums of products stay within 32 bits."""


@dataclass(frozen=True)
class CTranslate2Store:
    """int8 with a scale for each row, which error feedback knows; int16 with one for the matrix, rounded plainly."""

    _scales: dict[str, np.float32] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    fits_unseen = False

    @property
    def rounds(self) -> str:
        return "plain"

    def grid_type(self, qtype: str) -> GridType | None:
        return grid_type(qtype, scale="float32") if has_grid(qtype) else None

    def grid_of(self, matrix: MatrixPlan, start: int, stop: int, read: ReadRows) -> GridType | None:
        kind = self.grid_type(matrix.qtype)
        if kind is None:
            self._scale(matrix, read)
        return kind

    def _scale(self, matrix: MatrixPlan, read: ReadRows) -> None:
        """Of a whole matrix of int16; one thread makes it, all share it until ``join``."""
        with self._lock:
            if matrix.name not in self._scales:
                rows, columns = matrix_shape(matrix.weight.shape)
                starts = range(0, rows, step := chunk_rows(columns))
                most = max(np.abs(read(matrix, first, min(rows, first + step))).max() for first in starts)
                if not 0 < most < np.inf:
                    raise NumericPolicyError(
                        "a matrix of zeros has no scale in int16",
                        tensor=matrix.name,
                        expected="a weight that is not zero",
                        found=most,
                        remedy="take another level: -q int8",
                    )
                self._scales[matrix.name] = WIDE / most

    def hold(
        self, matrix: MatrixPlan, grid: Grid, codes: torch.Tensor, *, exact: bool = True
    ) -> tuple[Grid, torch.Tensor] | None:
        kind = self.grid_type(matrix.qtype)
        if kind is None:
            return None
        return kind.hold(grid, codes) if exact else kind.near(grid, codes)

    def blocks(self, matrix: MatrixPlan, read: Callable[[int, int], npt.NDArray[Any]]) -> Fields | None:
        """As ``Store.blocks``: codes, each row's with its scale behind it; None where rows that have one scale in
        common come with several."""
        rows, columns = matrix_shape(matrix.weight.shape)
        stored = read(0, rows)
        scales = np.ascontiguousarray(stored[:, -4:]).view("<f4").astype(np.float32).reshape(-1)
        codes = np.ascontiguousarray(stored[:, :-4]).view(np.int8 if self.grid_type(matrix.qtype) else "<i2")
        if self.grid_type(matrix.qtype) is not None:
            return [codes.reshape(rows, columns), scales]
        alike = bool((scales == scales[0]).all())
        return [codes.reshape(rows, columns).astype(np.int16), scales[0]] if alike else None

    def repack(self, matrix: MatrixPlan, held: HeldWords) -> None:
        """As ``Store.repack``: words of directories are not taken over as they stand."""
        del matrix, held

    def inputs(self, matrix: MatrixPlan) -> None:
        """As ``Store.inputs``: CTranslate2 rounds them to 8 bits, which is not followed here."""
        del matrix

    def numbers(self, matrix: MatrixPlan, inputs: InputGrid) -> Fields:
        raise ValueError(f"nothing of the inputs of {matrix.name} is calibrated")

    def largest(self, qtype: str) -> float:
        kind = self.grid_type(qtype)
        return float(np.finfo(np.float32).max) if kind is None else codebook_type(qtype).largest

    def piece(self, matrix: MatrixPlan, grid: Grid, codes: torch.Tensor) -> Any:
        return grid, codes

    def plain(self, matrix: MatrixPlan, rows: Floats, importance: Floats | None) -> Any:
        limits = np.iinfo(np.int16)
        return np.clip(np.rint(rows * self._scales[matrix.name]), limits.min, limits.max).astype(np.int16)

    def join(self, matrix: MatrixPlan, pieces: Sequence[Any]) -> Fields:
        scale = self._scales.pop(matrix.name, None)
        if scale is not None:
            return [np.concatenate(pieces), np.array(scale, np.float32)]
        largest = to_numpy(Grid.stack([grid for grid, _ in pieces]).d).astype(np.float32).reshape(-1)
        codes = to_numpy(torch.cat([codes for _, codes in pieces])).astype(np.int16) - 127
        lost = largest == 0
        codes[lost] = 0
        return [codes.astype(np.int8), np.float32(127) / np.where(lost, np.float32(127), largest)]

    def typed(self, tensor: TensorPlan, data: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        return data.view(NUMPY_TYPES[tensor.qtype]).reshape(tensor.output.shape)

    def decode(self, matrix: MatrixPlan, fields: Fields) -> Floats:
        codes, scales = fields
        values: Floats = codes.reshape(matrix_shape(codes.shape)).astype(np.float32)
        values /= scales.reshape(-1, 1)
        return values

    def decoded(self, matrix: MatrixPlan, fields: Fields) -> Iterator[tuple[int, Floats]]:
        codes, scales = fields
        seen, each = codes.reshape(matrix_shape(codes.shape)), scales.reshape(-1, 1)
        for first in range(0, len(seen), step := chunk_rows(seen.shape[1])):
            some = seen[first : first + step].astype(np.float32)
            some /= each if len(each) == 1 else each[first : first + step]
            yield first, some
