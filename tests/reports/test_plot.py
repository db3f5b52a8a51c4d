"""Labels that do not collide, axes that hold every point, bands where the grades are."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_quantize.reports import heatmap, plot
from llm_quantize.reports.findings import Variant
from tests.reports.examples import GRADES, comparison, usual, variant

SHAPES: list[dict[str, Any]] = [
    {"width": 1040.0, "height": 470.0, "font": 13.0, "margins": (52.0, 14.0, 124.0, 52.0)},
    {"width": 358.0, "height": 400.0, "font": 12.0, "margins": (34.0, 10.0, 8.0, 44.0)},
]
AREA = (50.0, 10.0, 850.0, 420.0)


def drawn(variants: tuple[Variant, ...], shape: dict[str, Any], floor: float | None = 2e-6) -> plot.Plot:
    return plot.draw(variants, comparison(*variants).advice(), noise_floor=floor, grades=GRADES, **shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_labels_and_marks_of_the_usual_levels_stand_apart(shape: dict[str, Any]) -> None:
    found = drawn(usual().variants, shape)
    boxes = [mark.place.box for mark in found.marks]
    marks = [(mark.x - 5, mark.y - 5, mark.x + 5, mark.y + 5) for mark in found.marks]
    assert not any(plot.overlap(a, b) for a, b in itertools.combinations(boxes, 2))
    assert not any(plot.overlap(box, mark) for box in boxes for mark in marks)
    assert all(found.area[0] <= box[0] and box[2] <= found.area[2] for box in boxes)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(60, 840), st.floats(20, 410)), min_size=1, max_size=12))
def test_a_dozen_labels_never_cover_one_another(points: list[tuple[float, float]]) -> None:
    labels = [f"IQ{index}_XXS" for index in range(len(points))]
    boxes = [place.box for place in plot.place_labels(points, labels, font=13, area=AREA)]
    assert not any(plot.overlap(a, b) for a, b in itertools.combinations(boxes, 2))


def test_many_levels_at_one_place_are_led_to_by_lines() -> None:
    places = plot.place_labels([(400.0, 200.0)] * 9, [f"Q{index}_K_M" for index in range(9)], font=13, area=AREA)
    boxes = [place.box for place in places]
    assert not any(plot.overlap(a, b) for a, b in itertools.combinations(boxes, 2))
    assert any(place.leader for place in places)
    assert not places[0].leader


def test_points_stand_where_the_axes_say() -> None:
    found = drawn((variant("A", 1_000_000, 0.1), variant("B", 3_000_000, 0.001)), SHAPES[0])
    ticks = {text: y for y, text in found.y_ticks}
    one, other = found.marks
    assert one.y == pytest.approx(ticks["0.1"])
    assert other.y == pytest.approx(ticks["0.001"])
    assert one.y < other.y
    assert {text: x for x, text in found.x_ticks}["2 MB"] == pytest.approx((one.x + other.x) / 2)
    assert found.front == f"M{one.x:.1f} {one.y:.1f} L{other.x:.1f} {other.y:.1f}"


def test_bars_are_standard_errors() -> None:
    found = drawn((variant("A", 1_000_000, 0.1, sem=0.05), variant("B", 2_000_000, 0.01)), SHAPES[0])
    top, bottom = found.marks[0].bar
    scale = abs(found.marks[0].y - found.marks[1].y)  # one decade
    assert found.marks[0].y - top == pytest.approx(scale * math.log10(1.5))
    assert bottom - found.marks[0].y == pytest.approx(scale * math.log10(2))


def test_the_noise_floor_is_drawn_only_where_it_is_near() -> None:
    far = drawn((variant("A", 1_000_000, 0.1),), SHAPES[0], 1e-6)
    near = drawn((variant("A", 1_000_000, 0.1), variant("B", 2_000_000, 4e-6)), SHAPES[0], 1e-6)
    assert far.floor is None
    assert near.floor is not None
    assert near.floor > near.marks[1].y


def test_grades_band_the_plot_without_gaps() -> None:
    found = drawn(usual().variants, SHAPES[0])
    names = [name for _, _, name in found.bands if name]
    assert names == ["indistinguishable", "excellent", "good", "noticeable loss", "heavy loss"]
    edges = [(below, above) for above, below, _ in found.bands]
    assert edges[0][0] == found.area[3]
    assert edges[-1][1] == found.area[1]
    assert all(left[1] == pytest.approx(right[0]) for left, right in itertools.pairwise(edges))


@pytest.mark.parametrize("variants", [(variant("Q4_0", 5, 0.0),), (variant("A", 7, 0.1), variant("B", 7, 0.1))])
def test_plots_of_one_place(variants: tuple[Variant, ...]) -> None:
    found = drawn(variants, SHAPES[1], None)
    assert all(math.isfinite(mark.x) and math.isfinite(mark.y) for mark in found.marks)


def test_heat_map_has_a_cell_for_each_tensor_of_a_layer() -> None:
    one = variant("Q4_K_M", 100, 0.02, layers=3)
    scale = heatmap.scale_of((one,))
    assert scale is not None
    found = heatmap.draw(one, scale)
    assert found is not None
    assert len(found.cells) == 3 * 7
    assert [role for _, role in found.rows][:4] == ["attn_q", "attn_k", "attn_v", "attn_output"]
    assert found.outside[0][0] == "token_embd"
    assert {heatmap.step_of(scale[0], scale), heatmap.step_of(scale[1], scale)} == {0, heatmap.STEPS - 1}
    assert heatmap.step_of(math.sqrt(scale[0] * scale[1]), scale) == heatmap.STEPS // 2


def test_no_heat_map_without_errors() -> None:
    assert heatmap.scale_of(()) is None
    assert heatmap.step_of(0.0, (0.1, 0.2)) == 0
    assert heatmap.step_of(math.nan, (0.1, 0.2)) == heatmap.STEPS - 1
    assert heatmap.step_of(0.1, (0.1, 0.1)) == heatmap.STEPS // 2


def test_a_label_does_not_cover_its_neighbours_mark() -> None:
    points = [(100.0, 100.0), (125.0, 100.0), (100.0, 120.0)]
    places = plot.place_labels(points, ["Q4_K_M", "Q4_0", "Q4_1"], font=13, area=AREA)
    marks = [(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    assert not any(plot.overlap(place.box, mark) for place in places for mark in marks)
