"""Sensitivities from one way back through the network: the Fisher information of every weight, and what errors cost.

Legend: p the model's next-token distribution, y a token drawn from it, W a matrix of the source, Q as an artifact holds
it, E = Q - W, N positions of text; s = -d/dW log p(y | text), the score of a window, all of whose positions are drawn.

    F   = E_y[s²], element by element              the diagonal of the Fisher information, summed over windows
    KLD ≈ ½ ⟨E, H E⟩ / N ≈ ½ Σ_ij E_ij² F_ij / N   to second order; H is the whole Fisher information

A divergence has no first-order term, and its second derivative is the Fisher information (Kullback 1959); tokens that
the model itself draws make the expectation the true one, not the empirical one (Kunstner, Balles, Hennig 2019). The
diagonal leaves out how errors of different weights fall together. Rounding errors hardly do; those of error feedback
are made to, which shows in what they do to the inputs x of their matrix: with A = Σ x xᵀ and r_i = Σ_j F_ij / Σ_j A_jj

    rho = Σ_i r_i E_i A E_iᵀ / Σ_ij r_i E_ij² A_jj

is by how much less a matrix's output moves than if they were independent, and its cost is multiplied by that.
docs/reference/profile.md has the measured ratio of estimate and divergence.

The way: the windows go forward and leave what enters each block (in memory, or in a file); the head draws tokens and
gives the first gradients; the blocks come in reverse, one in memory at a time, each run again window by window. Sums
are made in the order of the windows, and draws depend on the window alone, so that threads change no byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch

from llm_quantize import events
from llm_quantize.errors import NumericPolicyError
from llm_quantize.evaluation.sensitivity import Candidate, Sensitivity
from llm_quantize.evaluation.sensitivity_stream import EMBEDDING, Placed
from llm_quantize.events import EventSink
from llm_quantize.measures.perplexity import Tokens
from llm_quantize.models.opening import Source
from llm_quantize.streams.hidden import Activations
from llm_quantize.streams.network import Network
from llm_quantize.streams.passes import Finite, Move, Pass
from llm_quantize.streams.pool import Pool
from llm_quantize.streams.replaced import ReplacedWeights
from llm_quantize.streams.taps import Tap
from llm_quantize.streams.weights import CheckpointWeights

POSITIONS = 128
"""Predictions whose logits stand in memory at once, for each thread."""

_SEED = 20260

Hold = Callable[[Candidate], Mapping[str, torch.Tensor]]


@dataclass
class Estimation:
    """One run. ``windows``: (n, length) token ids. ``hold``: {tensor of the source: float32, its shape} with a
    candidate at its type. ``scratch``: where the hidden states between blocks lie in a file; None: in memory.
    ``fed_back``: errors are those of feedback, and A is summed up too."""

    source: Source
    network: Network
    windows: Tokens
    hold: Hold
    pool: Pool
    scratch: Path | None
    on_event: EventSink
    fed_back: bool = False
    total: int = 0
    done: int = 0

    def __post_init__(self) -> None:
        self.weights = CheckpointWeights(self.source.checkpoint)
        self.way = Pass(self.network, torch.from_numpy(self.windows.astype(np.int64)), self.pool, self._tell)

    def measure(self, placed: Sequence[Placed], record: Callable[[Sequence[Sensitivity]], None]) -> list[Sensitivity]:
        """Figures of ``placed``, in their order; ``record`` hears those of each part as soon as it has them.

        Raises NumericPolicyError where hidden states or gradients are not finite, StoppedError after a signal.
        """
        count, blocks = len(self.windows), self.network.n_blocks
        self.total = 4 * count * blocks + len(placed)
        found: dict[tuple[str, str], Sensitivity] = {}

        def settle(one: Placed, cost: float) -> None:
            key = one.candidate.key
            cost += found[key].kld if key in found else 0.0
            found[key] = _figure(one.candidate, cost)

        with ExitStack() as stack:
            entering = [stack.enter_context(self._states()) for _ in range(blocks + 1)]
            gradients = stack.enter_context(self._states())
            self._forward(entering)
            self._through_head(entering[blocks], gradients, [one for one in placed if one.head], settle)
            record([found[one.candidate.key] for one in placed if one.start == blocks])
            for index in reversed(range(blocks)):
                own = [one for one in placed if one.start == index]
                self._through_block(index, entering[index], gradients, own, settle)
                entering[index + 1].close()
                record([found[one.candidate.key] for one in own])
            outer = [one for one in placed if one.start == EMBEDDING]
            self._through_embedding(entering[0], gradients, outer, settle)
            record([found[one.candidate.key] for one in outer])
        return [found[one.candidate.key] for one in placed]

    @contextmanager
    def _states(self) -> Iterator[Activations]:
        count, length = self.windows.shape
        with Activations(count, length, self.network.width, torch.float32, directory=self.scratch) as states:
            yield states

    def _tell(self, steps: int = 1) -> None:
        self.done += steps
        self.on_event(events.Measure(done=min(self.done, self.total), total=self.total))

    def _forward(self, entering: Sequence[Activations]) -> None:
        self.way.embed(self.weights, entering[0])
        self.way.run(
            range(self.network.n_blocks),
            [self.weights],
            lambda block, _: self.way.through(
                block, [Move(entering[block.index], entering[block.index + 1], Finite())]
            ),
        )

    def _through_head(
        self,
        final: Activations,
        gradients: Activations,
        placed: Sequence[Placed],
        settle: Callable[[Placed, float], None],
    ) -> None:
        """Tokens drawn, the first gradients, and figures of the output matrix."""
        length = self.windows.shape[1]
        starts = range(0, length, POSITIONS)
        (name,) = self.network.head_tap().tensors

        def part(job: tuple[int, int]) -> tuple[int, int, torch.Tensor, torch.Tensor]:
            window, start = job
            hidden = final.read(window)[start : start + POSITIONS]
            return window, start, *head.pull_back(hidden, lambda logits: _drawn(logits, window, start))

        with self.network.head(self.weights) as head:
            fisher: torch.Tensor | None = None
            whole = torch.empty(final.shape[1:])
            jobs = ((window, start) for window in range(len(self.windows)) for start in starts)
            for window, start, back, gradient in self.pool.in_order(part, jobs):
                fisher = gradient.square_() if fisher is None else fisher.add_(gradient.square_())
                whole[start : start + POSITIONS] = back
                if start == starts[-1]:
                    _check(whole, self.network.n_blocks, window)
                    gradients.write(window, whole)
        assert fisher is not None
        self._settle(placed, {name: fisher}, settle)

    def _through_block(
        self,
        index: int,
        entering: Activations,
        gradients: Activations,
        placed: Sequence[Placed],
        settle: Callable[[Placed, float], None],
    ) -> None:
        def back(window: int) -> tuple[int, torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
            own: dict[str, torch.Tensor] = {}
            if not self.fed_back:
                return window, *block.pull_back(entering.read(window), gradients.read(window)), own
            with block.observe(partial(_multiplied, own)):
                return window, *block.pull_back(entering.read(window), gradients.read(window)), own

        fisher: dict[str, torch.Tensor] = {}
        grams: dict[str, torch.Tensor] = {}
        with self.way.block(index, self.weights) as block:
            for window, before, found, products in self.pool.in_order(back, range(len(self.windows))):
                for name, product in products.items():
                    grams[name] = grams[name].add_(product) if name in grams else product
                _check(before, index, window)
                gradients.write(window, before)
                for name, gradient in found.items():
                    square = gradient.square()
                    fisher[name] = fisher[name].add_(square) if name in fisher else square
                self._tell(3)
        taps = self.network.taps(index) if self.fed_back else []
        inputs = {name: tap.name for tap in taps if tap.matrices == 1 for name in tap.tensors}
        known = {name: grams[tap] for name, tap in inputs.items() if tap in grams}
        self._settle(placed, fisher, settle, known)

    def _settle(
        self,
        placed: Sequence[Placed],
        fisher: Mapping[str, torch.Tensor],
        settle: Callable[[Placed, float], None],
        grams: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> None:
        """Figures of ``placed`` by the Fisher information of the tensors that they hold. ``grams``: A of the inputs of
        some of them, where errors are fed back."""
        for one in placed:
            cost = 0.0
            for name, value in self.hold(one.candidate).items():
                if name not in fisher:
                    continue
                source = self.weights.read(name).float()
                part = quadratic(value, source, fisher[name])
                if name in grams:
                    part *= together(*_upright(one.candidate, name, value - source, fisher[name]), grams[name])
                cost += part
            settle(one, cost / (2 * self.windows.size))
            self._tell()

    def _through_embedding(
        self,
        entering: Activations,
        gradients: Activations,
        placed: Sequence[Placed],
        settle: Callable[[Placed, float], None],
    ) -> None:
        """Figures of the embedding: what enters block 0 is another, by the table's errors, at every position."""
        for one in placed:
            cost = 0.0
            with self._states() as states:
                self.way.embed(ReplacedWeights(self.weights, self.hold(one.candidate)), states)
                for window in range(len(self.windows)):
                    cost += quadratic(states.read(window), entering.read(window), gradients.read(window).square())
            settle(one, cost / (2 * self.windows.size))
            self._tell()


