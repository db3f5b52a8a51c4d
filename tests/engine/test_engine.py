"""Threads: order, signals, and what the system refuses. What all engines have in common is in test_engines.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from llm_quantize.engine import in_order, run, stop_on_signals
from llm_quantize.errors import ResourceError, StoppedError


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
