"""The dense twin of blockwise/refining.py and methods/refine.py: float64, one weight and one token after another.

Values of places between two codes are interpolated; the loss of a block is told by transformers' own layer in float64;
what a place or a float does to it is told by moving it a little to both sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

CAP = 4.0


def value(grid: Any, place: float, row: int, column: int, d: float | None = None, m: float | None = None) -> float:
    """What a place is worth in a row and column; ``d``, ``m``: in the place of the grid's own."""
    group, span = column // grid.group, column // grid.span
    levels = [float(level) for level in grid.levels]
    low = min(math.floor(place), max(0, len(levels) - 2))
    level = levels[low]
    if place > low:
        level += (place - low) * (levels[low + 1] - levels[low])
    if grid.z is not None:
        level -= float(grid.z[row, group])
    found = (float(grid.d[row, span]) if d is None else d) * float(grid.u[row, group]) * level
    if grid.m is not None:
        found -= (float(grid.m[row, span]) if m is None else m) * float(grid.v[row, group])
    return found


def values(grid: Any, places: np.ndarray, d: np.ndarray, m: np.ndarray | None) -> np.ndarray:
    """float64 (rows, columns)."""
    rows, columns = places.shape
    return np.array(
        [
            [
                value(
                    grid,
                    float(places[r, j]),
                    r,
                    j,
                    float(d[r, j // grid.span]),
                    None if m is None else float(m[r, j // grid.span]),
                )
                for j in range(columns)
            ]
            for r in range(rows)
        ]
    )


def counts(target: np.ndarray) -> np.ndarray:
    """How much each token of ``target`` (tokens, channels) counts: those above CAP medians count as that."""
    squares = (target.astype(np.float64) ** 2).mean(1)
    living = np.sort(squares[squares > 0])
    most = CAP * living[(len(living) - 1) // 2]
    shares = np.array([most / square if square > most else 1.0 for square in squares])
    return torch.from_numpy(shares).to(torch.bfloat16).double().numpy() if (shares < 1).any() else shares


def block_output(model: Any, index: int, hidden: np.ndarray) -> np.ndarray:
    """What transformers' layer ``index`` makes of ``hidden`` (tokens, channels), float64."""
    layer, kept = model.model.layers[index], []
    given = torch.from_numpy(np.asarray(hidden, np.float64))[None]
    before = layer.register_forward_pre_hook(
        lambda _, positional, named: ((given, *positional[1:]), named), with_kwargs=True
    )
    after = layer.register_forward_hook(lambda _, __, output: kept.append(output))
    try:
        with torch.inference_mode():
            model(input_ids=torch.zeros((1, given.shape[1]), dtype=torch.int64))
    finally:
        before.remove()
        after.remove()
    output = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
    return output.reshape(given.shape[1:]).numpy()


def loss(model: Any, index: int, windows: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """L of ``windows``, (what enters the layer, what the source's layer gives) of each."""
    total = 0.0
    for hidden, target in windows:
        away = block_output(model, index, hidden) - target.astype(np.float64)
        shares = counts(target)
        total += sum(share * float((row**2).mean()) for share, row in zip(shares, away, strict=True)) / len(away)
    return total / len(windows)


def slope(of: Callable[[float], float], by: float) -> float:
    """The derivative of ``of`` at 0 by differences to both sides."""
    return (of(by) - of(-by)) / (2 * by)
