"""Cholesky factorization in place, by blocks: no second matrix, as LAPACK through torch would need."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["factor_in_place"]

BLOCK = 256
_PANEL = 1024  # columns of the trailing matrix brought up to date by one product


def factor_in_place(matrix: Tensor) -> bool:
    """Overwrites the lower triangle of ``matrix`` (n, n), of any floats, with L, matrix = L L^T; False if it has none.

    Only the lower triangle is read; after False the content is lost. Above the diagonal nothing has a meaning.
    """
    n = len(matrix)
    for start in range(0, n, BLOCK):
        stop = min(n, start + BLOCK)
        corner, info = torch.linalg.cholesky_ex(matrix[start:stop, start:stop])
        if int(info) != 0:
            return False
        matrix[start:stop, start:stop] = corner
        if stop == n:
            break
        panel = torch.linalg.solve_triangular(corner.T, matrix[stop:, start:stop], upper=True, left=False)
        matrix[stop:, start:stop] = panel
        for first in range(stop, n, _PANEL):
            last = min(n, first + _PANEL)
            rows = panel[first - stop :]
            matrix[first:, first:last].addmm_(rows, rows[: last - first].T, alpha=-1)
    return True
