"""The calibration run: text through the model, one decoder block in memory at a time, statistics into a file.

    text → windows → embedding → block 0 → block 1 → … ; each block's inputs are summed up, written and journalled

Every window passes through a block before the next block is loaded, so memory holds one block, its statistics and one
window per thread; the hidden states between two blocks stay in memory or, where they are many, in a file. Windows run
side by side on one torch thread each and are summed in their order, so the file has the same bytes for any number of
threads. A killed run continues after its last finished block: from the hidden states it left, where they are whole,
else by running the finished blocks again without summing.

Where experts saw too few tokens a second part with further text is collected, and so on, and the parts are merged.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llm_quantize
from llm_quantize import events, memory
from llm_quantize.artifacts import preflight
from llm_quantize.artifacts.output import DTYPES, DType, refuse_changed, source_times
from llm_quantize.calibration.cache import is_kept, manifest_of, prepare_directory
from llm_quantize.calibration.drawing import draw_windows
from llm_quantize.calibration.enough import coverage_advice
from llm_quantize.calibration.imatrix import TapCoverage, by_layer, coverage
from llm_quantize.calibration.outcome import Calibration
from llm_quantize.calibration.statistics import BlockSums, collecting_sizes
from llm_quantize.calibration.windows import Windows
from llm_quantize.engine import stop_on_signals
from llm_quantize.errors import MissingExtraError
from llm_quantize.events import EventSink, ignore
from llm_quantize.io.artifact_paths import journal_path, manifest_path
from llm_quantize.io.cache import cache_directory
from llm_quantize.io.journal import canonical_json
from llm_quantize.io.leftovers import allocated_bytes, discard_hidden, discard_partial, hidden_bytes
from llm_quantize.io.output import OutputFile, ResumableOutput, Span
from llm_quantize.io.statistics_file import merge_statistics, merged_identity, read_statistics
from llm_quantize.io.statistics_layout import (
    StatisticsIdentity,
    StatisticsLayout,
    TapLike,
    check_kinds,
    layout_statistics,
)
from llm_quantize.io.whole_file import write_file
from llm_quantize.models.opening import Source
from llm_quantize.options import CalibrationOptions
from llm_quantize.streams.sizes import from_headers, from_network

if TYPE_CHECKING:
    from threading import Event

    from torch import Tensor

    from llm_quantize.streams.hidden import Kept
    from llm_quantize.streams.network import Block, Network

_CONTENT = "content"  # the unit of the hashes

MAX_PARTS = 4
"""Parts of text drawn for experts that saw too little; each is as long as all before it: at most 8 times the text."""


@dataclass
class _Run:
    """One calibration: what stays the same for all its parts, and what it cost so far. ``times``: of the source's files
    before the hash in ``model`` was asked for; ``directory``: where statistics are kept."""

    source: Source
    options: CalibrationOptions
    model: Mapping[str, Any]
    times: list[list[Any]]
    text: Mapping[str, Any]
    windows: Windows
    kinds: tuple[str, ...]
    dtype: DType
    directory: Path
    on_event: EventSink
    before: int | None = None
    network: Network | None = None
    computed: int = 0
    planned: int = 0
    began: float = field(default_factory=time.process_time)

    def identity(self, start: int, count: int) -> StatisticsIdentity:
        """Windows [start, start + count), run through this model; parts of the same tokens differ by their start."""
        ids = self.windows.draw(start, count)
        digest = hashlib.sha256(canonical_json([start, list(ids.shape), self.dtype, self.options.device]))
        digest.update(ids.astype("<i8").tobytes())
        facts = {"windows": len(ids), "first_window": start, "tokens": int(ids.size), "sha256": digest.hexdigest()}
        return StatisticsIdentity(self.model, {**self.text, **facts})


def calibrate(
    source: Source,
    options: CalibrationOptions,
    *,
    before: int | None = None,
    directory: Path | None = None,
    on_event: EventSink = ignore,
) -> Calibration:
    """Statistics of ``source`` over the text of ``options``; kept in ``directory`` (None: that of ``cache_directory``)
    under the hashes of both. ``before``: bytes that were resident when the run began (``memory.peak``).

    The same call finds them again, and continues what was interrupted, ending in the same bytes. Raises
    MissingExtraError without torch; ResourceError before any work where memory or disk do not suffice;
    NumericPolicyError naming layer and sample for an activation that is not finite (finished layers are kept);
    StoppedError after a signal; and what reading text and model raises.
    """
    for name in ("torch", "transformers"):
        if find_spec(name) is None:
            raise MissingExtraError("calibration", "torch")
    state = _open_run(source, options, before, directory or cache_directory() / "statistics", on_event)
    path = _part_path(state, 0, state.windows.samples)
    reused = path.is_file()
    paths, total = [_collect(state, 0, state.windows.samples)], state.windows.samples
    short = _short(paths[0], options.expert_minimum)
    merged = path
    while short and len(paths) < MAX_PARTS:
        count = len(state.windows.draw(total, total))
        if count == 0:
            break
        text = f"{sum(map(len, short.values()))} experts saw fewer than {options.expert_minimum} tokens"
        on_event(events.Note(f"{text}; drawing {count} more windows of text"))
        paths.append(_collect(state, total, count))
        total += count
        merged = _merge(paths, state.directory, on_event)
        short = _short(merged, options.expert_minimum)
    return _result(state, merged, total, short, reused=reused and state.computed == 0)


def _result(state: _Run, path: Path, total: int, short: Mapping[str, tuple[int, ...]], *, reused: bool) -> Calibration:
    options, hyper = state.options, state.source.architecture.hyper
    widest = max(hyper.embedding_length, hyper.feed_forward_length, hyper.n_head * hyper.head_dim)
    advice = coverage_advice(total * state.windows.length, widest, hessian="hessian" in state.kinds)
    if advice:
        state.on_event(events.Caution(advice))
    return Calibration(
        path=path,
        model=state.source.checkpoint.name,
        reused=reused,
        windows=total,
        length=state.windows.length,
        shares=state.windows.shares(total),
        kinds=state.kinds,
        dtype=state.dtype,
        short=short,
        experts=tuple(by_layer(_coverage(path, options.expert_minimum))),
        expert_minimum=options.expert_minimum,
        seconds=0.0 if reused else time.process_time() - state.began,
        computed_tokens=state.computed,
        memory_planned=state.planned,
        memory_peak=0 if reused else memory.peak_resident_bytes(),
        advice=() if advice is None else (advice,),
    )


def _open_run(
    source: Source, options: CalibrationOptions, before: int | None, directory: Path, on_event: EventSink
) -> _Run:
    windows, facts = draw_windows(source, options, on_event)
    times = source_times(source.checkpoint)
    model = {"name": source.checkpoint.name, "sha256": source.content(on_event)}
    kinds = check_kinds(options.collect)
    state = _Run(source, options, model, times, facts, windows, kinds, "float32", directory, on_event, before=before)
    _refuse_early(state)
    state.dtype = compute_dtype(source, options.device)
    return state


def _refuse_early(state: _Run) -> None:
    """Raise ResourceError where one thread does not fit, before torch alone takes more than the limit; not where there
    is nothing to run."""
    count, length = state.windows.samples, state.windows.length
    if any(_part_path(replace(state, dtype=dtype), 0, count).is_file() for dtype in DTYPES):
        return
    network = from_headers(state.source, state.options.device)
    sizes = collecting_sizes(network, state.kinds, (count, length), device=state.options.device)
    memory.fit(sizes, threads=1, max_ram=state.options.max_ram, before=state.before)


def compute_dtype(source: Source, device: str) -> DType:
    """bfloat16 for a checkpoint of 16 or 8 bits where the device multiplies it quickly, else float32."""
    import torch

    stored = {info.dtype for info in source.checkpoint.tensors.values()}
    quick = device != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if quick and not stored & {"F32", "F64"} else "float32"


def _part_path(state: _Run, start: int, count: int) -> Path:
    identity = state.identity(start, count)
    key = canonical_json({"model": identity.model, "text": identity.text, "kinds": list(state.kinds)})
    return _kept_in(state.directory, hashlib.sha256(key).hexdigest())


def _kept_in(directory: Path, digest: str) -> Path:
    return directory / f"{digest[:32]}.safetensors"


def _short(path: Path, minimum: int) -> dict[str, tuple[int, ...]]:
    return {entry.tap: entry.short for entry in _coverage(path, minimum) if entry.short}


def _coverage(path: Path, minimum: int) -> list[TapCoverage]:
    with read_statistics(path) as statistics:
        return coverage(statistics, minimum)


def _merge(paths: Sequence[Path], directory: Path, on_event: EventSink) -> Path:
    target = _kept_in(directory, hashlib.sha256(canonical_json([path.name for path in paths])).hexdigest())
    if not is_kept(target, merged_identity(paths), on_event):
        merge_statistics(paths, target)
        facts = {"identity": {"parts": [path.name for path in paths]}}
        write_file(manifest_path(target), [manifest_of(target, target.name, facts)], replace=True)
    return target


# one part


@dataclass(frozen=True)
class _Part:
    """One part's windows on their way through the blocks. ``keys``: the unit of each block that has statistics."""

    state: _Run
    network: Network
    layout: StatisticsLayout
    taps: Sequence[Sequence[TapLike]]
    output: ResumableOutput
    keys: Mapping[int, str]
    windows: int
    length: int
    fitted: memory.Fitted
    stop: Event

    @property
    def tokens(self) -> int:
        return self.windows * self.length

    def kept(self) -> Kept:
        """Where the hidden states stand between two blocks."""
        import torch

        from llm_quantize.streams.hidden import Kept

        shape = (self.windows, self.length, self.network.width)
        directory = None if self.fitted.in_memory else self.output.hidden()
        return Kept(self.output, shape, getattr(torch, self.state.dtype), directory)


