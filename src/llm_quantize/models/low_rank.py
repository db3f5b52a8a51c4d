"""Products of thin matrices, the same to the last bit on every machine and in any pieces.

A library of linear algebra adds in an order of its own, which depends on processor, shape and threads, so that float
sums differ in their last bits. Here each factor is first cut into two parts of few bits (Ozaki et al., "Error-free
transformations of matrix multiplication", 2012): of a row, relative to its largest magnitude 2^e, the nearest multiples
of 2^(e-q), and of what is left the nearest multiples of 2^(e-2q). The sums of products of such parts are whole numbers
below 2^53, which float64 holds exactly in whatever order they are added. What is dropped is below 2^-2q of the largest
product: with q of 20 or more, far below the rounding of float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]
PARTS = 3
"""Float64 values that stand for one of a factor while it is multiplied: two parts, and one of them again."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A factor (n, rank) in parts: ``high`` and ``low`` whole numbers, float64 (n, rank); ``exponents``: int32 (n, 1),
    of the largest magnitude in each row."""

    high: Doubles
    low: Doubles
    exponents: npt.NDArray[np.int32]
    bits: int

    def __getitem__(self, rows: slice) -> Cut:
        """Some of its rows."""
        return Cut(self.high[rows], self.low[rows], self.exponents[rows], self.bits)


def cut(factor: npt.NDArray[np.float32]) -> Cut:
    """float32 (n, rank), finite, in parts."""
    rank = factor.shape[1]
    bits = (53 - (rank - 1).bit_length()) // 2
    exact = factor.astype(np.float64)
    _, exponents = np.frexp(np.abs(exact).max(axis=1, keepdims=True, initial=0.0))
    scaled = np.ldexp(exact, bits - exponents)
    high = np.rint(scaled)
    low = np.rint(np.ldexp(scaled - high, bits))
    return Cut(high, low, exponents.astype(np.int32), bits)


@dataclass(frozen=True, slots=True)
class Right:
    """The right factor of a product, laid out for it: ``high`` (rank, n), ``crossed`` (2 rank, n)."""

    high: Doubles
    crossed: Doubles
    exponents: npt.NDArray[np.int32]
    bits: int


def laid_out(factor: Cut) -> Right:
    """A factor (n, rank) as the right side of products: its transpose."""
    high = np.ascontiguousarray(factor.high.T)
    crossed = np.concatenate([factor.low.T, factor.high.T])
    return Right(high, crossed, factor.exponents.T, factor.bits)


def product(left: Cut, right: Right) -> Doubles:
    """``left`` times the transpose of the factor in ``right``: float64 (rows, columns)."""
    bits = left.bits
    crossed = np.concatenate([left.high, left.low], axis=1) @ right.crossed
    found: Doubles = left.high @ right.high
    found += np.ldexp(crossed, -bits)
    scaled: Doubles = np.ldexp(found, left.exponents + right.exponents - 2 * bits)
    return scaled
