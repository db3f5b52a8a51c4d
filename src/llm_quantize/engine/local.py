"""The local thread pool. Kernels, reads, writes and hashes release the GIL, so threads are enough."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any, TypeVar

from llm_quantize.errors import ResourceError, StoppedError

Job = TypeVar("Job")
Result = TypeVar("Result")


def run(
    work: Callable[[Job], Result],
    jobs: Iterable[Job],
    *,
    threads: int,
    stop: threading.Event | None = None,
    resumable: bool | None = True,
    hold: Collection[int] = (),
    on_wait: Callable[[], None] = lambda: None,
) -> Iterator[Result]:
    """Results of ``work`` over ``jobs`` in order of completion; at most ``2 * threads`` jobs are taken ahead.

    The first exception ends the run: jobs in flight are finished and their results yielded, then it is raised.
    When ``stop`` is set, jobs in flight are finished and yielded, then StoppedError is raised; ``resumable`` says
    whether what they did is kept for the next run (None: a measurement, which never keeps a part). ``hold``:
    descriptors that stay open for as long as a job may be running, whatever becomes of this process. ``on_wait`` is
    called several times a second, to tell how far long jobs are.
    """
    del hold  # threads end with their process
    pending: set[Future[Result]] = set()
    failure: BaseException | None = None
    source = iter(jobs)
    exhausted = False
    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="llm-quantize") as pool:
        try:
            while pending or not exhausted:
                ending = failure is not None or (stop is not None and stop.is_set())
                while not exhausted and not ending and len(pending) < 2 * threads:
                    try:
                        pending.add(_submit(pool, work, next(source)))
                    except StopIteration:
                        exhausted = True
                if ending:
                    pending = {future for future in pending if not future.cancel()}
                    exhausted = True
                done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                on_wait()
                for future in done:
                    if (error := future.exception()) is None:
                        yield future.result()
                    else:
                        failure = failure or error
                if ending and not pending:
                    raise failure or stopped_error(resumable)
            if failure is not None:
                raise failure
        finally:
            for future in pending:
                future.cancel()


def in_order(
    work: Callable[[Job], Result],
    jobs: Iterable[Job],
    *,
    threads: int,
    stop: threading.Event | None = None,
    resumable: bool | None = True,
) -> Iterator[Result]:
    """What ``run`` gives, in the order of ``jobs``: a result that comes early waits for those before it.

    After a signal, results that no gap separates from the earlier ones are yielded before StoppedError.
    """
    early: dict[int, Result] = {}
    wanted = 0
    for number, result in run(
        partial(_numbered, work), enumerate(jobs), threads=threads, stop=stop, resumable=resumable
    ):
        early[number] = result
        while wanted in early:
            yield early.pop(wanted)
            wanted += 1


def _numbered(work: Callable[[Job], Result], job: tuple[int, Job]) -> tuple[int, Result]:
    return job[0], work(job[1])


def stopped_error(resumable: bool | None) -> StoppedError:
    """What a run raises after a signal; ``resumable`` as in ``run``."""
    if resumable:
        return StoppedError(
            "stopped by a signal; finished parts are kept",
            remedy="run the same command again: it continues where it stopped",
        )
    if resumable is None:
        return StoppedError(
            "stopped by a signal; what this measurement has found so far is not kept",
            remedy="run the same command again: it measures anew",
        )
    return StoppedError(
        "stopped by a signal; nothing is kept, as --no-checkpoints asks",
        remedy="run the same command again: it starts from the beginning; without --no-checkpoints it could continue",
    )


def _submit(pool: ThreadPoolExecutor, work: Callable[[Job], Result], job: Job) -> Future[Result]:
    try:
        return pool.submit(work, job)
    except RuntimeError as error:
        raise ResourceError(
            "the system gives this process no more threads",
            found=error,
            remedy="lower --threads, or raise the limits of memory (ulimit -v) and processes (ulimit -u)",
        ) from error


class _Handler:
    """What the first signal does (it sets ``event``), and the second (it ends the process)."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        if self.event.is_set():
            os._exit(StoppedError.exit_code)
        self.event.set()


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """An event set by the first SIGINT or SIGTERM; the second ends the process at once with exit code 75.

    Opened inside another one it is the other one's event, so that a signal stops both. Outside of the main thread no
    handler is installed and the event is never set by a signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield threading.Event()
        return
    outer = signal.getsignal(signal.SIGINT)
    if isinstance(outer, _Handler):
        yield outer.event
        return
    handle = _Handler()
    previous: dict[int, Any] = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield handle.event
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
