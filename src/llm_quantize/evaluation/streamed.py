"""A source and its artifacts side by side, block by block, and their predictions compared.

Every model is a stream of hidden states, one window after another. For each block the source's weights are loaded
and all its windows run through, then the first artifact's weights and its windows, and so on. At the end the final
norm and the head of the source and of one artifact or several stand together, and every scored position's logits are
compared and forgotten. Windows run side by side on one torch thread each, positions in parts of fixed size, so
the figures do not depend on the number of threads. All arithmetic is float32, sums are float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from llm_quantize import events
from llm_quantize.errors import NumericPolicyError
from llm_quantize.events import EventSink
from llm_quantize.measures.divergence import Comparison, Scores, log_softmax_like, score
from llm_quantize.measures.perplexity import Logits, Tokens, log_softmax, scored
from llm_quantize.runtimes.base import Predictions
from llm_quantize.streams.hidden import Activations
from llm_quantize.streams.network import Block, Head, Network
from llm_quantize.streams.passes import Finite, Move, Pass, give_back_memory
from llm_quantize.streams.pool import Pool
from llm_quantize.streams.reordered import Reordered
from llm_quantize.streams.weights import Weights

POSITIONS = 64
"""Positions whose logits are computed together."""

SLICE_VALUES = 1 << 18
"""Log-probabilities that are compared together: their float64 temporaries stay in a core's cache."""


@dataclass
class Stream:
    """One model's way through the windows. ``path``: for messages. ``head_weights``: what its head is loaded from."""

    path: Path
    weights: Weights
    head_weights: Weights
    states: Activations
    comparison: Comparison = field(default_factory=Comparison)


@dataclass
class RuntimeStream:
    """An artifact in its runtime: against the source, and against the same artifact streamed."""

    model: Predictions
    comparison: Comparison = field(default_factory=Comparison)
    rounding: Comparison = field(default_factory=Comparison)


class Evaluation:
    """The windows (n, length) of one evaluation on their way; ``total``: how many steps that is, in windows through
    blocks; ``head``: how many of these a window through a head is."""

    def __init__(
        self, network: Network, windows: Tokens, pool: Pool, total: int, on_event: EventSink, *, head: int
    ) -> None:
        self.network, self.windows, self.pool = network, windows, pool
        self._pass = Pass(network, torch.from_numpy(windows.astype(np.int64)), pool, lambda: self._advance(1))
        self._done, self._total, self._head, self._on_event = 0, total, head, on_event

    def _advance(self, steps: int) -> None:
        self._done += steps
        self._on_event(events.Measure(done=self._done, total=self._total))

    def embed(self, stream: Stream) -> None:
        """Put the hidden states that enter block 0 into the stream."""
        self._pass.embed(stream.weights, stream.states)

    def through_blocks(self, source: Stream, artifacts: Sequence[Stream], noise: Activations) -> None:
        """Every stream through every block. ``noise``: hidden states of the source's first windows, in another order
        of arithmetic. Raises NumericPolicyError for hidden states that are not finite, StoppedError after a signal."""
        streams = (source, *artifacts)

        def on_block(block: Block, number: int) -> None:
            stream = streams[number]
            moves = [Move(stream.states, stream.states, Finite(stream.path))]
            if number == 0:
                moves.append(Move(noise, noise, Finite(stream.path), _reordered))
            self._pass.through(block, moves)

        self._pass.run(range(self.network.n_blocks), [stream.weights for stream in streams], on_block)

    def through_head(
        self,
        source: Stream,
        artifacts: Sequence[Stream],
        *,
        noise: tuple[Activations, Comparison] | None = None,
        runtimes: Mapping[int, RuntimeStream] | None = None,
    ) -> None:
        """Compare the predictions of every scored position. ``runtimes``: {index of the artifact: its runtime}."""
        models = runtimes or {}
        with ExitStack() as stack:
            heads = [stack.enter_context(self.network.head(stream.head_weights)) for stream in (source, *artifacts)]
            for index, window in enumerate(self.windows):
                where, targets = scored(window)
                states = [stream.states.read(index)[where] for stream in (source, *artifacts)]
                other = noise[0].read(index)[where] if noise is not None and index < noise[0].shape[0] else None
                told = {which: one.model.logits(window.tolist())[where] for which, one in models.items()}
                part = partial(_compare_part, heads, (source, *artifacts), states, other, told, targets)
                for found in self.pool.in_order(part, range(0, len(targets), POSITIONS)):
                    _collect(found, artifacts, noise, models)
                self._advance(self._head * (1 + len(artifacts)))
        give_back_memory()


@dataclass
class _Part:
    """Scores of some positions: of each artifact, of the other arithmetic, of each runtime (loss; rounding)."""

    artifacts: list[list[Scores]]
    noise: list[Scores]
    runtimes: dict[int, tuple[list[Scores], list[Scores]]]


def _collect(
    part: _Part,
    artifacts: Sequence[Stream],
    noise: tuple[Activations, Comparison] | None,
    runtimes: Mapping[int, RuntimeStream],
) -> None:
    for stream, scores in zip(artifacts, part.artifacts, strict=True):
        for one in scores:
            stream.comparison.add_scores(one)
    if noise is not None:
        for one in part.noise:
            noise[1].add_scores(one)
    for which, (losses, rounding) in part.runtimes.items():
        for loss, rounded in zip(losses, rounding, strict=True):
            runtimes[which].comparison.add_scores(loss)
            runtimes[which].rounding.add_scores(rounded)


def _reordered(block: Block, hidden: torch.Tensor, _window: int) -> torch.Tensor:
    with Reordered():
        return block(hidden)


def _compare_part(
    heads: Sequence[Head],
    streams: Sequence[Stream],
    states: Sequence[torch.Tensor],
    noise: torch.Tensor | None,
    runtimes: Mapping[int, Logits],
    targets: Tokens,
    start: int,
) -> _Part:
    """Score positions [start, start + POSITIONS) of one window."""
    stop = min(start + POSITIONS, len(targets))
    logits = [head(state[start:stop]).numpy() for head, state in zip(heads, states, strict=True)]
    if noise is not None:
        with Reordered():
            other = heads[0](noise[start:stop]).numpy()
    found = _Part([[] for _ in logits[1:]], [], {which: ([], []) for which in runtimes})
    step = max(1, SLICE_VALUES // logits[0].shape[-1])
    for first in range(0, stop - start, step):
        rows = slice(first, min(first + step, stop - start))
        follow = targets[start:stop][rows]
        with blamed(streams[0].path):
            base = log_softmax(logits[0][rows])
        for which, given in enumerate(logits[1:]):
            with blamed(streams[which + 1].path):
                mine = log_softmax_like(base, given[rows], follow)
                found.artifacts[which].append(score(base, mine, follow))
                if which in runtimes:
                    real = log_softmax_like(base, runtimes[which][start:stop][rows], follow)
                    found.runtimes[which][0].append(score(base, real, follow))
                    found.runtimes[which][1].append(score(mine, real, follow))
        if noise is not None:
            found.noise.append(score(base, log_softmax_like(base, other[rows], follow), follow))
    return found


@contextmanager
def blamed(path: Path) -> Iterator[None]:
    """Name the model in an error about its logits."""
    try:
        yield
    except NumericPolicyError as error:
        raise NumericPolicyError(
            error.what,
            file=path,
            found=error.found,
            remedy="llm-quantize verify names the tensors with NaN or infinite weights",
        ) from error
