"""The front and its bend, against slow definitions and by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_quantize.measures.grades import GRADES
from llm_quantize.reports.pareto import ACCEPTABLE, advise, knee_of, pareto_front
from tests.reports.examples import usual, variant

POINTS = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12)), max_size=14)


def beaten(points: list[tuple[int, int]], index: int) -> bool:
    """Whether another point is no worse in both and better in one, or equal and earlier."""
    size, loss = points[index]
    return any(
        other[0] <= size and other[1] <= loss and (other != points[index] or place < index)
        for place, other in enumerate(points)
        if place != index
    )


@given(POINTS)
def test_front_is_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    wanted = {index for index in range(len(points)) if not beaten(points, index)}
    found = pareto_front([(float(x), float(y)) for x, y in points])
    assert set(found) == wanted
    assert [points[index][0] for index in found] == sorted(points[index][0] for index in found)


def test_knee_is_farthest_below_the_chord() -> None:
    assert knee_of([(0, 10), (1, 1.5), (2, 1), (10, 0)]) == (1, True)
    assert knee_of([(0, 3), (1, 2), (2, 1), (3, 0)]) == (1, False)  # a straight front: its middle, the smaller one
    assert knee_of([(0, 1), (1, 0)]) == (0, False)
    assert knee_of([(0, 1)]) == (0, False)


def test_usual_levels_bend_at_four_bits() -> None:
    result = usual()
    advice = advise(result.variants, result.reference.noise_floor)
    labels = [result.variants[index].label for index in advice.front]
    assert labels == ["Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0"]  # Q4_0 is larger and worse than Q4_K_M
    assert advice.knee is not None
    assert result.variants[advice.knee].label == "Q4_K_M"
    assert advice.smaller is not None
    assert advice.larger is not None
    assert (result.variants[advice.smaller].label, result.variants[advice.larger].label) == ("Q3_K_M", "Q5_K_M")


def test_what_is_under_the_noise_floor_earns_nothing() -> None:
    variants = (variant("F16", 900, 2e-7), variant("Q8_0", 500, 1.5e-6), variant("Q4_K_M", 300, 0.02))
    assert len(advise(variants, 1e-7).front) == 3
    advice = advise(variants, 2e-6)
    assert [variants[index].label for index in advice.front] == ["Q4_K_M", "Q8_0"]


@pytest.mark.parametrize(
    ("klds", "chosen", "reason"),
    [
        ((0.0002, 0.2), 0, "least"),  # two points have no bend, and the smaller one would be a bad choice
        ((0.0002, 0.015), 1, "middle"),
        ((0.001, 0.06, 0.07, 3.0), 0, "least"),  # the bend is at 0.06 or 0.07
        ((0.2, 0.4, 1.5), 0, "best"),
        ((0.0002, 0.001, 0.02, 0.4), 2, "bend"),
    ],
)
def test_what_loses_noticeably_is_not_advised_where_anything_else_is_there(
    klds: tuple[float, ...], chosen: int, reason: str
) -> None:
    variants = tuple(variant(f"level {index}", 800 - 100 * index, kld) for index, kld in enumerate(klds))
    advice = advise(variants, None)
    assert (advice.knee, advice.reason) == (chosen, reason)
    assert GRADES[2] == ("good", ACCEPTABLE)


def test_no_variant() -> None:
    assert advise((), None).knee is None


def test_exact_and_broken_variants_have_a_place() -> None:
    advice = advise((variant("F32", 100, 0.0), variant("Q2_K", 10, 9.0)), None)
    assert advice.front == (1, 0)
