"""A process that has few seconds and bytes, for work on what strangers wrote: programs, and files that unfold.

No check within an interpreter can stop everything that never ends or takes all memory; the system can. The process
(``limited_child.py``) knows none of our environment but a few variables, and ends with its object.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_quantize.errors import ResourceError

_SCRIPT = Path(__file__).with_name("limited_child.py")
_KEPT = ("PATH", "LD_LIBRARY_PATH", "TZ")


class LimitedProcess:
    """A process in which ``module`` answers. ``first``: what it is told once; ``memory``: bytes of address space;
    ``environment``: more variables. Close it; it also ends with the object.

    Raises ResourceError (the system gives no process).
    """

    def __init__(
        self, module: str, first: Mapping[str, Any], *, memory: int, environment: Mapping[str, str] | None = None
    ) -> None:
        kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(_SCRIPT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**kept, **(environment or {})},
                start_new_session=True,  # a signal from the terminal is ours to answer
            )
        except OSError as error:
            raise ResourceError(
                "the system gives no more processes",
                found=error.strerror,
                remedy="raise the limits of memory (ulimit -v) and processes (ulimit -u)",
            ) from error
        self._end = weakref.finalize(self, _finish, self._process)
        path = [str(Path(place).absolute()) for place in sys.path]
        self._broken = False
        self._send({**first, "path": path, "memory": memory, "module": module})

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, message: Mapping[str, Any], *, cpu: float) -> None:
        """Ask; ``cpu``: seconds that the process may have used, from its start, when it has answered."""
        self._send({**message, "cpu": int(cpu)})

    def _send(self, message: Mapping[str, Any]) -> None:
        if self._process.stdin is None or self._broken:
            return
        view = memoryview(json.dumps(message).encode() + b"\n")
        try:
            while view:
                view = view[os.write(self._process.stdin.fileno(), view) :]
        except BrokenPipeError:  # it is gone, which ``answer`` tells
            self._broken = True

    def answer(self, most: int) -> dict[str, Any] | None:
        """The next answer, of at most ``most`` bytes; None: it wrote more, or ended, see ``why``."""
        line = b"" if self._process.stdout is None else self._process.stdout.readline(most + 1)
        found: dict[str, Any] | None = json.loads(line) if line.endswith(b"\n") else None
        return found

    def why(self) -> tuple[bool, str]:
        """(whether a limit ended it, how it ended) of a process that gave no answer; it is closed."""
        self.close()
        status = self._process.returncode
        if status == -signal.SIGXCPU:
            return True, "no end within its seconds of CPU"
        if status < 0:
            return True, f"its process ended by signal {-status} ({signal.strsignal(-status)})"
        return False, f"exit status {status}"

    def close(self) -> None:
        """End the process."""
        self._end()


def _finish(process: subprocess.Popen[bytes]) -> None:
    """End the process and close its pipes."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
