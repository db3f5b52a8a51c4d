"""Geometry of the plot of size against KLD: plain numbers in the coordinates of an SVG; the template draws them.

Sizes go from left to right, ln KLD from bottom to top, so that better is lower left. Labels are placed where they
cover neither one another, nor a mark, nor (if there is room) the front.
"""

from __future__ import annotations

import itertools
import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llm_quantize.measures.advisor import Advice
from llm_quantize.reports.findings import LEAST_KLD, Variant
from llm_quantize.reports.numbers import bytes_text, significant, tick_text

Box = tuple[float, float, float, float]
"""left, top, right, bottom"""

_MARK = 6.0
_FLOOR_IN_VIEW = 20  # times the noise floor: a floor farther below the best file would only take room
_DISTANCES = (11.0, 20.0, 32.0, 46.0, 64.0, 90.0)
# Right, left, above, below, then the diagonals: (horizontal, vertical, text-anchor).
_DIRECTIONS = (
    (1.0, 0.0, "start"), (0.75, -0.75, "start"), (-0.75, 0.75, "end"), (-1.0, 0.0, "end"),
    (0.0, -1.0, "middle"), (0.0, 1.0, "middle"), (0.75, 0.75, "start"), (-0.75, -0.75, "end"),
)  # fmt: skip


@dataclass(frozen=True)
class Placed:
    """Where a label's text goes: ``x`` and the baseline ``y``, its SVG anchor, and whether a line leads to it."""

    x: float
    y: float
    anchor: str
    box: Box
    leader: bool


@dataclass(frozen=True)
class Mark:
    """One variant. ``bar``: top and bottom of KLD ± its standard error; ``state``: "chosen", "front" or "beaten"."""

    x: float
    y: float
    bar: tuple[float, float]
    label: str
    state: str
    place: Placed
    title: str


@dataclass(frozen=True)
class Plot:
    """All that the template draws. ``bands``: (top, bottom, name) of the grades that are in view."""

    width: float
    height: float
    area: Box
    font: float
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    bands: tuple[tuple[float, float, str], ...]
    floor: float | None
    front: str
    marks: tuple[Mark, ...]


def text_width(text: str, font: float) -> float:
    """A generous estimate in pixels: wide characters one em, others 0.62."""
    return font * sum(1.0 if unicodedata.east_asian_width(c) in "WF" else 0.62 for c in text)


def overlap(a: Box, b: Box) -> float:
    """Area that two boxes share."""
    across = min(a[2], b[2]) - max(a[0], b[0])
    down = min(a[3], b[3]) - max(a[1], b[1])
    return across * down if across > 0 and down > 0 else 0.0


def place_labels(
    points: Sequence[tuple[float, float]],
    labels: Sequence[str],
    *,
    font: float,
    area: Box,
    obstacles: Sequence[Box] = (),
    line: Sequence[tuple[float, float]] = (),
) -> list[Placed]:
    """A place inside ``area`` for the label of each point.

    Each takes the cheapest of 48 places around its point: first none that covers a label, a mark or an obstacle,
    then few crossings of ``line``, then near. Where all are taken the least covered one is used.
    """
    marks = [(x - _MARK, y - _MARK, x + _MARK, y + _MARK) for x, y in points]
    crossing = [point for a, b in itertools.pairwise(line) for point in _along(a, b)]
    placed: list[Placed] = []
    for (x, y), label in zip(points, labels, strict=True):
        taken = [*marks, *obstacles, *(other.box for other in placed)]
        best: tuple[float, Placed] | None = None
        for rank, distance in enumerate(_DISTANCES):
            for across, down, anchor in _DIRECTIONS:
                choice = _choice(x, y, label, font, distance, across, down, anchor)
                cost = _cost(choice.box, area, taken, crossing) + 8.0 * rank
                if best is None or cost < best[0]:
                    best = (cost, choice)
        if best is not None:
            placed.append(best[1])
    return placed


def _choice(
    x: float, y: float, label: str, font: float, distance: float, across: float, down: float, anchor: str
) -> Placed:
    width = text_width(label, font)
    tall = 0.5 * font
    at = x + across * distance
    middle = y + down * (distance + (tall if across == 0 else 0.0))
    left = {"start": at, "end": at - width, "middle": at - width / 2}[anchor]
    box = (left, middle - 0.62 * font, left + width, middle + 0.62 * font)
    return Placed(at, middle + 0.36 * font, anchor, box, leader=distance > _DISTANCES[1])


def _cost(box: Box, area: Box, taken: Sequence[Box], crossing: Sequence[tuple[float, float]]) -> float:
    outside = max(0.0, area[0] - box[0], box[2] - area[2], area[1] - box[1], box[3] - area[3])
    covered = sum(overlap(box, other) for other in taken)
    crossed = sum(box[0] <= x <= box[2] and box[1] <= y <= box[3] for x, y in crossing)
    return 1e6 * outside + (1e4 + covered * 100 if covered else 0.0) + 3.0 * crossed


