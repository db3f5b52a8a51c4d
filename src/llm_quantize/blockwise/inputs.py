"""What the matrices of a block are given: windows run through it, captured in chunks, summed up tile by tile.

Two streams of hidden states go through the blocks side by side: the source's own, and the one that leaves the blocks
quantized so far. A matrix is calibrated on the second; how it differs from the first is what a layer makes up for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm_quantize.blockwise.gram import Gram
from llm_quantize.calibration.activations import Activations
from llm_quantize.calibration.forward import Block, Tap
from llm_quantize.engine import run
from llm_quantize.errors import NumericPolicyError

CHUNK_TOKENS = 8192
"""Tokens whose inputs are held together; a constant, as sums in another order would be other sums."""

Inputs = dict[tuple[str, int], Tensor]
"""(tap, matrix) -> what one window gave it, (tokens, columns) in the network's dtype."""


class _EnoughError(Exception):
    """Every input that was asked for has been seen."""


@dataclass(frozen=True)
class Streams:
    """Hidden states of all windows: ``quantized``, and ``full``, the source's own (the same one, where nobody asks for
    the difference)."""

    quantized: Activations
    full: Activations

    @property
    def windows(self) -> int:
        return self.quantized.shape[0]

    @property
    def length(self) -> int:
        return self.quantized.shape[1]


class Pool:
    """Runs jobs in threads, each with one thread of torch: a sum must not depend on how many there are."""

    def __init__(self, threads: int, stop: threading.Event, *, resumable: bool) -> None:
        self.threads, self._stop, self._resumable = threads, stop, resumable

    def each(self, work: Callable[[Any], Any], jobs: Iterable[Any]) -> Iterator[Any]:
        """Results in the order of completion. The first exception ends the work; StoppedError after a signal."""

        def one(job: Any) -> Any:
            torch.set_num_threads(1)
            return work(job)

        return run(one, jobs, threads=self.threads, stop=self._stop, resumable=self._resumable)

    def do(self, jobs: Iterable[Callable[[], None]]) -> None:
        """Run them all."""
        for _ in self.each(lambda job: job(), jobs):
            pass


def capture(block: Block, hidden: Tensor, wanted: Sequence[Tap]) -> Inputs:
    """What the taps ``wanted`` see of one window; the block is left as soon as the last of them, if it is of a single
    matrix, has seen it."""
    names = {tap.name for tap in wanted}
    last = wanted[-1].name if wanted[-1].matrices == 1 else ""
    found: Inputs = {}

    def sink(tap: Any, matrix: int, inputs: Tensor) -> None:
        if tap.name in names and inputs.shape[0]:
            found[tap.name, matrix] = inputs.detach().clone()
            if tap.name == last:
                raise _EnoughError

    try:
        with block.observe(sink):
            block(hidden)
    except _EnoughError:
        pass
    return found


def collect(
    pool: Pool,
    taps: Sequence[Tap],
    streams: Streams,
    block: Block,
    full: Block | None,
    on_windows: Callable[[int], None],
    scales: Mapping[str, Tensor] | None = None,
) -> dict[tuple[str, int], Gram]:
    """The sums of every matrix of ``taps`` over all windows of the quantized stream through ``block``. With ``full``,
    the block of the source, cross products of single matrices as well (experts see other tokens in each stream).

    ``scales``: {tap: s (columns,)}: the quantized model's inputs are those of the source divided by s.

    An expert that no token reached is absent. Raises NumericPolicyError for inputs that are not finite.
    """
    columns = {tap.name: tap for tap in taps}
    grams: dict[tuple[str, int], Gram] = {}
    paired = [tap for tap in taps if tap.matrices == 1]
    step = max(1, CHUNK_TOKENS // streams.length)

    def window(index: int) -> tuple[int, Inputs, Inputs]:
        found = capture(block, streams.quantized.read(index), taps)
        own = capture(full, streams.full.read(index), paired) if full is not None and paired else {}
        for (tap, _), values in found.items():
            _refuse_nonfinite(values, tap, index)
        return index, found, own

    for first in range(0, streams.windows, step):
        chunk = range(first, min(first + step, streams.windows))
        results = {}
        for index, found, own in pool.each(window, chunk):
            results[index] = (found, own)
            on_windows(1)
        jobs: list[Callable[[], None]] = []
        keys = dict.fromkeys(key for index in chunk for key in results[index][0])
        for key in keys:
            inputs = torch.cat([results[index][0][key] for index in chunk if key in results[index][0]])
            cross = full is not None and columns[key[0]].matrices == 1
            theirs = torch.cat([results[index][1][key] for index in chunk]) if cross else None
            if theirs is not None and scales is not None and key[0] in scales:
                theirs = (theirs.float() / scales[key[0]].to(theirs.device)).to(theirs.dtype)
            if key not in grams:
                grams[key] = Gram(columns[key[0]].columns, cross=cross, device=inputs.device)
            jobs += grams[key].jobs(inputs, theirs)
        pool.do(jobs)
    for gram in grams.values():
        gram.finish()
    return grams


def propagate(
    pool: Pool, block: Block, before: Activations, after: Activations, on_windows: Callable[[int], None]
) -> None:
    """All windows through the block."""

    def window(index: int) -> None:
        values = block(before.read(index))
        _refuse_nonfinite(values, f"the output of block {block.index}", index)
        after.write(index, values)

    for _ in pool.each(window, range(before.shape[0])):
        on_windows(1)


def _refuse_nonfinite(values: Tensor, where: str, window: int) -> None:
    if bool(torch.isfinite(values).all()):
        return
    places = torch.nonzero(~torch.isfinite(values))
    token, channel = (int(index) for index in places[0])
    raise NumericPolicyError(
        f"an activation is not finite: {where}, sample {window}, token {token}, channel {channel} "
        f"({len(places)} such values in this sample)",
        tensor=where,
        expected="finite activations",
        found=float(values[token, channel]),
        remedy="check the checkpoint with `llm-quantize info`; finished blocks are kept",
    )
