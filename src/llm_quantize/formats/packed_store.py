"""How a model directory keeps one matrix: codes, scales and zero points in tensors of their own, and back to values."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llm_quantize.architectures.rows import chunk_rows, matrix_shape
from llm_quantize.formats.base import NUMPY_TYPES, Packed, ReadRows, Repacked, Scheme
from llm_quantize.formats.modules import joined_with
from llm_quantize.formats.packed import ALIGNED, PackedMatrix
from llm_quantize.formats.packing import store_floats
from llm_quantize.grids import grid_type
from llm_quantize.grids.codebook import CodebookGridType, block_maxima, ladder_of
from llm_quantize.grids.grid import Grid, GridType, Ladder, to_storage
from llm_quantize.kernels.repack import Room
from llm_quantize.plan import CACHED, MatrixPlan, TensorPlan
from llm_quantize.qtypes.held import HeldWords
from llm_quantize.qtypes.inputs import InputGrid

Floats = npt.NDArray[np.float32]
Fields = list[npt.NDArray[Any]]


@dataclass(frozen=True)
class DirectoryStore:
    """Codes, scales and zero points in tensors of their own, as the module of ``scheme``'s format lays them out."""

    form: Packed
    scheme: Scheme
    matrices: Sequence[MatrixPlan] = ()
    _ladders: dict[str, Ladder] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _local: threading.local = field(default_factory=threading.local)

    fits_unseen = True

    @property
    def rounds(self) -> str:
        return "plain" if self.form.OWN_ROUNDING else "fit"

    def grid_type(self, qtype: str) -> GridType:
        scheme = self.scheme.on(qtype)
        chosen = scheme.qtype
        # A negative scale gives the extra level to the larger side; every kernel that was tried reads it.
        least = self.form.least_zero(scheme)
        return grid_type(chosen.name, scale=chosen.scale, signed=True, least_zero=least)

    def grid_of(self, matrix: MatrixPlan, start: int, stop: int, read: ReadRows) -> GridType:
        kind = self.grid_type(matrix.qtype)
        if not isinstance(kind, CodebookGridType) or not kind.qtype.nested:
            return kind
        return replace(kind, ladder=self._ladder(kind, matrix, read)).rows(start, stop)

    def _ladder(self, kind: CodebookGridType, matrix: MatrixPlan, read: ReadRows) -> Ladder:
        """Of all scales of a matrix, from its weights and those that runtimes join with it; one thread makes it, all
        share it until ``join``."""
        with self._lock:
            if matrix.name not in self._ladders:
                own = _maxima(kind, matrix, read)
                joined = [one for one in self.matrices if one.name in joined_with(matrix.name)]
                most = max(float(_maxima(kind, one, read).amax()) for one in joined) if joined else float(own.amax())
                self._ladders[matrix.name] = ladder_of(kind.qtype, own, most)
            return self._ladders[matrix.name]

    def hold(
        self, matrix: MatrixPlan, grid: Grid, codes: torch.Tensor, *, exact: bool = True
    ) -> tuple[Grid, torch.Tensor] | None:
        kind = self.grid_type(matrix.qtype)
        take = kind.hold if exact else kind.near
        if grid.index is None:
            return take(grid, codes)
        if not self.scheme.act_order:
            return None
        plain, order = grid.in_order()
        found = take(plain, codes[:, order])
        return None if found is None else (found[0].spread(order), found[1][:, torch.argsort(order)])

    def repack(self, matrix: MatrixPlan, held: HeldWords) -> Repacked | None:
        if not hasattr(self._local, "room"):
            self._local.room = Room()
        fields = self.form.repack(self.scheme.on(matrix.qtype), held, self._local.room)
        if fields is None:
            return None
        packed, named = self._named(matrix, fields)
        back = self.form.words(packed, named)
        if back is None:
            return None
        return Repacked(fields, back, self.form.unpack(packed, named, 0, min(ALIGNED, packed.rows)))

    def blocks(self, matrix: MatrixPlan, read: Callable[[int, int], npt.NDArray[Any]]) -> None:
        """As ``Store.blocks``: there are none."""
        del matrix, read

    def inputs(self, matrix: MatrixPlan) -> InputGrid | None:
        return self.form.inputs(self.scheme)

    def numbers(self, matrix: MatrixPlan, inputs: InputGrid) -> Fields:
        whole = torch.tensor([inputs.whole], dtype=torch.float32)
        return [
            store_floats(to_storage(whole, getattr(torch, field.dtype)).numpy(), field.dtype)
            for field in self.form.input_fields(self.scheme)
        ]

    def largest(self, qtype: str) -> float:
        return self.scheme.on(qtype).qtype.largest

    def piece(self, matrix: MatrixPlan, grid: Grid, codes: torch.Tensor) -> tuple[Grid, torch.Tensor]:
        return grid, codes

    def plain(self, matrix: MatrixPlan, rows: Floats, importance: Floats | None) -> Any:
        raise ValueError(f"{matrix.qtype} has a grid")

    def join(self, matrix: MatrixPlan, pieces: Sequence[Any]) -> Fields:
        self._ladders.pop(matrix.name, None)
        grid = Grid.stack([grid for grid, _ in pieces])
        return self.form.pack(self.scheme.on(matrix.qtype), grid, torch.cat([codes for _, codes in pieces]))

    def typed(self, tensor: TensorPlan, data: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        return data.view(NUMPY_TYPES[tensor.qtype]).reshape(tensor.output.shape)

    def decode(self, matrix: MatrixPlan, fields: Fields) -> Floats:
        values = np.empty(matrix.weight.shape, np.float32)
        for first, some in self.decoded(matrix, fields):
            values[first : first + len(some)] = some
        return values

    def decoded(self, matrix: MatrixPlan, fields: Fields) -> Iterator[tuple[int, Floats]]:
        rows, columns = matrix.weight.shape
        packed, named = self._named(matrix, fields)
        step = max(ALIGNED, chunk_rows(columns) // ALIGNED * ALIGNED)
        for first in range(0, rows, step):
            yield first, self.form.unpack(packed, named, first, min(rows, first + step))

    def _named(self, matrix: MatrixPlan, fields: Fields) -> tuple[PackedMatrix, dict[str, npt.NDArray[Any]]]:
        """The description of a matrix that ``join`` made, and its fields by their suffixes."""
        rows, columns = matrix.weight.shape
        scheme = self.scheme.on(matrix.qtype)
        names = [field.suffix for field in self.form.fields(scheme, rows, columns)]
        beside = 0 if matrix.cache is None else CACHED
        named = dict(zip(names, fields[: len(fields) - beside], strict=True))
        return self.form.described(scheme, rows, columns), named


def _maxima(kind: CodebookGridType, matrix: MatrixPlan, read: ReadRows) -> torch.Tensor:
    """float32 (rows, blocks): the largest magnitude of each block of a matrix."""
    rows, columns = matrix_shape(matrix.weight.shape)
    starts = range(0, rows, step := chunk_rows(columns))
    parts = (torch.from_numpy(read(matrix, first, min(rows, first + step))) for first in starts)
    return torch.cat([block_maxima(kind.qtype, part) for part in parts])
