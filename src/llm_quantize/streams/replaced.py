"""One tensor of an artifact held at a qtype while all else stays as the source: quantized, decoded, and put back into
the tensors of the checkpoint that its rows come from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llm_quantize import kernels
from llm_quantize.architectures.base import OutputTensor
from llm_quantize.architectures.rows import chunk_ranges, matrix_shape, read_output_rows, to_float32
from llm_quantize.models.safetensors import Checkpoint
from llm_quantize.streams.weights import ReadsRows, Weights

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]


def hold(
    checkpoint: Checkpoint,
    weights: Weights,
    output: OutputTensor,
    qtype: str,
    importance: npt.NDArray[np.float32] | None,
    run: Map,
) -> dict[str, torch.Tensor]:
    """Checkpoint tensor -> float32 values, of the checkpoint's shape, as an artifact with ``output`` at ``qtype`` has
    them; rows of those tensors that belong to other outputs keep the source's values.

    ``importance``: float32 (matrices, columns). ``run`` maps a function over jobs, on threads.
    """
    seen: dict[str, npt.NDArray[np.float32]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for piece in output.pieces:
        if piece.source not in seen:
            whole = weights.read(piece.source).to(torch.float32).numpy()
            shapes[piece.source] = whole.shape
            turned = whole.swapaxes(-1, -2) if piece.transpose else whole
            seen[piece.source] = np.array(turned.reshape(matrix_shape(turned.shape)), np.float32, order="C")
    rows, columns = matrix_shape(output.shape)

    def chunk(job: tuple[int, int, int]) -> None:
        matrix, start, stop = job
        source = np.ascontiguousarray(read_output_rows(checkpoint, output, start, stop))
        vector = None if importance is None else np.ascontiguousarray(importance[matrix])
        packed = kernels.quantize(qtype, to_float32(source), vector)
        _put(checkpoint, output, seen, start, kernels.dequantize(qtype, packed, columns))

    for _ in run(chunk, chunk_ranges(output.shape, 0, rows)):
        pass
    found = {}
    transposed = {piece.source: piece.transpose for piece in output.pieces}
    for name, values in seen.items():
        shape = shapes[name]
        if transposed[name]:
            turned = values.reshape((*shape[:-2], shape[-1], shape[-2]))
            found[name] = torch.from_numpy(np.ascontiguousarray(turned.swapaxes(-1, -2)))
        else:
            found[name] = torch.from_numpy(values.reshape(shape))
    return found


def _put(
    checkpoint: Checkpoint,
    output: OutputTensor,
    seen: Mapping[str, npt.NDArray[np.float32]],
    start: int,
    values: npt.NDArray[np.float32],
) -> None:
    """Write rows [start, start + len(values)) of ``output`` where its pieces say they come from."""
    base = 0
    for piece in output.pieces:
        count = piece.count
        if count is None:
            count = checkpoint.matrix(piece.source, transpose=piece.transpose)[0] - piece.start
        first, last = max(start, base), min(start + len(values), base + count)
        if first < last:
            part = values[first - start : last - start]
            inside = np.arange(first - base, last - base)
            target = piece.start + (inside if piece.order is None else piece.order[inside])
            part = part - np.float32(piece.add) if piece.add else part
            if piece.columns is None:
                seen[piece.source][target] = part
            else:
                seen[piece.source][target[:, None], piece.columns] = part
        base += count


class ReplacedWeights:
    """``weights`` with other values for some of its tensors."""

    def __init__(self, weights: Weights, values: Mapping[str, torch.Tensor]) -> None:
        self._weights, self._values = weights, values

    @property
    def names(self) -> Collection[str]:
        return self._weights.names

    def read(self, name: str) -> torch.Tensor:
        """The tensor, replaced or not."""
        return self._values[name] if name in self._values else self._weights.read(name)

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Rows ``rows`` (int64) of a matrix."""
        if name not in self._values and isinstance(self._weights, ReadsRows):
            return self._weights.read_rows(name, rows)
        return self.read(name)[rows]
