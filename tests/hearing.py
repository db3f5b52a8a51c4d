"""What a run told, as the dictionaries that --json prints."""

from __future__ import annotations

from typing import Any

from llm_quantize.events import Event, EventSink


def into(heard: list[Any]) -> EventSink:
    """A sink that keeps what it hears in ``heard``."""

    def sink(event: Event) -> None:
        heard.append(event.to_dict())

    return sink
