"""Threads for what torch computes: the engine's, each with one thread of torch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from llm_quantize.engine import in_order, run

Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Pool:
    """``threads`` jobs side by side. The order of the sums inside a product must not depend on the machine or on how
    many jobs there are, so each has one thread of torch. ``stop`` and ``resumable``: see ``engine.run``."""

    threads: int
    stop: threading.Event | None
    resumable: bool | None

    def each(self, work: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
        """Results in the order of completion. The first exception ends the work; StoppedError after a signal."""
        with restored():
            yield from run(partial(_alone, work), jobs, threads=self.threads, stop=self.stop, resumable=self.resumable)

    def in_order(self, work: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
        """Results in the order of ``jobs``, else as ``each``."""
        with restored():
            yield from in_order(
                partial(_alone, work), jobs, threads=self.threads, stop=self.stop, resumable=self.resumable
            )

    def do(self, jobs: Iterable[Callable[[], None]]) -> None:
        """Run them all."""
        for _ in self.each(_call, jobs):
            pass


def _alone(work: Callable[[Job], Result], job: Job) -> Result:
    torch.set_num_threads(1)
    return work(job)


def _call(job: Callable[[], None]) -> None:
    job()


@contextmanager
def restored() -> Iterator[None]:
    """How many threads of torch this thread has, and threads that are yet to come begin with, is as before
    afterwards."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
