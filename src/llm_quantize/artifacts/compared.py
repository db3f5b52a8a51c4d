"""Chunks of one tensor of an artifact held against the source's rows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from llm_quantize.architectures.base import OutputTensor
from llm_quantize.architectures.rows import read_output_rows, to_float32
from llm_quantize.artifacts.deviation import Deviation
from llm_quantize.artifacts.verification import TensorCheck
from llm_quantize.models.opening import Source

Floats = npt.NDArray[np.float32]


class Compared:
    """``found``: by the matrix that chunks are part of. ``scale``: what a transform multiplied the columns with,
    float32 (columns,); it is taken out again."""

    def __init__(self, source: Source, output: OutputTensor, *, rescaled: bool, scale: Floats | None = None) -> None:
        self._source, self._output, self._rescaled, self._scale = source, output, rescaled, scale
        self.found: dict[int, Deviation] = {}
        self.source_nonfinite = self.poisoned = 0

    def add(self, start: int, values: Floats, matrix: int = 0) -> None:
        """Rows from ``start`` on, counted to the matrix of that number."""
        rows = read_output_rows(self._source.checkpoint, self._output, start, start + len(values))
        exact = to_float32(rows).reshape(values.shape)
        known, finite = np.isfinite(exact), np.isfinite(values)
        self.source_nonfinite += int(exact.size - np.count_nonzero(known))
        self.poisoned += int(np.count_nonzero(known & ~finite))
        wanted = np.where(known, exact, 0)
        deviation = self.found.setdefault(matrix, Deviation(rescaled=self._rescaled, known=self._scale is not None))
        straight = values if self._scale is None else values / self._scale
        deviation.add(np.where(finite & known, straight, wanted), wanted)

    def tell(self, check: TensorCheck) -> None:
        """The source's values that are not finite, into ``check``."""
        check.source_nonfinite = (check.source_nonfinite or 0) + self.source_nonfinite
