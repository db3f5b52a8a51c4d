"""Memory of this machine and this process: what there is, what is taken, what a thread takes."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

ARENA_BYTES = 64 << 20  # address space that glibc's allocator reserves for each thread, used or not


DEFAULT_STACK_BYTES = 8 << 20


def available_cpus() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_limit(max_ram: int | None) -> int | None:
    """The smallest of --max-ram, the cgroup's limit and physical memory, in bytes of resident memory."""
    limits = [] if max_ram is None else [max_ram]
    limits += cgroup_limits()
    if "SC_PHYS_PAGES" in os.sysconf_names:
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(limits) if limits else None


def cgroup_limits(memberships: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Memory limits in bytes of the control groups this process is in, from its own up to the root; v1 and v2."""
    try:
        lines = memberships.read_text().splitlines()
    except OSError:
        lines = []
    files = [(root, Path("/"), "memory.max"), (root / "memory", Path("/"), "memory.limit_in_bytes")]
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        if not controllers:
            files.append((root, Path(name), "memory.max"))
        elif "memory" in controllers.split(","):
            files.append((root / "memory", Path(name), "memory.limit_in_bytes"))
    limits = []
    for base, group, file in files:
        for place in (group, *group.parents):
            try:
                text = (base / str(place).lstrip("/") / file).read_text().strip()
            except OSError:
                continue
            if text.isdigit():
                limits.append(int(text))
    return limits


def address_limit() -> int | None:
    """RLIMIT_AS in bytes: what may be mapped, not what may be used; None without such a limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if soft == resource.RLIM_INFINITY else soft


def mapped_bytes() -> int:
    """Address space of this process now; a guess where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 256 << 20


def thread_address_bytes() -> int:
    """Address space that a new thread takes before it does anything: its stack and its allocator's arena."""
    stack, _ = resource.getrlimit(resource.RLIMIT_STACK)
    return (DEFAULT_STACK_BYTES if stack == resource.RLIM_INFINITY else stack) + ARENA_BYTES


def resident_bytes() -> int:
    """Resident memory of this process now; the peak so far where the system does not tell the present."""
    try:
        fields = Path("/proc/self/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Highest resident memory of this process so far."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration, ValueError):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