def _collect(state: _Run, start: int, count: int) -> Path:
    """The statistics of windows [start, start + count), collected where they are missing."""
    target = _part_path(state, start, count)
    identity = state.identity(start, count)
    if is_kept(target, identity, state.on_event):
        discard_partial(target, journal_path(target))
        discard_hidden(target)
        return target
    import torch

    from llm_quantize.streams.network import open_network

    options = state.options
    if state.network is None:
        state.on_event(events.Stage("build the network"))
        state.network = open_network(state.source, dtype=state.dtype, device=options.device)
    network = state.network
    taps = [network.taps(index) for index in range(network.n_blocks)]
    layout = layout_statistics(identity, taps, state.kinds)
    ids = torch.from_numpy(state.windows.draw(start, count))
    fitted = _fit(state, network, taps, ids)
    state.planned = max(state.planned, fitted.peak)
    prepare_directory(target.parent)
    preflight.check_disk(
        target.parent,
        layout.size + fitted.disk_bytes,
        held=allocated_bytes(target) + hidden_bytes(target),
        remedy="set LLM_QUANTIZE_CACHE to another directory, or take fewer --calibration-samples",
    )
    keys = {index: f"block {index}" for index, (_, nbytes) in enumerate(layout.spans) if nbytes}
    output = ResumableOutput(
        target,
        [OutputFile(target.name, layout.size, layout.header)],
        identity={"version": llm_quantize.__version__, "model": dict(identity.model), "text": dict(identity.text)},
        spans={
            **{key: Span(0, *layout.spans[index]) for index, key in keys.items()},
            _CONTENT: Span(0, layout.content.offset, layout.content.nbytes),
        },
        journal_path=journal_path(target),
        on_warning=lambda text: state.on_event(events.Caution(text)),
    )
    with output, stop_on_signals() as stop:
        _begin(output, state.times, state.on_event)
        job = _Part(state, network, layout, taps, output, keys, ids.shape[0], ids.shape[1], fitted, stop)
        _run_blocks(job, ids)
        _write_content(job)
        blocks = {key: record["sha256"] for key, record in sorted(output.records.items())}
        facts = {"identity": {"model": dict(identity.model), "text": dict(identity.text)}, "blocks": blocks}
        refuse_changed(state.source.checkpoint, state.times)
        output.sync()  # says so where the cache was taken away meanwhile
        output.finish(manifest_of(output.partial, target.name, facts))
    return target


