"""CPU time of a thread, divided among the artifacts that it worked for."""

from __future__ import annotations

import time
from collections.abc import Sequence


class Clock:
    """Divides this thread's CPU time among artifacts: each span since the last charge goes to those it served."""

    def __init__(self, artifacts: Sequence[int]) -> None:
        self.seconds = dict.fromkeys(artifacts, 0.0)
        self._last = time.thread_time()

    def charge(self, *artifacts: int) -> None:
        """The time since the last charge, in equal parts."""
        now = time.thread_time()
        for artifact in artifacts:
            self.seconds[artifact] += (now - self._last) / len(artifacts)
        self._last = now
