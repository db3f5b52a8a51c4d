"""SmoothQuant's search in float64, one token and one row after another."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def round_token(values: Array) -> Array:
    """int8, as compressed-tensors rounds a token."""
    scale = np.abs(values).max() / 127.5 or 1.0
    return np.array([min(max(round(value / scale), -128), 127) * scale for value in values])


def round_rows(weight: Array) -> Array:
    """int8 with a scale for each row, stored in float16."""
    found = np.empty_like(weight)
    for index, row in enumerate(weight):
        scale = float(np.float16(np.abs(row).max() / 127.5))
        found[index] = [min(max(round(value / scale), -128), 127) * scale for value in row]
    return found


def weight_loss(weight: Array, mean: Array, scales: Array) -> float:
    error = (round_rows(weight * scales) - weight * scales) / scales
    return float(sum(row @ mean @ row for row in error))


def input_loss(weight: Array, rows: Array, scales: Array) -> float:
    """Mean over tokens of |W dx|^2."""
    total = 0.0
    for x in rows:
        dx = x - round_token(x / scales) * scales
        total += float(np.square(weight @ dx).sum())
    return total / len(rows)


def candidates(largest: Array, weights: Array, points: int) -> list[tuple[float, Array]]:
    found = []
    for step in range(points + 1):
        a = step / points
        raw = np.array([m**a / w ** (1 - a) for m, w in zip(largest, weights, strict=True)])
        found.append((a, raw / np.sqrt(raw.max() * raw.min())))
    return found
