"""The one place where events are drawn: a bar on a terminal, plain lines elsewhere, JSON lines with --json."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import click

from llm_quantize import events
from llm_quantize.cli.common import Mode, line, warn
from llm_quantize.reports.wording import said

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

EVERY = 5.0
"""Seconds between two plain lines of one kind of progress."""

SAMPLED = 0.5
"""Seconds between two notes of how far a run is."""

LEAST_MOVED, LEAST_SECONDS = 0.02, 2.0
"""The share of a run, and the seconds, from which on something can be said of the time that is left."""


@contextmanager
def told(shown: Mode, description: str, *, live: bool = True) -> Iterator[events.EventSink]:
    """A sink for the library's events. ``description``: what is called progress where nothing else names it.

    ``live`` False: plain lines on a terminal too, for a command that writes text there meanwhile. With --quiet nothing
    is told: the result says what is not as asked. Progress that cannot be written stops no job.
    """
    if shown.quiet:
        yield events.ignore
    elif shown.json:
        yield _sheltered(_tell_json, in_full=False)
    elif shown.live and live:
        with _bar() as bar:
            yield _sheltered(_Drawn(description, bar), in_full=shown.verbose > 0)
    else:
        yield _sheltered(_Plain(description, shown), in_full=shown.verbose > 0)


def _sheltered(sink: events.EventSink, *, in_full: bool) -> events.EventSink:
    """``sink`` without its OSErrors; ``in_full``: the list behind a warning or a note comes after it, a note each."""

    def safe(event: events.Event) -> None:
        with suppress(OSError):
            sink(event)
            if in_full and isinstance(event, events.Caution | events.Note):
                for detail in event.details or ():
                    sink(events.Note(detail))

    return safe


def _tell_json(event: events.Event) -> None:
    click.echo(json.dumps(event.to_dict()), err=True)


class _Whole:
    """How far the whole run is, 0 to 1, and how long it will still take. It never goes back.

    The rate is that of the later half of the run: what an earlier run did already is not time, and a part that takes
    longer than was thought shows soon.
    """

    def __init__(self) -> None:
        self.share = 0.0
        self._seen: list[tuple[float, float]] = []

    def hear(self, event: events.Event) -> bool:
        """Whether the event says how far the whole is; takes note of it."""
        if not isinstance(event, events.Step) or event.whole is None:
            return False
        self.share = max(self.share, min(1.0, event.whole))
        now = time.monotonic()
        if not self._seen or now - self._seen[-1][0] >= SAMPLED:
            self._seen.append((now, self.share))
        return True

    @property
    def left(self) -> float | None:
        """Seconds; None where nothing can be said yet."""
        if not self._seen:
            return None
        now, began = time.monotonic(), self._seen[0][0]
        then, share = max((at, had) for at, had in self._seen if at <= began + (now - began) / 2)
        moved = self.share - share
        return (1 - self.share) * (now - then) / moved if moved >= LEAST_MOVED and now - then >= LEAST_SECONDS else None

    def words(self) -> str:
        """The share, and the time that is left; in a few words."""
        left = self.left
        return said(f"{self.share:.0%} of all{'' if left is None else f', {seconds_text(left)} left'}")


def seconds_text(seconds: float) -> str:
    """45 s, 12 min, 3 h 20 min."""
    whole = round(seconds)
    if whole < 90:
        return f"{whole} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


class _Work:
    """What is going on: its name, when it began, and at which rate it goes; and how far the whole run is."""

    def __init__(self, description: str) -> None:
        self.description, self.stage = description, ""
        self.began = time.monotonic()
        self.whole = _Whole()

    def name(self, event: events.Progress | events.Measure) -> str:
        """A quantization that calibrates first counts tokens meanwhile; a measurement is called by its stage."""
        if isinstance(event, events.Measure):
            return self.stage or said(self.description)
        return said("calibrate" if self.description == "quantize" and event.unit == "tokens" else self.description)

    def rate(self, event: events.Progress) -> str:
        each = event.done / max(time.monotonic() - self.began, 1e-9)
        return said(f"{each:.0f} tokens/s") if event.unit == "tokens" else f"{each / 1e6:.0f} Mw/s"


class _Plain:
    """Lines on stderr."""

    def __init__(self, description: str, shown: Mode) -> None:
        self.work, self.shown = _Work(description), shown
        self._last: dict[type, tuple[float, int]] = {}

    def __call__(self, event: events.Event) -> None:
        """Tell one event."""
        if isinstance(event, events.Caution):
            warn(self.shown, event.text)
        else:
            self._tell(event)

    def _tell(self, event: events.Event) -> None:
        self.work.whole.hear(event)
        match event:
            case events.Note(text):
                click.echo(line(said(f"note: {text}")), err=True)
            case events.Stage(text):
                self.work.stage = line(said(text))
                self._last.pop(events.Measure, None)
                click.echo(self.work.stage, err=True)
            case events.Resuming(units, _):
                click.echo(said(f"resuming: reading back {units} finished units"), err=True)
            case events.Start():
                self.work.began = time.monotonic()
                self._last[events.Progress] = (self.work.began, -1)
                if event.resumed_units:
                    click.echo(said(f"resuming: {event.resumed_units} finished units kept"), err=True)
            case events.Check(what, done, total):
                self._step(event, done, total, said(f"checking {what}"), first=True, facts=self._whole(event))
            case events.Measure(done, total):
                self._step(event, done, total, self.work.name(event), first=True, facts=self._whole(event))
            case events.Progress(done, total):
                self._step(event, done, total, self.work.name(event), facts=lambda: self._facts(event))

    def _step(
        self,
        event: events.Event,
        done: int,
        total: int,
        name: str,
        *,
        first: bool = False,
        facts: Callable[[], str] | None = None,
    ) -> None:
        """A line at the end, at the start where asked for, and now and then between."""
        now, percent = time.monotonic(), int(100 * done / max(1, total))
        last, told_percent = self._last.get(type(event), (self.work.began, -1))
        begins = first and (done == 0 or type(event) not in self._last)
        if percent == 100 or begins or (now - last >= EVERY and percent > told_percent):
            self._last[type(event)] = (now, percent)
            click.echo(f"{name}: {percent}%{f' ({facts()})' if facts else ''}", err=True)

    def _whole(self, event: events.Step) -> Callable[[], str] | None:
        return None if event.whole is None else self.work.whole.words

    def _facts(self, event: events.Progress) -> str:
        if event.whole is not None:
            return f"{self.work.rate(event)}, {self.work.whole.words()}, {_memory()}"
        percent = max(1, int(100 * event.done / max(1, event.total)))
        left = (time.monotonic() - self.work.began) * (100 - percent) / percent
        return said(f"{self.work.rate(event)}, {left:.0f} s left, {_memory()}")


class _Drawn:
    """One bar, and lines above it: of the whole run, where that is told, else of what is going on."""

    def __init__(self, description: str, bar: Bar) -> None:
        self.work, self.bar = _Work(description), bar
        self.task: TaskID = bar.add_task(said(description), total=None, rate="", memory="", left="")
        self._whole = False
        self._current, self._began = "", time.monotonic()

    def __call__(self, event: events.Event) -> None:
        """Draw one event."""
        self._whole = self.work.whole.hear(event) or self._whole
        match event:
            case events.Caution(text):
                self.bar.console.print(line(said(f"warning: {text}")), style="yellow", markup=False, highlight=False)
            case events.Note(text):
                self.bar.console.print(line(said(f"note: {text}")), markup=False, highlight=False)
            case events.Resuming(units, _):
                self.bar.console.print(said(f"resuming: reading back {units} finished units"), highlight=False)
            case events.Start():
                self.work.began = time.monotonic()
                if event.resumed_units:
                    self.bar.console.print(
                        said(f"resuming: {event.resumed_units} finished units kept"), highlight=False
                    )
            case events.Stage(text):
                self.work.stage = line(said(text))
                self._update(self.work.stage, 0, None)
            case events.Check(what, done, total):
                self._update(line(said(f"checking {what}")), done, total)
            case events.Download(file, done, total):
                self._update(line(said(f"download {file}")), done, total)
            case events.Measure(done, total):
                self._update(self.work.name(event), done, total)
            case events.Progress(done, total):
                self._update(self.work.name(event), done, total, rate=self.work.rate(event), memory=_memory())

    def _update(self, name: str, done: int, total: int | None, *, rate: str = "", memory: str | None = None) -> None:
        whole = self.work.whole
        if name != self._current:
            self._current, self._began = name, time.monotonic()
        left = whole.left if self._whole else self._left(done, total)
        # What is counted may be at its end while the run is not: no bar stands at 100 %. (``update`` takes a total of
        # None for no change.)
        share, end = (whole.share, 1.0) if self._whole else (done, total or 0)
        self.bar.tasks[0].total = end if share < end else None
        more: dict[str, Any] = {} if memory is None else {"memory": memory}
        told = "" if left is None else said(f"{seconds_text(left)} left")
        self.bar.update(self.task, description=name, completed=share, rate=rate, left=told, **more)

    def _left(self, done: int, total: int | None) -> float | None:
        """Seconds for the rest of what is counted, at the rate so far."""
        if not total or not done:
            return None
        return (time.monotonic() - self._began) * (total - done) / done


@contextmanager
def _bar() -> Iterator[Bar]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(),
        *(TextColumn(f"{{task.fields[{name}]}}", markup=False) for name in ("rate", "left", "memory")),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield bar


def _memory() -> str:
    from llm_quantize.memory import resident_bytes

    return f"{resident_bytes() / 1e6:.0f} MB"
