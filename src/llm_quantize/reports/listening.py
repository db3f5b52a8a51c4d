"""Who hears the events of a call in Python where nobody was named: a bar in a notebook, the log elsewhere.

A notebook gets rich's bars through its own display, which needs no widgets. Elsewhere nothing is written but warnings,
to the logger ``llm_quantize`` (``logging``), which has stages and notes at the level INFO.
"""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from llm_quantize import events
from llm_quantize.errors import printable
from llm_quantize.events import EventSink

if TYPE_CHECKING:
    from rich.progress import TaskID

LOGGER = logging.getLogger("llm_quantize")
EVERY = 0.2
"""Seconds between two drawings of a bar."""

_LONGEST = 1000


@contextmanager
def heard(on_event: EventSink | None, description: str) -> Iterator[EventSink]:
    """``on_event``; where it is None, what this session shows. ``description``: what is called progress that says
    nothing of itself."""
    if on_event is not None:
        yield on_event
    elif in_notebook():
        drawn = _Drawn(description, import_module("IPython.display").display)
        try:
            with warnings.catch_warnings():  # tqdm, which libraries import, wants widgets: nothing here needs them
                warnings.filterwarnings("ignore", message="IProgress not found")
                yield drawn
        finally:
            drawn.draw()
    else:
        yield _log


def in_notebook() -> bool:
    """Whether this is a notebook: an IPython that talks to a kernel's front end."""
    python = sys.modules.get("IPython")
    shell = None if python is None else python.get_ipython()
    return getattr(shell, "kernel", None) is not None


def _log(event: events.Event) -> None:
    match event:
        case events.Caution(text):
            LOGGER.warning("%s", printable(text, _LONGEST))
        case events.Note(text) | events.Stage(text):
            LOGGER.info("%s", printable(text, _LONGEST))


class _Drawn:
    """Bars in a notebook, one for each kind of work; ``display``: IPython's."""

    def __init__(self, description: str, display: Any) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
        self.bars = Progress(*columns, TimeRemainingColumn(elapsed_when_finished=True), auto_refresh=False)
        self.display, self.handle = display, None
        self.description = self.stage = description
        self._tasks: dict[str, TaskID] = {}
        self._last = 0.0

    def __call__(self, event: events.Event) -> None:
        """Show one event."""
        match event:
            case events.Caution(text):
                self._say(f"warning: {text}", "yellow")
            case events.Note(text):
                self._say(text, "dim")
            case events.Stage(text):
                self.stage = text
            case events.Start(total):
                self._step(self.description, 0, total)
            case events.Progress(done, total):
                self._step("calibrate" if event.unit == "tokens" else self.description, done, total)
            case events.Measure(done, total):
                self._step(self.stage, done, total)
            case events.Check(what, done, total):
                self._step(f"check {what}", done, total)
            case events.Download(file, done, total):
                self._step(file, done, total)

    def _step(self, name: str, done: int, total: int) -> None:
        name = printable(name, 60)
        if name not in self._tasks:
            self._tasks[name] = self.bars.add_task(name, total=total)
        self.bars.update(self._tasks[name], completed=done, total=total)
        if done >= total or time.monotonic() - self._last >= EVERY:
            self.draw()

    def draw(self) -> None:
        """The bars as they stand now; nothing where nothing was begun."""
        if not self._tasks:
            return
        self._last = time.monotonic()
        if self.handle is None:
            self.handle = self.display(self.bars, display_id=True)
        else:
            self.handle.update(self.bars)

    def _say(self, text: str, style: str) -> None:
        from rich.text import Text

        self.display(Text(printable(text, _LONGEST), style=style))
