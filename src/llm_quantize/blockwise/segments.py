"""Which rows of a matrix share their inputs, and where its values go back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llm_quantize.architectures.base import OutputTensor, Piece
from llm_quantize.architectures.rows import placed, scatter
from llm_quantize.errors import UnsupportedError
from llm_quantize.models.base import Model
from llm_quantize.streams.taps import Tap

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Segment:
    """Rows [start, stop) of a weight see the inputs of ``matrix`` of the tap called ``tap``."""

    start: int
    stop: int
    tap: str
    matrix: int


def segments(checkpoint: Model, weight: OutputTensor, taps: Sequence[Tap]) -> list[Segment] | None:
    """The rows of ``weight`` by the inputs they see, in order; None where no tap knows its sources.

    Raises UnsupportedError where the values of a source are not those of ``weight``.
    """
    found: list[Segment] = []
    for first, count, piece in placed(checkpoint, weight):
        tap = next((tap for tap in taps if piece.source in tap.tensors), None)
        if tap is None:
            return None
        if piece.altered:
            raise UnsupportedError("the values of this matrix are stored otherwise", tensor=weight.name)
        matrix = tap.tensors[piece.source]
        if matrix is not None or tap.matrices == 1:
            parts = [Segment(first, first + count, tap.name, matrix or 0)]
        else:
            parts = list(_stacked(checkpoint, first, count, piece, tap))
        for part in parts:
            if found and (found[-1].tap, found[-1].matrix) == (part.tap, part.matrix):
                part = Segment(found.pop().start, part.stop, part.tap, part.matrix)
            found.append(part)
    return found


def column_orders(members: Iterable[tuple[OutputTensor, Sequence[Segment]]]) -> dict[str, npt.NDArray[np.int64]]:
    """{tap: int64 (columns,), which of its inputs each column of its matrices multiplies}, where they stand in another
    order than the source's.

    Raises UnsupportedError where matrices that share a tap have not the same order.
    """
    found: dict[str, npt.NDArray[np.int64] | None] = {}
    for weight, seen in members:
        orders = [piece.columns for piece in weight.pieces]
        for segment in seen:
            order = found.setdefault(segment.tap, orders[0])
            if any(other is not order for other in orders):
                raise UnsupportedError(
                    "the columns of matrices that share an input are stored in different orders",
                    tensor=weight.name,
                    remedy="use --method rtn",
                )
    return {tap: order for tap, order in found.items() if order is not None}


def _stacked(checkpoint: Model, first: int, count: int, piece: Piece, tap: Tap) -> Iterator[Segment]:
    """The matrices of a stack that a piece takes rows of."""
    each = checkpoint.matrix(piece.source, transpose=piece.transpose)[0] // tap.matrices // piece.deal[1]
    at, end = piece.start, piece.start + count
    while at < end:
        last = min(end, (at // each + 1) * each)
        yield Segment(first + at - piece.start, first + last - piece.start, tap.name, at // each)
        at = last


class Sources:
    """Tensors of the source being given new values by the matrices that hold their rows.

    ``read``: a tensor's present values in the source's shape, float32: rows that no matrix holds keep them.
    """

    def __init__(self, checkpoint: Model, read: Callable[[str], Floats]) -> None:
        self._checkpoint, self._read = checkpoint, read
        self._values: dict[str, Floats] = {}

    def put(self, weight: OutputTensor, values: Floats) -> None:
        """Put the rows of ``weight`` (all of them) where they came from."""
        for piece in weight.pieces:
            if piece.source not in self._values:
                self._values[piece.source] = np.array(self._read(piece.source), np.float32, order="C")
        scatter(self._checkpoint, weight, 0, values, self._values)

    def finished(self) -> Iterator[tuple[str, Floats]]:
        """(name, values in the source's shape) of every tensor touched."""
        return iter(self._values.items())
