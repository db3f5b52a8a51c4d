"""Rows of a matrix whose codes move by gradient steps.

Every weight has a place t on the line of codes, a real number that begins at its code and may go one code up or down;
between two codes its value is linear. Every free float has a change in shares of what it was:

    value = d u (level(t) - z) - m v (grids/grid.py)        with G = dL/dvalue
    dL/dt = G d u level'(t)    dL/dd = sum over a span of G u (level(t) - z)    dL/dm = - sum of G v

Floats are rounded to what the file stores at every step, their gradients passed straight through. A step is Adam's
(Kingma and Ba 2014, arXiv 1412.6980). Codes harden by and by (as in TesseraQ, Chen et al. 2024, arXiv
2410.19103): from SOFT of the steps on, a place nearer to a code than a limit that grows to 1/2 settles there, and what
is left makes up for it. Codes of words (``Grid.book``) stay as they are. Dense twin: tests/oracles/dense_refinement.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llm_quantize.grids.grid import Grid

__all__ = ["Moving"]

CODES = 1.6
"""How far a weight goes in all steps together where its gradient never turns, in codes, about."""

FLOATS = 0.06
"""The same of a float, as a share of itself."""

SOFT = 0.3
"""Share of the steps after which codes begin to settle."""

FEWEST = 48
"""Steps below which a step goes no further: the way becomes shorter instead."""

WARMING = 4
"""Steps in which rates grow: the mean squares of the first ones are of little text."""

_MEAN, _SQUARE = 0.9, 0.99


class _Adam:
    """Directions of about unit length."""

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        self._taken = 0
        self._mean = torch.zeros(shape, dtype=torch.float32, device=device)
        self._square = torch.zeros_like(self._mean)

    def direction(self, gradient: Tensor) -> Tensor:
        """Of a descent, the shape of ``gradient``; 0 where it has always been 0."""
        self._taken += 1
        self._mean.mul_(_MEAN).add_(gradient, alpha=1 - _MEAN)
        self._square.mul_(_SQUARE).addcmul_(gradient, gradient, value=1 - _SQUARE)
        scale = (self._square / (1 - _SQUARE**self._taken)).sqrt_()
        return self._mean / (-(1 - _MEAN**self._taken) * torch.where(scale > 0, scale, 1.0))


class Moving:
    """``codes`` uint8 (rows, n) on ``grid``, to be moved in ``steps`` steps, all of them ``pace`` times as long. The
    columns of its groups stand side by side (``Grid.index`` is None)."""

    def __init__(self, grid: Grid, codes: Tensor, steps: int, pace: float = 1.0) -> None:
        self._first, self._steps, self._pace, self._taken = codes, steps, pace, 0
        self.grid, self.places = grid, codes.to(torch.float32)
        self._settled = torch.zeros_like(codes, dtype=torch.bool)
        self._words = grid.book is not None or len(grid.levels) < 2
        self._floats = [grid.d.clone()] if grid.m is None else [grid.d.clone(), grid.m.clone()]
        self._units = _units(grid)
        device = codes.device
        self._codes_adam = _Adam(codes.shape, device)
        self._floats_adam = [_Adam(part.shape, device) for part in self._floats]

    def values(self) -> Tensor:
        """float32 (rows, n), of places between codes too."""
        grid = self.grid
        values = self._levels() * grid.scale()[:, :, None]
        if grid.m is not None and grid.v is not None:
            values -= (_of_groups(grid.m, grid) * grid.v)[:, :, None]
        return values.reshape(self.places.shape)

    def _levels(self) -> Tensor:
        """level(t) - z, (rows, groups, group)."""
        grid, low = self.grid, self._below()
        level = torch.lerp(grid.levels[low], grid.levels[(low + 1).clamp_(max=len(grid.levels) - 1)], self.places - low)
        level = level.reshape(len(level), -1, grid.group)
        return level if grid.z is None else level - grid.z[:, :, None]

    def _below(self) -> Tensor:
        """int64: the code below each place, of the last one that before it."""
        return self.places.floor().clamp_(0, max(0, len(self.grid.levels) - 2)).long()

    def gradients(self, gradient: Tensor) -> tuple[Tensor, list[Tensor]]:
        """dL/dt (rows, n) and dL/dd, dL/dm (rows, spans), of ``gradient`` dL/dvalue float32 (rows, n)."""
        grid, low = self.grid, self._below()
        groups = gradient.reshape(len(gradient), -1, grid.group)
        slope = torch.zeros_like(gradient) if self._words else grid.levels[low + 1] - grid.levels[low]
        places = (groups * grid.scale()[:, :, None] * slope.reshape(groups.shape)).reshape(gradient.shape)
        floats = [_of_spans((groups * self._levels()).sum(2) * grid.u, grid)]
        if grid.v is not None:
            floats.append(_of_spans(groups.sum(2) * -grid.v, grid))
        return places, floats

    def step(self, gradient: Tensor) -> None:
        """One step down ``gradient``, dL/dvalue float32 (rows, n); the last one settles every code."""
        places, floats = self.gradients(gradient)
        rate = min(1.0, (self._taken + 1) / WARMING) * (1 - self._taken / self._steps) * 2 / max(FEWEST, self._steps)
        rate *= self._pace
        if not self._words:
            self._move(self._codes_adam.direction(places.masked_fill_(self._settled, 0.0)), CODES * rate)
        for part, unit, adam, change in zip(self._floats, self._units, self._floats_adam, floats, strict=True):
            part += FLOATS * rate * unit * adam.direction(change * unit)
        self.grid = self.grid.with_floats(*self._floats)
        self._taken += 1

    def _move(self, direction: Tensor, rate: float) -> None:
        moved = self.places + rate * direction
        moved = torch.minimum(torch.maximum(moved, self._first - 1.0), self._first + 1.0)
        moved = moved.clamp_(0, len(self.grid.levels) - 1)
        self.places = torch.where(self._settled, self.places, moved)
        done = (self._taken + 1) / self._steps
        limit = 0.5 * (done - SOFT) / (1 - SOFT)
        nearest = self.places.round()
        self._settled |= (self.places - nearest).abs() <= (limit if done < 1 else math.inf)
        self.places = torch.where(self._settled, nearest, self.places)

    def hardened(self) -> tuple[Grid, Tensor]:
        """Grid and codes uint8 (rows, n), each place at its nearest code."""
        return self.grid, self.places.round().to(torch.uint8)


def _units(grid: Grid) -> list[Tensor]:
    """How much each float changes where a share of 1 is asked for: d by itself, m by what moves values as far."""
    d = grid.d.abs()
    if grid.m is None or grid.v is None:
        return [d]
    scale, offset = (_of_spans(part.abs(), grid) for part in (grid.u, grid.v))
    return [d, d * torch.where(offset > 0, scale / torch.where(offset > 0, offset, 1.0), 0.0)]


def _of_spans(values: Tensor, grid: Grid) -> Tensor:
    """Sums over the groups of each span: (rows, groups) as (rows, spans)."""
    return values.reshape(len(values), -1, grid.span // grid.group).sum(2)


def _of_groups(values: Tensor, grid: Grid) -> Tensor:
    """(rows, spans) as (rows, groups)."""
    return values.repeat_interleave(grid.span // grid.group, dim=1)
