"""Running units of work: ``run(work, jobs)`` gives results in any order, ``in_order`` in theirs, both in threads.
ENGINES do what ``run`` does, each with workers of its own kind."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Protocol, TypeVar

from llm_quantize.engine import local, processes
from llm_quantize.engine.local import in_order, run, stop_on_signals, stopped_error

__all__ = ["ENGINES", "ISOLATED", "Engine", "in_order", "run", "stop_on_signals", "stopped_error"]

Job = TypeVar("Job")
Result = TypeVar("Result")


class Engine(Protocol):
    """See ``local.run``."""

    def __call__(
        self,
        work: Callable[[Job], Result],
        jobs: Iterable[Job],
        *,
        threads: int,
        stop: threading.Event | None = None,
        resumable: bool | None = True,
        hold: Collection[int] = (),
    ) -> Iterator[Result]: ...


ENGINES: Mapping[str, Engine] = {"threads": local.run, "processes": processes.run}
ISOLATED = frozenset({"processes"})
"""Those whose workers share no memory: each opens the work for itself."""
