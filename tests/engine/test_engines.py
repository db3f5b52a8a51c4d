"""What every engine does: any order, bounded look-ahead, first error wins, a signal stops it with nothing lost."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llm_quantize.engine import ENGINES, Engine, stop_on_signals
from llm_quantize.errors import IntegrityError, StoppedError

from .works import Traced, square


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """Each engine; when the test is over, none of its workers are left."""
    children = set(_children())
    yield ENGINES[request.param]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("llm-quantize")]
    assert set(_children()) <= children


def _children() -> list[str]:
    return Path("/proc/thread-self/children").read_text().split()


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_every_job_once(engine: Engine, threads: int) -> None:
    assert sorted(engine(square, range(50), threads=threads)) == [job * job for job in range(50)]
    assert list(engine(square, [], threads=threads)) == []


def test_several_workers_at_once(engine: Engine, tmp_path: Path) -> None:
    work = Traced(tmp_path, seconds=0.1)
    assert sorted(engine(work, range(12), threads=3)) == list(range(12))
    assert len(work.workers()) == 3
    assert work.begun() == list(range(12))


def test_jobs_are_taken_as_they_are_needed(engine: Engine) -> None:
    taken = []

    def jobs() -> Iterator[int]:
        for job in range(100):
            taken.append(job)
            yield job

    results = engine(square, jobs(), threads=2)
    for done in range(1, 101):
        next(results)
        assert len(taken) <= done + 4
    assert next(results, None) is None


def test_first_error_ends_the_run_and_jobs_in_flight_end(engine: Engine, tmp_path: Path) -> None:
    work = Traced(tmp_path, fails=(3,))
    results = []
    with pytest.raises(IntegrityError, match="job 3") as caught:
        results.extend(engine(work, range(1000), threads=2))
    assert caught.value.to_dict() == IntegrityError("job 3", file="some.gguf", offset=7, found=3).to_dict()
    assert 0 < len(work.finished()) < 20
    assert sorted(results) == work.finished()
    assert work.begun() == sorted([*work.finished(), 3])


def test_an_error_that_is_a_bug_comes_as_it_is(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="2"):
        list(engine(Traced(tmp_path, fails=(2,), bug=True), range(9), threads=2))


def test_the_first_of_several_errors(engine: Engine, tmp_path: Path) -> None:
    work, results = Traced(tmp_path, fails=range(3, 1000)), []
    with pytest.raises(IntegrityError):
        results.extend(engine(work, range(1000), threads=3))
    assert work.finished() == sorted(results)
    assert len(work.begun()) < 15


def test_a_consumer_that_leaves_stops_the_workers(engine: Engine, tmp_path: Path) -> None:
    work = Traced(tmp_path)
    results = engine(work, range(1000), threads=2)
    next(results)
    results.close()  # type: ignore[attr-defined]
    begun = work.begun()
    assert len(begun) <= 6
    time.sleep(0.1)
    assert work.begun() == begun


@pytest.mark.parametrize("resumable", [True, False, None])
def test_stop_yields_what_was_in_flight(engine: Engine, tmp_path: Path, resumable: bool | None) -> None:
    work, stop, results = Traced(tmp_path, seconds=0.05), threading.Event(), []
    with pytest.raises(StoppedError) as caught:
        _take(engine(work, range(1000), threads=2, stop=stop, resumable=resumable), results, stop.set)
    assert work.begun() == work.finished() == sorted(results)
    assert 3 <= len(results) < 10
    assert caught.value.exit_code == 75
    assert ("nothing is kept" in str(caught.value)) == (resumable is False)
    assert ("parts are kept" in str(caught.value)) == (resumable is True)


def test_stopped_before_it_begins(engine: Engine, tmp_path: Path) -> None:
    work, stop = Traced(tmp_path), threading.Event()
    stop.set()
    with pytest.raises(StoppedError):
        list(engine(work, range(1000), threads=2, stop=stop))
    assert work.begun() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes(engine: Engine, tmp_path: Path, number: int) -> None:
    """As a terminal sends it: to the driver and to every worker; only the driver listens."""
    work, results = Traced(tmp_path, seconds=0.05), []

    def kill() -> None:
        subprocess.run(["kill", f"-{int(number)}", *_children(), str(os.getpid())], check=True)

    with stop_on_signals() as stop, pytest.raises(StoppedError):
        _take(engine(work, range(1000), threads=2, stop=stop), results, kill)
    assert work.begun() == work.finished() == sorted(results)


def _take(found: Iterator[int], results: list[int], at_the_third: Callable[[], None]) -> None:
    for result in found:
        results.append(result)
        if len(results) == 3:
            at_the_third()
