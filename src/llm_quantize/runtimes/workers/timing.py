"""How fast a model of transformers runs, and what memory its process takes; evaluation/speed.py says what is timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def resident() -> int:
    """Bytes of this process that lie in memory; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS:")), 0)


def time_model(model: Any, asked: dict[str, int], threads: int) -> dict[str, float]:
    """Seconds to read ``asked["prompt"]`` tokens and to write ``asked["new"]`` behind ``asked["lead"]`` (medians of
    ``asked["repeats"]`` after one to warm up), ``memory`` after loading and one prompt, ``cpu_share``."""
    import torch

    vocabulary = model.get_input_embeddings().weight.shape[0]
    step = max(1, vocabulary // (asked["prompt"] + 1))
    prompt = torch.tensor([[(index * step) % vocabulary for index in range(1, asked["prompt"] + 1)]])
    cache: Any = None

    def read(tokens: Any) -> None:
        nonlocal cache
        cache = model(input_ids=tokens, use_cache=True).past_key_values

    def lead() -> None:
        read(prompt[:, : asked["lead"]])

    def write() -> None:
        for offset in range(asked["new"]):
            model(input_ids=prompt[:, offset : offset + 1], past_key_values=cache, use_cache=True)

    with torch.inference_mode():
        read(prompt)
        memory = resident()
        wall, cpu = time.perf_counter(), time.process_time()
        reading = _median(lambda: read(prompt), asked["repeats"])
        writing = _median(write, asked["repeats"], before=lead)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {"read": reading, "write": writing, "memory": memory, "cpu_share": cpu / (wall * threads)}


def _median(work: Callable[[], None], repeats: int, before: Callable[[], None] | None = None) -> float:
    """Seconds of ``work``: once to warm up, then the median; ``before`` is not timed."""
    times = []
    for _ in range(repeats + 1):
        if before is not None:
            before()
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])
