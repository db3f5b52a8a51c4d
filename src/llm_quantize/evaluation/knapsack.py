"""The multiple-choice knapsack, exactly: one option of each item, so that bytes fit a budget and costs are least.

Legend: b, c bytes and cost of an option, B the budget, l >= 0 a price of bytes, U the cost of a known choice.

    bound    L = sum over items of min(c + l b) - l B                no choice that fits costs less
    reduced  r = c + l b - min over the item's options of (c + l b)  >= 0
    a choice costs L + sum of its r + l (B - its bytes), so one better than U has sum of r < U - L

With l of the Lagrangian solution U - L is small: hardly an option of an item is left. Items are joined one after the
other; of partial choices those stay that no other one beats in bytes and in cost. (Dudzinski and Walukiewicz 1987.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

STATES = 50_000
"""Partial choices at most. Where there are more the known choice stands, which is hardly worse then: the gap is filled
by thousands of choices."""

_EQUAL = 1e-12  # of the known cost: what is nearer is no gain


def knapsack(items: Sequence[Sequence[tuple[int, float]]], budget: int, price: float, known: float) -> list[int] | None:
    """The option of each of ``items``, (bytes, cost), of the least cost in ``budget`` bytes; None where nothing costs
    less than ``known``, or too much would have to be looked at. ``price``: of a byte, in cost; any will do, but the
    search is short with that of the Lagrangian solution alone."""
    kept: list[npt.NDArray[np.int64]] = []
    tables = [np.array(item, np.float64).reshape(-1, 2) for item in items]
    priced = [table[:, 1] + price * table[:, 0] for table in tables]
    gap = known * (1 - _EQUAL) - (sum(float(one.min()) for one in priced) - price * budget)
    for one in priced:
        kept.append(np.flatnonzero(one - one.min() < gap))
    if gap <= 0 or not all(map(len, kept)):
        return None
    sizes, costs, reduced = (np.zeros(1) for _ in range(3))
    trail: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]] = []
    for table, own, options in zip(tables, priced, kept, strict=True):
        grown = [
            (table[options, 0][:, None] + sizes).ravel(),
            (table[options, 1][:, None] + costs).ravel(),
            ((own[options] - own.min())[:, None] + reduced).ravel(),
        ]
        left = np.flatnonzero(grown[2] < gap)
        left = left[np.lexsort((grown[1][left], grown[0][left]))]
        falling = np.minimum.accumulate(grown[1][left])
        left = left[np.concatenate(([True], falling[1:] < falling[:-1]))[: len(left)]]
        if not len(left) or len(left) > STATES:
            return None
        option, parent = np.divmod(left, len(sizes))
        trail.append((options[option].astype(np.int32), parent.astype(np.int32)))
        sizes, costs, reduced = (values[left] for values in grown)
    fitting = np.flatnonzero(sizes <= budget)
    if not len(fitting) or costs[fitting[-1]] >= known * (1 - _EQUAL):
        return None
    found, at = [], int(fitting[-1])
    for taken, parents in reversed(trail):
        found.append(int(taken[at]))
        at = int(parents[at])
    return found[::-1]
