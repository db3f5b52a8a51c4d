"""Amounts as people read them: three digits of what is small."""

from __future__ import annotations

import math

import pytest

from llm_quantize.measures.amounts import decimals


@pytest.mark.parametrize(
    ("value", "places", "text"),
    [
        (0.123456, 5, "0.12346"),
        (0.00123456, 5, "0.00123"),
        (0.000999, 5, "0.000999"),
        (0.000123456, 5, "0.000123"),
        (0.00000123456, 5, "0.00000123"),
        (4.56e-8, 5, "4.56e-08"),
        (-0.000123456, 5, "-0.000123"),
        (0.0, 5, "0"),
        (0.05, 3, "0.0500"),
        (12.3456, 3, "12.346"),
        (math.nan, 5, "nan"),
        (math.inf, 5, "inf"),
    ],
)
def test_what_is_small_has_three_digits(value: float, places: int, text: str) -> None:
    assert decimals(value, places) == text
