"""Grids of integers with a free scale and a free offset for each group.

The plain rule is MLX's own (0.32, read from what its CPU encoder writes): the end of the group's range that is farther
from zero is met exactly, with a scale that makes zero a code; the scale is negative where that end is the upper one.
Codes are chosen with scale and offset in float32, before both are stored in 16 bit. ``fit`` searches for the scale and
offset of small importance-weighted error instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llm_quantize.grids.grid import Grid, row_tiles, to_storage
from llm_quantize.grids.holding import Floats, as_affine
from llm_quantize.grids.integer import TILE, channel_importance
from llm_quantize.grids.search import TRIMS, Levels, affine_scales, divided, from_lanes, lanes
from llm_quantize.qtypes.affine import AffineType

__all__ = ["AffineGridType"]

_LEAST = 1e-7  # what MLX has as scale at least
_TWO_BITS = (-0.05, 0.05, 0.12, 0.2)
_STEPS = 15  # of the 4 bits that TRIMS are for


@dataclass(frozen=True)
class AffineGridType:
    """The grids of one :class:`AffineType`; a GridType."""

    qtype: AffineType

    @property
    def name(self) -> str:
        """The qtype's name."""
        return self.qtype.name

    @property
    def block(self) -> int:
        """Columns must be a multiple of it."""
        return self.qtype.group_size

    @property
    def joint(self) -> int:
        """See ``GridType``."""
        return 1

    @property
    def storage(self) -> torch.dtype:
        """The dtype of stored scales and offsets."""
        found: torch.dtype = getattr(torch, self.qtype.scale)
        return found

    def plain(self, weight: Tensor, importance: Tensor | None) -> tuple[Grid, Tensor]:
        """Grid and codes uint8 (rows, columns) of MLX's own encoder; importance is not used."""
        rows, columns = weight.shape
        scale, offset = self._owners(weight)
        groups = weight.reshape(rows, -1, self.qtype.group(columns))
        codes = ((groups - offset[:, :, None]) / scale[:, :, None]).round_().clamp_(0, self._last)
        return self._grid(scale, offset), codes.to(torch.uint8).flatten(1)

    def fit(self, weight: Tensor, importance: Tensor | None, *, refine: bool = True) -> Grid:
        """The grid of small importance-weighted error; with ``refine`` False the plain one.

        ``weight`` float32 (rows, columns), finite; ``importance`` float32 (columns,). Any subset of the rows gives the
        same numbers as the whole. UsageError where the columns are not whole groups.
        """
        columns = weight.shape[1]
        group = self.qtype.group(columns)
        plain = self._grid(*self._owners(weight))
        if not refine:
            return plain
        shares, levels = channel_importance(importance, weight), Levels(0.0, self._last)
        scale, offset = torch.empty_like(plain.d), torch.empty_like(plain.d)
        for first, last in row_tiles(len(weight), columns, TILE):
            x = lanes(weight[first:last], group)
            w = lanes(shares[None], group).repeat(1, last - first)
            own = plain.rows(first, last)
            start = own.d.reshape(-1), -own.offset().reshape(-1)
            found = affine_scales(x, w, levels, start, self.storage, self._trims())
            scale[first:last], offset[first:last] = (from_lanes(part, last - first) for part in found)
        return self._grid(scale, offset)

    @property
    def _last(self) -> float:
        return float((1 << self.qtype.bits) - 1)

    def _trims(self) -> tuple[float, ...]:
        """Parts of the range to cut off: about as many steps of the grid at every width from 4 bits."""
        if self.qtype.bits == 2:
            return _TWO_BITS
        return tuple(part * min(1.0, _STEPS / self._last) for part in TRIMS)

    def _owners(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and offset float32 (rows, groups), before they are stored."""
        groups = weight.reshape(len(weight), -1, self.qtype.group(weight.shape[1]))
        low, high = groups.amin(dim=2), groups.amax(dim=2)
        lower = low.abs() > high.abs()
        scale = divided(high - low, self._last).clamp(min=_LEAST)
        scale = torch.where(lower, scale, -scale)
        edge = torch.where(lower, low, high)
        code = (edge / scale).round()
        met = code != 0
        scale = torch.where(met, edge / torch.where(met, code, 1.0), scale)
        return scale, torch.where(met, edge, 0.0)

    def hold(self, grid: Grid, codes: Tensor) -> tuple[Grid, Tensor] | None:
        """See ``GridType``: offsets that are exact products, stored exactly."""
        return self._held(grid, codes, exact=True)

    def near(self, grid: Grid, codes: Tensor) -> tuple[Grid, Tensor] | None:
        """See ``GridType``: scales and offsets are rounded."""
        return self._held(grid, codes, exact=False)

    def _held(self, grid: Grid, codes: Tensor, *, exact: bool) -> tuple[Grid, Tensor] | None:
        if codes.shape[1] % self.block:
            return None
        size = self.qtype.group(codes.shape[1])
        return as_affine(grid, codes, bits=self.qtype.bits, size=size, floats=Floats(self.storage, exact))

    def _grid(self, scale: Tensor, offset: Tensor) -> Grid:
        levels = torch.arange(int(self._last) + 1, dtype=torch.float32, device=scale.device)
        ones = torch.ones((1, 1), dtype=torch.float32, device=scale.device).expand(scale.shape)
        d, m = to_storage(scale, self.storage), to_storage(-offset, self.storage)
        group = self.qtype.group_size
        return Grid(levels, group, group, d, ones, m=m, v=ones, storage=self.storage)