def _begin(output: ResumableOutput, times: list[list[Any]], on_event: EventSink) -> None:
    """Note when the source's files were written; what was collected before one of them was is collected again: they may
    have held other weights meanwhile."""
    if output.notes.get("source_times") not in (None, times) and (output.records or output.notes.get("hidden")):
        on_event(events.Caution("the source was written since the unfinished calibration; it is collected anew"))
        output.forget(*output.records)
        output.note({"hidden": None})
    output.note({"source_times": times})


def _fit(state: _Run, network: Network, taps: Sequence[Sequence[TapLike]], ids: Tensor) -> memory.Fitted:
    options, sizes = state.options, from_network(state.source, network, taps)
    need = collecting_sizes(sizes, state.kinds, (ids.shape[0], ids.shape[1]), device=options.device)
    return memory.fit(need, threads=options.threads, max_ram=options.max_ram, before=state.before)


def _run_blocks(job: _Part, ids: Tensor) -> None:
    """Every block whose statistics are missing, after those before it."""
    from llm_quantize.streams.hidden import close
    from llm_quantize.streams.passes import Move, Pass
    from llm_quantize.streams.pool import Pool
    from llm_quantize.streams.weights import CheckpointWeights

    output, state = job.output, job.state
    missing = [index for index, key in job.keys.items() if key not in output.records or not output.check(key)]
    if not missing:
        return
    weights, kept, last = CheckpointWeights(state.source.checkpoint), job.kept(), missing[-1]
    found = kept.resume(missing[0], [0], lambda text: state.on_event(events.Caution(f"{text}, without summing")))
    states, first = ([], 0) if found is None else found
    tell = _Progress(job.tokens, (last + 1 - first) * job.windows, state.on_event)
    facts = {"total": job.tokens, "threads": job.fitted.threads, "memory_needed": job.fitted.peak}
    state.on_event(events.Start(**facts, resumed_units=len(output.records)))
    way = Pass(job.network, ids, Pool(job.fitted.threads, job.stop, resumable=True), tell)

    def on_block(block: Block, _: int) -> None:
        index, before = block.index, states[0]
        sums = BlockSums(job.taps[index], state.kinds) if index in missing else None
        states.append(kept.leaving(index, before))
        # Every matrix's inputs are looked at while they are summed, so what leaves the block need not be.
        way.through(block, [Move(before, states[1], None, partial(_summed, sums))])
        if states.pop(0) is not states[0]:
            before.close()
        if sums is not None:
            _write(job, index, sums)
        kept.remember(index, states)

    try:
        if not states:
            states.append(kept.entering(0))
            way.embed(weights, states[0])
        way.run(range(first, last + 1), [weights], on_block)
        state.computed += job.tokens * (last + 1 - first) // job.network.n_blocks
    finally:
        close(states)


