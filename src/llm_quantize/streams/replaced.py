"""One tensor of an artifact held at a qtype while all else stays as the source: quantized, decoded, and put back into
the tensors of the checkpoint that its rows come from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llm_quantize import kernels
from llm_quantize.architectures.base import OutputTensor
from llm_quantize.architectures.rows import chunk_ranges, matrix_shape, read_output_rows, scatter, to_float32
from llm_quantize.kernels.weighing import vector_for
from llm_quantize.models.base import Model
from llm_quantize.streams.weights import ReadsRows, Weights

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]


def hold(
    checkpoint: Model,
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
    values = {
        name: np.array(weights.read(name).to(torch.float32).numpy(), np.float32, order="C")
        for name in dict.fromkeys(piece.source for piece in output.pieces)
    }
    rows, columns = matrix_shape(output.shape)

    def chunk(job: tuple[int, int, int]) -> None:
        matrix, start, stop = job
        source = np.ascontiguousarray(read_output_rows(checkpoint, output, start, stop))
        vector = None if importance is None else np.ascontiguousarray(importance[matrix])
        packed = kernels.quantize(qtype, to_float32(source), vector_for(qtype, vector))
        scatter(checkpoint, output, start, kernels.dequantize(qtype, packed, columns), values)

    for _ in run(chunk, chunk_ranges(output.shape, 0, rows)):
        pass
    return {name: torch.from_numpy(whole) for name, whole in values.items()}


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


class MixedWeights:
    """``weights`` with everything that an artifact would hold otherwise as it would hold it, made when it is read.

    ``held``: {tensor of the checkpoint: functions that put values into it}, each given the weights as they are so far;
    a tensor whose rows go into several tensors of the artifact has several.
    """

    def __init__(
        self, weights: Weights, held: Mapping[str, Sequence[Callable[[], Mapping[str, torch.Tensor]]]]
    ) -> None:
        self._weights, self._held = weights, held

    @property
    def names(self) -> Collection[str]:
        return self._weights.names

    def read(self, name: str) -> torch.Tensor:
        """The tensor as the artifact has it."""
        found = self._weights.read(name)
        source = found
        for make in self._held.get(name, ()):
            values = make()[name]
            # Rows of other tensors of the artifact have the source's values there.
            found = values if found is source else torch.where(values == source, found.to(values), values)
        return found
