"""How much of the correction serves text held back, written out: float64, explicit inverses, one token at a time.

The twin of ``llm_quantize.methods.correction``; it shares no line with it.
"""

from __future__ import annotations

import numpy as np

RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0)


def decided(weights, own, full, held):
    """(share, ridge) for ``weights`` (rows, n) whose inputs are ``own`` (tokens, n), the source model's ``full``; the
    last ``held`` tokens are held back."""
    fit = len(own) - held
    hessian, cross = own[:fit].T @ own[:fit] / fit, (full[:fit] - own[:fit]).T @ own[:fit] / fit
    squares = np.diag(hessian)
    living = squares[squares > 0]
    mean = np.minimum(living, 100 * np.sort(living)[(len(living) - 1) // 2]).mean()
    best = (0.0, RIDGES[0], 0.0)
    for ridge in RIDGES:
        map_ = cross @ np.linalg.inv(hessian + ridge * mean * np.eye(len(hessian)))
        agreement = size = 0.0
        for y, x in zip(own[fit:], full[fit:], strict=True):
            lacking, said = weights @ (x - y), weights @ (map_ @ y)
            agreement, size = agreement + said @ lacking, size + said @ said
        if agreement > 0 and agreement**2 / size > best[2]:
            # Least squares over text held back: sum (share * said - lacking)^2. What is said is right and noise; of the
            # noise there is less once all tokens are in the sums.
            noise = max(0.0, size - agreement) * fit / len(own)
            best = (agreement / (agreement + noise), ridge, agreement**2 / size)
    return best[:2]


def corrected(weight, own, full, share, ridge):
    """W + share W D (Y + ridge)^-1, float64."""
    hessian, cross = own.T @ own / len(own), (full - own).T @ own / len(own)
    squares = np.diag(hessian)
    living = squares[squares > 0]
    mean = np.minimum(living, 100 * np.sort(living)[(len(living) - 1) // 2]).mean()
    return weight + share * weight @ cross @ np.linalg.inv(hessian + ridge * mean * np.eye(len(hessian)))