@dataclass
class _Progress:
    """Tells how many of the part's tokens are through, as if all ``windows`` through blocks were one pass of them."""

    tokens: int
    windows: int
    on_event: EventSink
    done: int = 0

    def __call__(self) -> None:
        self.done += 1
        share = self.tokens * self.done // self.windows
        self.on_event(events.Progress(done=share, total=self.tokens, unit="tokens"))


def _summed(sums: BlockSums | None, block: Block, hidden: Tensor, window: int) -> Tensor:
    """A window through a block whose inputs are added to ``sums``."""
    if sums is None:
        return block(hidden)
    with sums.window(window) as sink, block.observe(sink):
        return block(hidden)


def _write(job: _Part, index: int, sums: BlockSums) -> None:
    """Write and record a block's statistics."""
    output, digest, digests = job.output, hashlib.sha256(), list[bytes]()
    span = output.spans[job.keys[index]]
    for position, piece in job.layout.block_pieces(index, sums.arrays().__getitem__, digests):
        digest.update(piece.data)
        output.write(span, position, piece.data)
    output.record(job.keys[index], {"sha256": digest.hexdigest(), "arrays": [one.hex() for one in digests]})


def _write_content(job: _Part) -> None:
    """Write and record the hashes of all blocks, which are recorded."""
    output = job.output
    digests = [bytes.fromhex(one) for key in job.keys.values() for one in output.records[key]["arrays"]]
    data = job.layout.content_bytes(digests)
    output.write(output.spans[_CONTENT], 0, data)
    output.record(_CONTENT, {"sha256": hashlib.sha256(data).hexdigest()})
