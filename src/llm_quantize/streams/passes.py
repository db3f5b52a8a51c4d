"""The one loop that leads windows of text through a network, one decoder block in memory at a time.

    embed → block 0: every window of every stream through it → block 1 → …

Calibration, quality, sensitivity and the run that quantizes block by block all go this way. They differ in how many
streams of hidden states they lead, in whose weights a block has, in what they do while it is loaded, and in what they
say of values that are not finite: that is what they give. Windows run side by side, each on one thread of torch.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llm_quantize.errors import NumericPolicyError
from llm_quantize.streams.hidden import Activations
from llm_quantize.streams.network import Block, Network
from llm_quantize.streams.pool import Pool, restored
from llm_quantize.streams.weights import Weights

Call = Callable[[Block, torch.Tensor, int], torch.Tensor | None]
"""(block, hidden states (length, width) of a window, its number) -> what leaves the block; None: it was not run to its
end."""

Check = Callable[[torch.Tensor, int, int], None]
"""(what left a block, the block's index, the window): raises NumericPolicyError for values that are not finite."""


def call(block: Block, hidden: torch.Tensor, _window: int) -> torch.Tensor:
    """A window through a block, and nothing else."""
    return block(hidden)


@dataclass(frozen=True)
class Finite:
    """The check of a measurement. ``file``: whose weights they are, and then it is told how many values are not
    finite; ``tensor``: the one that was replaced."""

    file: Path | None = None
    tensor: str | None = None

    def __call__(self, values: torch.Tensor, index: int, window: int) -> None:
        finite = torch.isfinite(values)
        if bool(finite.all()):
            return
        raise NumericPolicyError(
            f"the hidden states of window {window} are not finite after block {index}",
            file=self.file,
            tensor=self.tensor,
            found=None if self.file is None else f"{int((~finite).sum())} of {finite.numel()} values",
            remedy="llm-quantize verify names the tensors with NaN or infinite weights",
        )


@dataclass(frozen=True)
class Move:
    """Hidden states through a block: ``windows`` of ``before`` (None: all) to ``after``, which may be the same (None:
    what leaves the block is dropped). ``check`` looks at what leaves it; ``call`` runs a window."""

    before: Activations
    after: Activations | None
    check: Check | None
    call: Call = call
    windows: Sequence[int] | None = None


class Pass:
    """``ids``, int64 (windows, length), on their way through ``network``. ``on_window`` hears of each window that has
    gone through a block."""

    def __init__(
        self, network: Network, ids: torch.Tensor, pool: Pool, on_window: Callable[[], None] = lambda: None
    ) -> None:
        self.network, self.ids, self.pool, self._on_window = network, ids, pool, on_window

    def embed(self, weights: Weights, states: Activations) -> None:
        """Put the hidden states that enter block 0 into ``states``."""
        with restored():
            torch.set_num_threads(1)
            for window, values in enumerate(self.network.embed(weights, self.ids)):
                states.write(window, values)

    def run(self, indices: Iterable[int], weights: Sequence[Weights], on_block: Callable[[Block, int], None]) -> None:
        """Blocks ``indices``, each with one weights after the other: ``on_block(block, number of the weights)``."""
        for index in indices:
            for number, own in enumerate(weights):
                with self.block(index, own) as block:
                    on_block(block, number)

    @contextmanager
    def block(self, index: int, weights: Weights) -> Iterator[Block]:
        """A block with its weights; afterwards they are gone from this process."""
        try:
            with self.network.block(index, weights) as block:
                yield block
        finally:
            give_back_memory()

    def through(self, block: Block, moves: Sequence[Move]) -> None:
        """All ``moves`` through ``block``, window by window side by side.

        Raises what their checks raise, and StoppedError after a signal.
        """

        def step(job: tuple[Move, int]) -> None:
            move, window = job
            found = move.call(block, move.before.read(window), window)
            if found is not None:
                if move.check is not None:
                    move.check(found, block.index, window)
                if move.after is not None:
                    move.after.write(window, found)

        for _ in self.pool.each(step, ((move, window) for move in moves for window in _windows(move))):
            self._on_window()


def _windows(move: Move) -> Sequence[int]:
    return range(move.before.shape[0]) if move.windows is None else move.windows


def give_back_memory() -> None:
    """Let the C library return freed weights to the system, where it would keep them (glibc)."""
    if sys.platform == "linux":
        trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
