"""Verdicts: what is compared, what is counted, and that whatever is not exact is named."""

from __future__ import annotations

import numpy as np

from llm_quantize.artifacts.verdict import EXACT, REQUANTIZED, ROUNDED, Difference, conversion, of_units


def test_zeros_of_both_signs_and_nan_are_equal() -> None:
    found = Difference()
    found.add(np.float32([[0.0, np.nan, 1.0]]), np.float32([[-0.0, np.nan, 1.0]]))
    assert (found.unequal, found.verdict()) == (0, {"verdict": EXACT})


def test_what_is_no_number_on_one_side_is_not_exact() -> None:
    found = Difference()
    found.add(np.float32([[0.0, 3.0, 4.0]]), np.float32([[np.inf, 3.0, 4.0]]))
    assert found.verdict() == {"verdict": ROUNDED, "relative_error": 0.0}


def test_sums_of_finite_rows_are_those_with_nothing_left_out() -> None:
    """To the last bit: records of older versions have them."""
    generator = np.random.default_rng(0)
    for shape in ((128, 4096), (3, 7), (47, 1100), (1, 1)):
        wanted = generator.standard_normal(shape, np.float32)
        rows = wanted * (1 + generator.standard_normal(shape, np.float32) / 1000)
        for values in (rows, rows[::-1], wanted):
            off, found = np.where(np.isfinite(values), values - wanted, 0), Difference()
            found.add(values, wanted)
            assert found.unequal == np.count_nonzero(values != wanted)
            assert found.error == float(np.sum(np.square(off, dtype=np.float64)))
            assert found.norm == float(np.sum(np.square(wanted, dtype=np.float64)))


def test_units_add_up() -> None:
    halves = [Difference(1, 9.0, 50.0), Difference(0, 0.0, 50.0)]
    assert of_units(half.facts() for half in halves) == {"verdict": ROUNDED, "relative_error": 0.3}


def test_whatever_is_not_exact_is_named() -> None:
    """Also where its error is 0, or not known: whoever asks for nothing but exact tensors looks for the worst."""
    exact = ("a", 2, {"verdict": EXACT})
    assert "worst" not in conversion([exact])
    for facts in ({"verdict": ROUNDED, "relative_error": 0.0}, {"verdict": REQUANTIZED}):
        told = conversion([exact, ("b", 3, facts)])
        assert told["verdict"] == facts["verdict"]
        assert told["worst"] == {"tensor": "b", "relative_error": 0.0}
        assert told["weights"] == {EXACT: 2, facts["verdict"]: 3}
    two = [
        ("b", 3, {"verdict": ROUNDED, "relative_error": 0.1}),
        ("c", 1, {"verdict": REQUANTIZED, "relative_error": 0.2}),
    ]
    assert conversion(two)["worst"]["tensor"] == "c"
