"""The local pool: any order, bounded look-ahead, first error wins, signals stop it with nothing lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from llm_quantize.engine import in_order, run, stop_on_signals
from llm_quantize.errors import IntegrityError, ResourceError, StoppedError


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_every_job_once(threads: int) -> None:
    assert sorted(run(lambda job: job * job, range(50), threads=threads)) == [job * job for job in range(50)]
    assert list(run(lambda job: job, [], threads=threads)) == []


def test_jobs_are_taken_as_they_are_needed() -> None:
    taken = []

    def jobs() -> Iterator[int]:
        for job in range(100):
            taken.append(job)
            yield job

    results = run(lambda job: job, jobs(), threads=2)
    for done in range(1, 100):
        next(results)
        assert len(taken) <= done + 4


def test_first_error_ends_the_run_and_jobs_in_flight_end() -> None:
    finished = []

    def work(job: int) -> int:
        if job == 3:
            raise IntegrityError("job 3")
        time.sleep(0.01)
        finished.append(job)
        return job

    with pytest.raises(IntegrityError, match="job 3"):
        list(run(work, range(1000), threads=2))
    assert 0 < len(finished) < 20
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("llm-quantize")]


def test_a_consumer_that_leaves_stops_the_workers() -> None:
    started = []
    results = run(lambda job: started.append(job), range(1000), threads=2)
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert len(started) <= 5


def test_stop_yields_what_was_in_flight() -> None:
    stop = threading.Event()
    started, results = [], []

    def work(job: int) -> int:
        started.append(job)
        time.sleep(0.01)
        if job == 5:
            stop.set()
        return job

    with pytest.raises(StoppedError, match="same command") as caught:
        results.extend(run(work, range(1000), threads=2, stop=stop))
    assert sorted(results) == sorted(started)
    assert len(started) < 20
    assert caught.value.exit_code == 75


def test_no_more_threads_is_a_resource_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(ThreadPoolExecutor, "submit", refused)
    with pytest.raises(ResourceError, match="no more threads"):
        list(run(lambda job: job, range(3), threads=2))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_sets_the_event_and_handlers_come_back(number: int) -> None:
    before = signal.getsignal(number)
    with stop_on_signals() as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), number)
        assert stop.wait(5)
    assert signal.getsignal(number) is before


def test_one_inside_another_is_the_same() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signals() as outer:
        with stop_on_signals() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
            assert inner.wait(5)
        assert outer.is_set()
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
    with stop_on_signals() as later:
        assert not later.is_set()


@pytest.mark.parametrize("threads", [1, 4])
def test_results_in_order(threads: int) -> None:
    def work(job: int) -> int:
        time.sleep(0.01 * (3 - job % 4))
        return 10 * job

    assert list(in_order(work, range(12), threads=threads)) == list(range(0, 120, 10))


def test_in_order_stops_without_a_gap() -> None:
    stop = threading.Event()
    results: list[int] = []

    def work(job: int) -> int:
        if job == 5:
            stop.set()
        return job

    with pytest.raises(StoppedError, match="what this measurement has found so far is not kept"):
        results.extend(in_order(work, range(1000), threads=3, stop=stop, resumable=None))
    assert results == list(range(len(results)))
    assert 5 < len(results) < 20


def test_second_signal_ends_the_process_at_once() -> None:
    code = """
import os, signal, time
from llm_quantize.engine import stop_on_signals
with stop_on_signals():
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
"""
    began = time.monotonic()
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 75
    assert time.monotonic() - began < 30


def test_other_threads_install_no_handler() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def elsewhere() -> None:
        with stop_on_signals() as stop:
            seen.append((signal.getsignal(signal.SIGINT), stop.is_set()))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [(before, False)]
