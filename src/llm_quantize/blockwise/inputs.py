"""What the matrices of a block are given: windows run through it, captured in chunks, summed up tile by tile.

Two streams of hidden states go through the blocks side by side: the source's own, and the one that leaves the blocks
quantized so far. A matrix is calibrated on the second; how it differs from the first is what a layer makes up for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm_quantize.blockwise.estimate import CHUNK_TOKENS, samples_of
from llm_quantize.blockwise.gram import Gram
from llm_quantize.calibration.statistics import refuse_nonfinite
from llm_quantize.errors import NumericPolicyError
from llm_quantize.streams.hidden import Activations
from llm_quantize.streams.kv_cache import CacheSink
from llm_quantize.streams.network import Block, Tap
from llm_quantize.streams.passes import Move, Pass

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


class FullInputs:
    """What the source's own model gives the matrices of one block, all windows of it: seen once, and read by one stage
    each. In memory, or in files without a name in ``directory``. Taps of experts are not held: their tokens differ
    from stream to stream.

    A stage whose matrices end modules of the block may leave there what the quantized stream gives them instead
    (``leave``): the passes after it skip those modules (``knowing``)."""

    def __init__(
        self, taps: Sequence[Tap], windows: int, length: int, dtype: torch.dtype, directory: Path | None
    ) -> None:
        self.taps, self.windows = [tap for tap in taps if tap.matrices == 1], windows
        self._held = {
            tap.name: Activations(windows, length, tap.columns, dtype, directory=directory) for tap in self.taps
        }
        self._left: set[str] = set()

    def read(self, tap: str, window: int) -> Tensor | None:
        """(tokens, columns) of a window; None for a tap that is not held."""
        held = self._held.get(tap)
        return None if held is None else held.read(window)

    def leave(self, tap: str, windows: Sequence[int], inputs: Tensor) -> None:
        """Put what the quantized stream gives ``tap`` for ``windows``, (their tokens, columns), in place of what the
        source's gives it."""
        for window, values in zip(windows, inputs.tensor_split(len(windows)), strict=True):
            self._held[tap].write(window, values)
        if windows[-1] + 1 == self.windows:
            self._left.add(tap)

    def knowing(self, block: Block, window: int, taps: Sequence[Tap] = ()) -> AbstractContextManager[None]:
        """While open, this thread skips in ``block`` what leads to inputs of ``window`` that were left here, but for
        what leads past one of ``taps``: a router may share its input with an expert that is done."""
        wanted = {tap.name for tap in taps}
        known = [tap for tap in self._left if block.skips(tap, wanted)] if window < self.windows else []
        return block.knowing({tap: self._held[tap].read(window) for tap in known})

    def see(self, way: Pass, block: Block, before: Activations, after: Activations | None) -> None:
        """Run all windows through ``block`` of the source; ``after`` takes what leaves it, None where nobody needs it.

        Raises NumericPolicyError for inputs that are not finite."""

        def look(block: Block, hidden: Tensor, window: int) -> Tensor | None:
            taps = self.taps if window < self.windows else []
            found, values = capture(block, hidden, taps, whole=after is not None)
            for (tap, _), inputs in found.items():
                self._held[tap].write(window, inputs)
            return values

        windows = range(self.windows if after is None else before.shape[0])
        way.through(block, [Move(before, after, None, look, windows)])

    def close(self) -> None:
        """Free memory or files."""
        for held in self._held.values():
            held.close()


def capture(
    block: Block, hidden: Tensor, wanted: Sequence[Tap], *, whole: bool = False, cache: CacheSink | None = None
) -> tuple[Inputs, Tensor | None]:
    """What the taps ``wanted`` see of one window, and, if the block is run to its end, what leaves it. Without
    ``whole`` it is left as soon as the last of them has seen its input, where that is one of a single matrix.
    ``cache`` is told of keys and values on the way."""
    names = {tap.name for tap in wanted}
    last = wanted[-1].name if wanted and wanted[-1].matrices == 1 and not whole else ""
    found: Inputs = {}

    def sink(tap: Any, matrix: int, inputs: Tensor) -> None:
        if tap.name in names and inputs.shape[0]:
            found[tap.name, matrix] = inputs.detach().clone()
            if tap.name == last:
                raise _EnoughError

    try:
        with block.observe(sink, cache):
            return found, block(hidden)
    except _EnoughError:
        return found, None


