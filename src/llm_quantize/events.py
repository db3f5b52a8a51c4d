"""What the library tells while it works: small typed events, given to ``on_event``.

The command line draws them (cli/progress.py) or prints them as JSON lines (``to_dict``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar


@dataclass(frozen=True)
class Event:
    """Something told. ``kind``: its name in JSON."""

    kind: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; what does not apply is left out."""
        found = {item.name: getattr(self, item.name) for item in fields(self)}
        return {"event": self.kind, **{name: value for name, value in found.items() if value is not None}}


@dataclass(frozen=True)
class Note(Event):
    """Something good to know; ``details``: the whole list behind it."""

    kind = "note"
    text: str
    details: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Caution(Event):
    """Something that the user should know; ``details``: the whole list behind it."""

    kind = "warning"
    text: str
    details: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Step(Event):
    """How far something is. ``whole``: the share, 0 to 1, of all that the run has to do, counted in the time that it
    takes; None where nobody knows it (``Part`` puts it in)."""

    whole: float | None = field(default=None, kw_only=True)

    @property
    def share(self) -> float:
        """How much of what is counted here is done, 0 to 1."""
        done, total = getattr(self, "done", 0), getattr(self, "total", 1)
        return min(1.0, done / total) if total > 0 else 1.0


@dataclass(frozen=True)
class Stage(Step):
    """What begins now."""

    kind = "stage"
    text: str


@dataclass(frozen=True)
class Download(Step):
    """Bytes of a file from the hub."""

    kind = "download"
    file: str
    done: int
    total: int


@dataclass(frozen=True)
class Resuming(Event):
    """An unfinished run goes on: ``units`` of it are read back, ``total`` bytes."""

    kind = "resuming"
    units: int
    total: int


@dataclass(frozen=True)
class Check(Step):
    """How far the reading back of finished work is."""

    kind = "check"
    what: str
    done: int
    total: int


@dataclass(frozen=True)
class Start(Event):
    """Work begins: ``total`` as in Progress, the memory that it needs in bytes, the units that an earlier run did."""

    kind = "start"
    total: int
    threads: int
    memory_needed: int
    resumed_units: int


@dataclass(frozen=True)
class Progress(Step):
    """How far the work is: weights times artifacts, or what ``unit`` says."""

    kind = "progress"
    done: int
    total: int
    unit: str | None = None


@dataclass(frozen=True)
class Measure(Step):
    """How far a measurement is, in windows, through files or blocks."""

    kind = "measure"
    done: int
    total: int


@dataclass(frozen=True)
class Finished(Event):
    """An artifact is in its place. ``status``: "written" or "already complete"."""

    kind = "artifact"
    level: str
    path: str
    size: int
    status: str


@dataclass(frozen=True)
class Generated(Event):
    """A text is written: ``tokens`` of it in ``seconds``, after a prompt of ``prompt_tokens`` that took
    ``prompt_seconds`` (None: it is in ``seconds``), with ``threads``."""

    kind = "generated"
    tokens: int
    seconds: float
    threads: int
    prompt_tokens: int | None = None
    prompt_seconds: float | None = None

    @property
    def rate(self) -> float:
        """Tokens in a second."""
        return self.tokens / max(self.seconds, 1e-9)


EventSink = Callable[[Event], None]


class Part:
    """A sink for a part of a run: what it hears is told to ``parent``, with the share of the whole that it stands for.
    The part goes from ``first`` to ``last``, of 1; parts can have parts."""

    def __init__(self, parent: EventSink, first: float, last: float) -> None:
        self._parent, self._first, self._last = parent, first, last

    def __call__(self, event: Event) -> None:
        """Tell it."""
        if isinstance(event, Step):
            share = event.share if event.whole is None else event.whole
            event = replace(event, whole=self._first + (self._last - self._first) * share)
        self._parent(event)


def parts(parent: EventSink, costs: Sequence[float]) -> list[Part]:
    """A sink for each part of a run, in their order; ``costs``: how long each takes, in any unit."""
    total, before = sum(costs) or 1.0, 0.0
    found = []
    for cost in costs:
        found.append(Part(parent, before / total, (before + cost) / total))
        before += cost
    return found


def ignore(_event: Event) -> None:
    """The sink that hears nothing."""
