"""Which variants nothing beats in both size and loss, and where along them more bytes stop paying.

The bend ("knee") is found as Satopää, Albrecht, Irwin and Raghavan define it ("Finding a Kneedle in a Haystack",
2011): scale both axes of the front to [0, 1], draw the chord from its first point to its last, take the point
farthest below it. The loss axis is the root of the KLD, which behaves as a distance does (the change in the
probabilities is proportional to it); on the logarithmic axis of the plot a front is nearly straight, each bit per
weight dividing by the same factor, and has no bend to speak of. A KLD under the noise floor counts as the floor, so
that what is not a difference earns nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llm_quantize.reports.findings import Variant

LEAST_KLD = 1e-7
"""Floor of the logarithm where no noise floor is known: float32 arithmetic shows no less on real text."""

ACCEPTABLE = 0.05
"""Mean KLD from which on a loss is noticeable: the end of the grade "good" (evaluation/grades.py)."""


@dataclass(frozen=True)
class Advice:
    """Indices into the variants. ``front``: by size, from the smallest on. ``knee``: the one to take, None without
    variants; ``smaller`` and ``larger``: its neighbours on the front. ``reason``: "bend"; "middle" where the front has
    no bend; "least" where the bend is worse than ACCEPTABLE and ``knee`` the smallest file that is not; "best" where
    all are worse, and ``knee`` the one with the least loss."""

    front: tuple[int, ...]
    knee: int | None
    smaller: int | None
    larger: int | None
    reason: str


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (size, loss) that no other point beats or equals in both, from the smallest size on.

    Of equal points the first stays. O(n log n); the dense twin is in the tests.
    """
    order = sorted(range(len(points)), key=lambda index: (*points[index], index))
    front: list[int] = []
    least = math.inf
    for index in order:
        if points[index][1] < least:
            least = points[index][1]
            front.append(index)
    return front


def knee_of(points: Sequence[tuple[float, float]]) -> tuple[int, bool]:
    """Position in a front (sizes rising, losses falling) of its bend, and whether it has one.

    With one or two points, or where no inner point lies 3 % of the square or more below the chord, there is no bend:
    then the middle point is named, the smaller one of two.
    """
    if len(points) < 3:
        return 0, False
    (left, high), (right, low) = points[0], points[-1]
    drops = [(right - x) / (right - left) - (y - low) / (high - low) for x, y in points]
    best = max(range(len(points)), key=lambda index: drops[index])
    return (best, True) if drops[best] >= 0.03 else ((len(points) - 1) // 2, False)


def advise(variants: Sequence[Variant], noise_floor: float | None) -> Advice:
    """The front of ``variants`` by size and mean KLD, and the variant at its bend."""
    floor = max(noise_floor or 0.0, LEAST_KLD)
    losses = [math.sqrt(max(variant.divergence.kld, floor)) for variant in variants]
    points = [(float(variant.size), loss) for variant, loss in zip(variants, losses, strict=True)]
    front = pareto_front(points)
    if not front:
        return Advice((), None, None, None, "best")
    place, bent = knee_of([points[index] for index in front])
    reason = "bend" if bent else "middle"
    if variants[front[place]].divergence.kld >= ACCEPTABLE:
        # Losses fall along the front: the first acceptable one is the smallest.
        better = [later for later, index in enumerate(front) if variants[index].divergence.kld < ACCEPTABLE]
        place, reason = (better[0], "least") if better else (len(front) - 1, "best")
    smaller = front[place - 1] if place > 0 else None
    larger = front[place + 1] if place + 1 < len(front) else None
    return Advice(tuple(front), front[place], smaller, larger, reason)
