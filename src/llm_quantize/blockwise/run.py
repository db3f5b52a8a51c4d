"""The way through the blocks of a run that calibrates: collect, solve, write, put back, go on.

    hidden states → for each block: for each stage: inputs → factor → codes → the artifact → the block itself → … → next

Two streams run side by side (``inputs.Streams``). What is written is at once what the quantized stream computes with:
values are decoded from the very bytes of the artifact, so that a run that was killed and goes on, and reads finished
matrices back, sees the same hidden states and ends in the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llm_quantize import events
from llm_quantize.architectures.base import OutputTensor
from llm_quantize.architectures.rows import Arrays, matrix_shape, read_output_rows, to_float32, unit_ranges
from llm_quantize.artifacts.origin import source_hash
from llm_quantize.artifacts.rounding import Policy, Target
from llm_quantize.blockwise import rescaling
from llm_quantize.blockwise.embedding import written_embedding
from llm_quantize.blockwise.gram import Gram
from llm_quantize.blockwise.inputs import FullInputs, Streams, collect, propagate
from llm_quantize.blockwise.keeping import difference
from llm_quantize.blockwise.kv_cache import Largest
from llm_quantize.blockwise.measure import measure
from llm_quantize.blockwise.refining import Outcome, Part, Refinement
from llm_quantize.blockwise.refining_sizes import refinement_windows
from llm_quantize.blockwise.segments import Segment, Sources, column_orders, segments
from llm_quantize.blockwise.solver import Fields, Job, Solver
from llm_quantize.blockwise.stages import routers, stages
from llm_quantize.errors import NumericPolicyError, UnsupportedError
from llm_quantize.events import EventSink
from llm_quantize.formats.base import Store
from llm_quantize.formats.packing import mixture_of
from llm_quantize.grids.inputs import calibrated
from llm_quantize.memory import Fitted
from llm_quantize.methods.gptq_options import held_back
from llm_quantize.methods.refine import Moving
from llm_quantize.models.opening import Source
from llm_quantize.options import MethodOptions
from llm_quantize.plan import CACHED, MatrixPlan, unit_key
from llm_quantize.qtypes.range import first_beyond, refusal
from llm_quantize.streams.hidden import Activations, Kept, close
from llm_quantize.streams.network import Block, Network, Tap
from llm_quantize.streams.passes import Pass
from llm_quantize.streams.pool import Pool
from llm_quantize.streams.weights import CheckpointWeights, FiniteWeights

Floats = npt.NDArray[np.float32]

FULL, QUANTIZED = 0, 1  # the lanes of the streams' files


@dataclass
class Matrices:
    """The matrices of an artifact, read from the source and written as fields. ``changed``: {source tensor: values that
    a transform gave it, float32 in its shape}."""

    source: Source
    target: Target
    store: Store
    policy: Policy
    changed: dict[str, Floats] = field(default_factory=dict)

    def rows(self, matrix: MatrixPlan, start: int, stop: int) -> Floats:
        """float32 rows [start, stop) of the weight. Raises NumericPolicyError for values that are not finite, and for
        those that are too large for its type."""
        rows = self._finite(matrix, start, stop)
        limit = self.store.largest(matrix.qtype)
        beyond = first_beyond(rows, limit)
        if beyond >= 0:
            row, column = divmod(beyond, rows.shape[-1])
            remedy = self.target.plan.too_large.replace("TENSOR", mixture_of(matrix.name))
            value = float(rows[row, column])
            raise refusal(matrix.name, matrix.qtype, start + row, column, value, limit=limit, remedy=remedy)
        return rows

    def _finite(self, matrix: MatrixPlan, start: int, stop: int) -> Floats:
        weight = matrix.weight
        if any(piece.source in self.changed for piece in weight.pieces):
            return to_float32(read_output_rows(Arrays(self.present), weight, start, stop))
        rows, count = self.policy.finite(weight, read_output_rows(self.source.checkpoint, weight, start, stop), start)
        if count and self.policy.nonfinite == "keep":
            raise NumericPolicyError(
                f"a weight is NaN or infinite, and {matrix.qtype} cannot hold it",
                tensor=matrix.name,
                found=f"{count} such values in rows {start} to {stop - 1}",
                expected="finite weights in every matrix that is quantized by a method",
                remedy="--nonfinite=zero --overwrite replaces them by zero",
            )
        return np.array(to_float32(rows), np.float32)

    def present_rows(self, matrix: MatrixPlan, start: int, stop: int) -> Floats:
        """float32 rows [start, stop) of the weight as a transform left it, by the policy for NaN and infinity."""
        return self._finite(matrix, start, stop)

    def present(self, name: str) -> Floats:
        """A tensor of the source as it is now, float32, its shape."""
        if name in self.changed:
            return self.changed[name]
        return self.weights.read(name).float().numpy()

    @property
    def weights(self) -> CheckpointWeights:
        """The source's weights as the artifact is to have them: by the policy for NaN and infinity."""
        kind = FiniteWeights if self.policy.nonfinite == "zero" else CheckpointWeights
        return kind(self.source.checkpoint)

    def done(self, matrix: MatrixPlan) -> bool:
        """Whether every part of every field is recorded."""
        return all(key in self.target.output.records for _, _, key in self._units(matrix))

    def _units(self, matrix: MatrixPlan) -> Iterator[tuple[int, tuple[int, int], str]]:
        for number, index in enumerate(matrix.fields):
            tensor = self.target.plan.tensors[index]
            for start, stop in unit_ranges(tensor.output.shape):
                yield number, (start, stop), unit_key(tensor.name, start, stop)

    def write(self, matrix: MatrixPlan, fields: Fields, facts: Mapping[str, Any], whole: str = "") -> None:
        """Write and record the fields; ``facts`` go with the first part, and with them how far the matrix is from the
        source, where that is asked. ``whole``: the hash of the source's rows, where it is known."""
        if self.target.plan.judged and "verdict" not in facts:
            off, chosen = difference(self, matrix, fields), matrix.seen and self.target.plan.chained
            facts = {**facts, **off.verdict(chosen=chosen)}
        for number, (start, stop), key in self._units(matrix):
            tensor = self.target.plan.tensors[matrix.fields[number]]
            data = np.ascontiguousarray(fields[number]).reshape(matrix_shape(tensor.output.shape)[0], -1)[start:stop]
            raw = data.reshape(-1).view(np.uint8).data
            self.target.output.write(tensor.span(start, stop), 0, raw)
            if tensor.output.pieces:
                origin = source_hash(self.source.checkpoint, tensor.output, start, stop)
            else:
                whole = whole or source_hash(self.source.checkpoint, matrix.weight, 0, matrix_rows(matrix))
                origin = whole
            record: dict[str, Any] = {"sha256": hashlib.sha256(raw).hexdigest(), "source_sha256": origin}
            if (number, start) == (0, 0):
                record |= {"matrix": dict(facts), **self.replaced(matrix.weight)}
            self.target.output.record(key, record)

    def replaced(self, weight: OutputTensor) -> dict[str, int]:
        """How many values of the source were replaced by zero: a fact of a record, where there are any."""
        count = self.policy.count_nonfinite(weight) if self.policy.nonfinite == "zero" else 0
        return {"nonfinite_replaced": count} if count else {}

    def read(self, matrix: MatrixPlan) -> Fields:
        """The fields of a finished matrix, from the artifact."""
        parts: list[list[npt.NDArray[np.uint8]]] = [[] for _ in matrix.fields]
        for number, _, key in self._units(matrix):
            parts[number].append(np.frombuffer(self.target.output.read(key), np.uint8))
        return [
            self.store.typed(self.target.plan.tensors[index], np.concatenate(part))
            for index, part in zip(matrix.fields, parts, strict=True)
        ]


