"""What a pass of windows through blocks will need, from sizes alone: memory, threads, disk."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from llm_quantize import memory
from llm_quantize.architectures.base import Hyper
from llm_quantize.errors import ResourceError

HIDDEN_BYTES = 256 << 20
"""Hidden states beyond this go to a file: a killed run then goes on from them, and memory does not grow with text."""

MARGIN_BYTES = 64 << 20  # allocator slack, oneDNN's reordered copies, Python objects


@dataclass(frozen=True)
class Fitted:
    """A pass that fits: ``threads``, whether hidden states stay in memory, their bytes, and the planned peak."""

    threads: int
    in_memory: bool
    hidden_bytes: int
    peak: int


def workspace_bytes(hyper: Hyper, length: int, itemsize: int, *, eager: bool) -> int:
    """Temporary values while one window of ``length`` tokens goes through one block.

    Counted: hidden states and norms (6 widths), queries, keys, values and their rotated copies, the three wide values
    of the feed-forward (of all experts a token uses), and the scores: of every head, raw, weighted and in float32,
    where attention computes them all at once (``eager``), of one head's tiles elsewhere.
    """
    heads = (4 * hyper.n_head + 3 * hyper.n_head_kv) * hyper.head_dim
    wide = hyper.feed_forward_length
    if hyper.n_expert:
        wide = max(wide, hyper.n_expert_used * hyper.expert_feed_forward_length + hyper.shared_feed_forward_length)
    scores = length * length * (hyper.n_head * (2 * itemsize + 4) if eager else 16)
    return length * itemsize * (6 * hyper.embedding_length + heads + 3 * wide) + scores


def fit(
    *,
    fixed: int,
    each: int,
    hidden: int,
    threads: int | None,
    max_ram: int | None,
    device: str = "cpu",
    copies: int = 1,
) -> Fitted:
    """Threads and place of hidden states for a pass that needs ``fixed`` bytes, ``each`` more per thread and
    ``copies`` times ``hidden`` bytes of hidden states.

    Raises ResourceError naming the figures where one thread, its hidden states on disk, does not fit the limit
    (--max-ram, cgroup, address space).
    """
    count = 1 if device != "cpu" else threads or memory.available_cpus()
    now, peak_so_far = memory.resident_bytes(), memory.peak_resident_bytes()
    limit = memory.memory_limit(max_ram)
    address = memory.address_limit()
    in_memory = copies * hidden <= HIDDEN_BYTES

    def needed(number: int, kept: bool) -> int:
        return MARGIN_BYTES + fixed + number * each + (copies * hidden if kept else 0)

    def fits(number: int, kept: bool) -> bool:
        growth = needed(number, kept)
        mapped = memory.mapped_bytes() + growth + number * memory.thread_address_bytes()
        return (limit is None or now + growth <= limit) and (address is None or mapped <= address)

    if in_memory and not fits(1, True):
        in_memory = False
    while count > 1 and not fits(count, in_memory):
        count -= 1
    if not fits(count, in_memory):
        bound = min(value for value in (limit, address) if value is not None)
        raise ResourceError(
            "one block of this model and its statistics do not fit the memory limit",
            expected=f"{now + needed(1, False):,} bytes",
            found=f"a limit of {bound:,} bytes",
            remedy="raise --max-ram or the limit, take a smaller --sequence-length, or collect imatrix without hessian",
        )
    return Fitted(count, in_memory, copies * hidden, max(peak_so_far, now + needed(count, in_memory)))


def check_disk(directory: Path, needed: int) -> None:
    """Raise ResourceError where ``directory`` (which exists) has not ``needed`` bytes to give."""
    facts = os.statvfs(directory)
    free = facts.f_bavail * facts.f_frsize
    if needed > free:
        raise ResourceError(
            "not enough disk space for the statistics and the hidden states",
            file=directory,
            expected=f"{needed:,} bytes",
            found=f"{free:,} bytes free",
            remedy="free some space, set LLM_QUANTIZE_CACHE to another directory, or take fewer --calibration-samples",
        )
