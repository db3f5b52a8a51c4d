"""Grids of integers: a float scale, and perhaps a zero point, for each group of weights.

The plain rules are those of the reference tools (GPTQModel's quantizer: symmetric s = 2 max|x| / (2^b - 1),
asymmetric s = (max(0, max) - min(0, min)) / (2^b - 1), z = round(-min / s)); :meth:`IntegerGridType.fit` searches
scales for the smallest importance-weighted error instead (``grid_search``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_quantize.errors import UsageError
from llm_quantize.grids.grid import Grid, row_tiles, to_storage
from llm_quantize.grids.holding import Floats, as_integers
from llm_quantize.grids.search import (
    LEAST_SCALE,
    Levels,
    divided,
    fine_factors,
    fold,
    from_lanes,
    lanes,
    symmetric_scales,
    zero_point_scales,
)
from llm_quantize.qtypes.integer import WHOLE_ROW, IntegerType

__all__ = ["IntegerGridType"]

TILE = 1 << 18  # weights searched at once
LEAST_ROWS = 32  # of one tile, for long groups
# By bits: the largest factor of the scale that just covers a group, and the ratio from one factor to the next.
COARSE = {
    **dict.fromkeys((2, 3), (1.75, 1.13)),
    **{4: (1.15, 1.1), 5: (1.08, 1.06), 6: (1.04, 1.04), 7: (1.02, 1.02), 8: (1.01, 1.01)},
}
TRIES = 16


def channel_importance(importance: Tensor | None, weight: Tensor) -> Tensor:
    """``importance`` (columns,) with mean 1, none of it zero; ones where there is none. UsageError for bad values."""
    columns = weight.shape[1]
    if importance is None:
        return torch.ones(columns, dtype=torch.float32, device=weight.device)
    if importance.shape != (columns,) or not bool((torch.isfinite(importance) & (importance >= 0)).all()):
        raise UsageError(
            "An importance vector has the wrong form",
            expected=f"({columns},), finite, not negative",
            found=tuple(importance.shape),
        )
    wide = importance.to(weight.device, torch.float64)
    mean = wide.mean()
    if not bool(mean > 0):
        return torch.ones(columns, dtype=torch.float32, device=weight.device)
    return (wide / mean).clamp(min=1e-6).to(torch.float32)


@dataclass(frozen=True)
class IntegerGridType:
    """The grids of one :class:`IntegerType`; a GridType. The options are those of ``grid.grid_type``."""

    qtype: IntegerType
    signed: bool = False
    least_zero: int = 0
    spread: float = 0.0
    tries: int = TRIES

    def __post_init__(self) -> None:
        if not 0 <= self.least_zero < 2**self.qtype.bits:
            raise UsageError(
                "A smallest zero point is no code", expected=f"0 to {2**self.qtype.bits - 1}", found=self.least_zero
            )

    @property
    def name(self) -> str:
        """The qtype's name."""
        return self.qtype.name

    @property
    def block(self) -> int:
        """Columns must be a multiple of it."""
        return 1 if self.qtype.group_size == WHOLE_ROW else self.qtype.group_size

    @property
    def joint(self) -> int:
        """See ``GridType``."""
        return 1

    @property
    def storage(self) -> torch.dtype:
        """The dtype of stored scales."""
        return {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}[self.qtype.scale]

    def _levels(self) -> Tensor:
        count = 1 << self.qtype.bits
        levels = torch.arange(count, dtype=torch.float32)
        return levels - count // 2 if self.qtype.symmetric else levels

    def _factors(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Of the scale that just covers the group, then of the best: far below it for outliers that do not matter."""
        most, ratio = COARSE[self.qtype.bits]
        if self.qtype.bits <= 3 and not self.qtype.symmetric:
            most = COARSE[4][0]  # the extra level of the symmetric grid is not there to be left unused
        return tuple(most * ratio**-step for step in range(self.tries)), fine_factors(self.qtype.bits)

    def plain(self, weight: Tensor, importance: Tensor | None) -> tuple[Grid, Tensor]:
        """Grid and codes uint8 (rows, columns) by the reference tools' rule: nothing searched, importance not used."""
        grid = self._grid(weight, None, self._plain_scales)
        return grid, grid.nearest(weight)

    def fit(self, weight: Tensor, importance: Tensor | None, *, refine: bool = True) -> Grid:
        """The grid of small importance-weighted error; with ``refine`` False the plain one.

        ``weight`` float32 (rows, columns), finite; ``importance`` float32 (columns,). Any subset of the rows gives
        the same scales as the whole. UsageError where the columns are not whole groups.
        """
        if not refine:
            return self._grid(weight, None, self._plain_scales)
        return self._grid(weight, channel_importance(importance, weight), self._fitted_scales)

    def hold(self, grid: Grid, codes: Tensor) -> tuple[Grid, Tensor] | None:
        """See ``GridType``: scales that are stored exactly, and zero points in their range."""
        return self._held(grid, codes, exact=True)

    def near(self, grid: Grid, codes: Tensor) -> tuple[Grid, Tensor] | None:
        """See ``GridType``: scales are rounded."""
        return self._held(grid, codes, exact=False)

    def _held(self, grid: Grid, codes: Tensor, *, exact: bool) -> tuple[Grid, Tensor] | None:
        if codes.shape[1] % self.block:
            return None
        zeros = (self.least_zero, (1 << self.qtype.bits) - 1 + self.least_zero)
        kind, size = self.qtype, self.qtype.group(codes.shape[1])
        kept = Floats(self.storage, exact)
        return as_integers(grid, codes, bits=kind.bits, size=size, symmetric=kind.symmetric, zeros=zeros, floats=kept)

    def _grid(
        self, weight: Tensor, importance: Tensor | None, scales: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    ) -> Grid:
        rows, columns = weight.shape
        group = self.qtype.group(columns)
        d = torch.empty((rows, columns // group), dtype=torch.float32, device=weight.device)
        z = torch.empty_like(d)
        for start, stop in row_tiles(rows, columns, max(TILE, LEAST_ROWS * group)):
            x = lanes(weight[start:stop], group)
            w = x if importance is None else self._weights(x, lanes(importance[None], group), stop - start)
            scale, zero = scales(x, w)
            d[start:stop], z[start:stop] = from_lanes(scale, stop - start), from_lanes(zero, stop - start)
        ones = torch.ones((1, 1), dtype=torch.float32, device=weight.device).expand(d.shape)
        levels = self._levels().to(weight.device)
        return Grid(levels, group, group, d, ones, z=None if self.qtype.symmetric else z, storage=self.storage)

    def _weights(self, x: Tensor, importance: Tensor, rows: int) -> Tensor:
        """(group, rows * groups): importance, times sqrt(spread * mean x^2 + x^2) if asked, per group of mean 1."""
        w = importance.repeat(1, rows)
        if self.spread > 0:
            square = x * x
            mean = divided(fold(square), x.shape[0])
            w = w * (square + self.spread * mean).sqrt_() / mean.sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        return w

    def _plain_scales(self, x: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        last = float((1 << self.qtype.bits) - 1)
        if self.qtype.symmetric:
            scale = x.abs().amax(dim=0) * (2 / last)
            return self._stored(scale), torch.zeros_like(scale)
        low, high = x.amin(dim=0).clamp(max=0), x.amax(dim=0).clamp(min=0)
        scale = self._stored(divided(high - low, last))
        return scale, (-low / scale).round().clamp(self.least_zero, last)

    def _stored(self, scale: Tensor) -> Tensor:
        """Rounded to storage; a scale that is or becomes zero is the least one instead, and decodes to zeros."""
        stored = to_storage(scale, self.storage)
        return torch.where(stored > 0, stored, torch.full_like(stored, LEAST_SCALE))

    def _fitted_scales(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        levels = Levels.of(self._levels().to(x.device))
        if not self.qtype.symmetric:
            return zero_point_scales(x, w, levels, self._factors(), self.storage, self.least_zero)
        start = self._plain_scales(x, w)[0]
        scale = symmetric_scales(x, w, levels, self._factors(), self.storage, signed=self.signed, start=start)
        return scale, torch.zeros_like(scale)
