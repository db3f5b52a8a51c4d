"""Rows of a stored quantized matrix as a grid and its codes: what ``models.base.Model.held_grid`` gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm_quantize.grids.grid import Grid, Ladder
from llm_quantize.qtypes.held import HeldRows, move_whole

__all__ = ["grid_of", "joined", "moved", "taken"]


def grid_of(rows: HeldRows) -> tuple[Grid, Tensor]:
    """Grid and codes uint8 (n, K) of ``rows``. ``Grid.decode`` of them is the source's values, bit for bit."""
    scales = _tensor(rows.scales)
    unit = torch.full((1, 1), rows.unit, dtype=torch.float32).expand(scales.shape)
    ladder = None
    if rows.rungs is not None:
        steps = torch.from_numpy(np.array(rows.steps)).expand(scales.shape)
        ladder = Ladder(rows.base, steps, _tensor(rows.rung_levels), torch.from_numpy(np.array(rows.rungs)))
    offsets = None if rows.offsets is None else _tensor(rows.offsets)
    grid = Grid(
        _tensor(rows.levels),
        rows.group,
        rows.group,
        scales,
        unit,
        z=None if rows.zeros is None else _tensor(rows.zeros),
        m=offsets,
        v=None if offsets is None else torch.ones((1, 1)).expand(offsets.shape),
        storage=getattr(torch, rows.storage),
        ladder=ladder,
        index=None if rows.index is None else torch.from_numpy(rows.index.astype(np.int64)),
    )
    return grid, torch.from_numpy(np.ascontiguousarray(rows.places))


def _tensor(values: object) -> Tensor:
    return torch.from_numpy(np.array(values, np.float32, order="C"))


def joined(parts: Sequence[tuple[Grid, Tensor]]) -> tuple[Grid, Tensor] | None:
    """Successive rows of one matrix as one; None where their grids are not of one kind."""
    if not parts:
        return None
    if len(parts) == 1:
        return parts[0]
    first = parts[0][0]
    if not all(_alike(first, grid) for grid, _ in parts[1:]):
        return None
    return Grid.stack([grid for grid, _ in parts]), torch.cat([codes for _, codes in parts])


def _alike(one: Grid, other: Grid) -> bool:
    same = (one.group, one.span, one.storage) == (other.group, other.span, other.storage)
    parts = ((one.z, other.z), (one.m, other.m), (one.ladder, other.ladder), (one.index, other.index))
    if not same or any((left is None) != (right is None) for left, right in parts):
        return False
    if one.index is not None and other.index is not None and not torch.equal(one.index, other.index):
        return False
    if one.ladder is not None and other.ladder is not None:
        ladders = one.ladder.base == other.ladder.base and torch.equal(one.ladder.levels, other.ladder.levels)
        return ladders and torch.equal(one.levels, other.levels)
    return torch.equal(one.levels, other.levels)


def taken(part: tuple[Grid, Tensor], order: Sequence[int]) -> tuple[Grid, Tensor]:
    """The rows of a grid and its codes in another order."""
    grid, codes = part
    index = torch.tensor(order, dtype=torch.int64)
    return _mapped(grid, lambda one, _size: one[index]), codes[index]


def moved(part: tuple[Grid, Tensor], columns: npt.NDArray[np.int64]) -> tuple[Grid, Tensor] | None:
    """The columns of a grid and its codes in the order ``columns`` int64 (K,); None where that parts what shares a
    scale."""
    grid, codes = part
    if grid.index is not None or not (move_whole(columns, grid.span) and move_whole(columns, grid.group)):
        return None
    order = torch.from_numpy(columns)
    return _mapped(grid, lambda one, size: one[:, order[::size] // size]), codes[:, order]


def _mapped(grid: Grid, change: Callable[[Tensor, int], Tensor]) -> Grid:
    """``change``: of the numbers of groups, and how many columns each is for."""
    chosen = {
        name: None if one is None else change(one, grid.span if name in ("d", "m") else grid.group)
        for name, one in (("d", grid.d), ("u", grid.u), ("z", grid.z), ("m", grid.m), ("v", grid.v))
    }
    ladder = None if grid.ladder is None else grid.ladder.mapped(lambda one: change(one, grid.span))
    return replace(grid, ladder=ladder, **chosen)  # type: ignore[arg-type]
