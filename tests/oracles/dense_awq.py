"""The search for activation-aware scales in float64, one number after another."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def conditional_variances(h: Array) -> Array:
    """Of each channel of the conditioned ``h`` given all of smaller diagonal (of equal ones, those that come later): a
    Schur complement."""
    n = len(h)
    order = sorted(range(n), key=lambda i: (-h[i, i], i))
    found = np.empty(n)
    for place, i in enumerate(order):
        later = order[place + 1 :]
        found[i] = h[i, i]
        if later:
            found[i] -= h[i, later] @ np.linalg.solve(h[np.ix_(later, later)], h[later, i])
    return found


def round_asymmetric(weight: Array, bits: int, group: int) -> Array:
    """Each group of each row rounded to integers between its least and largest value, zero included."""
    last = 2**bits - 1
    found = np.empty_like(weight)
    for row in range(len(weight)):
        for start in range(0, weight.shape[1], group):
            part = weight[row, start : start + group]
            low, high = min(0.0, part.min()), max(0.0, part.max())
            scale = float(np.float16((high - low) / last))
            zero = min(max(round(-low / scale), 0), last)
            for i, value in enumerate(part):
                code = min(max(round(value / scale + zero), 0), last)
                found[row, start + i] = scale * (code - zero)
    return found


def loss(weight: Array, scales: Array, mean: Array, conditional: Array | None, bits: int, group: int) -> float:
    error = (round_asymmetric(weight * scales, bits, group) - weight * scales) / scales
    total = 0.0
    for row in error:
        total += row @ mean @ row if conditional is None else float((row**2 * conditional).sum())
    return total


def typical(weights: list[Array], group: int) -> Array:
    found = []
    for weight in weights:
        for row in weight:
            for start in range(0, len(row), group):
                part = np.abs(row[start : start + group])
                found.append(part / part.max())
    columns = weights[0].shape[1]
    return np.concatenate(found).reshape(-1, columns).mean(axis=0) + 1e-4


def candidates(
    weights: list[Array], mean: Array, conditional: Array, points: int, group: int, spread: list[int] | None
) -> list[tuple[str, float, Array]]:
    small = typical(weights, group)
    found = []
    for word, base in (("activation", np.sqrt(mean.diagonal())), ("conditional", np.sqrt(conditional))):
        for i in range(1, points + 1):
            found.append((word, i / points, base ** (i / points)))
        for i in range(points):
            found.append((f"{word}, weight", i / points, base ** (i / points) / small ** (1 - i / points)))
    return [(kind, exponent, normal(raw, spread)) for kind, exponent, raw in found]


def normal(raw: Array, spread: list[int] | None) -> Array:
    if spread is not None:
        shared = {k: np.exp(np.mean([np.log(raw[i]) for i, j in enumerate(spread) if j == k])) for k in spread}
        raw = np.array([shared[k] for k in spread])
    return raw / np.sqrt(raw.max() * raw.min())
