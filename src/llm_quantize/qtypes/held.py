"""Rows of a quantized matrix as its file holds them: places among levels, and the numbers of each group of columns.

    value = (scale * unit) * (levels[place] - zero) + offset

Whoever reads them makes a grid of it (grids/held.py), which needs torch; this does not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["UNEVEN", "Held", "HeldRows", "HeldWords", "move_whole"]

Floats = npt.NDArray[np.float32]

UNEVEN = "uneven"
"""The name of the grid of a matrix with groups of several sizes, which nothing holds."""


def move_whole(columns: npt.NDArray[np.int64], group: int) -> bool:
    """Whether groups of ``group`` columns stay together, in their order, where columns move to the order ``columns``
    int64 (K,); in one group any order is right."""
    if group >= len(columns):
        return True
    if len(columns) % group:
        return False
    starts = columns[::group]
    return not (starts % group).any() and np.array_equal(columns, (starts[:, None] + np.arange(group)).reshape(-1))


@dataclass(frozen=True)
class Held:
    """The grid of a stored matrix, as headers say. ``qtype``: its name. ``scale``: how scales are stored that are
    floats, "float16", "bfloat16" or "float32". ``powers``: those are said to be powers of two. ``act_order``: the
    columns of a group do not stand side by side."""

    qtype: str
    scale: str
    powers: bool = False
    act_order: bool = False


@dataclass(frozen=True)
class HeldRows:
    """n rows of K columns in groups of ``group``: column // group is the group of each, or what ``index`` (K,) says, in
    which each group is there as often. ``levels`` float32 (L,), ascending; ``places`` uint8 (n, K) among
    them; ``scales`` float32 (n, G), stored as ``storage`` ("float16", "bfloat16", "float32"); ``zeros`` (n, G), whole
    numbers on the count of the levels; ``offsets`` float32 (n, G), taken off.

    ``rungs`` uint8 (n, G): where scales are codes themselves, scale = rung_levels[rung] * steps + base. ``steps``
    broadcasts to (n, G); float64 where it is the inverse of a float32 that is stored.
    """

    levels: Floats
    places: npt.NDArray[np.uint8]
    group: int
    scales: Floats
    storage: str
    unit: float = 1.0
    zeros: npt.NDArray[Any] | None = None
    offsets: Floats | None = None
    rungs: npt.NDArray[np.uint8] | None = None
    rung_levels: Floats | None = None
    steps: npt.NDArray[Any] | None = None
    base: float = 0.0
    index: npt.NDArray[Any] | None = None

    def cut(self, start: int, stop: int) -> HeldRows:
        """Rows [start, stop) of these."""
        if (start, stop) == (0, len(self.places)):
            return self
        steps = self.steps
        return replace(
            self,
            places=self.places[start:stop],
            scales=self.scales[start:stop],
            zeros=None if self.zeros is None else self.zeros[start:stop],
            offsets=None if self.offsets is None else self.offsets[start:stop],
            rungs=None if self.rungs is None else self.rungs[start:stop],
            steps=steps if steps is None or len(steps) == 1 else steps[start:stop],
        )


@dataclass(frozen=True)
class HeldWords:
    """All n rows of K columns in groups of ``group``, as places from 0 of ``bits`` bits. ``words`` uint32: all places,
    in the layout ``layout`` (kernels/repack.py); ``scales`` float32 (n, G), stored as ``storage`` ("" where that does
    not matter); either ``zeros`` int16 (n, G), on the count of places, or ``offsets`` float32 (n, G), which are added.

    A reader decodes scale * (place - zero), or scale * place + offset, in float32 in this order.
    """

    words: npt.NDArray[np.uint32]
    layout: str
    bits: int
    group: int
    scales: Floats
    storage: str
    zeros: npt.NDArray[np.int16] | None = None
    offsets: Floats | None = None

    def value(self, place: int) -> Floats:
        """float32 (n, G): what a place of each group is decoded to."""
        with np.errstate(invalid="ignore", over="ignore"):
            if self.zeros is not None:
                return self.scales * (np.float32(place) - self.zeros.astype(np.float32))
            values: Floats = self.scales * np.float32(place)
            return values if self.offsets is None else values + self.offsets
