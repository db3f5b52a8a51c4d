"""AWQ's clipping (Lin et al., AWQ, MLSys 2024): a group's largest weights cut off where that lowers its loss.

Only for grids that span a group from end to end: a fitted grid (``GridType.fit``) weighs the same choice already.

    W (rows, n)   weights, in groups of g columns        H (n, n)   sum x x^T
    For each row and group: c = max |w| * (1 - i / 20), i = 0 .. 9; w is clamped to [-c, c] and rounded plainly to q;
    the i with the smallest (q - w) H_gg (q - w)^T is kept, H_gg the group's own block of H.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm_quantize.errors import UsageError
from llm_quantize.methods.grid import GridType, row_tiles

STEPS, WHOLE = 10, 20


def clip(weight: Tensor, hessian: Tensor, grid_type: GridType) -> Tensor:
    """``weight`` float32 (rows, n) clipped, a new tensor; every row by itself.

    ``hessian``: float32 (n, n), any factor. Raises UsageError for shapes that do not fit.
    """
    rows, columns = weight.shape
    if hessian.shape != (columns, columns):
        raise UsageError(
            "A matrix and its hessian do not fit together",
            expected=(columns, columns),
            found=tuple(hessian.shape),
        )
    group = grid_type.block if grid_type.block > 1 else columns
    blocks = hessian.reshape(columns // group, group, columns // group, group)
    own = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (groups, g, g)
    found = torch.empty_like(weight)
    for start, stop in row_tiles(rows, columns):
        found[start:stop] = _clip_rows(weight[start:stop], own, group, grid_type)
    return found


def _clip_rows(weight: Tensor, own: Tensor, group: int, grid_type: GridType) -> Tensor:
    parts = weight.reshape(weight.shape[0], -1, group)
    largest = parts.abs().amax(dim=2, keepdim=True)
    best, least = parts.clone(), torch.full_like(largest, torch.inf)
    for step in range(STEPS):
        limit = largest * (1 - step / WHOLE)
        clipped = parts.clamp(-limit, limit)
        grid, codes = grid_type.plain(clipped.reshape(weight.shape), None)
        error = grid.decode(codes).reshape(parts.shape) - parts
        loss = (torch.einsum("rgi,gij->rgj", error, own) * error).sum(dim=2, keepdim=True)
        better = loss < least
        best, least = torch.where(better, clipped, best), torch.where(better, loss, least)
    return best.reshape(weight.shape)
