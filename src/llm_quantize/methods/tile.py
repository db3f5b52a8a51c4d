"""One tile of rows on its way through the stages, held with the columns first: (n, R), rows side by side.

Legend: w (n,) one row of the target, q the values of its codes, d = w - q; all stages lower d H d^T with H the
conditioned Hessian. Rows never touch each other, and R is padded to whole vectors with rows of zeros, so a row's codes
do not depend on its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llm_quantize.grids.grid import Grid
from llm_quantize.kernels import feedback as loops
from llm_quantize.kernels.reference.feedback import nearest
from llm_quantize.methods.hessian import Factor

__all__ = ["Tile", "padded_rows", "weighted_squares"]


@dataclass
class Tile:
    """``rows`` rows of a matrix. ``target``, ``residual`` float32 (n, R), ``codes`` uint8 (n, R), R >= rows;
    ``gradient`` = H d float32 (n, R), None where it is not known."""

    rows: int
    target: Tensor
    residual: Tensor
    codes: Tensor
    grid: Grid
    numbers: loops.TileGrid
    clipped: int = 0
    gradient: Tensor | None = None

    @classmethod
    def make(cls, target: Tensor, grid: Grid) -> Tile:
        """``target`` float32 (n, R), contiguous, columns from the grid's rows on being padding; no codes as yet."""
        rows = grid.shape[0]
        return cls(
            rows=rows,
            target=target,
            residual=target.clone(),
            codes=torch.zeros(target.shape, dtype=torch.uint8, device=target.device),
            grid=grid,
            numbers=_tile_grid(grid, target.shape[1]),
        )

    def round_plainly(self) -> None:
        """Each weight gets the nearest code."""
        value, self.codes, outside = nearest(self.numbers, slice(None), self.target)
        self.residual, self.gradient = self.target - value, None
        self.clipped = int(outside[:, : self.rows].sum())

    def feed_back(self, factor: Factor) -> None:
        """Column after column in the factor's order the nearest code, its error handed on to the later ones."""
        order = factor.order
        numbers = self.numbers.columns(order)
        weight = self.target[order]
        residual, codes = torch.empty_like(weight), torch.empty_like(self.codes)
        counts = torch.zeros(weight.shape[1], dtype=torch.int32, device=weight.device)
        for block in _blocks(len(weight)):
            target = weight[block].clone()
            if block.start:
                target.addmm_(factor.lower[block, : block.start], residual[: block.start])
            loops.feedback(
                numbers.columns(block),
                factor.lower[block, block],
                weight[block],
                target,
                residual[block],
                codes[block],
                counts,
            )
        self.residual[order], self.gradient = residual, None
        self.codes[order] = codes
        self.clipped = int(counts[: self.rows].sum())

    def descend(self, factor: Factor, reciprocal: Tensor, sweeps: int) -> None:
        """Up to ``sweeps`` sweeps of coordinate descent; ``reciprocal`` float32 (n,) = 1 / H_jj."""
        if sweeps:
            gradient = self.current_gradient(factor)
            loops.descend(
                self.numbers, factor.hessian, reciprocal, self.target, gradient, self.residual, self.codes, sweeps
            )

    def current_gradient(self, factor: Factor) -> Tensor:
        """H d, float32 (n, R): one product after each step that changes all residuals; descent keeps it current."""
        if self.gradient is None:
            self.gradient = factor.hessian @ self.residual
        return self.gradient

    def losses(self, factor: Factor) -> Tensor:
        """d H d^T, float64 (rows,)."""
        return weighted_squares(self.residual, self.current_gradient(factor))[: self.rows]

    def move_to(self, grid: Grid) -> None:
        """The same codes on another grid."""
        self.grid = grid
        self.numbers = _tile_grid(grid, self.target.shape[1])
        at = self.numbers.group.long()
        value = self.numbers.scale[at] * self.numbers.levels[self.codes.long()]
        if self.numbers.offset is not None:
            value -= self.numbers.offset[at]
        self.residual, self.gradient = self.target - value, None

    def row_codes(self) -> Tensor:
        """uint8 (rows, n)."""
        return self.codes[:, : self.rows].T.contiguous()


def padded_rows(values: Tensor) -> Tensor:
    """float32 (rows, n) as (n, R), contiguous, R the next multiple of the vector length."""
    rows, n = values.shape
    whole = -(-rows // loops.LANES) * loops.LANES
    out = torch.zeros(n, whole, dtype=torch.float32, device=values.device)
    out[:, :rows] = values.T
    return out


def weighted_squares(residual: Tensor, gradient: Tensor) -> Tensor:
    """Sum over columns of d * (H d), both float32 (n, R): float64 (R,)."""
    losses = torch.zeros(residual.shape[1], dtype=torch.float64, device=residual.device)
    for block in _blocks(len(residual)):
        losses += (gradient[block].to(torch.float64) * residual[block]).sum(0)
    return losses


def _blocks(columns: int) -> list[slice]:
    return [slice(start, min(columns, start + loops.BLOCK)) for start in range(0, columns, loops.BLOCK)]


def _tile_grid(grid: Grid, width: int) -> loops.TileGrid:
    """The grid of ``grid``'s rows, the columns of the tile beyond them having no scale."""
    columns = grid.shape[1]
    group = torch.arange(columns, dtype=torch.int32, device=grid.u.device) // grid.group
    offset = None if grid.z is None and grid.m is None else padded_rows(grid.offset())
    scale = padded_rows(grid.scale())
    if scale.shape[1] != width:
        raise ValueError("a grid and its tile differ in rows")
    return loops.TileGrid.make(scale, offset, group, grid.levels, uniform=grid.uniform)
