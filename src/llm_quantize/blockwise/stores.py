"""How a format keeps one matrix: from codes on a grid to the bytes of its fields, and back to values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from llm_quantize import kernels
from llm_quantize.artifacts.plan import ArtifactPlan, MatrixPlan, TensorPlan
from llm_quantize.artifacts.rounding import infinite_blocks
from llm_quantize.errors import NumericPolicyError
from llm_quantize.formats.base import NUMPY_TYPES, Scheme
from llm_quantize.formats.table import FORMATS, scheme_of
from llm_quantize.grids import grid_type, has_grid, pack_ggml
from llm_quantize.grids.grid import Grid, GridType
from llm_quantize.qtypes import QTYPES

Floats = npt.NDArray[np.float32]
Fields = list[npt.NDArray[Any]]


class Store(Protocol):
    """A format, seen from a method. Threads may share it."""

    def grid_type(self, qtype: str) -> GridType | None:
        """The grids of ``qtype``; None where it has none of that form and can only be rounded plainly."""

    def piece(self, matrix: MatrixPlan, grid: Grid, codes: torch.Tensor) -> Any:
        """Some rows of ``matrix``, in whatever form ``join`` takes."""

    def plain(self, matrix: MatrixPlan, rows: Floats, importance: Floats | None) -> Any:
        """Some rows rounded plainly, for a qtype without a grid."""

    def join(self, matrix: MatrixPlan, pieces: Sequence[Any]) -> Fields:
        """The fields of ``matrix`` of the pieces of all its rows, in order."""

    def typed(self, tensor: TensorPlan, data: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        """The bytes of a stored field as ``join`` gives it."""

    def decode(self, matrix: MatrixPlan, fields: Fields) -> Floats:
        """float32 (rows, columns): what a runtime will compute with."""


class GgufStore:
    """ggml's blocks: a tensor is its packed rows."""

    def grid_type(self, qtype: str) -> GridType | None:
        return grid_type(qtype) if has_grid(qtype) else None

    def piece(self, matrix: MatrixPlan, grid: Grid, codes: torch.Tensor) -> npt.NDArray[np.uint8]:
        return self._checked(matrix, pack_ggml(matrix.qtype, grid, codes))

    def plain(self, matrix: MatrixPlan, rows: Floats, importance: Floats | None) -> npt.NDArray[np.uint8]:
        return self._checked(matrix, kernels.quantize(matrix.qtype, rows, importance))

    def _checked(self, matrix: MatrixPlan, packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        if infinite_blocks(QTYPES[matrix.qtype], packed).size:
            raise NumericPolicyError(
                f"the weights are too large for {matrix.qtype}: a float16 scale overflows",
                tensor=matrix.name,
                expected="magnitudes below about 65504",
                remedy=f"keep this tensor in BF16: --tensor-type '^{matrix.name}$=bf16' --overwrite",
            )
        return packed

    def join(self, matrix: MatrixPlan, pieces: Sequence[Any]) -> Fields:
        return [np.concatenate(pieces)]

    def typed(self, tensor: TensorPlan, data: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        return data.reshape(-1, tensor.row_bytes)

    def decode(self, matrix: MatrixPlan, fields: Fields) -> Floats:
        columns = matrix.weight.shape[-1]
        packed = fields[0].reshape(-1, QTYPES[matrix.qtype].row_bytes(columns))
        return kernels.dequantize(matrix.qtype, packed, columns)


@dataclass(frozen=True)
class DirectoryStore:
    """Codes, scales and zero points in tensors of their own, as the module of ``scheme``'s format lays them out."""

    scheme: Scheme

    def grid_type(self, qtype: str) -> GridType:
        chosen = self.scheme.qtype
        # A negative scale gives the extra level to the larger side; every kernel that was tried reads it.
        return grid_type(chosen.name, scale=chosen.scale, signed=True, least_zero=self.scheme.least_zero)

    def piece(self, matrix: MatrixPlan, grid: Grid, codes: torch.Tensor) -> tuple[Grid, torch.Tensor]:
        return grid, codes

    def plain(self, matrix: MatrixPlan, rows: Floats, importance: Floats | None) -> Any:
        raise ValueError(f"{matrix.qtype} has a grid")

    def join(self, matrix: MatrixPlan, pieces: Sequence[Any]) -> Fields:
        grid = Grid.stack([grid for grid, _ in pieces])
        return FORMATS[self.scheme.format].pack(self.scheme, grid, torch.cat([codes for _, codes in pieces]))

    def typed(self, tensor: TensorPlan, data: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        return data.view(NUMPY_TYPES[tensor.qtype]).reshape(tensor.output.shape)

    def decode(self, matrix: MatrixPlan, fields: Fields) -> Floats:
        rows, columns = matrix.weight.shape
        format = FORMATS[self.scheme.format]
        names = [field.suffix for field in format.fields(self.scheme, rows, columns)]
        return format.unpack(self.scheme, dict(zip(names, fields, strict=True)))


def store_of(artifact: ArtifactPlan) -> Store:
    """The store of an artifact."""
    return GgufStore() if artifact.format == "gguf" else DirectoryStore(scheme_of(artifact))
