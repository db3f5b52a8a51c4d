"""Refines the grids of ggml's superblocks: 256 weights with one or two float16 numbers and small integer sub-scales.

value = d u level - m v, for sub-block S of superblock B. Turn by turn (block coordinate descent on
E = sum w (x - value)^2):

  1. with d, m fixed, every sub-block tries the sub-scales and sub-minima near (u, v), codes nearest for each pair
     (codes held while v moves would follow the old v, and find less);
  2. with codes, u, v fixed, d and m by weighted least squares, rounded to float16, codes nearest again;
     kept where E fell.

Every step is kept only where E fell, so no superblock ends above the grid that it came with. Arrays: x, w (n, S, B) for
B superblocks of S sub-blocks of n weights; u, v (S, B); d, m (B,).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llm_quantize.grids.grid import Grid, to_storage
from llm_quantize.grids.search import Levels, fold, reciprocal, solve_pair, symmetric_scales

__all__ = ["fit_superblocks"]

REACH = (3, 1, 1)  # how far u and v move in each turn; twice the way costs four times as much for 0.5 % of E
FREE_REACH = (4, 2, 2)  # the same where there is only u
# Of the scale that maps the largest magnitude of a sub-block to the lowest level.
FREE_FACTORS = (0.78, 0.88, 0.96, 1.02, 1.08, 1.16, 1.25, 1.34)


@dataclass(frozen=True)
class Blocks:
    """The numbers of B superblocks; see the top of this file. ``m`` and ``v`` are None for symmetric types."""

    x: Tensor
    w: Tensor
    total: Tensor  # sum of w, (S, B)
    levels: Levels
    u_bounds: tuple[int, int]
    v_most: int
    d: Tensor
    u: Tensor
    m: Tensor | None = None
    v: Tensor | None = None

    def target(self) -> Tensor:
        """What scale * level should be: x, or x + m v, (n, S, B)."""
        return self.x if self.m is None or self.v is None else self.x + self.m * self.v

    def coded(self) -> tuple[Tensor, Tensor]:
        """Nearest levels and residuals, (n, S, B)."""
        scale, target = self.d * self.u, self.target()
        level = self.levels.nearest_(target * reciprocal(scale))
        return level, target - level * scale

    def sub_errors(self, u: Tensor, target: Tensor | None = None) -> Tensor:
        """sum w e^2 of every sub-block with sub-scales ``u``, (S, B)."""
        scale = self.d * u
        if target is None:
            target = self.target()
        residual = self.levels.nearest_(target * reciprocal(scale)).mul_(scale).sub_(target)
        return fold(residual.square_().mul_(self.w))

    def error(self) -> Tensor:
        """E of every superblock, (B,)."""
        return fold(self.sub_errors(self.u))


def fit_superblocks(grid: Grid, x: Tensor, w: Tensor, *, bounds: tuple[int, int], v_most: int) -> Grid:
    """``grid`` with better numbers for ``x`` (rows, columns) weighted by ``w``: no superblock's error is larger.

    ``bounds``: smallest and largest sub-scale; where negative ones exist, sub-blocks are also searched afresh with
    scales of both signs. ``v_most``: the largest sub-minimum, 0 where the type has no offsets.
    """
    rows, subs = len(x), grid.span // grid.group
    cut = _superblocks(x, grid.group, subs)
    weight = _superblocks(w, grid.group, subs)
    first = Blocks(
        cut,
        weight,
        fold(weight),
        Levels.of(grid.levels),
        bounds,
        v_most,
        grid.d.reshape(-1),
        grid.u.reshape(-1, subs).t().contiguous(),
        None if grid.m is None else grid.m.reshape(-1),
        None if grid.v is None else grid.v.reshape(-1, subs).t().contiguous(),
    )
    best, least = _descend(first)
    if bounds[0] < 0:
        best, least = _choose(best, least, *_descend(_afresh(first)))
    return replace(
        grid,
        d=best.d.reshape(rows, -1),
        u=best.u.t().reshape(rows, -1).contiguous(),
        m=None if best.m is None else best.m.reshape(rows, -1),
        v=None if best.v is None else best.v.t().reshape(rows, -1).contiguous(),
    )


def _superblocks(values: Tensor, group: int, subs: int) -> Tensor:
    """(rows, columns) as (group, subs, superblocks)."""
    return values.reshape(-1, subs, group).permute(2, 1, 0).contiguous()


def _choose(old: Blocks, least: Tensor, new: Blocks, error: Tensor) -> tuple[Blocks, Tensor]:
    """Superblock by superblock ``new`` where its error is lower, and the errors."""
    better = error < least
    m = None if new.m is None or old.m is None else torch.where(better, new.m, old.m)
    v = None if new.v is None or old.v is None else torch.where(better, new.v, old.v)
    chosen = replace(old, d=torch.where(better, new.d, old.d), u=torch.where(better, new.u, old.u), m=m, v=v)
    return chosen, torch.where(better, error, least)


def _afresh(blocks: Blocks) -> Blocks:
    """Sub-scales from a search of every sub-block with both signs; the largest becomes the lowest sub-scale."""
    n, subs, count = blocks.x.shape
    x, w = blocks.x.reshape(n, -1), blocks.w.reshape(n, -1)
    found = symmetric_scales(x, w, blocks.levels, (FREE_FACTORS, ()), torch.float32, signed=True).reshape(subs, count)
    found = torch.where(x.abs().amax(dim=0).reshape(subs, count) > 0, found, torch.zeros_like(found))
    at = found.abs().argmax(dim=0, keepdim=True)
    d = to_storage(found.gather(0, at)[0] / blocks.u_bounds[0], torch.float16)
    u = (found * reciprocal(d)).round_().clamp_(*blocks.u_bounds)
    return replace(blocks, d=d, u=u)


def _descend(blocks: Blocks) -> tuple[Blocks, Tensor]:
    """``blocks`` after some turns of the two steps, and its error (B,)."""
    best = blocks
    least = best.error().nan_to_num(torch.inf, torch.inf)
    for reach in FREE_REACH if blocks.v is None else REACH:
        searched = _search(best, reach)
        # Codes first with the old floats: a turn whose new floats are no better still keeps its sub-scales.
        best, least = _choose(best, least, searched, searched.error())
        refitted = _refit(best)
        best, least = _choose(best, least, refitted, refitted.error())
    return best, least


def _search(blocks: Blocks, reach: int) -> Blocks:
    """Step 1: the best of sub-scales u - reach .. u + reach with sub-minima v - reach .. v + reach."""
    best_u, best_v = blocks.u, blocks.v
    least = blocks.sub_errors(blocks.u)
    for down in range(-reach, reach + 1) if blocks.v is not None else (0,):
        v = None if blocks.v is None else (blocks.v + down).clamp_(0, blocks.v_most)
        target = blocks.x if blocks.m is None or v is None else blocks.x + blocks.m * v
        for step in range(-reach, reach + 1):
            u = (blocks.u + step).clamp_(*blocks.u_bounds)
            error = blocks.sub_errors(u, target)
            better = error < least
            least, best_u = torch.where(better, error, least), torch.where(better, u, best_u)
            best_v = None if best_v is None or v is None else torch.where(better, v, best_v)
    return replace(blocks, u=best_u, v=best_v)


def _refit(blocks: Blocks) -> Blocks:
    """Step 2: d and m by least squares on the nearest codes, rounded to float16."""
    level, residual = blocks.coded()
    weighted = blocks.w * residual
    plain = fold(weighted)
    cross = fold(weighted.mul_(level))
    weighted = blocks.w * level
    square = fold(level.mul_(weighted))
    u = blocks.u
    a, aa = fold(u * cross), fold(u * u * square)
    if blocks.m is None or blocks.v is None:
        step = torch.where(aa > 0, a / torch.where(aa > 0, aa, 1.0), 0.0)
        return replace(blocks, d=to_storage(blocks.d + step, torch.float16))
    linear = fold(weighted)
    v = blocks.v
    d_step, m_step = solve_pair(aa, -fold(u * v * linear), fold(v * v * blocks.total), a, -fold(v * plain))
    d, m = (blocks.d + d_step).clamp_(min=0), (blocks.m + m_step).clamp_(min=0)
    return replace(blocks, d=to_storage(d, torch.float16), m=to_storage(m, torch.float16))
