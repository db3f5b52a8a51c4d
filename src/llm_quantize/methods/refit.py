"""The free floats of a grid, solved for all superblocks of a row at once under the full Hessian.

With the codes fixed, a row's values are linear in its free floats: q = sum_s d_s B_s + m_s C_s, where on superblock s
B_s = u * (level - z) and C_s = -v, and 0 elsewhere. With r = w - q the best change x of (d, m) solves

    A x = b    A (K, K) = [B C]^T H [B C],  b (K,) = [B C]^T H r,  K = superblocks, twice with offsets

and changes the loss r H r^T by x A x - 2 b x, which is also exact for the change that storage rounds x to: a row takes
it only if it lowers the loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm_quantize.grids.grid import Grid, to_storage
from llm_quantize.kernels import feedback as loops
from llm_quantize.methods.hessian import Factor
from llm_quantize.methods.tile import Tile, padded_rows

__all__ = ["refit"]

_SYSTEM_BYTES = 64 << 20  # of the normal equations held at once
_RIDGE = 1e-7  # relative to the diagonal, which is scaled to 1


def refit(tile: Tile, factor: Factor) -> bool:
    """Moves ``tile`` to the grid with the best free floats for its codes; whether any row took new ones."""
    grid, hessian, gradient = tile.grid, factor.hessian, tile.current_gradient(factor)
    basis = _basis(tile)
    unknowns = len(basis) * (grid.shape[1] // grid.span)
    step = max(loops.LANES, _SYSTEM_BYTES // (16 * unknowns * unknowns) // loops.LANES * loops.LANES)
    old = grid.d if grid.m is None else torch.cat([grid.d, grid.m], 1)
    new = old.clone()
    for start in range(0, tile.target.shape[1], step):
        lanes = slice(start, start + step)
        rows = slice(start, min(tile.rows, start + step))
        if rows.start >= rows.stop:
            break
        system, right = _equations([part[:, lanes] for part in basis], hessian, gradient[:, lanes], grid.span)
        count = rows.stop - rows.start
        new[rows] = _step(system[:count], right[:count], old[rows], grid.rows(rows.start, rows.stop))
    if torch.equal(new, old):
        return False
    spans = grid.d.shape[1]
    tile.move_to(grid.with_floats(new[:, :spans], None if grid.m is None else new[:, spans:]))
    return True


def _basis(tile: Tile) -> list[Tensor]:
    """B, and C where there are offsets: float32 (n, R)."""
    grid = tile.grid
    group = tile.numbers.group.long()
    level = grid.levels[tile.codes.long()]
    if grid.z is not None:
        level -= padded_rows(grid.z)[group]
    parts = [level.mul_(padded_rows(grid.u)[group])]
    if grid.v is not None:
        parts.append(padded_rows(grid.v)[group].neg_())
    return parts


def _equations(basis: list[Tensor], hessian: Tensor, gradient: Tensor, span: int) -> tuple[Tensor, Tensor]:
    """A float64 (rows, K, K) and b float64 (rows, K) for some of the rows of a tile."""
    n, rows = gradient.shape
    spans = n // span
    parts = [part.contiguous() for part in basis]
    system = torch.zeros(len(parts) * spans, len(parts) * spans, rows, device=gradient.device)
    for s in range(spans):
        stop = (s + 1) * span
        here = slice(s * span, stop)
        for i, part in enumerate(parts):
            product = hessian[here, :stop].T @ part[here]
            for j, other in enumerate(parts):
                sums = (product * other[:stop]).view(s + 1, span, rows).sum(1)
                system[i * spans + s, j * spans : j * spans + s + 1] = sums
                system[j * spans : j * spans + s + 1, i * spans + s] = sums
    right = [(part * gradient).view(spans, span, rows).to(torch.float64).sum(1) for part in parts]
    return system.permute(2, 0, 1).to(torch.float64), torch.cat(right).T


def _step(system: Tensor, right: Tensor, old: Tensor, grid: Grid) -> Tensor:
    """New free floats float32 (rows, K): as stored, and the old ones in rows that would not gain."""
    diagonal = system.diagonal(dim1=1, dim2=2)
    unit = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()
    scaled = system * unit[:, :, None] * unit[:, None, :]
    scaled.diagonal(dim1=1, dim2=2).add_(_RIDGE).clamp_(min=_RIDGE)
    scaled.diagonal(dim1=1, dim2=2)[diagonal <= 0] = 1.0
    lower, info = torch.linalg.cholesky_ex(scaled)
    change = torch.cholesky_solve((right * unit)[:, :, None], lower)[:, :, 0] * unit
    usable = (info == 0) & torch.isfinite(change).all(1)
    change = torch.where(usable[:, None], change, 0.0)
    wanted = (old.to(torch.float64) + change).to(torch.float32)
    spans = grid.d.shape[1]
    new = torch.cat([grid.stored(wanted[:, :spans]), to_storage(wanted[:, spans:], grid.storage)], 1)
    made = new.to(torch.float64) - old
    gain = 2 * (right * made).sum(1) - torch.einsum("rk,rkl,rl->r", made, system, made)
    return torch.where((gain > 0)[:, None], new, old)