def _along(a: tuple[float, float], b: tuple[float, float]) -> list[tuple[float, float]]:
    """Points every four pixels of a segment."""
    steps = max(1, int(math.dist(a, b) / 4))
    return [(a[0] + (b[0] - a[0]) * i / steps, a[1] + (b[1] - a[1]) * i / steps) for i in range(steps + 1)]


def draw(
    variants: Sequence[Variant],
    advice: Advice,
    *,
    noise_floor: float | None,
    grades: Sequence[tuple[str, float]],
    width: float,
    height: float,
    font: float,
    margins: tuple[float, float, float, float],
) -> Plot:
    """The plot of ``variants``. ``grades``: names as shown, with their limits; ``margins``: left (or
    more, as its numbers need), top, right, bottom.

    Raises ValueError without a variant.
    """
    floor = max(noise_floor or 0.0, LEAST_KLD)
    losses = [max(variant.divergence.kld, floor) for variant in variants]
    near = noise_floor is not None and noise_floor >= LEAST_KLD and min(losses) < _FLOOR_IN_VIEW * noise_floor
    span = [*losses, floor] if near else losses
    top, bottom = margins[1], height - margins[3]
    to_y, y_ticks = _loss_axis(span, top, bottom)
    left = max(margins[0], 14 + max((text_width(text, 0.92 * font) for _, text in y_ticks), default=0.0))
    area = (left, top, width - margins[2], bottom)
    to_x, x_ticks = _size_axis([variant.size for variant in variants], area)
    points = [(to_x(variant.size), to_y(loss)) for variant, loss in zip(variants, losses, strict=True)]
    line = [points[index] for index in advice.front]
    bands = _bands(grades, to_y, area)
    placed = place_labels(
        points,
        [variant.label for variant in variants],
        font=font,
        area=(area[0] + 4, area[1] + 2, area[2] - 2, area[3] - 2),
        line=line,
    )
    marks = []
    for index, (variant, (x, y), place) in enumerate(zip(variants, points, placed, strict=True)):
        state = "chosen" if index == advice.take else "front" if index in advice.front else "beaten"
        sem = variant.divergence.kld_sem
        spread = sem if math.isfinite(sem) else 0.0
        kld = variant.divergence.kld
        bar = (to_y(max(kld + spread, floor)), to_y(max(kld - spread, floor)))
        title = f"{variant.label}: {bytes_text(variant.size)}, KLD {significant(kld)}"
        marks.append(Mark(x, y, bar, variant.label, state, place, title))
    path = " ".join(f"{'M' if i == 0 else 'L'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(line))
    return Plot(
        width, height, area, font, x_ticks, y_ticks, bands,
        to_y(floor) if near else None, path, tuple(marks),
    )  # fmt: skip


Axis = tuple[Callable[[float], float], tuple[tuple[float, str], ...]]


def _size_axis(sizes: Sequence[int], area: Box) -> Axis:
    """Linear, from a little under the smallest to a little above the largest; about five round ticks."""
    low, high = min(sizes), max(sizes)
    room = 0.09 * (high - low) or 0.2 * high
    first, last = max(0.0, low - room), high + room
    scale = (area[2] - area[0]) / (last - first)

    def place(size: float) -> float:
        return area[0] + (size - first) * scale

    wanted = 7 if area[2] - area[0] > 500 else 4
    step = _round_step((last - first) / wanted)
    ticks = [step * i for i in range(math.ceil(first / step), math.floor(last / step) + 1)]
    return place, tuple((place(tick), tick_text(tick)) for tick in ticks)


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)


def _loss_axis(losses: Sequence[float], top: float, bottom: float) -> Axis:
    """Logarithmic, a little beyond the data and never less than a decade; ticks at 1, of few decades at 2 and 5 too."""
    low, high = math.log10(min(losses)) - 0.22, math.log10(max(losses)) + 0.22
    spare = max(0.0, 1.0 - (high - low)) / 2
    low, high = low - spare, high + spare
    scale = (bottom - top) / (high - low)

    def place(loss: float) -> float:
        return bottom - (math.log10(loss) - low) * scale

    factors = (1,) if high - low > 2.5 else (1, 2, 5)
    ticks = [
        factor * 10.0**power
        for power in range(math.floor(low), math.ceil(high) + 1)
        for factor in factors
        if low <= math.log10(factor) + power <= high
    ]
    return place, tuple((place(tick), significant(tick, 1)) for tick in ticks)


def _bands(
    grades: Sequence[tuple[str, float]], to_y: Callable[[float], float], area: Box
) -> tuple[tuple[float, float, str], ...]:
    bands, below = [], area[3]
    for name, limit in grades:
        above = area[1] if math.isinf(limit) else min(area[3], max(area[1], to_y(limit)))
        if below - above > 1:
            bands.append((above, below, name if below - above >= 16 else ""))
        below = min(below, above)
    return tuple(bands)
