"""The meaning of the column loops (``feedback.py`` says what they do), and their form for accelerators.

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
        level = x.clamp(float(grid.levels[0]), float(grid.levels[-1])).round_()
        codes = (level - grid.levels[0]).to(torch.uint8)
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
    coupling: Tensor,
    reciprocal: Tensor,
    weight: Tensor,
    gradient: Tensor,
    residual: Tensor,
    codes: Tensor,
    counts: Tensor,
) -> None:
    """See :func:`llm_quantize.kernels.feedback.descend`."""
    for j in range(len(weight)):
        wanted = (weight[j] - residual[j]) + gradient[j] * reciprocal[j]
        value, codes[j], _ = nearest(grid, j, wanted)
        after = weight[j] - value
        change = after - residual[j]
        residual[j] = after
        counts += change != 0
        gradient[j + 1 :] += change * coupling[j + 1 :, j, None]
