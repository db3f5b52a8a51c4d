"""Work for any engine: picklable, and what it did can be read in a folder from any process."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from llm_quantize.errors import IntegrityError


def square(job: int) -> int:
    return job * job


@dataclass(frozen=True)
class Traced:
    """Does nothing for ``seconds``. ``folder``: one file for each job begun, one for each finished. ``fails``: jobs
    that raise; ``kills``: jobs at which the process dies, as often as the number says."""

    folder: Path
    seconds: float = 0.01
    fails: Collection[int] = ()
    kills: tuple[tuple[int, int], ...] = ()
    bug: bool = False

    def __call__(self, job: int) -> int:
        times = len(list(self.folder.glob(f"begun-{job}-*")))
        (self.folder / f"begun-{job}-{times}").write_text(f"{os.getpid()} {threading.get_ident()}")
        if times < dict(self.kills).get(job, 0):
            os.kill(os.getpid(), signal.SIGKILL)
        if job in self.fails:
            if self.bug:
                raise KeyError(job)
            raise IntegrityError(f"job {job}", file="some.gguf", offset=7, found=job)
        time.sleep(self.seconds)
        (self.folder / f"finished-{job}").touch()
        return job

    def begun(self) -> list[int]:
        """Jobs begun, sorted; again and again where they were."""
        return sorted(int(path.name.split("-")[1]) for path in self.folder.glob("begun-*"))

    def finished(self) -> list[int]:
        """Jobs that came to their end, sorted."""
        return sorted(int(path.name.split("-")[1]) for path in self.folder.glob("finished-*"))

    def workers(self) -> set[str]:
        """Every process and thread that began a job."""
        return {path.read_text() for path in self.folder.glob("begun-*")}


class Opened:
    """Work that is opened, by path, in each process that it comes to: ``log`` has one line for each."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def __reduce__(self) -> tuple[object, ...]:
        return _open, (self.log,)

    def __call__(self, job: int) -> int:
        return os.getpid()


def _open(log: Path) -> Opened:
    if not log.exists():
        raise IntegrityError("nothing to open", file=log)
    with log.open("a") as file:
        file.write(f"{os.getpid()}\n")
    return Opened(log)


def not_portable(job: int) -> object:
    """A result that cannot be pickled."""
    return lambda: job
