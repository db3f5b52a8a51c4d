"""What the library tells while it works: small dictionaries with an ``event`` key, given to ``on_event``.

Events: ``note`` and ``warning`` (text); ``download`` (file, done, total); ``start`` (total weights to quantize,
threads, memory needed in bytes, resumed units); ``progress`` (done, total, in weights times artifacts);
``artifact`` (level, path, size, status); ``stage`` (text) and ``measure`` (done, total) of the demo.
The command line draws them with rich or prints them as JSON lines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

EventSink = Callable[[Mapping[str, Any]], None]


def ignore(_event: Mapping[str, Any]) -> None:
    """The sink that hears nothing."""
