"""GPTQ written out: float64, one column after the other, an explicit inverse, no blocks, no vectors of rows to pad.

The twin of ``llm_quantize.methods``: it shares no line with it. A grid is given by what each code of each weight is
worth: ``values`` (rows, n, codes). Beside codes it returns margins: how close, as a share of the gap between two
neighbouring values, the closest choice of each row was, so that a test can leave out rows that rounding may decide.
"""

from __future__ import annotations

import numpy as np


def condition(hessian, tokens, *, damp, shrink):
    """Mean of x x^T, shrunk and damped, dead channels cut off: float64 (n, n)."""
    n = len(hessian)
    mean = np.asarray(hessian, np.float64) / tokens
    mean = (mean + mean.T) / 2
    diagonal = np.diag(mean).copy()
    if shrink:
        share = min(0.9, n / tokens)
        mean = (1 - share) * mean + share * np.diag(diagonal)
    living = diagonal[diagonal > 0]
    mean[diagonal == 0] = 0
    mean[:, diagonal == 0] = 0
    lower_median = np.sort(living)[(len(living) - 1) // 2]
    return mean + damp * np.minimum(living, 100 * lower_median).mean() * np.eye(n)


def nearest(values, wanted):
    """Codes (rows,) of the values (rows, codes) nearest to ``wanted`` (rows,), and the margins of the choices."""
    distance = np.abs(values - wanted[:, None])
    codes = distance.argmin(1)
    ranked = np.sort(distance, 1)
    gap = np.sort(np.abs(values - np.take_along_axis(values, codes[:, None], 1)), 1)[:, 1]
    margin = np.where(gap > 0, (ranked[:, 1] - ranked[:, 0]) / np.where(gap > 0, gap, 1), 1.0)
    return codes, margin


def feed_back(target, hessian, order, values):
    """Optimal brain quantization in a fixed order (Frantar et al. 2022, equations 2 and 3): (codes, margins)."""
    rows, n = target.shape
    weight = np.asarray(target, np.float64).copy()
    inverse = np.linalg.inv(hessian)
    codes, margins = np.zeros((rows, n), int), np.full(rows, np.inf)
    left = np.ones(n, bool)
    for j in order:
        codes[:, j], margin = nearest(values[:, j], weight[:, j])
        margins = np.minimum(margins, margin)
        error = (weight[:, j] - values[np.arange(rows), j, codes[:, j]]) / inverse[j, j]
        left[j] = False
        weight[:, left] -= np.outer(error, inverse[j, left])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes, margins


def worth(values, codes):
    """Values (rows, n) of ``codes``."""
    return np.take_along_axis(values, codes[:, :, None], 2)[:, :, 0]


def descend(target, hessian, codes, values, sweeps):
    """Coordinate descent in natural order, its gradient made anew for each column: (codes, margins)."""
    rows, n = target.shape
    codes, margins = codes.copy(), np.full(rows, np.inf)
    for _ in range(sweeps):
        for j in range(n):
            now = worth(values, codes)
            wanted = now[:, j] - (now - target) @ hessian[:, j] / hessian[j, j]
            codes[:, j], margin = nearest(values[:, j], wanted)
            margins = np.minimum(margins, margin)
    return codes, margins


def losses(target, hessian, quantized):
    """(w - q) H (w - q)^T for each row."""
    residual = np.asarray(target, np.float64) - quantized
    return np.einsum("ri,ij,rj->r", residual, hessian, residual)


def refit(target, hessian, bases):
    """For each row the floats x (K,) that bring the columns of its basis (rows, n, K) nearest to it under H."""
    root = np.linalg.cholesky(hessian).T
    return np.stack([np.linalg.lstsq(root @ b, root @ w, rcond=None)[0] for w, b in zip(target, bases, strict=True)])


def corrected(target, hessian, cross, tokens, *, damp, ridge_base, alpha):
    """W + alpha W D (H + ridge)^-1, means over ``tokens``."""
    n = len(hessian)
    ridge = damp * ridge_base * (1 + n / tokens)
    return target + alpha * target @ (cross / tokens) @ np.linalg.inv(hessian / tokens + ridge * np.eye(n))
