"""The frozen number grid of a matrix, in one form for every format.

A method (rounding, error feedback, coordinate descent) chooses codes; a grid says what each code is worth. With
r a row, j a column, g = j // group and s = j // span:

    value(r, j) = d[r, s] * u[r, g] * (levels[code] - z[r, g]) - m[r, s] * v[r, g]

or, where the columns of a group do not stand side by side (act-order), g = index[j] and s = g * group // span.

d, m   float32 (rows, columns / span)   the free floats, already as the format stores them
u, v   float32 (rows, columns / group)  integers of the format (sub-scales, sub-minima), or ones
z      float32 (rows, columns / group)  integer zero points
ggml's superblocks (span 256, group 16 or 32), its blocks of 32 and integer groups are all of this form. In ggml's
codebook types only some codes may stand together in eight neighbouring columns: a grid with a ``book`` of words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from llm_quantize.errors import UsageError
from llm_quantize.grids.words import nearest_words
from llm_quantize.kernels.words import Book

__all__ = ["GGML_GRIDS", "Grid", "GridType", "Ladder", "row_tiles", "to_storage"]

TILE = 1 << 19  # weights worked on at once: some ten float32 or float64 arrays of this size stay below 64 MiB


def row_tiles(rows: int, columns: int, tile: int = TILE) -> Iterator[tuple[int, int]]:
    """(start, stop) of pieces of ``rows`` rows with about ``tile`` weights each, at least one row."""
    step = max(1, tile // max(1, columns))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def to_storage(values: Tensor, storage: torch.dtype) -> Tensor:
    """``values`` rounded to ``storage``, as float32; what is too large becomes the largest finite number."""
    most = torch.finfo(storage).max
    return values.clamp(-most, most).to(storage).to(torch.float32)


@dataclass(frozen=True)
class Ladder:
    """Where the free floats of a grid are codes themselves: d = level * step + base.

    ``base``: one number for the matrix. ``steps``: float32, the shape of d. ``levels``: float32 (n,), ascending, n <=
    256. ``codes``: uint8, the shape of d: those of the d at hand (two rungs may be one float32).
    """

    base: float
    steps: Tensor
    levels: Tensor
    codes: Tensor

    @classmethod
    def of(cls, base: float, steps: Tensor, levels: Tensor) -> Ladder:
        """With the lowest codes."""
        return cls(base, steps, levels, torch.zeros(steps.shape, dtype=torch.uint8, device=steps.device))

    def at(self, values: Tensor) -> Ladder:
        """The same with the rungs nearest to ``values`` (the shape of d), of two the lower."""
        scaled = (values - self.base) * (1.0 / torch.where(self.steps > 0, self.steps, 1.0))
        codes = torch.bucketize(scaled, (self.levels[:-1] + self.levels[1:]) / 2, out_int32=True)
        return replace(self, codes=codes.to(torch.uint8))

    def moved(self, by: int) -> Ladder:
        """The same, so many rungs up or down."""
        return replace(self, codes=(self.codes.to(torch.int16) + by).clamp_(0, len(self.levels) - 1).to(torch.uint8))

    def decode(self) -> Tensor:
        """d, float32, as decoders compute it."""
        level = self.levels.index_select(0, self.codes.reshape(-1).to(torch.int32)).reshape(self.codes.shape)
        return level * self.steps + self.base

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Ladder:
        """The same for other rows, or elsewhere."""
        return replace(self, steps=change(self.steps), codes=change(self.codes))


@dataclass(frozen=True)
class Grid:
    """What every code of a matrix stands for (see the top of this file for the formula).

    ``levels`` float32 (n,), ascending, at most 256. ``group`` and ``span``: weights that share u, v, z and d, m; span
    is a multiple of group. ``z``, ``m``, ``v`` may be None (no zero points, no offsets; m and v together).
    ``storage``: the dtype that d and m were rounded to; ``ladder``: of d where it is stored as codes. ``index`` int64
    (columns,): the group of each column, where that is not column // group. ``book``: which codes may stand together,
    None: all may. Raises UsageError where shapes contradict each other, or a group of ``index`` has not ``group``
    columns.
    """

    levels: Tensor
    group: int
    span: int
    d: Tensor
    u: Tensor
    z: Tensor | None = None
    m: Tensor | None = None
    v: Tensor | None = None
    storage: torch.dtype = torch.float16
    ladder: Ladder | None = None
    index: Tensor | None = None
    book: Book | None = None

    def __post_init__(self) -> None:
        rows, columns = self.shape
        groups = (rows, columns // self.group)
        right = self.span % self.group == 0 and self.d.shape == (rows, columns // self.span)
        right = right and all(part is None or part.shape == groups for part in (self.u, self.z, self.v))
        right = right and (self.ladder is None or self.ladder.steps.shape == self.d.shape)
        right = right and (self.m is None) == (self.v is None) and (self.m is None or self.m.shape == self.d.shape)
        if not right or not 1 <= self.levels.numel() <= 256:
            found = {name: None if part is None else tuple(part.shape) for name, part in self._parts().items()}
            raise UsageError(
                "The parts of a number grid do not fit together",
                expected=f"d, m (rows, columns / {self.span}), u, v, z (rows, columns / {self.group}), m with v",
                found=found,
            )
        if self.index is not None:
            self._check_index(self.index)

    def _check_index(self, index: Tensor) -> None:
        _, columns = self.shape
        groups = columns // self.group
        right = index.shape == (columns,) and not index.is_floating_point()
        right = right and bool((index >= 0).all()) and bool((index < groups).all())
        counts = torch.bincount(index, minlength=groups).tolist() if right else []
        if any(count != self.group for count in counts) or not right:
            raise UsageError(
                "The columns of a number grid do not fill its groups",
                expected=f"{groups} groups of {self.group} columns",
                found=counts or f"{index.dtype} {tuple(index.shape)}",
            )

    def _parts(self) -> dict[str, Tensor | None]:
        return {"d": self.d, "u": self.u, "z": self.z, "m": self.m, "v": self.v}

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the matrix."""
        return self.u.shape[0], self.u.shape[1] * self.group

    @cached_property
    def uniform(self) -> bool:
        """Whether the levels are consecutive integers."""
        steps = torch.arange(self.levels.numel(), dtype=torch.float32, device=self.levels.device)
        return bool(torch.equal(self.levels, self.levels[0] + steps))

    def scale(self) -> Tensor:
        """d * u for each group, float32 (rows, groups): value = scale * level - offset."""
        return _per_group(self.d, self.span // self.group) * self.u

    def offset(self) -> Tensor:
        """scale * z + m * v for each group, float32 (rows, groups)."""
        offset = torch.zeros_like(self.u) if self.m is None or self.v is None else self._minimum(self.m, self.v)
        return offset if self.z is None else self.scale() * self.z + offset

    def _minimum(self, m: Tensor, v: Tensor) -> Tensor:
        return _per_group(m, self.span // self.group) * v

    def decode(self, codes: Tensor) -> Tensor:
        """Values float32 (rows, columns) of ``codes`` uint8 (rows, columns), bit for bit as the decoder computes them.

        Raises UsageError for another shape.
        """
        self._check(codes)
        if self.index is not None:
            plain, order = self.in_order()
            return plain.decode(codes[:, order])[:, torch.argsort(order)]
        values = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
        for start, stop in row_tiles(*self.shape):
            part = self.rows(start, stop)
            values[start:stop] = part._values(codes[start:stop].reshape(stop - start, -1, self.group)).flatten(1)
        return values

    def _values(self, codes: Tensor) -> Tensor:
        """Values (rows, groups, group) of codes of that shape: scale first, then the level, then the offset."""
        if self.uniform:
            level = codes.to(torch.float32) + self.levels[0]
        else:
            level = self.levels.index_select(0, codes.reshape(-1).to(torch.int32)).reshape(codes.shape)
        if self.z is not None:
            level = level - self.z[:, :, None]
        values = self.scale()[:, :, None] * level
        if self.m is None or self.v is None:
            return values
        return values - self._minimum(self.m, self.v)[:, :, None]

    def nearest(self, weight: Tensor, importance: Tensor | None = None) -> Tensor:
        """Codes uint8 (rows, columns) whose values lie nearest to ``weight`` float32 (rows, columns).

        Of two equally near the lower code; where a scale is zero and all values are one, the code next to zero. Where
        there are words, ``importance`` float32 (columns,) weighs their columns; else it changes nothing. Raises
        UsageError for another shape.
        """
        self._check(weight)
        if self.book is not None:
            return nearest_words(self, self.book, weight, importance)
        if self.index is not None:
            plain, order = self.in_order()
            return plain.nearest(weight[:, order])[:, torch.argsort(order)]
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        for start, stop in row_tiles(*self.shape):
            part = self.rows(start, stop)
            codes[start:stop] = part._nearest(weight[start:stop].reshape(stop - start, -1, self.group)).flatten(1)
        return codes

    def _nearest(self, weight: Tensor) -> Tensor:
        """Codes of weights (rows, groups, group): a guess in float64, then the neighbour towards the weight."""
        scale = self.scale()[:, :, None]
        wide = weight.to(torch.float64)
        last = self.levels.numel() - 1
        guess = self._guess(wide, scale)
        value = self._values(guess).to(torch.float64)
        upwards = (wide > value) != (scale < 0)
        other = torch.where(upwards, guess + 1, guess - 1).clamp_(0, last)
        distance = (wide - value).abs_()
        rival = (wide - self._values(other).to(torch.float64)).abs_()
        better = (rival < distance) | ((rival == distance) & (other < guess) & (scale != 0))
        return torch.where(better, other, guess).to(torch.uint8)

    def _guess(self, wide: Tensor, scale: Tensor) -> Tensor:
        """int16 codes, right but for the rounding of the decoder."""
        target = wide if self.m is None or self.v is None else wide + self._minimum(self.m, self.v)[:, :, None]
        target = target / torch.where(scale == 0, torch.ones_like(scale), scale).to(torch.float64)
        target = torch.where(scale == 0, torch.zeros_like(target), target)
        if self.z is not None:
            target = target + self.z[:, :, None]
        if self.uniform:
            return (target - self.levels[0]).round_().clamp_(0, self.levels.numel() - 1).to(torch.int16)
        wide_levels = self.levels.to(torch.float64)
        return torch.bucketize(target, (wide_levels[:-1] + wide_levels[1:]) / 2).to(torch.int16)

    def with_floats(self, d: Tensor, m: Tensor | None = None) -> Grid:
        """The same grid with other free floats, as they are stored (finite); ``m`` None keeps the old offsets."""
        m = self.m if m is None else to_storage(m, self.storage)
        if self.ladder is None:
            return replace(self, d=to_storage(d, self.storage), m=m)
        ladder = self.ladder.at(d)
        return replace(self, d=ladder.decode(), m=m, ladder=ladder)

    def stored(self, d: Tensor) -> Tensor:
        """``d`` (rows, spans) as it is after having been stored, finite."""
        return to_storage(d, self.storage) if self.ladder is None else self.ladder.at(d).decode()

    def in_order(self) -> tuple[Grid, Tensor]:
        """The grid of the columns in the order of their groups, and which column each of them is, int64 (columns,)."""
        if self.index is None:
            return self, torch.arange(self.shape[1], device=self.u.device)
        return replace(self, index=None), torch.argsort(self.index, stable=True)

    def spread(self, order: Tensor) -> Grid:
        """This grid, whose groups stand side by side, for columns ``order`` of a matrix: what ``in_order`` undoes."""
        return replace(self, index=torch.argsort(order) // self.group)

    def rows(self, start: int, stop: int) -> Grid:
        """The grid of rows ``start`` to ``stop`` (views of the same numbers)."""
        return self._mapped(lambda part: part[start:stop], levels=self.levels)

    def _mapped(self, change: Callable[[Tensor], Tensor], levels: Tensor) -> Grid:
        return replace(
            self,
            levels=levels,
            d=change(self.d),
            u=change(self.u),
            z=None if self.z is None else change(self.z),
            m=None if self.m is None else change(self.m),
            v=None if self.v is None else change(self.v),
            ladder=None if self.ladder is None else self.ladder.mapped(change),
        )

    def to(self, device: torch.device | str) -> Grid:
        """The same grid on ``device``."""
        moved = self._mapped(lambda part: part.to(device), levels=self.levels.to(device))
        moved = moved if moved.index is None else replace(moved, index=moved.index.to(device))
        if moved.book is not None:
            moved = replace(moved, book=moved.book.to(device))
        if moved.ladder is None:
            return moved
        return replace(moved, ladder=replace(moved.ladder, levels=moved.ladder.levels.to(device)))

    @staticmethod
    def stack(grids: Sequence[Grid]) -> Grid:
        """The grids of successive rows of one matrix, with the same ``index``, as one. UsageError for none."""
        if not grids:
            raise UsageError("No number grid of a matrix without rows")
        parts = {
            name: None if part is None else torch.cat([other._parts()[name] for other in grids])  # type: ignore[misc]
            for name, part in grids[0]._parts().items()
        }
        found = replace(grids[0], ladder=None, **parts)  # type: ignore[arg-type]
        ladders = [other.ladder for other in grids if other.ladder is not None]
        if not ladders:
            return found
        steps, codes = torch.cat([one.steps for one in ladders]), torch.cat([one.codes for one in ladders])
        return replace(found, ladder=replace(ladders[0], steps=steps, codes=codes))

    def _check(self, values: Tensor) -> None:
        if values.shape != self.shape:
            raise UsageError("A matrix does not fit its number grid", expected=self.shape, found=tuple(values.shape))


def _per_group(values: Tensor, repeat: int) -> Tensor:
    """(rows, spans) as (rows, groups)."""
    return values if repeat == 1 else values.repeat_interleave(repeat, dim=1)


class GridType(Protocol):
    """A format's way to choose the grid of a matrix. ``block``: columns must be a multiple of it."""

    @property
    def name(self) -> str:
        """The qtype's name."""

    @property
    def block(self) -> int:
        """Columns must be a multiple of it."""

    @property
    def joint(self) -> int:
        """Neighbouring columns whose codes are chosen together, in whole groups of so many: 1 or the size of a word."""

    def plain(self, weight: Tensor, importance: Tensor | None) -> tuple[Grid, Tensor]:
        """Grid and codes uint8 (rows, columns) that the owner of the format would write.

        ``weight`` float32 (rows, columns); ``importance`` float32 (columns,), mean square of each input channel.
        """

    def fit(self, weight: Tensor, importance: Tensor | None, *, refine: bool = True) -> Grid:
        """The best grid for the importance-weighted error of nearest codes, its floats as the format stores them."""

    def hold(self, grid: Grid, codes: Tensor) -> tuple[Grid, Tensor] | None:
        """``codes`` uint8 (rows, columns) of a whole matrix on ``grid``, of whatever type, as a grid of this type and
        codes, for ``Store.piece``: the same numbers, none rounded. None where this type cannot hold them."""

    def near(self, grid: Grid, codes: Tensor) -> tuple[Grid, Tensor] | None:
        """``hold``, but that floats which do not fit their storage are rounded to it: the same codes. None where even
        so this type has no such grid."""


GGML_GRIDS = frozenset(
    (
        *("q1_0", "q2_0", "tq1_0", "tq2_0", "nvfp4", "mxfp4", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl"),
        *("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs"),
    )
)
