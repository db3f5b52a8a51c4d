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
