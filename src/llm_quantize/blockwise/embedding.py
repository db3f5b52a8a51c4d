"""Embedding and output matrix as the artifact holds them: the first error that a run can make up for, and the last."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from llm_quantize import kernels
from llm_quantize.architectures.base import OutputTensor
from llm_quantize.architectures.rows import unit_ranges
from llm_quantize.artifacts.rounding import Target
from llm_quantize.formats.base import Store
from llm_quantize.models.opening import Source
from llm_quantize.plan import MatrixPlan, TensorPlan, unit_key
from llm_quantize.qtypes import QTYPES
from llm_quantize.streams.weights import CheckpointWeights

if TYPE_CHECKING:
    from llm_quantize.blockwise.run import Matrices

_EMBEDDING = "token_embd.weight"
_HEAD = "output.weight"
_CHUNK = 1 << 12  # rows decoded together

Numbers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Rows = Callable[[Numbers], Floats]


def written_embedding(matrices: Matrices) -> WrittenTable | None:
    """The embedding as the artifact has it; None where it is kept as it is, or cannot be read by rows of the
    source's."""
    return _of_matrix(matrices, _EMBEDDING) or _of_tensor(matrices, _EMBEDDING)


def written_head(matrices: Matrices) -> WrittenTable | None:
    """The same of the output matrix, which may be the embedding."""
    own = any(output.name == _HEAD for output in matrices.source.tensors.outputs)
    stored = any(tensor.name == _HEAD for tensor in matrices.target.plan.tensors)
    found = _of_matrix(matrices, _HEAD if own else _EMBEDDING)
    return found or _of_tensor(matrices, _HEAD if stored else _EMBEDDING)


def _of_matrix(matrices: Matrices, name: str) -> WrittenTable | None:
    """Of a matrix that the artifact has stored in several fields."""
    wanted = next((output for output in matrices.source.tensors.outputs if output.name == name), None)
    for matrix in matrices.target.plan.matrices:
        same = wanted is not None and matrix.weight.pieces[0].source == wanted.pieces[0].source
        if same and not matrix.seen and _is_plain(matrices.source, matrix.weight):
            fields = matrices.read(matrix)
            return WrittenTable(matrices.weights, matrix.weight, partial(_of_fields, matrices.store, matrix, fields))
    return None


def _of_tensor(matrices: Matrices, name: str) -> WrittenTable | None:
    """Of a tensor of ggml's blocks."""
    target = matrices.target
    tensor = next((tensor for tensor in target.plan.tensors if tensor.name == name), None)
    if tensor is None or tensor.qtype not in QTYPES or QTYPES[tensor.qtype].block_size == 1:
        return None
    if not _is_plain(matrices.source, tensor.output):
        return None
    return WrittenTable(matrices.weights, tensor.output, partial(_of_blocks, target, tensor))


def _is_plain(source: Source, tensor: OutputTensor) -> bool:
    """Whether its rows are those of one tensor of the source, all of them as they stand."""
    (piece, *others) = tensor.pieces
    plain = piece.order is None and piece.columns is None and not piece.transpose and not piece.altered
    return plain and not others and source.checkpoint.matrix(piece.source)[0] == tensor.shape[0]


class WrittenTable:
    """Weights of a source (see streams/weights.py) of which ``table`` is the one that an artifact has stored;
    ``decode``: its rows by their numbers, ascending."""

    def __init__(self, weights: CheckpointWeights, table: OutputTensor, decode: Rows) -> None:
        self._weights, self._decode = weights, decode
        self._name, self._rows = table.pieces[0].source, table.shape[0]

    @property
    def names(self) -> Collection[str]:
        return self._weights.names

    def read(self, name: str) -> torch.Tensor:
        """As CheckpointWeights; the table float32, as decoded."""
        if name != self._name:
            return self._weights.read(name)
        return self.read_rows(name, torch.arange(self._rows))

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Rows ``rows`` (int64, ascending): (len(rows), columns)."""
        if name != self._name:
            return self._weights.read_rows(name, rows)
        return torch.from_numpy(self._decode(rows.numpy()))


def _of_fields(store: Store, matrix: MatrixPlan, fields: Sequence[npt.NDArray[Any]], wanted: Numbers) -> Floats:
    """Rows ``wanted`` of a matrix, from those of its fields that have its rows."""
    total, columns = matrix.weight.shape
    found = np.empty((len(wanted), columns), np.float32)
    for at in range(0, len(wanted), _CHUNK):
        some = wanted[at : at + _CHUNK]
        part = replace(matrix, weight=replace(matrix.weight, shape=(len(some), columns)))
        held = [field[some] if field.shape[:1] == (total,) else field for field in fields]
        found[at : at + len(some)] = store.decode(part, held)
    return found


def _of_blocks(target: Target, tensor: TensorPlan, wanted: Numbers) -> Floats:
    """Rows ``wanted``, ascending, of a tensor of ggml's blocks."""
    columns = tensor.output.shape[-1]
    found = np.empty((len(wanted), columns), np.float32)
    for start, stop in unit_ranges(tensor.output.shape):
        first, last = np.searchsorted(wanted, [start, stop])
        if first == last:
            continue
        data = target.output.read(unit_key(tensor.name, start, stop))
        packed = np.frombuffer(data, np.uint8).reshape(stop - start, tensor.row_bytes)
        for at in range(first, last, _CHUNK):
            some = wanted[at : min(at + _CHUNK, last)]
            found[at : at + len(some)] = kernels.dequantize(
                tensor.qtype, np.ascontiguousarray(packed[some - start]), columns
            )
    return found
