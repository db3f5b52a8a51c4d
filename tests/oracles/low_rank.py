"""W + scale (B A) in fractions, one value after another."""

from __future__ import annotations

from fractions import Fraction

import numpy as np


def exact_sum(weight: np.ndarray, b: np.ndarray, a: np.ndarray, scale: float) -> list[list[Fraction]]:
    """``weight`` (out, in), ``b`` (out, rank), ``a`` (rank, in): every value as it is without rounding."""
    return [
        [
            Fraction(float(weight[i, j]))
            + Fraction(scale) * sum(Fraction(float(b[i, k])) * Fraction(float(a[k, j])) for k in range(len(a)))
            for j in range(weight.shape[1])
        ]
        for i in range(len(weight))
    ]
