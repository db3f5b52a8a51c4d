"""Threads of a runtime where nobody says how many: the processors that are idle, not those that there are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llm_quantize.runtimes import threads
from llm_quantize.runtimes.threads import idle_threads

CPUS = 8


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of CPUS processors with its files in a folder of the test."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(CPUS)), raising=False)
    monkeypatch.setattr(threads, "STAT", tmp_path / "stat")
    monkeypatch.setattr(threads, "MEMBERSHIPS", tmp_path / "membership")
    monkeypatch.setattr(threads, "GROUPS", tmp_path / "groups")
    return tmp_path


def measured(machine: Path, idle: list[int]) -> int:
    """What is found where processor i was idle for ``idle[i]`` of 20 ticks, a part of it waiting for a disk."""
    start = {number: [1000 * number, 5, 30, 400, 7, 0, 0, 0, 0, 0] for number in range(CPUS + 1)}

    def write(ticks: dict[int, list[int]]) -> None:
        lines = [f"cpu{number} {' '.join(map(str, line))}" for number, line in ticks.items()]
        (machine / "stat").write_text("\n".join(["cpu  9 9 9 9 9 9 9 9 9 9", *lines, "intr 1 2 3", ""]))

    def later(seconds: float) -> None:
        assert 0 < seconds <= 0.5
        for number, share in enumerate([*idle, 20]):  # one more processor is idle, and not ours
            start[number][0] += 20 - share
            start[number][3] += share - share // 4
            start[number][4] += share // 4
        write(start)

    write(start)
    return idle_threads(sleep=later)


@pytest.mark.parametrize(
    ("idle", "expected"),
    [([20] * 8, 8), ([0] * 8, 1), ([20, 20, 20, 0, 0, 0, 0, 0], 3), ([19] * 8, 8), ([10] * 8, 4), ([1] * 8, 1)],
)
def test_as_many_as_are_idle(machine: Path, idle: list[int], expected: int) -> None:
    assert measured(machine, idle) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"groups/a/b/cpu.max": "max 100000", "groups/a/cpu.max": "250000 100000"}, 2),
        ({"groups/cpu.max": "50000 100000"}, 1),
        ({"groups/cpu/a/b/cpu.cfs_quota_us": "300000", "groups/cpu/a/b/cpu.cfs_period_us": "100000"}, 3),
        ({"groups/cpu/a/b/cpu.cfs_quota_us": "-1", "groups/cpu/a/b/cpu.cfs_period_us": "100000"}, 8),
        ({"groups/a/b/cpu.max": "strange"}, 8),
        ({}, 8),
    ],
)
def test_no_more_than_a_quota(machine: Path, files: dict[str, str], expected: int) -> None:
    (machine / "membership").write_text("0::/a/b\n4:cpu,cpuacct:/a/b\n")
    for name, text in files.items():
        (machine / name).parent.mkdir(parents=True, exist_ok=True)
        (machine / name).write_text(text + "\n")
    assert measured(machine, [20] * 8) == expected


def test_without_proc_the_load_of_the_last_minute_counts(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for load, expected in ((0.2, 8), (5.6, 2), (30.0, 1)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert idle_threads() == expected


def test_one_processor_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {3}, raising=False)
    monkeypatch.setattr(threads, "STAT", Path("/nowhere"))
    assert idle_threads(sleep=lambda _seconds: pytest.fail("slept")) == 1
