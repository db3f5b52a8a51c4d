"""The codebooks of the I-quants: the points that may be stored, and the nearest of them for every point that may not.

IQ2_* and IQ1_* store 8 weights, IQ3_* store 4, as the number of one point of a fixed grid. A point is a row of codes
0..levels-1; the search works with the odd magnitudes 2 * code + 1 (IQ1: code - 1). The grids are format constants and
come from the ``gguf`` package. What a code that is not on the grid may become is ggml's rule (ggml/src/ggml-quants.c,
``iq2xs_init_impl`` and ``iq3xs_init_impl``): the grid points at the ``wanted`` smallest distinct distances, sorted by
distance and then by their number. Of points that fit equally well the first one wins: the order decides bytes.

:func:`codebook` is the meaning, in numpy; :func:`native_codebook` is what kernels get, built in a few milliseconds at
first use and kept. To add a type: a row in ``WANTED``, a row in ``qtypes``, its quantizer in a ``reference_*.py``
(with :func:`codebook`) and in a native family (``lq::Codebook``, see native/codebook.hpp); ``quantize`` does the rest.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cache
from typing import Final

import gguf.quants
import numpy as np
import numpy.typing as npt

from llm_quantize.kernels import _native

__all__ = ["WANTED", "Codebook", "codebook", "grid_codes", "native_codebook"]

Integers = npt.NDArray[np.int64]

WANTED: Final = {"iq2_xxs": 2, "iq2_xs": 2, "iq2_s": 1, "iq3_xxs": 2, "iq3_s": 3, "iq1_s": 3, "iq1_m": 3}
_lock: Final = threading.Lock()
_native_books: Final[dict[str, _native.Codebook]] = {}


@dataclass(frozen=True)
class Codebook:
    """One grid. A *point* is the number that its codes make as digits in base ``levels``, the first code the lowest.

    ``codes`` int64 (n, d) of the grid's n entries; ``index`` int64 (levels ** d,): number of the entry at each point,
    or -1; ``start`` int64 (levels ** d + 1,) and ``neighbours`` int64: for a point off the grid the numbers
    ``neighbours[start[p]:start[p + 1]]``, nearest first, never empty; for one on it nothing.
    """

    codes: Integers
    levels: int
    index: Integers
    start: Integers
    neighbours: Integers

    def points(self, codes: Integers) -> Integers:
        """Points (...) of codes (..., d)."""
        points: Integers = (codes * self.levels ** np.arange(codes.shape[-1])).sum(axis=-1)
        return points


@cache
def grid_codes(qtype: str) -> tuple[Integers, int]:
    """(codes int64 (n, d) of the grid of ``qtype``, number of levels), from the ``gguf`` package."""
    owner = getattr(gguf.quants, qtype.upper())
    owner.init_grid()
    values = np.asarray(owner.grid)
    levels, codes = np.unique(values, return_inverse=True)
    return codes.reshape(-1, values.shape[-1]).astype(np.int64), len(levels)


def find_neighbours(codes: Integers, levels: int, wanted: int) -> Codebook:
    """The codebook of the grid ``codes`` (n, d), by comparing every point with every entry."""
    n, d = codes.shape
    points = np.arange(levels**d)
    index = np.full(len(points), -1)
    index[(codes * levels ** np.arange(d)).sum(axis=1)] = np.arange(n)
    start, neighbours = np.zeros(len(points) + 1, np.int64), []
    for point in points:
        if index[point] < 0:
            own = point // levels ** np.arange(d) % levels
            distance = ((codes - own) ** 2).sum(axis=1)
            farthest = np.unique(distance)[:wanted][-1]
            near = np.flatnonzero(distance <= farthest)
            neighbours.append(near[np.argsort(distance[near], kind="stable")])
        start[point + 1] = start[point] + (len(neighbours[-1]) if index[point] < 0 else 0)
    return Codebook(codes, levels, index, start, np.concatenate(neighbours))


@cache
def codebook(qtype: str) -> Codebook:
    """The codebook of an I-quant (a key of ``WANTED``); slow, for the reference kernels and the tests."""
    codes, levels = grid_codes(qtype)
    return find_neighbours(codes, levels, WANTED[qtype])


def native_codebook(qtype: str) -> _native.Codebook | None:
    """What the native kernel of ``qtype`` searches, made once, at first use; None for a type without a grid."""
    if qtype not in WANTED:
        return None
    found = _native_books.get(qtype)
    if found is None:
        with _lock:
            if qtype not in _native_books:
                codes, levels = grid_codes("iq1_s" if qtype == "iq1_m" else qtype)
                _native_books[qtype] = _native.Codebook(codes.astype(np.uint8), levels, WANTED[qtype])
            found = _native_books[qtype]
    return found
