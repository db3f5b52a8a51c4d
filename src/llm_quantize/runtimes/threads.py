"""How many threads a runtime has where nobody says: as many as there are processors that others leave idle, now.

llama.cpp's threads wait for each other at every layer, so one that gets no processor stops all of them: on a machine
that is busy, or in a container with a quota, a thread for each processor is many times slower than a single one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from llm_quantize.memory import available_cpus

LOOK_SECONDS = 0.2
STAT = Path("/proc/stat")
GROUPS = Path("/sys/fs/cgroup")
MEMBERSHIPS = Path("/proc/self/cgroup")

_IDLE = slice(3, 5)  # idle, iowait, of the times that /proc/stat has for a processor
_ALL = slice(0, 8)  # guest times are in user and nice already


def idle_threads(*, sleep: Callable[[float], None] = time.sleep) -> int:
    """How many threads find a processor of their own: the idle ones of those this process may use, over the next
    LOOK_SECONDS, no more than a control group's quota, and 1 at least. Where the system does not tell (no /proc), by
    its load of the last minute.
    """
    allowed = available_cpus()
    if allowed == 1:
        return 1
    before = _times()
    if before:
        sleep(LOOK_SECONDS)
        idle = sum(_share(before[name], now) for name, now in _times().items() if name in before)
    else:
        idle = allowed - os.getloadavg()[0]
    return max(1, min(allowed, round(idle), _quota()))


def _times() -> dict[str, list[int]]:
    """Ticks of each processor that this process may use; empty where they are not told."""
    names = {f"cpu{number}" for number in os.sched_getaffinity(0)} if hasattr(os, "sched_getaffinity") else set()
    try:
        lines = [line.split() for line in STAT.read_text().splitlines()]
    except OSError:
        return {}
    return {line[0]: [int(ticks) for ticks in line[1:]] for line in lines if line and line[0] in names}


def _share(before: list[int], now: list[int]) -> float:
    """The share of the time in which it was idle."""
    spent = [b - a for a, b in zip(before, now, strict=False)]
    return sum(spent[_IDLE]) / max(1, sum(spent[_ALL]))


def _quota() -> int:
    """Processors' worth of time that the control groups of this process give it; very many where they set no limit."""
    try:
        lines = MEMBERSHIPS.read_text().splitlines()
    except OSError:
        lines = []
    places = [GROUPS, GROUPS / "cpu"]
    for line in lines:
        _, controllers, group = line.split(":", 2)
        base = GROUPS / "cpu" if "cpu" in controllers.split(",") else GROUPS
        path = base / group.lstrip("/")
        places += [path, *(parent for parent in path.parents if parent.is_relative_to(base))]
    shares = [share for place in places for share in _limits(place)]
    return max(1, round(min(shares, default=float(1 << 16))))


def _limits(place: Path) -> list[float]:
    """Quota over period of one control group, of either version; nothing where it has none."""
    try:
        quota, period = (place / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (place / "cpu.cfs_quota_us").read_text().strip()
            period = (place / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return []
    return [int(quota) / int(period)] if quota.isdigit() and period.isdigit() and int(period) else []
