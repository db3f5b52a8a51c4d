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


@contextmanager
def told(shown: Mode, description: str, *, live: bool = True) -> Iterator[events.EventSink]:
    """A sink for the library's events. ``description``: what is called progress where nothing else names it.

    ``live`` False: plain lines on a terminal too, for a command that writes text there meanwhile. With --quiet only
    warnings are told. Progress that cannot be written stops no job.
    """
    if shown.json:
        yield _sheltered(_json_sink(shown))
    elif shown.live and live:
        with _bar() as bar:
            yield _sheltered(_Drawn(description, bar))
    else:
        yield _sheltered(_Plain(description, shown))


def _sheltered(sink: events.EventSink) -> events.EventSink:
    def safe(event: events.Event) -> None:
        with suppress(OSError):
            sink(event)

    return safe


def _json_sink(shown: Mode) -> events.EventSink:
    def sink(event: events.Event) -> None:
        if not shown.quiet or isinstance(event, events.Caution):
            click.echo(json.dumps(event.to_dict()), err=True)

    return sink


class _Work:
    """What is going on: its name, when it began, and at which rate it goes."""

    def __init__(self, description: str) -> None:
        self.description, self.stage = description, ""
        self.began = time.monotonic()

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
        elif not self.shown.quiet:
            self._tell(event)

    def _tell(self, event: events.Event) -> None:
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
                self._step(event, done, total, said(f"checking {what}"), first=True)
            case events.Measure(done, total):
                self._step(event, done, total, self.work.name(event), first=True)
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

    def _facts(self, event: events.Progress) -> str:
        percent = max(1, int(100 * event.done / max(1, event.total)))
        left = (time.monotonic() - self.work.began) * (100 - percent) / percent
        return said(f"{self.work.rate(event)}, {left:.0f} s left, {_memory()}")


class _Drawn:
    """One bar for all that goes on, and lines above it."""

    def __init__(self, description: str, bar: Bar) -> None:
        self.work, self.bar = _Work(description), bar
        self.task: TaskID = bar.add_task(said(description), total=None, rate="", memory="")

    def __call__(self, event: events.Event) -> None:
        """Draw one event."""
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

    def _update(self, name: str, done: int, total: int | None, **more: Any) -> None:
        self.bar.update(self.task, description=name, completed=done, total=total, **more)


@contextmanager
def _bar() -> Iterator[Bar]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"), TimeRemainingColumn(), TextColumn("{task.fields[memory]}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield bar


def _memory() -> str:
    from llm_quantize.memory import resident_bytes

    return f"{resident_bytes() / 1e6:.0f} MB"
