"""Importance that says nothing, and importance that float32 cannot weigh with.

ggml's searches multiply every error by the importance of its channel. Where that is 0 for all channels that share a
scale, every scale is equally good, and ggml takes 0 or the first one: the weights are erased. What is beyond the range
of float32 sums erases just as well. Legend: h (columns,) the importance of one matrix, a row of an imatrix.

    h = 0 throughout              nothing is known of the matrix: it is rounded as if there were no importance
    h = 0 on BLOCK channels       nothing is known of them: they weigh as much as the mean of the others
    max h beyond 2^-SAFE, 2^SAFE  scaled by a power of two; only ratios matter, and they stay the same to the bit

Single channels of 0 between others stay as they are: their inputs were always 0, and the others choose the scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llm_quantize.qtypes import QTYPES

__all__ = ["BLOCK", "Weighed", "vector_for", "weigh"]

Floats = npt.NDArray[np.float32]

BLOCK = 16  # the fewest channels that share a scale in any type
SAFE = 33  # from 1e-10 to 1e10: sums of 256 products, and their squares, stay within float32
FAINT = 1e-16  # of the largest: a block below it is lost in float32 beside the others, as if it were zero


@dataclass(frozen=True)
class Weighed:
    """``rows`` float32 (matrices, columns), fit to weigh with; a matrix of which nothing is known keeps its zeros.
    ``silent``: those matrices; ``partly``: matrices with blocks of channels of which nothing is known."""

    rows: Floats
    silent: tuple[int, ...] = ()
    partly: tuple[int, ...] = ()


def weigh(rows: Floats) -> Weighed:
    """``rows`` float32 (matrices, columns), finite and not negative, mended where they would erase weights. What needs
    no mending is handed back, not copied."""
    blocks = np.maximum.reduceat(rows, np.arange(0, rows.shape[1], BLOCK), axis=1)
    largest = blocks.max(axis=1)
    mute = blocks <= FAINT * largest[:, None].astype(np.float64)
    silent = largest == 0
    partly = mute.any(axis=1) & ~silent
    exponents = np.frexp(largest)[1]
    scaled = (np.abs(exponents) > SAFE) & ~silent
    if not (partly | scaled).any():
        return Weighed(rows, _numbers(silent))
    mended = rows.copy()
    mended[scaled] = np.ldexp(rows[scaled].astype(np.float64), -exponents[scaled, None]).astype(np.float32)
    for matrix in np.flatnonzero(partly):
        unknown = np.repeat(mute[matrix], BLOCK)[: rows.shape[1]]
        mended[matrix, unknown] = mended[matrix, ~unknown].mean(dtype=np.float64)
    return Weighed(mended, _numbers(silent), _numbers(partly))


def vector_for(qtype: str, importance: Floats | None) -> Floats | None:
    """What ``quantize`` is to be given for the ``importance`` (columns,) of one matrix: nothing where that says nothing
    or the type does not use it; for a type that cannot be without, every channel weighs the same."""
    if importance is None or not QTYPES[qtype].uses_importance:
        return None
    if importance.any():
        return importance
    return np.ones_like(importance) if QTYPES[qtype].needs_importance else None


def _numbers(which: npt.NDArray[np.bool_]) -> tuple[int, ...]:
    return tuple(int(number) for number in np.flatnonzero(which))
