"""Accumulators: what one window adds to the statistics of a block, and sums that do not depend on who came first.

Legend: X (tokens, columns) the inputs that one matrix saw in one window; s = sum of x^2, a = max |x|, m = sum of x,
H = X^T X, n = tokens. s, m and the sums over windows are float64; H of a window is one float32 product (its relative
error, about 1e-6, is far below what damping and rounding of a Hessian's user allow, and float64 would cost twice the
time), added up in float64.

Threads compute windows side by side, but windows are added strictly in their order, so the sums have the same bytes
for any number of threads (torch must run one thread in each: ``torch.set_num_threads(1)``). A window that is early
waits in memory; beyond ``early_bytes`` its thread waits. Windows must be begun in ascending order, as a pool that takes
jobs from a queue does. Dense twin: tests/oracles/dense_statistics.py. The file they go to: io/statistics_file.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llm_quantize.errors import NumericPolicyError
from llm_quantize.io.statistics_layout import TapLike, check_kinds
from llm_quantize.memory import TORCH_BYTES, Sizes
from llm_quantize.streams.sizes import NetworkSizes

if TYPE_CHECKING:
    from torch import Tensor

Sink = Callable[[TapLike, int, "Tensor"], None]
EARLY_BYTES = 256 << 20
_CHUNK_ROWS = 64  # rows turned to float64 at a time: they stay in the cache


@dataclass(frozen=True)
class Partial:
    """What one window adds to one matrix, on the CPU; None for a kind that is not collected.

    ``sum_squares`` and ``sums``: float64 (columns,); ``absmax``: float32 (columns,); ``hessian``: float32
    (columns, columns).
    """

    count: int
    sum_squares: npt.NDArray[np.float64] | None = None
    sums: npt.NDArray[np.float64] | None = None
    absmax: npt.NDArray[np.float32] | None = None
    hessian: npt.NDArray[np.float32] | None = None

    def arrays(self) -> list[npt.NDArray[Any]]:
        """The arrays that are there."""
        return [values for values in (self.sum_squares, self.sums, self.absmax, self.hessian) if values is not None]


def partial(kinds: Sequence[str], inputs: Tensor, *, tap: str = "", window: int = 0) -> Partial:
    """The statistics of ``inputs``: (tokens, columns), float32, bfloat16 or float16, on any device.

    Raises NumericPolicyError, naming ``tap``, ``window``, token and channel, where a value is NaN or infinite.
    """
    import torch

    if inputs.device.type == "mps":
        inputs = inputs.cpu()  # there is no float64 on this device
    squares = torch.zeros(inputs.shape[1], dtype=torch.float64, device=inputs.device)
    sums = torch.zeros_like(squares)
    values = inputs.detach()
    for start in range(0, len(values), _CHUNK_ROWS):
        wide = values[start : start + _CHUNK_ROWS].to(torch.float64)
        if "absmax" in kinds:
            sums += wide.sum(0)
        squares += wide.square_().sum(0)
    if not bool(torch.isfinite(squares).all()):
        remedy = "calibrate in float32 if this was bfloat16 or float16; check the checkpoint with `llm-quantize info`"
        refuse_nonfinite(inputs, f"layer input {tap}", window, tensor=tap, remedy=remedy)
    hessian = None
    if "hessian" in kinds:
        if float(squares.max()) >= float(np.finfo(np.float32).max):
            _refuse_overflow(tap, window, float(squares.max()))
        wide = values.to(torch.float32)
        hessian = (wide.T @ wide).cpu().numpy()
    absmax = values.abs().amax(0).to(torch.float32).cpu().numpy() if "absmax" in kinds else None
    return Partial(
        count=inputs.shape[0],
        sum_squares=squares.cpu().numpy() if "imatrix" in kinds else None,
        sums=sums.cpu().numpy() if "absmax" in kinds else None,
        absmax=absmax,
        hessian=hessian,
    )


def refuse_nonfinite(values: Tensor, where: str, window: int, *, tensor: str, remedy: str) -> None:
    """Raise NumericPolicyError for the first of ``values`` (tokens, channels) that is NaN or infinite; there is one."""
    import torch

    places = torch.nonzero(~torch.isfinite(values))
    token, channel = (int(index) for index in places[0])
    raise NumericPolicyError(
        f"an activation is not finite: {where}, sample {window}, token {token}, channel {channel} "
        f"({len(places)} such values in this sample)",
        tensor=tensor,
        expected="finite activations",
        found=float(values[token, channel]),
        remedy=remedy,
    )


def _refuse_overflow(tap: str, window: int, found: float) -> None:
    raise NumericPolicyError(
        f"the squares of the activations of layer input {tap} overflow float32 in sample {window}",
        tensor=tap,
        expected=f"sums of squares below {float(np.finfo(np.float32).max):.3g}",
        found=f"{found:.3g}",
        remedy="collect imatrix without hessian",
    )


class TapTotals:
    """The sums of one tap; ``arrays`` is what the file stores, hessian in float64 until it is written."""

    def __init__(self, tap: TapLike, kinds: Sequence[str]) -> None:
        shape = (tap.matrices, tap.columns)
        self.arrays: dict[str, npt.NDArray[Any]] = {"counts": np.zeros(tap.matrices, np.int64)}
        if "imatrix" in kinds:
            self.arrays["sum_squares"] = np.zeros(shape, np.float64)
        if "absmax" in kinds:
            self.arrays["sums"] = np.zeros(shape, np.float64)
            self.arrays["absmax"] = np.zeros(shape, np.float32)
        if "hessian" in kinds:
            self.arrays["hessian"] = np.zeros((*shape, tap.columns), np.float64)

    def add(self, matrix: int, partial: Partial) -> None:
        """Add what one window saw of one matrix."""
        self.arrays["counts"][matrix] += partial.count
        for suffix in ("sum_squares", "sums", "hessian"):
            values = getattr(partial, suffix)
            if values is not None:
                self.arrays[suffix][matrix] += values
        if partial.absmax is not None:
            np.maximum(self.arrays["absmax"][matrix], partial.absmax, out=self.arrays["absmax"][matrix])


@dataclass(frozen=True)
class StatisticsMemory:
    """Bytes that the statistics of one block take: ``totals`` once, ``window`` for each thread."""

    totals: int
    window: int


def memory_of(taps: Sequence[TapLike], kinds: Sequence[str]) -> StatisticsMemory:
    """What ``BlockSums`` of these taps will hold, from sizes alone."""
    totals = window = 0
    for tap in taps:
        cells, squares = tap.matrices * tap.columns, tap.matrices * tap.columns**2
        totals += 8 * tap.matrices + 8 * cells * ("imatrix" in kinds) + 12 * cells * ("absmax" in kinds)
        window += 8 * cells * ("imatrix" in kinds) + 12 * cells * ("absmax" in kinds)
        totals += 8 * squares * ("hessian" in kinds)
        window += 4 * squares * ("hessian" in kinds)
    return StatisticsMemory(totals, window)


def collecting_sizes(network: NetworkSizes, kinds: Sequence[str], windows: tuple[int, int], *, device: str) -> Sizes:
    """What a pass that collects holds, from sizes alone. ``windows``: number and length."""
    number, length = windows
    needs = [memory_of(taps, kinds) for taps in network.taps]
    partial = max((need.window for need in needs), default=0)
    return Sizes(
        libraries=TORCH_BYTES,
        ends=network.embedding,
        block=network.block,
        sums=max((need.totals for need in needs), default=0) + min(EARLY_BYTES, number * partial),
        each=partial + network.workspace(length) + network.scratch,
        hidden=network.hidden(number, length),
        device=device,
    )


class BlockSums:
    """The statistics of one block over windows 0, 1, 2, ..., computed by threads, added in order.

    with sums.window(i) as sink, block.observe(sink): block(hidden)
    """

    def __init__(self, taps: Sequence[TapLike], kinds: Sequence[str], *, early_bytes: int = EARLY_BYTES) -> None:
        self.taps = tuple(taps)
        self.kinds = check_kinds(kinds)
        self.totals = {tap.name: TapTotals(tap, self.kinds) for tap in taps}
        self._early_bytes = early_bytes
        self._early: dict[int, _Window] = {}
        self._held = 0
        self._next = 0
        self._adding = False
        self._failure: BaseException | None = None
        self._condition = threading.Condition()

    @contextmanager
    def window(self, index: int) -> Iterator[Sink]:
        """A sink for what window ``index`` feeds to the block; on leaving, it is added when its turn has come.

        A failure inside reaches every thread that waits for its turn. Raises NumericPolicyError (from the sink).
        """
        found = _Window(index, self.kinds)
        try:
            yield found.sink
            self._add(found)
        except BaseException as error:
            with self._condition:
                self._failure = self._failure or error
                self._condition.notify_all()
            raise

    def _add(self, window: _Window) -> None:
        """Add this window and all that follow it without a gap, or leave it, or wait while too much lies here."""
        with self._condition:
            if window.index < self._next or window.index in self._early:
                raise ValueError(f"window {window.index} was added before")
            while window.index != self._next and self._held + window.nbytes > self._early_bytes:
                if self._failure is not None:
                    raise self._failure
                self._condition.wait()
            self._early[window.index] = window
            self._held += window.nbytes
            if self._adding:
                return  # the thread that adds will find it
            self._adding = True
        while (ready := self._take()) is not None:
            for tap, matrix, found in ready.parts:
                self.totals[tap].add(matrix, found)
            with self._condition:
                self._next += 1
                self._condition.notify_all()

    def _take(self) -> _Window | None:
        """The window whose turn it is, if it is here; else this thread adds no more."""
        with self._condition:
            ready = self._early.pop(self._next, None)
            if ready is None:
                self._adding = False
            else:
                self._held -= ready.nbytes
            return ready

    @property
    def windows(self) -> int:
        """How many windows were added."""
        return self._next

    def counts(self) -> dict[str, npt.NDArray[np.int64]]:
        """Tokens so far: tap name -> int64 (matrices,). Complete when no thread is inside ``window``."""
        return {name: totals.arrays["counts"].copy() for name, totals in self.totals.items()}

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Everything under its name in the file, not copied. Raises ValueError where a window is missing."""
        if self._early:
            raise ValueError(f"window {self._next} is missing, {len(self._early)} later ones are there")
        return {
            f"{name}.{suffix}": values for name, total in self.totals.items() for suffix, values in total.arrays.items()
        }


class _Window:
    """What one window adds to a block."""

    def __init__(self, index: int, kinds: Sequence[str]) -> None:
        self.index, self.kinds = index, kinds
        self.parts: list[tuple[str, int, Partial]] = []
        self.nbytes = 0

    def sink(self, tap: TapLike, matrix: int, inputs: Tensor) -> None:
        """Take the inputs (tokens, columns) of one matrix; an expert that no token reached adds nothing."""
        if inputs.shape[0] == 0:
            return
        found = partial(self.kinds, inputs, tap=tap.name, window=self.index)
        self.parts.append((tap.name, matrix, found))
        self.nbytes += sum(values.nbytes for values in found.arrays())


def means(arrays: Mapping[str, npt.NDArray[Any]], tap: str) -> npt.NDArray[np.float64]:
    """sum / n of a tap's inputs: float64 (matrices, columns), zeros for a matrix that saw no token."""
    counts = np.maximum(arrays[f"{tap}.counts"], 1)
    return np.asarray(arrays[f"{tap}.sums"] / counts[:, None], np.float64)
