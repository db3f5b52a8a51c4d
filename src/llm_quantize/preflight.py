"""Refuse before work what cannot succeed: disk, memory, file-size limits, an output that cannot be written."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_quantize.errors import AccessError, ResourceError
from llm_quantize.plan import ArtifactPlan, memory_needed

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


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
    """The smallest of --max-ram, the cgroup's limit, RLIMIT_AS and physical memory, in bytes."""
    limits = [] if max_ram is None else [max_ram]
    for path in _CGROUP_LIMITS:
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            limits.append(int(text))
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        limits.append(soft)
    if "SC_PHYS_PAGES" in os.sysconf_names:
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(limits) if limits else None


def resident_bytes() -> int:
    """Resident memory of this process now; the peak so far where the system does not tell the present."""
    try:
        fields = Path("/proc/self/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Highest resident memory of this process so far."""
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
    parent = _existing_parent(directory)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise AccessError(
            "the output directory cannot be written", file=parent, remedy="choose another directory with -o"
        )
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
    limit = memory_limit(max_ram)
    wanted = threads or available_cpus()
    count = wanted
    while limit is not None and count > 1 and memory_needed(artifacts, count) > limit:
        count -= 1
    if limit is not None and memory_needed(artifacts, count) > limit:
        raise ResourceError(
            "the memory limit is too small for this model's rows",
            expected=f"{memory_needed(artifacts, count)} bytes",
            found=f"a limit of {limit} bytes",
            remedy="raise --max-ram or the process limit",
        )
    return Preflight(count, memory_needed(artifacts, count), limit, needed, free)


def _existing_parent(directory: Path) -> Path:
    path = directory.absolute()
    while not path.exists():
        path = path.parent
    if not path.is_dir():
        raise AccessError("the output directory is a file", file=path, remedy="choose another directory with -o")
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
