"""Embedding and output matrix as the artifact holds them: the first error that a run can make up for, and the last."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from llm_quantize import kernels
from llm_quantize.architectures.base import OutputTensor
from llm_quantize.architectures.rows import unit_ranges
from llm_quantize.artifacts.rounding import Target
from llm_quantize.models.opening import Source
from llm_quantize.plan import MatrixPlan, TensorPlan, unit_key
from llm_quantize.qtypes import QTYPES
from llm_quantize.streams.weights import CheckpointWeights

if TYPE_CHECKING:
    from llm_quantize.blockwise.run import Matrices

_EMBEDDING = "token_embd.weight"
_HEAD = "output.weight"
_CHUNK = 1 << 12  # rows decoded together


def written_embedding(matrices: Matrices) -> WrittenTable | WrittenMatrix | None:
    """The embedding as the artifact has it; None where it is kept as it is, or cannot be read by rows of the
    source's."""
    tables = (matrices.source, matrices.target, matrices.weights)
    return _written_matrix(matrices, _EMBEDDING) or WrittenTable.embedding(*tables)


def written_head(matrices: Matrices) -> WrittenTable | WrittenMatrix | None:
    """The same of the output matrix, which may be the embedding."""
    tables = (matrices.source, matrices.target, matrices.weights)
    own = any(output.name == _HEAD for output in matrices.source.tensors.outputs)
    return _written_matrix(matrices, _HEAD if own else _EMBEDDING) or WrittenTable.head(*tables)


def _written_matrix(matrices: Matrices, name: str) -> WrittenMatrix | None:
    wanted = next((output for output in matrices.source.tensors.outputs if output.name == name), None)
    for matrix in matrices.target.plan.matrices:
        same = wanted is not None and matrix.weight.pieces[0].source == wanted.pieces[0].source
        if same and not matrix.seen and _is_plain(matrices.source, matrix.weight):
            return WrittenMatrix(matrices, matrix)
    return None


def _is_plain(source: Source, tensor: OutputTensor) -> bool:
    """Whether its rows are those of one tensor of the source, all of them as they stand."""
    (piece, *others) = tensor.pieces
    plain = piece.order is None and piece.columns is None and not piece.transpose and not piece.add
    return plain and not others and source.checkpoint.matrix(piece.source)[0] == tensor.shape[0]


class WrittenMatrix:
    """Weights of a source of which one table is the matrix that an artifact has stored in several fields."""

    def __init__(self, matrices: Matrices, matrix: MatrixPlan) -> None:
        self._matrices, self._matrix = matrices, matrix
        self._weights = matrices.weights
        self._name = matrix.weight.pieces[0].source
        self._fields = matrices.read(matrix)

    @property
    def names(self) -> Collection[str]:
        return self._weights.names

    def read(self, name: str) -> torch.Tensor:
        """As CheckpointWeights; the table float32, as decoded."""
        if name != self._name:
            return self._weights.read(name)
        return self.read_rows(name, torch.arange(self._matrix.weight.shape[0]))

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Rows ``rows`` (int64): (len(rows), columns)."""
        if name != self._name:
            return self._weights.read_rows(name, rows)
        total, columns = self._matrix.weight.shape
        wanted, found = rows.numpy(), np.empty((len(rows), columns), np.float32)
        for at in range(0, len(wanted), _CHUNK):
            some = wanted[at : at + _CHUNK]
            fields = [field[some] if field.shape[:1] == (total,) else field for field in self._fields]
            found[at : at + len(some)] = self._matrices.store.decode(self._part(len(some)), fields)
        return torch.from_numpy(found)

    def _part(self, rows: int) -> MatrixPlan:
        weight = replace(self._matrix.weight, shape=(rows, self._matrix.weight.shape[-1]))
        return replace(self._matrix, weight=weight)


class WrittenTable:
    """Weights of a source (see calibration/weights.py) of which one table is the one that an artifact has stored."""

    def __init__(self, weights: CheckpointWeights, target: Target, tensor: TensorPlan) -> None:
        self._weights, self._target, self._tensor = weights, target, tensor
        self._name = tensor.output.pieces[0].source

    @classmethod
    def embedding(cls, source: Source, target: Target, weights: CheckpointWeights) -> WrittenTable | None:
        """None where the artifact keeps the embedding as it is, or cannot be read by rows of the source's."""
        return cls._of(source, target, weights, _EMBEDDING)

    @classmethod
    def head(cls, source: Source, target: Target, weights: CheckpointWeights) -> WrittenTable | None:
        """The same of the output matrix, which may be the embedding."""
        stored = any(tensor.name == _HEAD for tensor in target.plan.tensors)
        return cls._of(source, target, weights, _HEAD if stored else _EMBEDDING)

    @classmethod
    def _of(cls, source: Source, target: Target, weights: CheckpointWeights, name: str) -> WrittenTable | None:
        tensor = next((tensor for tensor in target.plan.tensors if tensor.name == name), None)
        if tensor is None or tensor.qtype not in QTYPES or QTYPES[tensor.qtype].block_size == 1:
            return None
        return cls(weights, target, tensor) if _is_plain(source, tensor.output) else None

    @property
    def names(self) -> Collection[str]:
        return self._weights.names

    def read(self, name: str) -> torch.Tensor:
        """As CheckpointWeights; the embedding float32, as decoded."""
        if name != self._name:
            return self._weights.read(name)
        return self.read_rows(name, torch.arange(self._tensor.output.shape[0]))

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Rows ``rows`` (int64, ascending): (len(rows), columns)."""
        if name != self._name:
            return self._weights.read_rows(name, rows)
        tensor, columns = self._tensor, self._tensor.output.shape[-1]
        wanted = rows.numpy()
        found = np.empty((len(wanted), columns), np.float32)
        for start, stop in unit_ranges(tensor.output.shape):
            first, last = np.searchsorted(wanted, [start, stop])
            if first == last:
                continue
            data = self._target.output.read(unit_key(tensor.name, start, stop))
            packed = np.frombuffer(data, np.uint8).reshape(stop - start, tensor.row_bytes)
            for at in range(first, last, _CHUNK):
                some = wanted[at : min(at + _CHUNK, last)]
                found[at : at + len(some)] = kernels.dequantize(
                    tensor.qtype, np.ascontiguousarray(packed[some - start]), columns
                )
        return torch.from_numpy(found)
