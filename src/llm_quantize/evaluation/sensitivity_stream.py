"""Measuring sensitivities block by block: many streams of hidden states, each the source's up to one replaced tensor.

    source's stream at block i ──replace one tensor of block i──▶ variant's stream ──blocks i+1 … n──▶ head ──▶ KLD

A variant costs nothing before its own block. Streams are carried in groups that fit the memory: a group begins where
its first tensor stands, so the model is read once, from there on, for each group. Figures are recorded after each
group, and a stopped run goes on from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from llm_quantize import events
from llm_quantize.errors import NumericPolicyError, UnsupportedError
from llm_quantize.evaluation.sensitivity import Candidate, Cost, Sensitivity
from llm_quantize.events import EventSink
from llm_quantize.measures.perplexity import Tokens, scored
from llm_quantize.measures.uncertainty import mean_and_sem
from llm_quantize.models.opening import Source
from llm_quantize.streams.hidden import Activations
from llm_quantize.streams.network import Block, Head, Network
from llm_quantize.streams.passes import Finite, Move, Pass, give_back_memory
from llm_quantize.streams.pool import Pool
from llm_quantize.streams.replaced import ReplacedWeights
from llm_quantize.streams.weights import CheckpointWeights, Weights

POSITIONS = 128
"""Predictions whose logits of one variant stand in memory at once, for each thread."""

EMBEDDING = -1  # where a variant begins: before block 0; block 0, 1, ...; n_blocks: the head


@dataclass(frozen=True)
class Placed:
    """A candidate and where it begins. ``head``: the head is another one too (a tied embedding)."""

    candidate: Candidate
    start: int
    head: bool


def place(source: Source, network: Network, wanted: Sequence[Candidate]) -> list[Placed]:
    """Where each candidate begins, sorted by that. Raises UnsupportedError for a tensor that no part uses."""
    names = {output.name for output in source.tensors.outputs}
    owner = {name: index for index in range(network.n_blocks) for name in network.tensors(index)}
    head, embedding = set(network.tensors("head")), set(network.tensors("embedding"))
    placed = []
    for candidate in wanted:
        sources = {piece.source for output in candidate.outputs for piece in output.pieces}
        if candidate.name == "output.weight" or sources <= head - embedding:
            placed.append(Placed(candidate, network.n_blocks, True))
        elif sources <= embedding:
            placed.append(Placed(candidate, EMBEDDING, bool(sources & head) and "output.weight" not in names))
        elif len(found := {owner.get(name) for name in sources}) == 1 and (start := found.pop()) is not None:
            placed.append(Placed(candidate, start, False))
        else:
            raise UnsupportedError("a tensor belongs to no single block", tensor=candidate.name)
    return sorted(placed, key=lambda one: one.start)


def plan_groups(placed: Sequence[Placed], n_blocks: int, streams: int) -> list[list[Placed]]:
    """At most ``streams`` variants at a time; those of the head alone need no stream and come last, together."""
    moving = [one for one in placed if one.start < n_blocks]
    groups = [moving[start : start + streams] for start in range(0, len(moving), streams)]
    rest = [one for one in placed if one.start == n_blocks]
    return [*groups, rest] if rest else groups


def cost_of(groups: Sequence[Sequence[Placed]], n_blocks: int, tokens: int) -> Cost:
    """What the groups will take, from their places alone."""
    passes = 0
    for group in groups:
        passes += sum(n_blocks - max(one.start, 0) for one in group)
    every = [one for group in groups for one in group]
    return Cost(
        tensors=len({one.candidate.name for one in every}),
        streams=len(every),
        tokens=tokens,
        passes=passes,
        forwards=passes / n_blocks,
        groups=len(groups),
    )


@dataclass
class _Stream:
    """One variant under way, and its divergences: float64 (positions,) for each window."""

    placed: Placed
    states: Activations
    weights: Weights
    head_weights: Weights | None
    klds: dict[int, npt.NDArray[np.float64]] = field(default_factory=dict)


@dataclass
class Measurement:
    """One run over groups. ``hold``: {tensor of the source: float32, its shape} with a candidate at its type."""

    source: Source
    network: Network
    windows: Tokens
    hold: Callable[[Candidate], Mapping[str, torch.Tensor]]
    pool: Pool
    on_event: EventSink
    total: int = 0
    done: int = 0

    def __post_init__(self) -> None:
        self.weights = CheckpointWeights(self.source.checkpoint)
        ids = torch.from_numpy(self.windows.astype(np.int64))
        self.way = Pass(self.network, ids, self.pool, self._tell)

    def measure(
        self, groups: Sequence[Sequence[Placed]], record: Callable[[Sequence[Sensitivity]], None]
    ) -> list[Sensitivity]:
        """Figures of all groups, in their order; ``record`` hears each group's as soon as it has them.

        Raises NumericPolicyError where hidden states or logits are not finite, StoppedError after a signal.
        """
        starts = [one.start for group in groups for one in group if one.start < self.network.n_blocks]
        source = self.network.n_blocks + max((0, *starts))
        self.total = len(self.windows) * (source + sum(map(self._steps, groups)))
        found: list[Sensitivity] = []
        with self._states() as origin, self._states() as final:
            self.way.embed(self.weights, final)
            self._lead(final, range(self.network.n_blocks))
            self.way.embed(self.weights, origin)
            reached = 0
            for group in groups:
                if group[0].start < self.network.n_blocks:
                    reached = self._advance(origin, reached, max(group[0].start, 0))
                rows = self._group(group, origin, final)
                reached = max(reached, min(max(one.start for one in group), self.network.n_blocks))
                record(rows)
                found += rows
        return found

    def _steps(self, group: Sequence[Placed]) -> int:
        return sum(self.network.n_blocks - max(one.start, 0) + 1 for one in group)

    @contextmanager
    def _states(self) -> Iterator[Activations]:
        count, length = self.windows.shape
        with Activations(count, length, self.network.width, torch.float32) as states:
            yield states

    def _lead(self, states: Activations, indices: range) -> None:
        """The source's own stream through blocks ``indices``."""
        self.way.run(indices, [self.weights], lambda block, _: self.way.through(block, [_in_place(states)]))

    def _advance(self, origin: Activations, reached: int, wanted: int) -> int:
        """The source's stream from where it stands to the input of block ``wanted``."""
        self._lead(origin, range(reached, min(wanted, self.network.n_blocks)))
        return max(reached, wanted)

    def _group(self, group: Sequence[Placed], origin: Activations, final: Activations) -> list[Sensitivity]:
        """Carry a group to its figures; ``origin`` is left at the input of the last block that begins a variant."""
        last = max(one.start for one in group)
        streams: list[_Stream] = []
        with ExitStack() as stack:
            for one in group:
                if one.start == EMBEDDING or one.start == self.network.n_blocks:
                    streams.append(self._outer(one, final, stack))

            def on_block(block: Block, _: int) -> None:
                moving = [stream.states for stream in streams if stream.states is not final]
                self.way.through(block, [_in_place(states) for states in moving])
                for one in group:
                    if one.start == block.index:
                        streams.append(self._begin(block, one, origin, stack))
                if block.index < last:
                    self.way.through(block, [_in_place(origin)])

            self.way.run(range(max(group[0].start, 0), self.network.n_blocks), [self.weights], on_block)
            self._heads(streams, final)
            by_key = {stream.placed.candidate.key: stream for stream in streams}
            return [_figure(by_key[one.candidate.key], len(self.windows)) for one in group]

    def _outer(self, one: Placed, final: Activations, stack: ExitStack) -> _Stream:
        """A variant of the embedding, with a stream of its own, or of the head, which looks at the source's."""
        replaced = ReplacedWeights(self.weights, self.hold(one.candidate))
        if one.start == self.network.n_blocks:
            return _Stream(one, final, self.weights, replaced)
        states = stack.enter_context(self._states())
        self.way.embed(replaced, states)
        return _Stream(one, states, self.weights, replaced if one.head else None)

    def _begin(self, block: Block, one: Placed, origin: Activations, stack: ExitStack) -> _Stream:
        """A variant of a tensor of this block: the source's stream through the block with that tensor replaced."""
        states = stack.enter_context(self._states())
        held = self.hold(one.candidate)
        for name, value in held.items():
            block.replace(name, value)
        try:
            self.way.through(block, [Move(origin, states, Finite(tensor=one.candidate.name))])
        finally:
            for name in held:
                block.replace(name, self.weights.read(name))
        return _Stream(one, states, self.weights, None)

    def _tell(self) -> None:
        self.done += 1
        self.on_event(events.Measure(done=self.done, total=self.total))

    def _heads(self, streams: Sequence[_Stream], final: Activations) -> None:
        """The divergence of every stream: those with the source's head together, the others one at a time."""
        with self.network.head(self.weights) as head:
            plain = [stream for stream in streams if stream.head_weights is None]
            self._compare(head, [(head, stream) for stream in plain], final)
            for stream in streams:
                if stream.head_weights is not None:
                    with self.network.head(stream.head_weights) as other:
                        self._compare(head, [(other, stream)], final)
        give_back_memory()

    def _compare(self, head: Head, streams: Sequence[tuple[Head, _Stream]], final: Activations) -> None:
        if not streams:
            return

        def window(index: int) -> None:
            where, targets = scored(self.windows[index])
            base = final.read(index)[where]
            others = [stream.states.read(index)[where] for _, stream in streams]
            # One array for all: small results kept one by one would sit in the holes that logits leave in the heap,
            # and each next logits would need new memory.
            klds = np.empty((len(streams), len(targets)))
            for start in range(0, len(targets), POSITIONS):
                rows = slice(start, start + POSITIONS)
                reference = torch.log_softmax(head(base[rows]).double(), -1)
                share = reference.exp()
                entropy = torch.special.entr(share).sum(-1)
                for row, (own, stream), state in zip(klds, streams, others, strict=True):
                    row[rows] = _divergence(own(state[rows]), share, entropy, stream.placed.candidate)
            for row, (_, stream) in zip(klds, streams, strict=True):
                stream.klds[index] = row

        for _ in self.pool.each(window, range(len(self.windows))):
            for _ in streams:
                self._tell()


def _in_place(states: Activations) -> Move:
    return Move(states, states, Finite())


def _divergence(
    logits: torch.Tensor, share: torch.Tensor, entropy: torch.Tensor, candidate: Candidate
) -> npt.NDArray[np.float64]:
    """KLD per position, float64: sum p ln p - sum p ln q, with ln q = logits - logsumexp(logits)."""
    wide = logits.double()
    crossed = torch.where(share > 0, share * wide, 0.0).sum(-1) - torch.logsumexp(wide, -1)
    found: npt.NDArray[np.float64] = (-entropy - crossed).numpy()
    if not np.isfinite(found).all():
        raise NumericPolicyError(
            "the logits are not finite, or rule out a token that the source allows",
            tensor=candidate.name,
            found=candidate.qtype,
        )
    return found


def _figure(stream: _Stream, windows: int) -> Sensitivity:
    candidate = stream.placed.candidate
    klds = [stream.klds[index] for index in range(windows)]
    mean, sem = mean_and_sem(np.concatenate(klds), np.repeat(np.arange(windows), [len(one) for one in klds]))
    return Sensitivity(candidate.name, candidate.qtype, candidate.bits, candidate.nbytes, max(mean, 0.0), sem)
