"""Refuse before work what cannot succeed: disk, memory, file-size limits, an output that cannot be written."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_quantize.errors import AccessError, ResourceError
from llm_quantize.plan import ArtifactPlan, work_bytes

ARENA_BYTES = 64 << 20  # address space that glibc's allocator reserves for each thread, used or not
DEFAULT_STACK_BYTES = 8 << 20


@dataclass(frozen=True)
class Preflight:
    """What a run may use: threads after fitting the memory limit, and the figures it was decided on (bytes)."""

    threads: int
    memory_needed: int
    memory_limit: int | None
    disk_needed: int
    disk_free: int


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


def address_needed(artifacts: Sequence[ArtifactPlan], threads: int) -> int:
    """Address space of a run, in bytes: what is mapped now; for each thread a stack, an arena and its buffers."""
    return mapped_bytes() + threads * thread_address_bytes() + work_bytes(artifacts, threads)


def memory_needed(artifacts: Sequence[ArtifactPlan], threads: int) -> int:
    """Peak resident bytes of a run that goes on from here: the model is open, its buffers come on top."""
    return max(peak_resident_bytes(), resident_bytes() + work_bytes(artifacts, threads))


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


def check(
    artifacts: Sequence[ArtifactPlan],
    directory: Path,
    *,
    threads: int | None,
    max_ram: int | None,
    already_allocated: int = 0,
    ignore_space: bool = False,
) -> Preflight:
    """Fit the run to the machine, or raise ResourceError or AccessError naming the figure that does not fit."""
    parent = refuse_unwritable(directory)
    needed = max(0, sum(artifact.size for artifact in artifacts) - already_allocated)
    facts = os.statvfs(parent)
    free = facts.f_bavail * facts.f_frsize
    if needed > free and not ignore_space:
        raise ResourceError(
            "not enough disk space for the output",
            file=parent,
            expected=f"{needed} bytes",
            found=f"{free} bytes free",
            remedy="free some space, choose another directory with -o, or a smaller level; --ignore-space tries anyway",
        )
    _check_file_size(artifacts)
    count = fit_threads(artifacts, threads=threads, max_ram=max_ram)
    return Preflight(count, memory_needed(artifacts, count), memory_limit(max_ram), needed, free)


def fit_threads(artifacts: Sequence[ArtifactPlan], *, threads: int | None, max_ram: int | None) -> int:
    """The threads that a run may have, at most ``threads`` (all CPUs); ResourceError where memory suits not one."""
    limit = memory_limit(max_ram)
    count = threads or available_cpus()
    count = _fit(artifacts, count, limit, memory_needed, "raise --max-ram or the memory limit of the container")
    return _fit(artifacts, count, address_limit(), address_needed, "raise the limit of address space (ulimit -v)")


def _fit(
    artifacts: Sequence[ArtifactPlan],
    threads: int,
    limit: int | None,
    needed: Callable[[Sequence[ArtifactPlan], int], int],
    remedy: str,
) -> int:
    """The most threads, up to ``threads``, that stay under ``limit`` bytes; ResourceError if one does not."""
    if limit is None:
        return threads
    while threads > 1 and needed(artifacts, threads) > limit:
        threads -= 1
    if needed(artifacts, threads) > limit:
        raise ResourceError(
            "the memory limit is too small for this model's rows",
            expected=f"{needed(artifacts, threads)} bytes",
            found=f"a limit of {limit} bytes",
            remedy=remedy,
        )
    return threads


def refuse_unwritable(directory: Path) -> Path:
    """The nearest directory above that exists; AccessError where nothing can be made in it."""
    path = directory.absolute()
    while not os.path.lexists(path):
        path = path.parent
    if not path.is_dir():
        raise AccessError("the output directory is a file", file=path, remedy="choose another directory with -o")
    if not os.access(path, os.W_OK | os.X_OK):
        raise AccessError(
            "the output directory cannot be written", file=path, remedy="choose another directory with -o"
        )
    return path


def _check_file_size(artifacts: Sequence[ArtifactPlan]) -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if soft == resource.RLIM_INFINITY:
        return
    for artifact in artifacts:
        for file in artifact.files:
            if file.size > soft:
                raise ResourceError(
                    "a file would be larger than this process may write",
                    file=file.name,
                    expected=f"at most {soft} bytes (RLIMIT_FSIZE)",
                    found=f"{file.size} bytes",
                    remedy="raise the limit (ulimit -f) or use --split-max-size",
                )
