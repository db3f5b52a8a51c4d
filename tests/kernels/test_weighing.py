"""Importance that says nothing, or more than float32 holds: no type erases a weight because of it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from llm_quantize import kernels
from llm_quantize.kernels.weighing import BLOCK, vector_for, weigh
from llm_quantize.qtypes import QTYPES

WEIGHTED = [name for name, qtype in QTYPES.items() if qtype.uses_importance]
COLUMNS = 512


def seen(seed: int = 0, columns: int = COLUMNS) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).chisquare(1, columns).astype(np.float32) + np.float32(0.01)


def error(qtype: str, vector: npt.NDArray[np.float32] | None, which: slice = slice(None)) -> float:
    """Relative error of ``which`` columns, weighted as ``quantize`` is told to by what ``weigh`` makes of a vector."""
    weights = np.random.default_rng(1).standard_normal((16, COLUMNS)).astype(np.float32) * np.float32(0.02)
    told = None if vector is None else weigh(vector[None]).rows[0]
    packed = kernels.quantize(qtype, weights, vector_for(qtype, told))
    off = kernels.dequantize(qtype, packed, COLUMNS)[:, which] - weights[:, which]
    return float(np.sqrt(np.square(off).mean() / np.square(weights[:, which]).mean()))


@pytest.mark.parametrize("qtype", WEIGHTED)
def test_no_type_erases_what_importance_does_not_speak_of(qtype: str) -> None:
    usual = error(qtype, seen())
    assert error(qtype, np.zeros(COLUMNS, np.float32)) < 1.2 * usual
    for length in (BLOCK, 32, 256):
        partly = seen()
        partly[:length] = 0
        assert error(qtype, partly, slice(0, length)) < 1.4 * usual, length
    partly[:256] = 1e-30  # beside values of 1, no sum of float32 sees it
    assert error(qtype, partly, slice(0, 256)) < 1.4 * usual


@pytest.mark.parametrize("qtype", WEIGHTED)
@pytest.mark.parametrize("exponent", [-126, -80, 40, 120])
def test_only_ratios_of_importance_matter(qtype: str, exponent: int) -> None:
    """A power of two in every value changes no byte, at any magnitude."""
    scaled = np.ldexp(seen(), exponent).astype(np.float32)
    assert error(qtype, scaled) == error(qtype, np.ldexp(scaled, -exponent).astype(np.float32))


def test_what_needs_no_mending_is_handed_back() -> None:
    rows = np.stack([seen(2), seen(3)])
    rows[:, ::2] = 0
    rows[0, 16:31] = 0  # fifteen of sixteen: the last one chooses the scale
    assert weigh(rows).rows is rows
    assert (weigh(rows).silent, weigh(rows).partly) == ((), ())


def test_what_is_silent_is_named() -> None:
    rows = np.stack([seen(2, 40), np.zeros(40, np.float32), seen(3, 40), seen(4, 40)])
    rows[2, 32:] = 0  # the last block is half a block
    found = weigh(rows)
    assert (found.silent, found.partly) == ((1,), (2,))
    np.testing.assert_array_equal(found.rows[[0, 1, 3]], rows[[0, 1, 3]])
    np.testing.assert_array_equal(found.rows[2, 32:], rows[2, :32].mean(dtype=np.float64).astype(np.float32))
    assert vector_for("q4_k", found.rows[1]) is None
    np.testing.assert_array_equal(vector_for("iq2_xs", found.rows[1]), 1)
    assert vector_for("q8_0", rows[0]) is None
    assert vector_for("q4_k", None) is None