def matrix_rows(matrix: MatrixPlan) -> int:
    """How many rows a matrix (or a stack of them) has."""
    return matrix_shape(matrix.weight.shape)[0]


class Blocks:
    """One artifact's way through the blocks. ``ids``: int64 (windows, length) tokens; the first ``calibrated`` windows
    are calibrated on, the others tell at the end what was lost, where the source's stream goes along."""

    def __init__(
        self,
        matrices: Matrices,
        network: Network,
        ids: torch.Tensor,
        calibrated: int,
        options: MethodOptions,
        fitted: Fitted,
        pool: Pool,
        on_event: EventSink,
    ) -> None:
        self.matrices, self.network, self.ids, self.calibrated = matrices, network, ids, calibrated
        self.fitted, self.on_event = fitted, on_event
        self.way = Pass(network, ids, pool, self._advance)
        self.directory = matrices.target.output.hidden() if fitted.disk_bytes else None
        shape = (*ids.shape, network.width)
        place = None if fitted.in_memory else self.directory
        self.kept = Kept(matrices.target.output, shape, network.dtype, place)
        plan = matrices.target.plan
        self.transform = options.transform_of(plan.format)
        self.sequential = options.inputs == "sequential"
        self.quantized = options.inputs != "source"
        self.options = options.stages(plan.format)
        self.paired = options.pairs(plan.format)
        self.held_back = held_back(calibrated) if self.options.corrects and self.options.correction is None else 0
        self.refinement = options.refinement
        self._whole: frozenset[str] = frozenset()
        self.routers = routers(matrices.source.tensors.outputs)
        method = options.method_of(plan.format)
        self.solver = Solver(
            method,
            matrices.store,
            matrices.rows,
            self.options,
            pool,
            str(network.device),
            self.routers,
            keeps=self.refinement > 0,
        )
        self.taps = [network.taps(index) for index in range(network.n_blocks)]
        self.members = self._members()
        self.held = [rescaling.held(matrices, index) for index in range(network.n_blocks)]
        self.measures = self.paired and calibrated < len(ids)
        self._steps, self._total = 0, 1

    def _members(self) -> list[list[tuple[MatrixPlan, list[Segment]]]]:
        """The matrices of each block and what their rows see."""
        found: list[list[tuple[MatrixPlan, list[Segment]]]] = [[] for _ in self.taps]
        checkpoint = self.matrices.source.checkpoint
        homes = {name: index for index, taps in enumerate(self.taps) for tap in taps for name in tap.tensors}
        for matrix in [matrix for matrix in self.matrices.target.plan.matrices if matrix.seen]:
            index = homes.get(matrix.weight.pieces[0].source)
            seen = None if index is None else segments(checkpoint, matrix.weight, self.taps[index])
            if index is None or seen is None:
                raise UnsupportedError(
                    "the inputs of this matrix cannot be observed",
                    tensor=matrix.name,
                    remedy="leave it out with --ignore, or use --method rtn",
                )
            found[index].append((matrix, seen))
        return found

    def run(self) -> None:
        """Quantize every matrix that is not done. Raises StoppedError after a signal: finished matrices are kept."""
        whole = [held for held in self.members if all(self.matrices.done(matrix) for matrix, _ in held)]
        self._whole = frozenset(matrix.name for held in whole for matrix, _ in held)
        missing = [index for index, held in enumerate(self.members) if not all(self._done(m) for m, _ in held)]
        missing += [index for index in range(len(self.taps)) if not self._held_done(index)]
        self.measures = self.measures and self.matrices.target.output.notes.get("measured") is None
        if self.measures:
            missing.append(self.network.n_blocks - 1)
        if not missing:
            return
        streams, first = self._begin(min(missing))
        self._total = sum(self._windows(index) for index in range(first, max(missing) + 1))
        facts = {"total": self.ids.numel(), "threads": self.way.pool.threads, "memory_needed": self.fitted.peak}
        self.on_event(events.Start(**facts, resumed_units=0))
        try:
            for index in range(first, max(missing) + 1):
                streams = self._block(index, streams, last=index == max(missing))
                if index < max(missing):
                    self.kept.remember(index, self._lanes(streams))
            if self.measures:
                measured = measure(self.matrices, self.way, streams, self.calibrated)
                if any(self.matrices.store.inputs(matrix) for matrix in self.matrices.target.plan.matrices):
                    measured["activations"] = "as they are"
                if any(matrix.cache for matrix in self.matrices.target.plan.matrices):
                    measured["kv_cache"] = "as it is"
                self.matrices.target.output.note({"measured": measured})
        finally:
            close(self._lanes(streams))

    def _done(self, matrix: MatrixPlan) -> bool:
        """Whether it need not be quantized. Matrices of a block that are refined together are done together: what a
        killed run wrote of them is written again, the same bytes."""
        return matrix.name in self._whole if self.refinement else self.matrices.done(matrix)

    def _held_done(self, index: int) -> bool:
        return all(unit in self.matrices.target.output.records for _, _, unit in rescaling.held_units(self.held[index]))

    def _stages(self, index: int) -> list[list[Tap]]:
        wanted = {segment.tap for _, seen in self.members[index] for segment in seen}
        return list(stages(self.taps[index], wanted, self.routers, sequential=self.sequential))

    def _passes(self, index: int) -> int:
        stages = len(self._stages(index))
        return (stages + 1 if self.quantized else max(1, stages)) + self.transform.passes + self.paired

    def _windows(self, index: int) -> int:
        """How many windows go through block ``index``, for the progress."""
        windows = self._passes(index) * self.ids.shape[0]
        if self.refinement and not all(self._done(matrix) for matrix, _ in self.members[index]):
            windows += refinement_windows(self.calibrated, self.ids.shape[1], self.refinement)
        return windows

    def _advance(self, windows: int = 1) -> None:
        self._steps += windows
        total = self.ids.numel()
        done = min(total, total * self._steps // self._total)
        self.on_event(events.Progress(done=done, total=total, unit="tokens"))

    # hidden states

    def _lanes(self, streams: Streams) -> list[Activations]:
        return [streams.quantized, streams.full] if self.paired else [streams.quantized]

    def _begin(self, wanted: int) -> tuple[Streams, int]:
        """The streams that enter the first block to be run, and its index: where an earlier run left them, or 0."""
        lanes = [QUANTIZED, FULL] if self.paired else [QUANTIZED]
        found = self.kept.resume(wanted, lanes, lambda text: self.on_event(events.Caution(text)))
        if found is not None:
            states, first = found
            return Streams(states[0], states[-1]), first
        weights = self.matrices.weights
        own = written_embedding(self.matrices) if self.quantized else None
        quantized = self.kept.entering(0, QUANTIZED)
        self.way.embed(own or weights, quantized)
        if not self.paired:
            return Streams(quantized, quantized), 0
        full = self.kept.entering(0, FULL)
        self.way.embed(weights, full)
        return Streams(quantized, full), 0

    # one block

    def _block(self, index: int, streams: Streams, *, last: bool) -> Streams:
        weights = self.matrices.weights
        full: FullInputs | None = None
        with ExitStack() as stack:
            own = streams.full
            if self.paired:
                full, own = self._see_source(index, streams, weights, last=last)
                stack.callback(full.close)
            block = stack.enter_context(self.way.block(index, weights))
            scales: dict[str, torch.Tensor] = {}
            if all(self._done(matrix) for matrix, _ in self.members[index]) and self._held_done(index):
                rescaling.restore(self.matrices, self.held[index], block)
            elif self.transform.passes:
                scales = rescaling.rescale(
                    self.matrices,
                    index,
                    block,
                    self.taps[index],
                    streams.quantized,
                    self.way,
                    transform=self.transform,
                    feedback=self.options.feedback,
                    windows=self.calibrated,
                )
            goes_on = not last or self.measures
            after = self.kept.leaving(index, streams.quantized, QUANTIZED) if goes_on else streams.quantized
            handled: set[str] = set()
            through = self.calibrated if last else 0  # so many windows need not go through the block, or have gone
            fresh: list[Job] = []
            for stage in self._stages(index):
                names = {tap.name for tap in stage} - handled
                members = [(matrix, seen) for matrix, seen in self.members[index] if seen[0].tap in names]
                # What is collected on the source's own inputs is collected once, on the way to the next block.
                going = after if goes_on and not self.quantized else None
                jobs = self._stage(members, stage, block, streams, full, scales, going)
                if jobs and going is not None:
                    through = self.calibrated
                fresh += jobs
                handled |= names
            if self.refinement and fresh:
                self._refine(fresh, block, streams.quantized, own)
            self.matrices.changed.clear()
            if not goes_on:
                return streams
            left = None if self.refinement else full  # what stages left there is of codes that have moved since
            propagate(self.way, block, streams.quantized, after, range(through, len(self.ids)), left)
        return _moved(streams, Streams(after, own if self.paired else after))

    def _see_source(
        self, index: int, streams: Streams, weights: CheckpointWeights, *, last: bool
    ) -> tuple[FullInputs, Activations]:
        """What the source's own block gives its matrices, and the hidden states that leave it."""
        windows, length = self.calibrated, self.ids.shape[1]
        wanted = {segment.tap for matrix, seen in self.members[index] if not self._done(matrix) for segment in seen}
        taps = [tap for tap in self.taps[index] if tap.name in wanted or any(t.matrices > 1 for t in self.taps[index])]
        place = None if self.fitted.inputs_in_memory else self.directory
        seen = taps if wanted and self.options.corrects else []
        full = FullInputs(seen, windows, length, self.network.dtype, place)
        goes_on = not last or self.measures or self.refinement
        after = self.kept.leaving(index, streams.full, FULL) if goes_on else None
        with self.way.block(index, weights) as block:
            full.see(self.way, block, streams.full, after)
        return full, after or streams.full

    def _stage(
        self,
        members: Sequence[tuple[MatrixPlan, list[Segment]]],
        stage: Sequence[Tap],
        block: Block,
        streams: Streams,
        full: FullInputs | None,
        scales: Mapping[str, torch.Tensor],
        after: Activations | None,
    ) -> list[Job]:
        """Quantize the matrices of one stage that are not done, and put all of them into the block. ``after``: takes
        what leaves the block for the windows calibrated on. Returns what was to be done, written where nothing refines
        it."""
        jobs = [Job(matrix, seen) for matrix, seen in members if not self._done(matrix)]
        if jobs:
            stage = _looked_at(stage, jobs)
            asked = {job.matrix.name: self.matrices.store.inputs(job.matrix) for job in jobs}
            looks = any(grid is not None and grid.static for grid in asked.values())
            cache = Largest() if any(job.matrix.cache is not None for job in jobs) else None
            grams = collect(
                self.way,
                stage,
                streams.quantized,
                block,
                full if self.options.corrects else None,
                scales,
                windows=self.calibrated,
                held_back=self.held_back,
                looks=looks,
                cache=None if cache is None else cache.see,
                orders=column_orders((matrix.weight, seen) for matrix, seen in members),
                leaves=self.sequential,
                after=after,
            )
            for one in jobs:
                grid = asked[one.matrix.name]
                one.inputs = None if grid is None else calibrated(grid, _largest(one, grams))
                one.cache = cache
            self.solver.stage(jobs, grams, stage, members)
            grams.clear()
        sources = Sources(self.matrices.source.checkpoint, self.matrices.present)
        fresh = {job.matrix.name: job for job in jobs}
        for matrix, _ in members:
            job = fresh.get(matrix.name)
            if job is None:
                fields = self.matrices.read(matrix)
            else:
                fields = [*self.solver.join(job), *self._cached(job)]
                if self.refinement:
                    job.fields = fields
                else:
                    self.matrices.write(matrix, fields, job.summary())
            if self.quantized:
                sources.put(matrix.weight, self.matrices.store.decode(matrix, fields))
        for name, decoded in sources.finished():
            block.replace(name, torch.from_numpy(decoded))
        return jobs

    def _refine(self, jobs: Sequence[Job], block: Block, entering: Activations, target: Activations) -> None:
        """Refine what the stages made of a block, put the better of both into it, and write it."""
        store = self.matrices.store

        def put(values: Mapping[str, Floats]) -> None:
            sources = Sources(self.matrices.source.checkpoint, self.matrices.present)
            for job in jobs:
                sources.put(job.matrix.weight, values[job.matrix.name])
            for name, decoded in sources.finished():
                block.replace(name, torch.from_numpy(decoded))

        def begin(pace: float) -> list[Part]:
            return [
                Part(job.matrix.name, job.matrix.weight, start, Moving(grid, codes, self.refinement, pace))
                for job in jobs
                for start, (grid, codes) in sorted(job.solved.items())
            ]

        if any(job.solved for job in jobs):
            refining = Refinement(block, entering, target, self.calibrated, self.way.pool, put, self._advance)
            were = {job.matrix.name: store.decode(job.matrix, job.fields) for job in jobs}
            before = refining.loss(refining.held)
            parts, pace = refining.run(begin, were, self.refinement)
            fields = {job.matrix.name: self._refined(job, parts) for job in jobs}
            put({job.matrix.name: store.decode(job.matrix, fields[job.matrix.name]) for job in jobs})
            after = refining.loss(refining.held)
            outcome = Outcome(before, after, self.refinement, len(refining.held), pace)
            if not outcome.kept:
                put(were)
            for job in jobs:
                if job.solved:
                    job.facts["refinement"] = outcome.facts()
                    job.fields = fields[job.matrix.name] if outcome.kept else job.fields
        for job in jobs:
            self.matrices.write(job.matrix, job.fields, job.summary())
            job.fields.clear()

    def _refined(self, job: Job, parts: Sequence[Part]) -> Fields:
        """The fields of a job with its parts as they are now."""
        for part in [part for part in parts if part.name == job.matrix.name]:
            job.pieces[part.start] = self.matrices.store.piece(job.matrix, *part.moving.hardened())
        return [*self.solver.join(job), *self._cached(job)]

    def _cached(self, job: Job) -> Fields:
        """The scales of the keys and values before a matrix, where it has them."""
        if job.cache is None or job.matrix.cache is None:
            return []
        tensors = tuple(self.matrices.target.plan.tensors[index] for index in job.matrix.fields[-CACHED:])
        return job.cache.fields(job.matrix, tensors)


def _looked_at(stage: Sequence[Tap], jobs: Sequence[Job]) -> list[Tap]:
    """The taps that ``jobs`` see; all where there are experts, as their layer's inputs serve them. What other taps got
    in the source's block was not kept."""
    seen = {segment.tap for job in jobs for segment in job.segments}
    return [tap for tap in stage if tap.name in seen or any(one.matrices > 1 for one in stage)]


def _largest(job: Job, grams: Mapping[tuple[str, int], Gram]) -> float:
    """The largest input of a matrix; of an expert, that of all experts, whom runtimes join."""
    taps = {segment.tap for segment in job.segments}
    return max((float(gram.largest.max()) for (tap, _), gram in grams.items() if tap in taps), default=0.0)


def _moved(old: Streams, new: Streams) -> Streams:
    """``new``, after closing what of ``old`` is not needed any more."""
    for states in {old.quantized, old.full} - {new.quantized, new.full}:
        states.close()
    return new
