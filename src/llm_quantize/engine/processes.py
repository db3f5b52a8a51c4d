"""Worker processes: the same contract as threads, for machines where one interpreter's lock is what all wait for.

Each is a fresh interpreter (nothing is forked: the driver has threads) that opens the work once and does a job at a
time. One that is killed loses only the unit it was at, which another does again. They live no longer than the driver.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Generic, TypeVar

from llm_quantize.engine.local import stopped_error
from llm_quantize.engine.worker import END, ERROR, HERE, READY, RESULT, SIGNALS
from llm_quantize.errors import ResourceError

Job = TypeVar("Job")
Result = TypeVar("Result")

AHEAD = 2  # jobs that a worker has: the one it is at, and the next
ATTEMPTS = 3  # workers that may die at one job, or one after the other before they are ready
_SCRIPT = Path(__file__).with_name("worker.py")


def run(
    work: Callable[[Job], Result],
    jobs: Iterable[Job],
    *,
    threads: int,
    stop: threading.Event | None = None,
    resumable: bool | None = True,
    hold: Collection[int] = (),
) -> Iterator[Result]:
    """As ``local.run``, with ``threads`` processes. ``work``, jobs, results and exceptions are pickled; ``work`` is
    opened once in each process.

    Raises ResourceError where the system gives no more processes, or ends them again and again at the same job.
    """
    crew: _Crew[Job, Result] = _Crew(ForkingPickler.dumps(work), threads, hold)
    source = iter(jobs)
    exhausted = False
    try:
        while crew.outstanding or not exhausted:
            ending = crew.failure is not None or (stop is not None and stop.is_set())
            while not exhausted and not ending and crew.outstanding < AHEAD * threads:
                try:
                    crew.waiting.append(_Task(next(source)))
                except StopIteration:
                    exhausted = True
            if ending:
                exhausted = True
                crew.finish()
            crew.hand_out()
            if crew.results:
                yield crew.results.popleft()
            elif crew.outstanding:
                crew.listen()
            if ending and not crew.outstanding:
                raise crew.failure or stopped_error(resumable)
        if crew.failure is not None:
            raise crew.failure
    finally:
        crew.close()


@dataclass
class _Task:
    """A job, and how many workers died at it."""

    job: Any
    deaths: int = 0


@dataclass(eq=False)
class _Worker:
    """A process, and the tasks that it has: it is at the first of them."""

    process: subprocess.Popen[bytes]
    connection: Connection
    here: bool = False
    ready: bool = False
    tasks: deque[_Task] = field(default_factory=deque)

    def send(self, message: Any) -> None:
        with suppress(OSError):  # it is gone, which ``listen`` hears
            self.connection.send_bytes(message)

    def end(self) -> int:
        """Its exit status, killed unless it has ended."""
        self.connection.close()
        self.process.kill()
        return self.process.wait()


class _Crew(Generic[Job, Result]):
    """The processes of a run, at most ``threads``: each is started when there is a job for it."""

    def __init__(self, work: Any, threads: int, hold: Collection[int]) -> None:
        self._work, self._threads, self._hold = work, threads, tuple(hold)
        self._workers: list[_Worker] = []
        self._never_ready = 0
        self._ending = False
        self.waiting: deque[_Task] = deque()
        self.results: deque[Result] = deque()
        self.failure: BaseException | None = None

    @property
    def outstanding(self) -> int:
        """Jobs taken whose results were not."""
        return len(self.waiting) + sum(len(worker.tasks) for worker in self._workers) + len(self.results)

    def hand_out(self) -> None:
        """Give the jobs that wait to workers, new ones where there are too few."""
        busy = sum(bool(worker.tasks) for worker in self._workers)
        while len(self._workers) < min(self._threads, busy + len(self.waiting)):
            self._workers.append(_start(self._hold))
        for most in range(AHEAD):
            for worker in self._workers:
                if self.waiting and worker.here and len(worker.tasks) <= most:
                    worker.tasks.append(self.waiting.popleft())
                    worker.send(ForkingPickler.dumps(worker.tasks[-1].job))

    def listen(self) -> None:
        """Wait a moment for what the workers have to say."""
        by_connection = {worker.connection: worker for worker in self._workers}
        for connection in wait(list(by_connection), timeout=0.2):
            worker = by_connection[connection]  # type: ignore[index]
            try:
                kind, value = worker.connection.recv()
            except (EOFError, ConnectionResetError):
                self._lost(worker)
                continue
            self._heard(worker, kind, value)

    def _heard(self, worker: _Worker, kind: str, value: Any) -> None:
        if kind == HERE:
            worker.here = True
            worker.send(ForkingPickler.dumps(sys.path))
            worker.send(self._work)
        elif kind == READY:
            worker.ready, self._never_ready = True, 0
        elif kind == RESULT:
            worker.tasks.popleft()
            self.results.append(value)
        elif kind == ERROR:
            if worker.ready:
                worker.tasks.popleft()
            self.failure = self.failure or value

    def _lost(self, worker: _Worker) -> None:
        """A worker is gone: what it had is done by another, unless the run ends."""
        self._workers.remove(worker)
        status = worker.end()
        if self._ending or self.failure is not None:
            return
        if not worker.ready:
            self._never_ready += 1
            deaths, when = self._never_ready, "before they were ready"
        elif worker.tasks:
            worker.tasks[0].deaths += 1
            deaths, when = worker.tasks[0].deaths, "at the same unit of work"
        else:
            deaths, when = 0, ""
        if deaths >= ATTEMPTS:
            self.failure = _died(deaths, when, status)
        self.waiting.extendleft(reversed(worker.tasks))

    def finish(self) -> None:
        """Begin no more jobs: those in work are finished."""
        if self._ending:
            return
        self._ending = True
        self.waiting.clear()
        for worker in list(self._workers):
            if worker.ready:
                worker.send(END)
            else:
                self._workers.remove(worker)
                worker.end()

    def close(self) -> None:
        """End every process."""
        for worker in self._workers:
            worker.end()
        self._workers.clear()


def _start(hold: tuple[int, ...]) -> _Worker:
    """A new process. A signal that comes before it is ready to ignore it waits; ``hold`` it has open to its end."""
    ours, theirs = Pipe()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", str(_SCRIPT), str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(), *hold),
        )
    except OSError as error:
        ours.close()
        raise ResourceError(
            "the system gives no more processes",
            found=error,
            remedy="lower --threads, or raise the limits of memory (ulimit -v) and processes (ulimit -u)",
        ) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
    return _Worker(process, ours)


def _died(deaths: int, when: str, status: int) -> ResourceError:
    how = f"by signal {-status} ({signal.strsignal(-status)})" if status < 0 else f"with exit status {status}"
    return ResourceError(
        "worker processes end again and again",
        found=f"{deaths} times {when}, the last {how}",
        remedy="where memory runs out the system kills them: lower --threads or raise the memory limit; or leave out "
        "--engine processes. The same command continues",
    )
