"""The meaning of the column loops, and their form for accelerators.

One column after the other, all rows at once; a product and a sum are two roundings, as in the native twin.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from llm_quantize.kernels.feedback import TileGrid

__all__ = ["descend", "feedback", "nearest"]


def nearest(grid: TileGrid, columns: slice | int, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values float32, codes uint8, and where ``wanted`` was outside of the grid; all (columns, R) or (R,)."""
    at = grid.group[columns].long()
    shifted = wanted if grid.offset is None else wanted + grid.offset[at]
    x = shifted * grid.inverse[at]
    outside = (x < grid.edges[0]) | (x > grid.edges[1])
    if grid.uniform:
        low, high = grid.edges[0] + 0.5, grid.edges[1] - 0.5  # numbers of the host: an accelerator need not be asked
        level = x.clamp(low, high).round_()
        codes = (level - low).to(torch.uint8)
    else:
        index = torch.bucketize(x, grid.middles, right=True)
        level = grid.levels[index]
        codes = index.to(torch.uint8)
    value = grid.scale[at] * level
    if grid.offset is not None:
        value = value - grid.offset[at]
    return value, codes, outside


def feedback(
    grid: TileGrid, coupling: Tensor, weight: Tensor, target: Tensor, residual: Tensor, codes: Tensor, counts: Tensor
) -> None:
    """See :func:`llm_quantize.kernels.feedback.feedback`."""
    for j in range(len(weight)):
        value, codes[j], outside = nearest(grid, j, target[j])
        residual[j] = weight[j] - value
        counts += outside
        target[j + 1 :] += residual[j] * coupling[j + 1 :, j, None]


def descend(
    grid: TileGrid,
    hessian: Tensor,
    reciprocal: Tensor,
    weight: Tensor,
    gradient: Tensor,
    residual: Tensor,
    codes: Tensor,
    sweeps: int,
    block: int | None = None,
) -> int:
    """See :func:`llm_quantize.kernels.feedback.descend`. Without ``block``, the meaning: every change of a code changes
    its row's gradient at once. With it, outside of blocks of so many columns one product brings it up to date.
    """
    n, total = len(weight), 0
    size = n if block is None else block
    for _ in range(sweeps):
        moved = torch.zeros((), dtype=torch.int64, device=weight.device)
        for start in range(0, n, size):
            inside = slice(start, min(n, start + size))
            before = residual[inside].clone()
            local = gradient[inside] if block is None else gradient[inside].clone()
            for j in range(start, inside.stop):
                wanted = (weight[j] - residual[j]) + local[j - start] * reciprocal[j]
                value, found, _ = nearest(grid, j, wanted)
                after = weight[j] - value
                change = after - residual[j]
                residual[j] = after
                codes[j] = torch.where(change != 0, found, codes[j])
                moved += (change != 0).sum()
                local += change * hessian[j, inside, None]
            if block is not None:
                gradient.addmm_(hessian[:, inside], residual[inside] - before)
        total += int(moved)
        if int(moved) == 0:
            break
    return total
