"""Refuse before work what cannot succeed: disk, memory, file-size limits, an output that cannot be written."""

from __future__ import annotations

import os
import resource
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from llm_quantize import memory
from llm_quantize.architectures.rows import chunk_rows, matrix_shape
from llm_quantize.engine import ISOLATED
from llm_quantize.errors import AccessError, ResourceError
from llm_quantize.measures.amounts import bytes_text
from llm_quantize.memory import Sizes
from llm_quantize.plan import ArtifactPlan

FIXED_WORK = 6 << 20  # journal, jobs, the pool
PER_THREAD = 1 << 20  # stack, kernel scratch


@dataclass(frozen=True)
class Preflight:
    """What a run may use: threads after fitting the memory limit, and the figures it was decided on (bytes).
    ``memory_needed``: at the height of the whole run; ``before``: resident when it began (``memory.peak``)."""

    threads: int
    memory_needed: int
    memory_limit: int | None
    disk_needed: int
    disk_free: int
    before: int | None = None


def rounding_sizes(artifacts: Sequence[ArtifactPlan]) -> Sizes:
    """What rounding single tensors holds: it goes by the chunk and the widest row, not by the model's size."""
    bookkeeping = sum(file.held_bytes for artifact in artifacts for file in artifact.files)
    bookkeeping += sum(4096 * len(artifact.tensors) for artifact in artifacts)
    return Sizes(
        margin=FIXED_WORK + bookkeeping,
        each=PER_THREAD + _chunk_bytes(artifacts) + max((one.source_scratch for one in artifacts), default=0),
        refusal=(
            "the memory limit is too small for this model's rows",
            "raise --max-ram or the memory limit of the container",
        ),
    )


def _chunk_bytes(artifacts: Sequence[ArtifactPlan]) -> int:
    """The most that one thread holds of one chunk: as read, gathered, converted, and packed for each qtype."""
    most = 0
    alike = all(artifact.alike for artifact in artifacts)
    groups = [artifacts] if alike else [[artifact] for artifact in artifacts]
    for together in chain.from_iterable(zip(*(a.tensors for a in group), strict=True) for group in groups):
        rows, columns = matrix_shape(together[0].output.shape)
        count = min(rows, chunk_rows(columns))
        stored = artifacts[0].source_itemsize
        converted = 4 if stored not in (2, 4) or any(piece.altered for piece in together[0].output.pieces) else 0
        packed = {tensor.qtype: tensor.row_bytes for tensor in together}
        most = max(most, count * (columns * (3 * stored + 2 * converted) + sum(packed.values())))
    return most


def fit(
    artifacts: Sequence[ArtifactPlan],
    *,
    threads: int | None,
    max_ram: int | None,
    before: int | None = None,
    engine: str = "threads",
) -> tuple[int, int]:
    """The threads (or other workers) that round, at most ``threads`` (all CPUs), and the resident bytes of the run at
    its height, all phases of all artifacts, each with the threads that fit it.

    ``before``: see ``memory.peak``. Raises ResourceError where a phase does not fit with one thread.
    """
    sizes = rounding_sizes(artifacts)
    if engine in ISOLATED:  # a worker opens the model for itself, and takes what this process has taken for that
        sizes = replace(sizes, each=sizes.each + memory.before_libraries())
    phases = dict.fromkeys(phase for artifact in artifacts for phase in artifact.phases)
    # The most demanding first: what a refusal asks for is then enough for the whole run.
    for phase in sorted((sizes, *phases), key=lambda one: memory.least(one, before=before), reverse=True):
        memory.fit(phase, threads=1, max_ram=max_ram, before=before)
    rounding = memory.fit(sizes, threads=threads, max_ram=max_ram, before=before)
    heights = [memory.fit(phase, threads=rounding.threads, max_ram=max_ram, before=before).peak for phase in phases]
    return rounding.threads, max(rounding.peak, *heights, 0)


def check(
    artifacts: Sequence[ArtifactPlan],
    directory: Path,
    *,
    threads: int | None,
    max_ram: int | None,
    before: int | None = None,
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
            expected=f"{bytes_text(needed)} ({needed} bytes)",
            found=f"{bytes_text(free)} ({free} bytes) free",
            remedy="free some space, choose another directory with -o, or a smaller level; --ignore-space tries anyway",
        )
    _check_file_size(artifacts)
    count, height = fit(artifacts, threads=threads, max_ram=max_ram, before=before, engine=engine)
    return Preflight(count, height, memory.memory_limit(max_ram), needed, free, before)


def check_disk(directory: Path, needed: int, *, held: int = 0, remedy: str) -> None:
    """Raise ResourceError where ``directory`` (which exists) has not ``needed`` bytes to give to a run's own files.
    ``held``: bytes of them that an earlier run has on disk already; ``remedy``: what helps beside freeing space."""
    facts = os.statvfs(directory)
    free = facts.f_bavail * facts.f_frsize
    there = f", beside {bytes_text(held)} that are there already" if held else ""
    if needed - held > free:
        raise ResourceError(
            "not enough disk space for what the run keeps on its way (statistics and hidden states)",
            file=directory,
            expected=f"{bytes_text(needed - held)} ({needed - held:,} bytes){there}",
            found=f"{bytes_text(free)} ({free:,} bytes) free",
            remedy=f"free some space, {remedy}",
        )


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
