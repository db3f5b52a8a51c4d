"""A model's profile: plan the cost, measure what is not known yet, remember it.

Figures are journalled beside the profile as soon as a group of variants is measured; the same command goes on from
them, whatever the memory limit and the number of threads are now: they change no figure's meaning, and its value only
where torch multiplies in another order (by 1e-9).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_quantize import memory
from llm_quantize.artifacts import preflight
from llm_quantize.artifacts.output import refuse_changed, source_times
from llm_quantize.engine import stop_on_signals
from llm_quantize.errors import MissingExtraError, UsageError
from llm_quantize.evaluation.ladders import ladder_of
from llm_quantize.evaluation.sensitivity import Candidate, Cost, Profile, Sensitivity, windows_sha256
from llm_quantize.events import EventSink, ignore
from llm_quantize.io.durable import fail_os, open_regular_output, read_at
from llm_quantize.io.imatrix_file import Imatrix
from llm_quantize.io.journal import parse_journal, record_line
from llm_quantize.io.ownership import take_lock
from llm_quantize.io.statistics_file import read_statistics, refuse_other_model
from llm_quantize.measures.perplexity import Tokens
from llm_quantize.memory import TORCH_BYTES, Fitted, Sizes
from llm_quantize.models.opening import Source
from llm_quantize.streams.sizes import from_network

if TYPE_CHECKING:
    from llm_quantize.evaluation.ladders import Hold
    from llm_quantize.evaluation.sensitivity_stream import Placed
    from llm_quantize.streams.network import Network
    from llm_quantize.streams.pool import Pool

STREAM_BYTES = 2 << 30
"""Hidden states of variants held at once where there is no memory limit."""

ESTIMATE = 1
"""Which estimate by gradients this version makes: one more whenever its figures become others."""

PASSES = 4.0
"""Forwards of the text that an estimate takes: there, each block once more on the way back, and twice that for its
gradients."""
_KEPT_FOR_BACK = 4  # times what a forward holds for a moment is kept of a block until its gradients are there


@dataclass(frozen=True)
class ProfilePlan:
    """What will be measured, and what that takes. ``groups`` are carried one after the other by ``threads``; ``times``:
    of the source's files when the plan was made. ``estimated``: by gradients, in one group, whose hidden states take
    ``disk`` bytes of files (0: they stay in memory)."""

    source: Source
    network: Network
    windows: Tokens
    imatrix: Imatrix | None
    device: str
    wanted: tuple[Candidate, ...]
    known: Mapping[tuple[str, str], Sensitivity]
    groups: tuple[tuple[Placed, ...], ...]
    cost: Cost
    threads: int
    memory: int
    texts: tuple[str, ...]
    times: list[list[Any]]
    form: str = "gguf"
    statistics: Path | None = None
    estimated: bool = False
    disk: int = 0


def plan_profile(
    source: Source,
    windows: Tokens,
    types: Sequence[str],
    imatrix: Imatrix | None,
    *,
    texts: Sequence[str] = (),
    journal: Path | None = None,
    threads: int | None = None,
    max_ram: int | None = None,
    device: str = "cpu",
    form: str = "gguf",
    statistics: Path | None = None,
    estimated: bool = False,
    on_event: EventSink = ignore,
) -> ProfilePlan:
    """Everything that measuring takes, without loading a weight. ``windows``: (n, length) token ids; ``journal``: what
    an earlier run measured, left out of the plan; only where there is one the source's files are read for their hash.
    ``form``: the format whose types these are; ``statistics``: with Hessians, for codes that are chosen by error
    feedback where the format has such. ``estimated``: figures by gradients (evaluation/fisher.py), not measured one by
    one.

    Raises MissingExtraError without torch, UsageError (types, windows), ResourceError where not even one variant fits.
    """
    for module in ("torch", "transformers"):
        if find_spec(module) is None:
            raise MissingExtraError("Measuring sensitivity", "torch")
    from llm_quantize.evaluation.sensitivity_stream import cost_of, place, plan_groups
    from llm_quantize.streams.network import open_network

    if windows.ndim != 2 or not len(windows) or not 4 <= windows.shape[1] <= source.architecture.hyper.context_length:
        raise UsageError(
            "no window to measure on",
            expected=f"windows of 4 to {source.architecture.hyper.context_length} tokens",
            found=windows.shape,
        )
    ladder = ladder_of(form)
    wanted = ladder.candidates(source, types, {} if imatrix is None else imatrix.values)
    known, times = dict[tuple[str, str], Sensitivity](), source_times(source.checkpoint)
    if journal is not None and journal.is_file():
        known = known_figures(
            journal, identity_of(source, windows, imatrix, statistics, form, device, estimated, on_event)
        )
    network = open_network(source, dtype="float32", device=device)
    placed = place(source, network, [one for one in wanted if one.key not in known])
    solving = ladder.held_bytes(wanted, statistics)
    limits = {"threads": threads, "max_ram": max_ram}
    if estimated:
        fitted = memory.fit(
            _estimate_sizes(source, network, windows, wanted, solving, device, statistics is not None), **limits
        )
        groups: tuple[tuple[Placed, ...], ...] = (tuple(placed),) if placed else ()
        names, streams = {one.candidate.name for one in placed}, len(placed)
        cost = Cost(len(names), streams, windows.size, 0, PASSES if placed else 0.0, 2 * len(groups), estimated=True)
    else:
        largest = _largest(wanted)
        streams, fitted = _fit(
            source, network, windows, placed, largest=largest, solving=solving, device=device, **limits
        )
        groups = tuple(tuple(group) for group in plan_groups(placed, network.n_blocks, streams))
        cost = cost_of(groups, network.n_blocks, windows.size)
    return ProfilePlan(
        source=source,
        network=network,
        windows=windows,
        imatrix=imatrix,
        device=device,
        wanted=tuple(wanted),
        known=known,
        groups=groups,
        cost=cost,
        threads=fitted.threads,
        memory=fitted.peak,
        texts=tuple(texts),
        times=times,
        form=form,
        statistics=statistics,
        estimated=estimated,
        disk=0 if fitted.in_memory else fitted.hidden_bytes,
    )


def importance_of(
    source: Source, imatrix: Imatrix | None, statistics: Path | None, on_event: EventSink = ignore
) -> str | None:
    """The hash of what figures are measured with beside the model: an importance matrix, or the Hessians of a file of
    statistics. Raises UsageError where that has none, IntegrityError where it is of another model."""
    if statistics is None:
        return None if imatrix is None else imatrix.sha256
    with read_statistics(statistics) as found:
        if "hessian" not in found.kinds:
            raise UsageError(
                "these statistics hold no Hessians",
                file=statistics,
                expected="hessian",
                found=", ".join(found.kinds),
                remedy="llm-quantize analyze importance MODEL --collect hessian --format statistics -o FILE",
            )
        refuse_other_model(found, source.content(on_event))
        return found.content_sha256


def _fit(
    source: Source,
    network: Network,
    windows: Tokens,
    placed: Sequence[Placed],
    *,
    largest: int,
    solving: int,
    threads: int | None,
    max_ram: int | None,
    device: str,
) -> tuple[int, Fitted]:
    """How many variants fit at a time. Raises ResourceError where not one does."""
    from llm_quantize.evaluation.sensitivity_stream import POSITIONS

    sizes = from_network(source, network)
    length = windows.shape[1]
    stream = sizes.hidden(*windows.shape)
    logits = POSITIONS * network.vocab_size * (4 + 6 * 8)

    def holding(streams: int) -> Sizes:
        # A replaced tensor stands beside its block as it was read, as it is seen, and as it is put back.
        beside = 3 * largest + (2 + streams) * stream + solving
        return Sizes(
            libraries=TORCH_BYTES,
            ends=sizes.embedding + 2 * sizes.head + beside,
            block=sizes.block + beside,
            each=max(sizes.workspace(length), logits) + 4 * sizes.hidden(1, length) + sizes.scratch,
            device=device,
        )

    limit = memory.memory_limit(max_ram)
    streams = max(1, min(len(placed), STREAM_BYTES // stream))
    if limit is not None:
        streams = max(1, min(streams, (limit - memory.peak(holding(0), 1)) // stream))
    fitted = memory.fit(holding(streams), threads=threads, max_ram=max_ram)
    return streams, fitted


def _largest(wanted: Sequence[Candidate]) -> int:
    """Bytes of the largest tensor that is held at a type: of one whose figures are known too, which a trial holds."""
    return max((4 * one.weights for one in wanted), default=0)


def _estimate_sizes(
    source: Source,
    network: Network,
    windows: Tokens,
    wanted: Sequence[Candidate],
    solving: int,
    device: str,
    fed_back: bool,
) -> Sizes:
    """What the way back holds. A thread has the gradients of a whole part beside what its window leaves for them."""
    from llm_quantize.evaluation.fisher import POSITIONS

    sizes = from_network(source, network)
    length = windows.shape[1]
    logits = POSITIONS * network.vocab_size * (6 * 4 + 2 * 8)
    blocks = [network.taps(index) for index in range(network.n_blocks if fed_back else 0)]
    grams = max((sum(4 * tap.columns**2 for tap in taps if tap.matrices == 1) for taps in blocks), default=0)
    beside = 3 * _largest(wanted) + solving + grams
    return Sizes(
        libraries=TORCH_BYTES,
        ends=max(sizes.embedding, 3 * sizes.head) + beside,
        block=2 * sizes.block + beside,
        each=max(_KEPT_FOR_BACK * sizes.workspace(length) + 2 * sizes.block + 2 * grams, logits + 2 * sizes.head)
        + sizes.scratch,
        hidden=sizes.hidden(*windows.shape),
        copies=network.n_blocks + 3,
        device=device,
        refusal=(
            "one block of this model and its gradients do not fit the memory limit",
            "raise --max-ram or the limit, or take fewer --threads",
        ),
    )


def measure_profile(plan: ProfilePlan, *, journal: Path | None = None, on_event: EventSink = ignore) -> Profile:
    """Measure, or estimate, what the plan lacks. ``journal``: where figures are kept as they come; left there for
    the caller to remove when the profile is written.

    Raises NumericPolicyError, BusyError (another process measures the same), StoppedError after a signal,
    IntegrityError (the source was written meanwhile), and what reading weights raises.
    """
    from llm_quantize.streams.pool import Pool

    found = dict(plan.known)
    identity = identity_of(
        plan.source, plan.windows, plan.imatrix, plan.statistics, plan.form, plan.device, plan.estimated, on_event
    )
    with stop_on_signals() as stop, _journal(plan, identity, journal) as record:
        pool = Pool(plan.threads, stop, resumable=None if journal is None else True)
        with ladder_of(plan.form).holding(plan.source, pool, plan.imatrix, plan.statistics) as hold:
            way = _estimate if plan.estimated else _measure
            rows = way(plan, hold, pool, partial(_settled, plan, record), on_event) if plan.groups else []
    refuse_changed(plan.source.checkpoint, plan.times)
    found |= {(row.tensor, row.qtype): row for row in rows}
    length = plan.windows.shape[1]
    text = {
        "sha256": identity["windows"],
        "datasets": list(plan.texts),
        "context": length,
        "windows": len(plan.windows),
        "tokens": len(plan.windows) * (length if plan.estimated else length - 1 - length // 2),
    }
    name = plan.source.checkpoint.name
    ordered = tuple(found[one.key] for one in plan.wanted)
    return Profile(name, identity["model"], text, identity["importance"], ordered, plan.form, plan.estimated)


Record = Callable[[Sequence[Sensitivity]], None]


def _measure(plan: ProfilePlan, hold: Hold, pool: Pool, record: Record, on_event: EventSink) -> list[Sensitivity]:
    from llm_quantize.evaluation.sensitivity_stream import Measurement

    return Measurement(plan.source, plan.network, plan.windows, hold, pool, on_event).measure(plan.groups, record)


def _estimate(plan: ProfilePlan, hold: Hold, pool: Pool, record: Record, on_event: EventSink) -> list[Sensitivity]:
    from llm_quantize.evaluation.fisher import Estimation

    with scratch_of(plan) as scratch:
        fed_back = plan.statistics is not None
        run = Estimation(plan.source, plan.network, plan.windows, hold, pool, scratch, on_event, fed_back)
        return run.measure([one for group in plan.groups for one in group], record)


def identity_of(
    source: Source,
    windows: Tokens,
    imatrix: Imatrix | None,
    statistics: Path | None,
    form: str,
    device: str,
    estimated: bool,
    on_event: EventSink,
) -> dict[str, Any]:
    """What figures depend on (JSON-ready)."""
    return {
        "model": source.content(on_event),
        "windows": windows_sha256(windows),
        "importance": importance_of(source, imatrix, statistics, on_event),
        "device": device,
        **({} if form == ProfilePlan.form else {"form": form}),
        **({"estimated": ESTIMATE} if estimated else {}),
    }


@contextmanager
def scratch_of(plan: ProfilePlan) -> Iterator[Path | None]:
    """A directory for the hidden states of ``plan``; None where they stay in memory. Raises ResourceError where the
    disk is too small."""
    if not plan.disk:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="llm-quantize-") as found:
        preflight.check_disk(Path(found), plan.disk, remedy="set TMPDIR to another directory")
        yield Path(found)


def _settled(plan: ProfilePlan, record: Callable[[Sequence[Sensitivity]], None], rows: Sequence[Sensitivity]) -> None:
    """Keep ``rows``, which were measured on the source that was planned for."""
    refuse_changed(plan.source.checkpoint, plan.times)
    record(rows)


def known_figures(path: Path, identity: Mapping[str, Any]) -> dict[tuple[str, str], Sensitivity]:
    """What an earlier run of the same identity measured, by (tensor, type); nothing where there is none."""
    if path.is_symlink() or not path.is_file():
        return {}
    records, _ = parse_journal(path.read_bytes())
    if not records or records[0].get("identity") != dict(identity):
        return {}
    rows = [Sensitivity.from_dict(row) for record in records[1:] for row in record.get("rows", [])]
    return {(row.tensor, row.qtype): row for row in rows}


@contextmanager
def _journal(
    plan: ProfilePlan, identity: Mapping[str, Any], path: Path | None
) -> Iterator[Callable[[Sequence[Sensitivity]], None]]:
    """A function that keeps figures; a journal of another identity is started again."""
    if path is None:
        yield lambda _rows: None
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = open_regular_output(path, append=True)
    except OSError as error:
        fail_os(error, "the journal cannot be opened", path)
    try:
        take_lock(descriptor, path, None)
        if not plan.known:
            os.ftruncate(descriptor, 0)
            _append(descriptor, path, {"identity": dict(identity)})
        elif not read_at(descriptor, os.fstat(descriptor).st_size, 0).endswith(b"\n"):
            os.write(descriptor, b"\n")
        yield partial(_keep, descriptor, path)
    finally:
        os.close(descriptor)


def _keep(descriptor: int, path: Path, rows: Sequence[Sensitivity]) -> None:
    _append(descriptor, path, {"rows": [row.to_dict() for row in rows]})


def _append(descriptor: int, path: Path, record: Mapping[str, Any]) -> None:
    data = record_line(record)
    try:
        if os.write(descriptor, data) != len(data):
            raise OSError("the record is cut short")
        os.fsync(descriptor)
    except OSError as error:
        fail_os(error, "the journal cannot be written", path)