def quadratic(held: torch.Tensor, source: torch.Tensor, fisher: torch.Tensor) -> float:
    """Σ (held - source)² fisher, all float32 of one shape, summed in float64."""
    error = (held - source).square_().mul_(fisher)
    return float(error.sum(dtype=torch.float64))


def together(error: torch.Tensor, fisher: torch.Tensor, gram: torch.Tensor) -> float:
    """rho of ``error`` and ``fisher`` (out, in) with inputs of ``gram`` (in, in), float32; 1 without an error."""
    diagonal = gram.diagonal()
    rows = fisher.sum(1) / diagonal.sum().clamp_min(torch.finfo(gram.dtype).tiny)
    moved = (((error @ gram) * error).sum(1) * rows).sum(dtype=torch.float64)
    apart = (error.square() @ diagonal * rows).sum(dtype=torch.float64)
    return float(moved / apart) if float(apart) > 0 else 1.0


def _upright(
    candidate: Candidate, name: str, error: torch.Tensor, fisher: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as (out, in), where the checkpoint may store them the other way."""
    turned = any(piece.transpose for output in candidate.outputs for piece in output.pieces if piece.source == name)
    return (error.T, fisher.T) if turned else (error, fisher)


def _multiplied(found: dict[str, torch.Tensor], tap: Tap, _matrix: int, inputs: torch.Tensor) -> None:
    """A sink that puts XᵀX of the inputs (tokens, columns) of a window into ``found``; of single matrices alone."""
    if tap.matrices == 1:
        wide = inputs.detach().float().cpu()
        found[tap.name] = wide.T @ wide


def _drawn(logits: torch.Tensor, window: int, start: int) -> torch.Tensor:
    """p - y for logits float32 (k, vocabulary): the gradient of -log p(y) for tokens y drawn from p, by random
    numbers of the window's own."""
    share = torch.softmax(logits, -1)
    numbers = np.random.Generator(np.random.PCG64([_SEED, window, start])).random(len(share))
    bars = torch.from_numpy(numbers).unsqueeze(-1)
    summed = share.double().cumsum(-1)
    drawn = torch.searchsorted(summed, bars * summed[:, -1:]).clamp_(max=share.shape[-1] - 1)
    return share.scatter_add_(1, drawn, torch.full_like(drawn, -1, dtype=share.dtype))


def _check(gradient: torch.Tensor, index: int, window: int) -> None:
    if not bool(torch.isfinite(gradient).all()):
        raise NumericPolicyError(
            f"the gradients of window {window} are not finite before block {index}",
            remedy="measure the sensitivities instead: --exact",
        )


def _figure(candidate: Candidate, cost: float) -> Sensitivity:
    if not np.isfinite(cost):
        raise NumericPolicyError("the estimated loss is not finite", tensor=candidate.name, found=candidate.qtype)
    return Sensitivity(candidate.name, candidate.qtype, candidate.bits, candidate.nbytes, cost, 0.0)
