"""Refuse before work what cannot succeed: disk, memory, file-size limits, an output that cannot be written."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llm_quantize import memory
from llm_quantize.engine import ISOLATED
from llm_quantize.errors import AccessError, ResourceError
from llm_quantize.plan import ArtifactPlan, work_bytes


@dataclass(frozen=True)
class Preflight:
    """What a run may use: threads after fitting the memory limit, and the figures it was decided on (bytes)."""

    threads: int
    memory_needed: int
    memory_limit: int | None
    disk_needed: int
    disk_free: int


def address_needed(artifacts: Sequence[ArtifactPlan], threads: int) -> int:
    """Address space of a run, in bytes: what is mapped now; for each thread a stack, an arena and its buffers."""
    return memory.mapped_bytes() + threads * memory.thread_address_bytes() + work_bytes(artifacts, threads)


def memory_needed(artifacts: Sequence[ArtifactPlan], threads: int, engine: str = "threads") -> int:
    """Peak resident bytes of a run that goes on from here: the model is open, its buffers come on top.

    A worker that opens the model for itself takes once more what this process has taken so far."""
    now = memory.resident_bytes()
    workers = threads * now if engine in ISOLATED else 0
    return max(memory.peak_resident_bytes(), now + workers + work_bytes(artifacts, threads))


def check(
    artifacts: Sequence[ArtifactPlan],
    directory: Path,
    *,
    threads: int | None,
    max_ram: int | None,
    already_allocated: int = 0,
    ignore_space: bool = False,
    engine: str = "threads",
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
    count = fit_threads(artifacts, threads=threads, max_ram=max_ram, engine=engine)
    return Preflight(count, memory_needed(artifacts, count, engine), memory.memory_limit(max_ram), needed, free)


def fit_threads(
    artifacts: Sequence[ArtifactPlan], *, threads: int | None, max_ram: int | None, engine: str = "threads"
) -> int:
    """The threads (or other workers) that a run may have, at most ``threads`` (all CPUs).

    Raises ResourceError where memory suits not one."""
    limit = memory.memory_limit(max_ram)
    count = threads or memory.available_cpus()
    needed = partial(memory_needed, engine=engine)
    count = _fit(artifacts, count, limit, needed, "raise --max-ram or the memory limit of the container")
    inside = 1 if engine in ISOLATED else count  # address space is each process's own
    mapped = _fit(
        artifacts, inside, memory.address_limit(), address_needed, "raise the limit of address space (ulimit -v)"
    )
    return count if engine in ISOLATED else mapped


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
