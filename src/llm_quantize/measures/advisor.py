"""Which file of a model to take: the one rule of ``compare``, of its page, and of ``recommend``.

Of the files that fit the machine, take the smallest that is indistinguishable from the source; where none is, the one
that loses least. Files whose loss was measured on this model go before all others: an estimate decides only where no
measured file fits. (On a GPU, a good file that lies there whole goes before better ones that would be split.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from llm_quantize.measures.grades import GRADES

_LIMITS = dict(GRADES)
INDISTINGUISHABLE, GOOD, USABLE = _LIMITS["indistinguishable"], _LIMITS["good"], _LIMITS["noticeable loss"]
PRIORITIES = ("quality", "speed", "size")


@dataclass(frozen=True)
class Offer:
    """A file as the rule sees it: ``size`` in bytes; ``kld``, the mean KL divergence (infinite: not known), whether it
    was ``measured`` on this model or is only ``estimated`` for it (neither: published of another, or exact); whether it
    ``fits``, and is then ``split`` between GPU and RAM; ``cost`` of a token in any unit, ``timed`` or not."""

    size: int
    kld: float
    measured: bool = True
    estimated: bool = False
    fits: bool = True
    split: bool = False
    cost: float = math.inf
    timed: bool = False

    @property
    def judged(self) -> float:
        """The divergence that a limit is held against: an estimate counts twice."""
        return self.kld * (2 if self.estimated else 1)


@dataclass(frozen=True)
class Advice:
    """Places in the list of offers. ``front``: those of the best evidence that no other beats in size and loss, by
    size. ``take`` None: nothing that fits is known. ``smaller`` and ``larger``: its neighbours on the front,
    whether they fit or not. ``reason``: "clean" (the smallest that is indistinguishable), "least" (loses least),
    "whole" (loses least of what lies whole on the GPU), "fast", "small"; "" where nothing is taken. ``untried``: what
    the rule would take if estimates counted as much as measurements, None where that changes nothing."""

    front: tuple[int, ...]
    take: int | None
    smaller: int | None
    larger: int | None
    reason: str
    untried: int | None = None


def advise(offers: Sequence[Offer], priority: str = "quality") -> Advice:
    """What to take of ``offers``, by the rule above; ``priority`` "speed": the fastest that is still good; "size": the
    smallest without a heavy loss."""
    believed = _believed(offers)
    front = tuple(_unbeaten(offers, believed))
    fitting = _unbeaten(offers, [index for index in believed if offers[index].fits])
    take, reason = _take(offers, fitting, priority)
    if take is None:
        return Advice(front, None, None, None, "")
    smaller = [index for index in front if offers[index].size < offers[take].size]
    larger = [index for index in front if offers[index].kld < offers[take].kld]
    return Advice(
        front=front,
        take=take,
        smaller=smaller[-1] if smaller else None,
        larger=larger[0] if larger else None,
        reason=reason,
        untried=_untried(offers, take, priority),
    )


def _believed(offers: Sequence[Offer]) -> list[int]:
    """Those of the best evidence: what was measured, if any of that fits; else all whose loss is known."""
    known = [index for index, offer in enumerate(offers) if offer.kld < math.inf]  # NaN is not
    measured = [index for index in known if offers[index].measured]
    return measured if any(offers[index].fits for index in measured) else known


def _unbeaten(offers: Sequence[Offer], places: Sequence[int]) -> list[int]:
    """Those of ``places`` that none of them beats, by size."""
    beaten = beaten_by([offers[place] for place in places])
    found = [place for place, by in zip(places, beaten, strict=True) if by is None]
    return sorted(found, key=lambda index: (offers[index].size, offers[index].kld))


def _untried(offers: Sequence[Offer], take: int, priority: str) -> int | None:
    if not offers[take].measured:
        return None
    # Against an estimate a measured figure stands for itself; it is no reason to measure what is exact anyway.
    equal = [replace(one, measured=False) for one in offers if one.measured or one.estimated]
    places = [index for index, one in enumerate(offers) if one.measured or one.estimated]
    found = advise(equal, priority).take
    return None if found is None or offers[places[found]].measured else places[found]


def _take(offers: Sequence[Offer], fitting: Sequence[int], priority: str) -> tuple[int | None, str]:
    """The choice of ``fitting`` places, and why."""
    if not fitting:
        return None, ""
    best = min(fitting, key=lambda index: (offers[index].kld, offers[index].size))
    if priority == "size":
        usable = [index for index in fitting if offers[index].judged < USABLE]
        return (min(usable, key=lambda index: offers[index].size), "small") if usable else (best, "least")
    if priority == "speed":
        good = [index for index in fitting if offers[index].judged < GOOD]
        timed = [index for index in good if offers[index].timed] or good
        return (min(timed, key=lambda index: offers[index].cost), "fast") if good else (best, "least")
    whole = [index for index in fitting if not offers[index].split]
    pool = whole if any(offers[index].judged < GOOD for index in whole) else list(fitting)
    clean = [index for index in pool if offers[index].judged < INDISTINGUISHABLE]
    if clean:
        return min(clean, key=lambda index: offers[index].size), "clean"
    least = min(pool, key=lambda index: (offers[index].kld, offers[index].size))
    return least, "least" if least == best else "whole"


def beaten_by(offers: Sequence[Offer]) -> list[int | None]:
    """For each offer the one that makes it pointless, if there is one: no larger (but for a thousandth) and better, or
    smaller and no worse. Nothing that was not measured beats what was."""

    def beats(other: Offer, one: Offer) -> bool:
        if other.kld == math.inf or (one.measured and not other.measured):
            return False
        return (other.size <= one.size * 1.001 and other.kld < one.kld) or (
            other.size < one.size and other.kld <= one.kld
        )

    found: list[int | None] = []
    for one in offers:
        better = [place for place, other in enumerate(offers) if one.kld < math.inf and beats(other, one)]
        found.append(min(better, key=lambda place: (offers[place].kld, offers[place].size), default=None))
    return found
