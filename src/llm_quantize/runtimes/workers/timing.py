"""How fast a model runs, and what memory its process takes: one clock for every runtime. evaluation/speed.py says what
is timed; this file stands alone, as interpreters that do not know llm_quantize run it too."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

Read = Callable[[Sequence[int]], object]
Write = Callable[[Sequence[int], Sequence[int]], float]


def resident() -> int:
    """Bytes of this process that lie in memory; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS:")), 0)


def time_model(
    read: Read, write: Write, *, vocabulary: int, asked: Mapping[str, int], threads: int
) -> dict[str, float]:
    """Seconds to "read" ``asked["prompt"]`` tokens and to "write" ``asked["new"]`` behind ``asked["lead"]`` (medians of
    ``asked["repeats"]`` after one to warm up), "memory" after loading and one prompt (bytes), and the "cpu_share" of
    ``threads`` threads.

    ``read``: reads ids at once into an empty cache, and returns when that is done. ``write``: reads the first ids like
    that and then writes as many tokens as the second ones are, one by one; it gives back the seconds of the latter.
    """
    step = max(1, vocabulary // (asked["prompt"] + 1))
    prompt = [(index * step) % vocabulary for index in range(1, asked["prompt"] + 1)]
    lead, new = prompt[: asked["lead"]], prompt[: asked["new"]]

    def reading() -> float:
        began = time.perf_counter()
        read(prompt)
        return time.perf_counter() - began

    read(prompt)
    memory = resident()
    wall, cpu = time.perf_counter(), time.process_time()
    seconds = median(reading, asked["repeats"]), median(lambda: write(lead, new), asked["repeats"])
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {"read": seconds[0], "write": seconds[1], "memory": memory, "cpu_share": cpu / (wall * threads)}


def one_by_one(read: Read, advance: Callable[[int, int], object]) -> Write:
    """``write`` of a runtime that is asked for each token: ``advance(id, position)`` reads one behind the others."""

    def write(lead: Sequence[int], new: Sequence[int]) -> float:
        read(lead)
        began = time.perf_counter()
        for position, token in enumerate(new, len(lead)):
            advance(token, position)
        return time.perf_counter() - began

    return write


def median(timed: Callable[[], float], repeats: int) -> float:
    """Seconds that ``timed`` tells: once to warm up, then the median."""
    return statistics.median([timed() for _ in range(repeats + 1)][1:])
