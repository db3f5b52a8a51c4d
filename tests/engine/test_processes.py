"""Processes: what is killed is done again, bounded; nothing outlives the driver; errors cross whole."""

from __future__ import annotations

import fcntl
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import pytest

from llm_quantize import errors
from llm_quantize.engine import processes
from llm_quantize.errors import IntegrityError, LlmQuantizeError, MissingExtraError, ResourceError

from .works import Opened, Traced, not_portable, square


def test_a_killed_worker_loses_only_its_unit(tmp_path: Path) -> None:
    work = Traced(tmp_path, kills=((3, 1), (7, 2)))
    assert sorted(processes.run(work, range(20), threads=2)) == list(range(20))
    assert work.begun() == sorted([*range(20), 3, 7, 7])


@pytest.mark.parametrize("threads", [1, 3])
def test_killed_again_and_again_at_the_same_unit(tmp_path: Path, threads: int) -> None:
    work = Traced(tmp_path, kills=((3, 99),))
    results = []
    with pytest.raises(ResourceError, match="worker processes end again and again") as caught:
        results.extend(processes.run(work, range(1000), threads=threads))
    assert work.begun().count(3) == processes.ATTEMPTS
    assert "signal 9 (Killed)" in (caught.value.found or "")
    assert "--threads" in (caught.value.remedy or "")
    assert sorted(results) == work.finished()


def test_workers_killed_from_outside(tmp_path: Path) -> None:
    work = Traced(tmp_path, seconds=0.05)
    found = []
    for result in processes.run(work, range(30), threads=2):
        found.append(result)
        if len(found) in (5, 15):
            alive = [pid for pid in {int(one.split()[0]) for one in work.workers()} if Path(f"/proc/{pid}").exists()]
            os.kill(alive[0], signal.SIGKILL)
    assert sorted(found) == list(range(30))


def test_work_is_opened_once_in_each_process(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    used = set(processes.run(Opened(log), range(40), threads=3))
    opened = [int(line) for line in log.read_text().split()]
    assert 1 <= len(opened) == len(set(opened)) <= 3
    assert used <= set(opened)
    assert os.getpid() not in opened


def test_work_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="nothing to open"):
        list(processes.run(Opened(tmp_path / "none"), range(40), threads=2))


def test_workers_that_never_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "worker.py"
    script.write_text("raise SystemExit(3)")
    monkeypatch.setattr(processes, "_SCRIPT", script)
    with pytest.raises(ResourceError, match="3 times before they were ready, the last with exit status 3"):
        list(processes.run(square, range(9), threads=2))


def test_no_more_processes_is_a_resource_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise BlockingIOError("Resource temporarily unavailable")

    before = len(list(Path("/proc/self/fd").iterdir()))
    monkeypatch.setattr(subprocess, "Popen", refused)
    with pytest.raises(ResourceError, match="no more processes"):
        list(processes.run(square, range(3), threads=2))
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_a_result_that_cannot_be_pickled_is_an_error() -> None:
    with pytest.raises((AttributeError, RuntimeError), match="local"):
        list(processes.run(not_portable, range(3), threads=1))


DRIVER = """
import fcntl, sys
from pathlib import Path
from llm_quantize.engine import processes
from tests.engine.works import Traced
lock = open(sys.argv[2], "w")
fcntl.flock(lock, fcntl.LOCK_EX)
print("began", flush=True)
for result in processes.run(Traced(Path(sys.argv[1]), seconds=0.2), range(1000), threads=3, hold=[lock.fileno()]):
    print(result, flush=True)
"""


def test_no_worker_outlives_a_killed_driver(tmp_path: Path) -> None:
    """Workers hear that the driver is gone, in the middle of a job; until they are gone too, its locks hold."""
    lock, folder = tmp_path / "lock", tmp_path / "folder"
    folder.mkdir()
    arguments = [sys.executable, "-c", DRIVER, str(folder), str(lock)]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "src")])}
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, env=environment) as driver:
        assert driver.stdout is not None
        for _ in range(4):
            driver.stdout.readline()
        work = Traced(folder)
        workers = {int(one.split()[0]) for one in work.workers()}
        assert len(workers) == 3
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        driver.kill()
        driver.wait()
        with lock.open("w") as file:
            assert not _locked(file)
            begun = work.begun()
            for pid in workers:
                os.kill(pid, signal.SIGCONT)
            until = time.monotonic() + 20
            while not _locked(file) and time.monotonic() < until:
                time.sleep(0.01)
            assert _locked(file)
        assert work.begun() == begun
        assert not any(Path(f"/proc/{pid}/exe").exists() for pid in workers)


def _locked(file: IO[str]) -> bool:
    """Whether the lock could be taken."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _tree(kind: type[LlmQuantizeError] = LlmQuantizeError) -> list[type[LlmQuantizeError]]:
    return [kind, *(below for child in kind.__subclasses__() for below in _tree(child))]


@pytest.mark.parametrize("kind", [kind for kind in _tree() if kind.__module__ == errors.__name__])
def test_errors_cross_whole(kind: type[LlmQuantizeError]) -> None:
    facts = {"file": "a/b", "tensor": "t", "offset": 3, "expected": "x", "found": "y", "remedy": "z"}
    error = kind("what", "extra", remedy="z") if kind is MissingExtraError else kind("what", **facts)  # type: ignore[arg-type, call-arg]
    found = pickle.loads(pickle.dumps(error))
    assert type(found) is kind
    assert (str(found), found.to_dict(), found.args) == (str(error), error.to_dict(), error.args)
