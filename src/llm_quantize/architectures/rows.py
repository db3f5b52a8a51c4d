"""The map between the tensors of a source and those of an artifact, applied to rows, both ways.

``read_output_rows`` makes rows of an output tensor from rows of its source's: gathered, transposed, offset, never
whole. ``scatter`` is its inverse: rows of an output tensor go back to where they come from. ``inverse`` is the map
itself the other way, for reading rows of a source out of an artifact.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from llm_quantize.architectures.base import Curve, OutputTensor, Piece

if TYPE_CHECKING:
    import torch

    from llm_quantize.grids.grid import Grid

# A chunk of 16-bit weights stays in the cache of one core while it is read, hashed and quantized.
CHUNK_WEIGHTS = 1 << 19
UNIT_WEIGHTS = 1 << 24

_UNDO: Mapping[Curve, Curve] = {"": "", "-exp": "log-", "log-": "-exp"}

Rows = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]


class Shapes(Protocol):
    """Tensors known by their shapes."""

    def matrix(self, name: str, *, transpose: bool = False) -> tuple[int, int]:
        """(rows, columns) of a tensor seen as a matrix, its last two dimensions exchanged first with ``transpose``."""


class RowSource(Shapes, Protocol):
    """What this module needs of a checkpoint (``safetensors.Checkpoint`` is one)."""

    def read_rows(
        self, name: str, start: int, stop: int, *, transpose: bool = False, buffer: Any = None, digest: Any = None
    ) -> Rows: ...


class StampedSource(RowSource, Protocol):
    """A source that tells what is stored of packed matrices without decoding them (``models.base.Rows`` is one)."""

    def is_stamped(self, name: str) -> bool: ...

    def stamp(self, name: str) -> bytes: ...


class Arrays:
    """A row source over arrays in memory. ``read``: a tensor's values, float32, in its shape."""

    def __init__(self, read: Callable[[str], Floats]) -> None:
        self._read = read

    def matrix(self, name: str, *, transpose: bool = False) -> tuple[int, int]:
        """As ``Checkpoint.matrix``."""
        return matrix_shape(_turned(self._read(name), transpose).shape)

    def read_rows(
        self, name: str, start: int, stop: int, *, transpose: bool = False, buffer: Any = None, digest: Any = None
    ) -> Floats:
        """As ``Checkpoint.read_rows``; ``buffer`` and ``digest`` are for stored bytes, which these are not."""
        del buffer, digest
        seen = _turned(self._read(name), transpose)
        return np.ascontiguousarray(seen.reshape(matrix_shape(seen.shape))[start:stop])


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of a tensor seen as a matrix; a vector is one row."""
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return rows, (shape[-1] if shape else 1)


def weights_of(shape: tuple[int, ...]) -> int:
    """How many weights a tensor has."""
    rows, columns = matrix_shape(shape)
    return rows * columns


def unit_ranges(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Row ranges in which a tensor is quantized and journalled; a function of the shape alone.

    A range holds at most UNIT_WEIGHTS weights or one row; it is part of one matrix of a 3-D tensor, or whole matrices.
    """
    rows, columns = matrix_shape(shape)
    per_matrix = shape[-2] if len(shape) > 1 else 1
    weights = per_matrix * columns
    if weights <= UNIT_WEIGHTS:
        step = per_matrix * max(1, UNIT_WEIGHTS // max(1, weights))
        return [(start, min(start + step, rows)) for start in range(0, rows, step)]
    chunk = chunk_rows(columns)
    step = max(chunk, UNIT_WEIGHTS // columns // chunk * chunk)
    return [
        (base + start, base + min(start + step, per_matrix))
        for base in range(0, rows, per_matrix)
        for start in range(0, per_matrix, step)
    ]


def chunk_rows(columns: int) -> int:
    """Rows handled at a time by one thread."""
    return max(1, CHUNK_WEIGHTS // max(1, columns))


def chunk_ranges(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(matrix index, first row, end row) of the pieces of a unit; no piece crosses from one matrix to the next."""
    per_matrix = shape[-2] if len(shape) > 1 else 1
    step = chunk_rows(shape[-1] if shape else 1)
    while start < stop:
        matrix = start // per_matrix
        end = min(stop, start + step, (matrix + 1) * per_matrix)
        yield matrix, start, end
        start = end


@dataclass(frozen=True)
class Shaped:
    """Tensors of which the shapes are known, and nothing else."""

    shapes: Mapping[str, tuple[int, ...]]

    def matrix(self, name: str, *, transpose: bool = False) -> tuple[int, int]:
        """As ``Shapes.matrix``."""
        shape = self.shapes[name]
        return matrix_shape((*shape[:-2], shape[-1], shape[-2]) if transpose else shape)


def placed(source: Shapes, tensor: OutputTensor) -> Iterator[tuple[int, int, Piece]]:
    """(first row, rows, piece) for every piece of ``tensor``."""
    first = 0
    for piece in tensor.pieces:
        count = piece.count
        if count is None:
            rows = source.matrix(piece.source, transpose=piece.transpose)[0]
            count = (rows // piece.deal[1] if piece.transpose else rows) - piece.start
        yield first, count, piece
        first += count


def read_output_rows(
    source: RowSource, tensor: OutputTensor, start: int, stop: int, *, buffer: Any = None, digest: Any = None
) -> Rows:
    """Rows [start, stop) of ``tensor`` as (stop - start, columns): float32, float16, or uint16 = bfloat16 bits.

    ``digest`` (a hashlib object) is updated with the source bytes as they are read. ``buffer`` (writable bytes) is
    read into where one contiguous piece of the source is enough and fits; the result may lie in it.
    """
    if tensor.constant is not None:
        rows, columns = matrix_shape(tensor.shape)
        return np.ascontiguousarray(tensor.constant, dtype=np.float32).reshape(rows, columns)[start:stop]
    parts: list[Rows] = []
    if tensor.dealt:
        parts = [to_float32(_read_piece(source, piece, start, stop, None, digest)) for piece in tensor.pieces]
        return np.stack(parts, axis=-1).reshape(stop - start, -1)
    if is_joined(tensor):
        parts = [_read_piece(source, piece, 0, 1, None, digest) for piece in tensor.pieces]
        return _together(parts, axis=1)
    for base, count, piece in placed(source, tensor):
        first, last = max(start, base) - base, min(stop, base + count) - base
        if first < last:
            alone = first == start - base and last == stop - base
            parts.append(_read_piece(source, piece, first, last, buffer if alone else None, digest))
    if len(parts) == 1:
        return parts[0]
    return _together(parts, axis=0)


class HeldSource(Shapes, Protocol):
    """A source of stored grids (``models.base.Model`` is one)."""

    def held_grid(
        self, name: str, start: int, stop: int, *, transpose: bool = False
    ) -> tuple[Grid, torch.Tensor] | None: ...


def held_output_rows(
    source: HeldSource, tensor: OutputTensor, start: int, stop: int
) -> tuple[Grid, torch.Tensor] | None:
    """``Model.held_grid`` for rows [start, stop) of ``tensor``: the rows of its pieces, in their order, each on
    the grid on which the source stores it. None where a piece is not held by its rows, or has something added or its
    columns in an order that parts groups; or where pieces are on grids of different kinds. Needs torch."""
    from llm_quantize.grids.held import joined, moved, taken

    if tensor.constant is not None or is_joined(tensor):
        return None
    parts = []
    for base, count, piece in placed(source, tensor):
        first, last = max(start, base) - base, min(stop, base + count) - base
        if first >= last:
            continue
        index, step = piece.deal
        if piece.altered or (step > 1 and not piece.transpose):
            return None
        wanted = np.arange(first, last) if piece.order is None else piece.order[first:last].astype(np.int64)
        wanted = (wanted + piece.start) * step + index
        low = int(wanted.min())
        found = source.held_grid(piece.source, low, int(wanted.max()) + 1, transpose=piece.transpose)
        if found is not None and piece.columns is not None:
            found = moved(found, piece.columns)
        if found is None:
            return None
        ordered = piece.order is None and step == 1
        parts.append(found if ordered else taken(found, (wanted - low).tolist()))
    return joined(parts)


def is_joined(tensor: OutputTensor) -> bool:
    """Whether ``tensor`` is a vector of several, one behind the other: it is one row, and pieces of it are columns."""
    return len(tensor.shape) == 1 and len(tensor.pieces) > 1


def _together(parts: list[Rows], *, axis: int) -> Rows:
    if len({part.dtype for part in parts}) > 1:
        parts = [to_float32(part) for part in parts]
    return np.concatenate(parts, axis=axis)


def scatter(source: Shapes, tensor: OutputTensor, start: int, rows: Floats, into: Mapping[str, Floats]) -> None:
    """Put rows [start, start + len(rows)) of ``tensor``, float32, where its pieces say that they come from.

    ``into``: {source tensor: float32, its shape, contiguous}, of all that these rows come from; written in place. What
    a piece adds is taken off again in float32: adding it once more gives the same value exactly (a curve undone is as
    near as float32 comes). Calls for different rows may run at the same time.
    """
    for base, count, piece in placed(source, tensor):
        first, last = max(start, base), min(start + len(rows), base + count)
        if first < last:
            _put(into[piece.source], piece, first - base, rows[first - start : last - start])


def inverse(shapes: Mapping[str, tuple[int, ...]], outputs: Iterable[OutputTensor]) -> dict[str, OutputTensor]:
    """{source tensor: how its rows are made of those of ``outputs``}, for ``read_output_rows``.

    ``shapes``: of all source tensors. Where two outputs hold the same rows (a tied embedding), the first is read.
    Raises ValueError for a source tensor of which no output holds some rows, or that is transposed in part.
    """
    back: dict[str, dict[int, Piece]] = {}
    dealt: dict[str, list[Piece | None]] = {}
    source = Shaped(shapes)
    for output in outputs:
        if is_joined(output):
            for name, part in _columns_of(source, output):
                back.setdefault(name, {}).setdefault(0, part)
            continue
        for base, count, piece in placed(source, output):
            if piece.deal[1] > 1:
                index, shares = piece.deal
                dealt.setdefault(piece.source, [None] * shares)[index] = _undealt(output, piece)
                continue
            back.setdefault(piece.source, {}).setdefault(piece.start, _back(output.name, base, count, piece))
    found = {}
    for name, shape in shapes.items():
        if name in dealt:
            parts = tuple(piece for piece in dealt[name] if piece is not None)
            if len(parts) != len(dealt[name]):
                raise ValueError(f"{len(parts)} of {len(dealt[name])} shares of {name} are in the outputs")
            found[name] = OutputTensor(name, shape, parts, dealt=True)
            continue
        pieces = tuple(piece for _, piece in sorted(back.get(name, {}).items()))
        rows = sum(matrix_shape(shape)[0] if piece.count is None else piece.count for piece in pieces)
        if rows != matrix_shape(shape)[0]:
            raise ValueError(f"{rows} rows of {name}, of shape {shape}, are in the outputs")
        found[name] = OutputTensor(name, shape, pieces)
    return found


def _columns_of(source: Shapes, output: OutputTensor) -> Iterator[tuple[str, Piece]]:
    """(name, where it stands in ``output``) of each of the vectors that ``output`` consists of."""
    first = 0
    for piece in output.pieces:
        count = source.matrix(piece.source)[1]
        order = np.arange(count) if piece.columns is None else np.argsort(piece.columns)
        yield piece.source, Piece(output.name, columns=order + first, add=-piece.add, curve=_UNDO[piece.curve])
        first += count


def _undealt(output: OutputTensor, piece: Piece) -> Piece:
    """What ``piece`` of ``output`` gives to its source's rows, of which it has every so-manieth column."""
    if len(output.pieces) > 1 or piece.start or piece.count is not None:
        raise ValueError(f"{piece.source} is dealt to one part of {output.name}")
    return Piece(output.name, transpose=piece.transpose, add=-piece.add, curve=_UNDO[piece.curve])


def _back(output: str, base: int, count: int, piece: Piece) -> Piece:
    """The piece of a source tensor that comes from rows [base, base + count) of ``output``."""
    order = None if piece.order is None else np.argsort(piece.order)
    columns = None if piece.columns is None else np.argsort(piece.columns)
    curve = _UNDO[piece.curve]
    if piece.transpose:
        if base or piece.start or piece.count is not None:
            raise ValueError(f"{piece.source} is one part of {output}, and transposed")
        return Piece(output, order=columns, transpose=True, columns=order, add=-piece.add, curve=curve)
    return Piece(output, start=base, count=count, order=order, columns=columns, add=-piece.add, curve=curve)


def curved(curve: Curve, values: Rows) -> Floats:
    """``curve`` of values, float32. Computed in float64, which leaves no room for machines to differ."""
    found = to_float32(values)
    if not curve:
        return found
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):  # what is not finite is another's to refuse
        wide = found.astype(np.float64)
        return (-np.exp(wide) if curve == "-exp" else np.log(-wide)).astype(np.float32)


def _put(whole: Floats, piece: Piece, first: int, values: Floats) -> None:
    """Write rows [first, first + len(values)) of a piece into its source's tensor."""
    if not whole.flags.c_contiguous:
        raise ValueError(f"the values of {piece.source} do not lie in one block")
    if piece.add:
        values = values - np.float32(piece.add)
    values = curved(_UNDO[piece.curve], values)
    if piece.transpose:
        seen = whole.reshape(-1, *whole.shape[-2:]).swapaxes(1, 2)
    else:
        seen = whole.reshape(1, *matrix_shape(whole.shape))
    last = first + len(values)
    index, step = piece.deal
    if step > 1 and not piece.transpose:
        seen[0, piece.start + first : piece.start + last, index::step] = values
        return
    if piece.order is None and len(seen) == 1:
        matrix, rows = seen[0], slice(piece.start + first, piece.start + last)
        matrix[rows, slice(None) if piece.columns is None else piece.columns] = values
        return
    target = np.arange(first, last) if piece.order is None else piece.order[first:last]
    which, row = np.divmod((target + piece.start) * step + index, seen.shape[1])
    if piece.columns is None:
        seen[which, row] = values
    else:
        seen[which[:, None], row[:, None], piece.columns] = values


def _turned(values: Floats, transpose: bool) -> Floats:
    return values.swapaxes(-1, -2) if transpose else values


def to_float32(rows: Rows) -> npt.NDArray[np.float32]:
    """Float32 values of rows read from a source; uint16 means bfloat16 bits. Exact."""
    if rows.dtype == np.uint16:
        return (rows.astype(np.uint32) << 16).view(np.float32)
    return rows.astype(np.float32, copy=False)


def _read_piece(source: RowSource, piece: Piece, first: int, last: int, buffer: Any, digest: Any) -> Rows:
    read = partial(source.read_rows, piece.source, transpose=piece.transpose, digest=digest)
    index, step = piece.deal
    if step > 1 and piece.transpose:
        rows = read((piece.start + first) * step, (piece.start + last) * step)[index::step]
    elif piece.order is None:
        fits = buffer is not None and len(buffer) >= (last - first) * source.matrix(piece.source)[1] * 8
        rows = read(piece.start + first, piece.start + last, buffer=buffer if fits and not piece.transpose else None)
    else:
        rows = _gather(read, piece.order[first:last].astype(np.int64) + piece.start)
    if step > 1 and not piece.transpose:
        rows = rows[:, index::step]
    rows = np.ascontiguousarray(rows if piece.columns is None else rows[:, piece.columns])
    if piece.curve:
        rows = curved(piece.curve, rows)
    return to_float32(rows) + np.float32(piece.add) if piece.add else rows


def _gather(read: Callable[..., Rows], wanted: npt.NDArray[np.int64]) -> Rows:
    """Rows in an arbitrary order: one block when they lie close together, else run by run."""
    low, high = int(wanted.min()), int(wanted.max()) + 1
    if high - low <= 2 * len(wanted):
        block = read(low, high)
        return np.ascontiguousarray(block[wanted - low])
    breaks = np.flatnonzero(np.diff(wanted) != 1) + 1
    edges = [0, *breaks.tolist(), len(wanted)]
    return np.concatenate(
        [read(int(wanted[left]), int(wanted[right - 1]) + 1) for left, right in itertools.pairwise(edges)]
    )