def collect(
    way: Pass,
    taps: Sequence[Tap],
    hidden: Activations,
    block: Block,
    full: FullInputs | None,
    scales: Mapping[str, Tensor] | None = None,
    *,
    windows: int,
    held_back: int = 0,
    samples: int = 0,
    looks: bool = False,
    cache: CacheSink | None = None,
    orders: Mapping[str, npt.NDArray[np.int64]] | None = None,
    leaves: bool = False,
    after: Activations | None = None,
) -> dict[tuple[str, int], Gram]:
    """The sums of every matrix of ``taps`` over the first ``windows`` of ``hidden`` through ``block``; with ``full``,
    cross products of single matrices as well.

    ``held_back``: so many of the windows, the last ones, are held back from sums with a cross product (``Gram.hold``).
    ``scales``: {tap: s (columns,)}: the block's inputs are those of the source divided by s. ``samples``: about so many
    inputs of each are kept; then, and where it ``looks``, the largest of each channel is noted. ``cache``: is told of
    keys and values by several threads. ``orders``: {tap: the order in which its inputs are summed up}. An expert that
    no token reached is absent. ``leaves``: nothing before ``taps`` will be replaced in ``block``, and what they are
    given is left in ``full`` for passes to come. ``after``: takes what leaves the block, which may be where ``hidden``
    stood.

    Raises NumericPolicyError for inputs that are not finite.
    """
    known = {tap.name: tap for tap in taps}
    grams: dict[tuple[str, int], Gram] = {}
    step = max(1, CHUNK_TOKENS // hidden.shape[1])

    results: dict[int, Inputs] = {}

    def look(block: Block, hidden: Tensor, window: int) -> Tensor | None:
        with nullcontext() if full is None else full.knowing(block, window, taps):
            results[window], values = capture(block, hidden, taps, whole=after is not None, cache=cache)
        return values

    def check(values: Tensor, index: int, window: int) -> None:
        if not bool(torch.isfinite(values).all()):
            _blame(window, results[window], full)
            _refuse_output(values, index, window)

    summed = windows - held_back
    for first in [*range(0, summed, step), *range(summed, windows, step)]:
        chunk = range(first, min(first + step, summed if first < summed else windows))
        way.through(block, [Move(hidden, after, check, look, chunk)])
        jobs: list[Callable[[], None]] = []
        seen: dict[tuple[str, int], tuple[Tensor, list[tuple[int, int]]]] = {}
        for key in dict.fromkeys(key for index in chunk for key in results[index]):
            parts = [(index, results[index].pop(key)) for index in chunk if key in results[index]]
            inputs = torch.cat([part for _, part in parts])
            seen[key] = inputs, [(index, len(part)) for index, part in parts]
            del parts
            theirs = _theirs(full, key[0], chunk, inputs, scales or {}) if known[key[0]].matrices == 1 else None
            if (order := (orders or {}).get(key[0])) is not None:
                columns = torch.from_numpy(order).to(inputs.device)
                inputs, theirs = inputs[:, columns], None if theirs is None else theirs[:, columns]
            if key not in grams:
                grams[key] = Gram(known[key[0]].columns, cross=theirs is not None, device=inputs.device)
            if first >= summed and theirs is not None:
                grams[key].hold(inputs, theirs)
            else:
                jobs += grams[key].jobs(inputs, theirs)
            if samples or looks:
                most = samples_of(samples, known[key[0]].matrices)
                grams[key].look(inputs, most * (first + len(chunk)) // windows - most * first // windows)
        way.pool.do(jobs)
        if not all(grams[key].finite() for key in grams):
            for index in chunk:
                _blame(index, _of_window(seen, index), full)
            tap, matrix = next(key for key, gram in grams.items() if not gram.finite())
            expert = f", expert {matrix}" if known[tap].matrices > 1 else ""
            raise NumericPolicyError(
                f"the squares of the activations of layer input {tap}{expert} overflow float32",
                tensor=tap,
                expected=f"sums of squares below {torch.finfo(torch.float32).max:.3g}",
                found=f"samples {chunk[0]} to {chunk[-1]}",
                remedy="check the checkpoint with `llm-quantize info`; finished blocks are kept",
            )
        if leaves and full is not None:
            for (tap, _), (inputs, _) in seen.items():
                if tap in block.endings and full.read(tap, chunk[0]) is not None:
                    full.leave(tap, chunk, inputs)
    for gram in grams.values():
        gram.finish()
    return grams


def _of_window(seen: Mapping[tuple[str, int], tuple[Tensor, list[tuple[int, int]]]], index: int) -> Inputs:
    """What window ``index`` gave, of what all windows of a chunk did: (inputs, [(window, its tokens)])."""
    found: Inputs = {}
    for key, (inputs, counts) in seen.items():
        parts = torch.split(inputs, [count for _, count in counts])
        for (window, _), part in zip(counts, parts, strict=True):
            if window == index:
                found[key] = part
    return found


def _blame(index: int, inputs: Inputs, full: FullInputs | None) -> None:
    """Raise NumericPolicyError if window ``index`` is the one whose inputs are not finite."""
    for (tap, _), values in inputs.items():
        _refuse_nonfinite(values, tap, index)
        theirs = None if full is None else full.read(tap, index)
        if theirs is not None:
            _refuse_nonfinite(theirs, tap, index)


def _theirs(
    full: FullInputs | None, tap: str, chunk: Sequence[int], inputs: Tensor, scales: Mapping[str, Tensor]
) -> Tensor | None:
    """The source's own inputs for the same windows, on the scale of ``inputs``."""
    if full is None:
        return None
    parts = [part for index in chunk if (part := full.read(tap, index)) is not None]
    theirs = torch.cat(parts).to(inputs.device)
    if tap in scales:
        theirs = (theirs.float() / scales[tap].to(theirs.device)).to(theirs.dtype)
    return theirs


def propagate(
    way: Pass, block: Block, before: Activations, after: Activations, windows: Sequence[int], full: FullInputs | None
) -> None:
    """``windows`` through the block, but for what was left in ``full``. Raises NumericPolicyError where what leaves it
    is not finite."""

    def go(block: Block, hidden: Tensor, window: int) -> Tensor:
        with nullcontext() if full is None else full.knowing(block, window):
            return block(hidden)

    way.through(block, [Move(before, after, _refuse_output, go, windows)])


def _refuse_output(values: Tensor, index: int, window: int) -> None:
    _refuse_nonfinite(values, f"the output of block {index}", window)


def _refuse_nonfinite(values: Tensor, where: str, window: int) -> None:
    if not bool(torch.isfinite(values).all()):
        remedy = "check the checkpoint with `llm-quantize info`; finished blocks are kept"
        refuse_nonfinite(values, where, window, tensor=where, remedy=remedy)
