"""A source and its artifacts side by side, block by block, and their predictions compared.

Every model is a stream of hidden states, one window after another. The source's goes first, once for all artifacts and
for later runs (reference.py). Then, for each block, the first artifact's weights are loaded and all its windows run
through, then the second's, and so on. At the end the final norm and the head of the source and of one artifact or
several stand together, and every scored position's logits are compared and forgotten; what the source predicts is
computed once for all of them. Windows run side by side on one torch thread each, positions in parts of fixed size, so
the figures do not depend on the number of threads. All arithmetic is float32 (products by oneDNN, where torch has it),
sums are float64.
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
from llm_quantize.evaluation.reference import Reference
from llm_quantize.events import EventSink
from llm_quantize.measures.divergence import Comparison, Predicted, Scores, candidate_like
from llm_quantize.measures.perplexity import Logits, Tokens, scored
from llm_quantize.runtimes.base import Predictions
from llm_quantize.streams.hidden import Activations
from llm_quantize.streams.network import Block, Head, Network
from llm_quantize.streams.passes import Finite, Move, Pass, give_back_memory
from llm_quantize.streams.pool import Pool
from llm_quantize.streams.products import FastProducts
from llm_quantize.streams.reordered import Reordered
from llm_quantize.streams.weights import Weights

POSITIONS = 64
"""Positions whose logits are computed together."""

SLICE_VALUES = 1 << 18
"""Log-probabilities that are compared together: their float64 temporaries stay in a core's cache."""


@dataclass
class Stream:
    """An artifact's way through the windows. ``path``: for messages. ``head_weights``: what its head is loaded from."""

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

    def refer(self, weights: Weights, states: Activations, again: Activations, reference: Reference) -> None:
        """The source, with ``weights``, through every block, and its first windows in another order of arithmetic:
        what leaves the last block at scored positions is put into ``reference``. ``states``, ``again``: room for the
        hidden states of whole windows on the way.

        Raises NumericPolicyError for hidden states that are not finite, StoppedError after a signal."""
        check = Finite(reference.path)
        self._pass.embed(weights, states)
        for index in range(again.shape[0]):
            again.write(index, states.read(index))

        def on_block(block: Block, _: int) -> None:
            self._pass.through(block, [Move(states, states, check, _fast), Move(again, again, check, _reordered)])

        self._pass.run(range(self.network.n_blocks), [weights], on_block)
        for final, whole in ((reference.states, states), (reference.again, again)):
            for index in range(final.shape[0]):
                final.write(index, whole.read(index)[scored(self.windows[index])[0]])

    def through_blocks(self, artifacts: Sequence[Stream]) -> None:
        """Every artifact from its embedding through every block. Raises as ``refer``."""
        for stream in artifacts:
            self._pass.embed(stream.weights, stream.states)

        def on_block(block: Block, number: int) -> None:
            stream = artifacts[number]
            self._pass.through(block, [Move(stream.states, stream.states, Finite(stream.path), _fast)])

        self._pass.run(range(self.network.n_blocks), [stream.weights for stream in artifacts], on_block)

    def through_head(
        self,
        reference: Reference,
        artifacts: Sequence[Stream],
        *,
        noise: Comparison | None = None,
        runtimes: Mapping[int, RuntimeStream] | None = None,
    ) -> None:
        """Compare the predictions of every scored position. ``noise``: where the reference's own in another order of
        arithmetic are scored; ``runtimes``: {index of the artifact: its runtime}."""
        models = runtimes or {}
        known = 0 if noise is None else reference.again.shape[0]
        paths = (reference.path, *(stream.path for stream in artifacts))
        with ExitStack() as stack:
            weights = [reference.head_weights, *(stream.head_weights for stream in artifacts)]
            heads = [stack.enter_context(self.network.head(one)) for one in weights]
            for index, window in enumerate(self.windows):
                where, targets = scored(window)
                states = [reference.states.read(index), *(stream.states.read(index)[where] for stream in artifacts)]
                other = reference.again.read(index) if index < known else None
                told = {which: one.model.logits(window.tolist())[where] for which, one in models.items()}
                part = partial(_compare_part, heads, paths, states, other, told, targets)
                for found in self.pool.in_order(part, range(0, len(targets), POSITIONS)):
                    _collect(found, index, artifacts, noise, models)
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
    window: int,
    artifacts: Sequence[Stream],
    noise: Comparison | None,
    runtimes: Mapping[int, RuntimeStream],
) -> None:
    for stream, scores in zip(artifacts, part.artifacts, strict=True):
        for one in scores:
            stream.comparison.add_scores(one, window)
    if noise is not None:
        for one in part.noise:
            noise.add_scores(one, window)
    for which, (losses, rounding) in part.runtimes.items():
        for loss, rounded in zip(losses, rounding, strict=True):
            runtimes[which].comparison.add_scores(loss, window)
            runtimes[which].rounding.add_scores(rounded, window)


def _fast(block: Block, hidden: torch.Tensor, _window: int) -> torch.Tensor:
    with FastProducts():
        return block(hidden)


def _reordered(block: Block, hidden: torch.Tensor, _window: int) -> torch.Tensor:
    with Reordered():
        return block(hidden)


def _compare_part(
    heads: Sequence[Head],
    paths: Sequence[Path],
    states: Sequence[torch.Tensor],
    noise: torch.Tensor | None,
    runtimes: Mapping[int, Logits],
    targets: Tokens,
    start: int,
) -> _Part:
    """Score positions [start, start + POSITIONS) of one window."""
    stop = min(start + POSITIONS, len(targets))
    with FastProducts():
        logits = [head(state[start:stop]).numpy() for head, state in zip(heads, states, strict=True)]
    if noise is not None:
        with Reordered():
            other = heads[0](noise[start:stop]).numpy()
    found = _Part([[] for _ in logits[1:]], [], {which: ([], []) for which in runtimes})
    step = max(1, SLICE_VALUES // logits[0].shape[-1])
    for first in range(0, stop - start, step):
        rows = slice(first, min(first + step, stop - start))
        follow = targets[start:stop][rows]
        with blamed(paths[0]):
            base = Predicted.of(logits[0][rows])
        for which, given in enumerate(logits[1:]):
            with blamed(paths[which + 1]):
                mine = candidate_like(base, given[rows], follow)
                found.artifacts[which].append(base.score(mine, follow))
                if which in runtimes:
                    real = candidate_like(base, runtimes[which][start:stop][rows], follow)
                    found.runtimes[which][0].append(base.score(real, follow))
                    found.runtimes[which][1].append(mine.score(real, follow))
        if noise is not None:
            found.noise.append(base.score(candidate_like(base, other[rows], follow), follow))
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
