"""What the library tells while it works: small dictionaries with an ``event`` key, given to ``on_event``.

Events: ``note`` and ``warning`` (text); ``stage`` (text): what begins now; ``download`` (file, done, total);
``resuming`` (units, total) and ``check`` (what, done, total) while finished work is read back; ``start`` (total work,
threads, memory needed in bytes, resumed units); ``progress`` (done, total: weights times artifacts, or what ``unit``
says); ``measure`` (done, total: windows, through files or blocks); ``artifact`` (level, path, size, status).
The command line draws them with rich or prints them as JSON lines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

EventSink = Callable[[Mapping[str, Any]], None]


def ignore(_event: Mapping[str, Any]) -> None:
    """The sink that hears nothing."""
