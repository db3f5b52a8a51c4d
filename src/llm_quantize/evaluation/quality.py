"""What any artifact lost against its source, measured block by block, without a runtime.

    source, artifacts, windows of text → streams of hidden states, block by block → logits of both → divergence

Definitions: measures/divergence.py. The way: evaluation/streamed.py; what is kept of the source's: reference.py. Beside
the figures stand the noise floor (the source against itself in another order of arithmetic, streams/reordered.py),
pairs of artifacts on the same tokens, and, where a runtime is asked for, the same artifact there with the difference
between the two figures.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_quantize import events, memory
from llm_quantize.architectures.rows import weights_of
from llm_quantize.artifacts import preflight
from llm_quantize.artifacts.decoded import Decoded
from llm_quantize.artifacts.opening import open_decoded
from llm_quantize.artifacts.output import refuse_changed, source_times
from llm_quantize.engine import stop_on_signals
from llm_quantize.errors import MissingExtraError, NumericPolicyError, UsageError
from llm_quantize.evaluation.quality_plan import QualityPlan
from llm_quantize.events import EventSink, ignore
from llm_quantize.io.cache import cache_directory
from llm_quantize.io.durable import fail_os
from llm_quantize.measures import grades
from llm_quantize.measures.amounts import decimals
from llm_quantize.measures.divergence import Comparison, Divergence, Paired, pair
from llm_quantize.measures.perplexity import Tokens
from llm_quantize.models.opening import Source
from llm_quantize.results import Tabled, json_ready
from llm_quantize.runtimes import RUNTIMES, artifact_at, what_opens_what

if TYPE_CHECKING:
    from llm_quantize.evaluation.reference import Reference
    from llm_quantize.evaluation.streamed import Evaluation, RuntimeStream, Stream
    from llm_quantize.streams.hidden import Activations

NOISE_WINDOWS = 4
"""Windows that the source runs a second time, in another order of arithmetic."""

SCORED = 500  # comparing the probabilities of a word takes as long as so many products
ROUNDING_LIMIT = 0.01
"""Mean KLD between an artifact streamed and the same one in llama.cpp up to which the rounding of activations to 8
bits explains it: 1e-5 to 2e-3 is what it costs, by the model; a wrong tensor or position costs more than 0.1."""


@dataclass(frozen=True)
class NoiseFloor:
    """The source against itself in another order of float32 arithmetic, over ``tokens`` positions. KLD in nats."""

    kld: float
    kld_max: float
    same_top: float
    tokens: int


@dataclass(frozen=True)
class RuntimeQuality:
    """The artifact in its real runtime. ``divergence``: from the source; ``difference``: its KLD minus the streamed
    one, with the paired standard error; ``rounding``: from the same artifact streamed, which is what the runtime's
    own arithmetic (activations rounded to 8 bits) does; ``explained``: whether that is small and accounts for the
    difference, roots of KLDs being distances: |√a - √b| ≤ √rounding, with a quarter to spare."""

    runtime: str
    divergence: Divergence
    rounding: Divergence
    difference: float
    difference_sem: float
    explained: bool


@dataclass(frozen=True)
class ArtifactQuality:
    """One artifact. ``size`` in bytes; ``bits_per_weight``: all its bits, header included, as a plan has it;
    ``notes``: what in it differs from the reference's configuration; ``inputs``: what the inputs of its matrices were
    rounded to, as its runtime does, "" where they were not; ``cache``: the same of keys and values."""

    path: str
    size: int
    bits_per_weight: float
    divergence: Divergence
    grade: str
    notes: tuple[str, ...]
    runtime: RuntimeQuality | None
    inputs: str = ""
    cache: str = ""

    @property
    def rounded_sentences(self) -> tuple[str, ...]:
        """What a reader must know of inputs, and of keys and values, that were rounded."""
        name = Path(self.path).name
        inputs = f"{name}: inputs of matrices rounded too, as its runtime does: {self.inputs}"
        cache = f"{name}: keys and values rounded too, as its runtime does: {self.cache}"
        return (*([inputs] if self.inputs else []), *([cache] if self.cache else []))


@dataclass(frozen=True)
class MemoryFacts:
    """Bytes of resident memory: the limit (None: none), what was planned and the peak of this process; what the plan
    chose: ``threads``, hidden states ``on_disk``, heads of how many artifacts at once (``together``)."""

    limit: int | None
    planned: int
    peak: int
    threads: int
    on_disk: bool
    together: int


@dataclass(frozen=True, repr=False)
class QualityResult(Tabled):
    """Artifacts in the order given, pairs of them in the order (0, 1), (0, 2), ..., (1, 2), ... ``tokens``: scored
    positions; ``seconds``: CPU time; ``reused``: the reference's hidden states were kept by an earlier run."""

    columns = ("artifact", "size", "bits_per_weight", "kld", "kld_sem", "same_top", "perplexity", "grade")

    reference: str
    texts: tuple[str, ...]
    text_sha256: str
    context: int
    windows: int
    tokens: int
    artifacts: tuple[ArtifactQuality, ...]
    pairs: tuple[Paired, ...]
    noise: NoiseFloor
    memory: MemoryFacts
    seconds: float
    reused: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The same facts, JSON-ready, and the thresholds of the grades."""
        limits = [{"name": name, "max_kld": limit} for name, limit in grades.GRADES]
        found: dict[str, Any] = json_ready({**asdict(self), "grades": limits})
        return found

    def summary(self) -> dict[str, Any]:
        """The reference, the text, and the mean KL divergence of each artifact."""
        losses = " ".join(f"{Path(one.path).name}:{decimals(one.divergence.kld, 5)}" for one in self.artifacts)
        return {"reference": Path(self.reference).name, "tokens": self.tokens, "kld": losses}

    def rows(self) -> list[dict[str, Any]]:
        """One for each artifact: its size, its grade, and every figure of its divergence."""
        return [
            {
                "artifact": Path(one.path).name,
                "size": one.size,
                "bits_per_weight": one.bits_per_weight,
                "grade": one.grade,
                **json_ready(one.divergence),
            }
            for one in self.artifacts
        ]

    def gate(self, max_kld: float) -> NumericPolicyError | None:
        """The error for artifacts whose mean KLD is above ``max_kld``, or None."""
        beyond = [one for one in self.artifacts if not one.divergence.kld <= max_kld]
        if not beyond:
            return None
        figures = ", ".join(f"{Path(one.path).name} {decimals(one.divergence.kld, 5)}" for one in beyond)
        return NumericPolicyError(
            "the divergence from the reference is above the limit",
            file=beyond[0].path,
            expected=f"a mean KL divergence of at most {max_kld:g}",
            found=figures,
            remedy="choose a level with more bits, or calibrate; --max-kld sets the limit",
        )


def measure_quality(
    source: Source,
    artifacts: Sequence[str | Path],
    windows: Tokens,
    *,
    threads: int | None = None,
    max_ram: int | None = None,
    device: str = "cpu",
    runtime: str | None = None,
    texts: Sequence[str] = (),
    scratch: Path | None = None,
    kept: Path | None = None,
    on_event: EventSink = ignore,
) -> QualityResult:
    """Divergence of every artifact (GGUF files, directories of split ones, model directories) from ``source``
    over ``windows``, (n, length) token ids of the source's tokenizer.

    ``threads``: None means all CPUs, fewer where memory asks for it. ``max_ram``: bytes of resident memory; hidden
    states go to a file in ``scratch`` (None: the system's temporary directory) where they are many. ``kept``: where
    those of the source that every artifact needs are kept for other runs (None: in ``cache_directory``). ``runtime``:
    a name of RUNTIMES ("llama.cpp" maps files whole) also runs each artifact there.
    ``texts``: names for the report.

    Raises: MissingExtraError (torch), UsageError (no artifact, no window, windows longer than the context),
    ResourceError before any work where one block or two heads do not fit, IntegrityError (another model's artifact),
    NumericPolicyError (NaN or infinite values on the way), StoppedError after a signal, and what reading raises.
    """
    _check(source, artifacts, windows, runtime)
    from llm_quantize.evaluation.reference import KeptStates, identity_of
    from llm_quantize.evaluation.streamed import Evaluation
    from llm_quantize.streams.network import open_network
    from llm_quantize.streams.pool import Pool

    began = time.process_time()
    decoded = [open_decoded(source, path) for path in artifacts]
    _check_runtime(decoded, runtime)
    for one in decoded:
        for note in one.notes:
            on_event(events.Caution(f"{one.path.name}: {note}"))
    network = open_network(source, dtype="float32", device=device)
    again = min(NOISE_WINDOWS, len(windows))
    plan = QualityPlan(source, network, decoded, windows, runtime is not None)
    fitted, together = plan.fit(again, threads=threads, max_ram=max_ram, device=device)
    groups = [range(i, min(i + together, len(decoded))) for i in range(0, len(decoded), together)]
    head = _head_steps(source, network.n_blocks, network.vocab_size)
    times = source_times(source.checkpoint)
    identity = identity_of(source, windows, again, device, on_event)
    store = None if identity is None else KeptStates(kept or cache_directory() / "references", identity)
    with ExitStack() as stack:
        for one in decoded:
            stack.callback(one.close)
        pool = Pool(fitted.threads, stack.enter_context(stop_on_signals()), resumable=None)
        directory = None if fitted.in_memory else _scratch(stack, scratch, fitted.hidden_bytes)
        reference = _reference(stack, source, windows, network.width, again, directory)
        reused = store is not None and store.load(reference, on_event)
        blocks = (len(decoded) * len(windows) + (0 if reused else len(windows) + again)) * network.n_blocks
        steps = blocks + head * len(windows) * (len(groups) + len(decoded))
        work = Evaluation(network, windows, pool, steps, on_event, head=head)
        if not reused:
            _refer(work, reference, directory)
            if store is not None:
                refuse_changed(source.checkpoint, times)
                store.keep(reference, on_event)
        streams = _streams(stack, decoded, windows, network.width, directory)
        work.through_blocks(streams)
        noise = Comparison()
        real = _through_heads(work, reference, streams, noise, groups, decoded, runtime)
    found = tuple(
        _artifact(one, stream, real.get(i), runtime)
        for i, (one, stream) in enumerate(zip(decoded, streams, strict=True))
    )
    _warn(found, on_event)
    limit, peak = memory.memory_limit(max_ram), memory.peak_resident_bytes()
    return QualityResult(
        reference=str(source.checkpoint.directory),
        texts=tuple(texts),
        text_sha256=hashlib.sha256(windows.astype("<i4").tobytes()).hexdigest(),
        context=windows.shape[1],
        windows=len(windows),
        tokens=streams[0].comparison.scores().shape[1],
        artifacts=found,
        pairs=tuple(pair([one.comparison for one in streams], a, b) for a, b in combinations(range(len(streams)), 2)),
        noise=_noise_floor(noise),
        memory=MemoryFacts(limit, fitted.peak, peak, fitted.threads, not fitted.in_memory, together),
        seconds=time.process_time() - began,
        reused=reused,
    )


def _head_steps(source: Source, n_blocks: int, vocabulary: int) -> int:
    """How many windows through a block take as long as one through a head, half of whose positions are scored."""
    weights = sum(weights_of(output.shape) for output in source.tensors.outputs if output.name.startswith("blk."))
    width = source.architecture.hyper.embedding_length
    return max(1, round(vocabulary * (width + SCORED) / 2 * n_blocks / max(1, weights)))


def _scratch(stack: ExitStack, parent: Path | None, needed: int) -> Path:
    """A directory for ``needed`` bytes of hidden states, gone when ``stack`` is closed."""
    try:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llm-quantize-", dir=parent)))
    except OSError as error:
        fail_os(error, "there is no place for hidden states", parent or Path(tempfile.gettempdir()))
    preflight.check_disk(folder, needed, remedy="set TMPDIR to another directory, or take fewer --windows")
    return folder


def _reference(
    stack: ExitStack, source: Source, windows: Tokens, width: int, again: int, directory: Path | None
) -> Reference:
    """Room for what artifacts meet of the source."""
    from llm_quantize.evaluation.reference import Reference, scored_positions
    from llm_quantize.streams.weights import CheckpointWeights

    length = scored_positions(windows)
    return Reference(
        source.checkpoint.directory,
        CheckpointWeights(source.checkpoint),
        stack.enter_context(_states(len(windows), length, width, directory)),
        stack.enter_context(_states(again, length, width, directory)),
    )


def _refer(work: Evaluation, reference: Reference, directory: Path | None) -> None:
    """Run the source; its hidden states on the way are gone afterwards."""
    from llm_quantize.streams.passes import give_back_memory

    (count, length), width = work.windows.shape, work.network.width
    again = reference.again.shape[0]
    with _states(count, length, width, directory) as states, _states(again, length, width, directory) as other:
        work.refer(reference.head_weights, states, other, reference)
    give_back_memory()


def _streams(
    stack: ExitStack, decoded: Sequence[Decoded], windows: Tokens, width: int, directory: Path | None
) -> list[Stream]:
    from llm_quantize.evaluation.streamed import Stream

    count, length = windows.shape
    return [
        Stream(one.path, one, one.for_head(), stack.enter_context(_states(count, length, width, directory)))
        for one in decoded
    ]


def _states(windows: int, length: int, width: int, directory: Path | None) -> Activations:
    import torch

    from llm_quantize.streams.hidden import Activations as States

    return States(windows, length, width, torch.float32, directory=directory)


def _through_heads(
    work: Evaluation,
    reference: Reference,
    streams: Sequence[Stream],
    noise: Comparison,
    groups: Sequence[range],
    decoded: Sequence[Decoded],
    runtime: str | None,
) -> dict[int, RuntimeStream]:
    """Compare all predictions, some artifacts at a time, and in ``runtime`` too.

    Returns {artifact: what its runtime gave}.
    """
    real: dict[int, RuntimeStream] = {}
    for group in groups:
        with ExitStack() as stack:
            opened = {} if runtime is None else _open_runtimes(stack, decoded, group, work, runtime)
            real |= {group[place]: one for place, one in opened.items()}
            work.through_head(
                reference,
                [streams[index] for index in group],
                noise=noise if group.start == 0 else None,
                runtimes=opened,
            )
    return real


def _check(source: Source, artifacts: Sequence[str | Path], windows: Tokens, runtime: str | None) -> None:
    if not artifacts:
        raise UsageError("no artifact to measure", remedy="give the path of a GGUF file, or of a model directory")
    if windows.ndim != 2 or not len(windows) or windows.shape[1] < 4:
        raise UsageError("no window to measure on", expected="(windows, at least 4 tokens)", found=windows.shape)
    longest = source.architecture.hyper.context_length
    if windows.shape[1] > longest:
        raise UsageError(
            "the windows are longer than the model's context",
            expected=f"at most {longest} tokens",
            found=windows.shape[1],
            remedy="give a smaller --context",
        )
    if runtime is not None and runtime not in RUNTIMES:
        raise UsageError("no such runtime", expected=", ".join(RUNTIMES), found=runtime)
    for module in ("torch", "transformers"):
        if find_spec(module) is None:
            raise MissingExtraError("Measuring quality", "torch")


def _check_runtime(decoded: Sequence[Decoded], runtime: str | None) -> None:
    for one in decoded:
        if runtime is not None and not RUNTIMES[runtime].opens(artifact_at(one.path)):
            raise UsageError(
                f"{runtime} does not run this artifact",
                file=one.path,
                expected=what_opens_what(),
                remedy="leave out --runtime, or measure this one by itself",
            )


def _open_runtimes(
    stack: ExitStack, decoded: Sequence[Decoded], group: range, work: Evaluation, runtime: str
) -> dict[int, RuntimeStream]:
    """{place in the group: the artifact in its runtime}."""
    from llm_quantize.evaluation.streamed import RuntimeStream

    size, threads = work.network.vocab_size, work.pool.threads
    found: dict[int, RuntimeStream] = {}
    for place, index in enumerate(group):
        path = artifact_at(decoded[index].path)
        model = RUNTIMES[runtime].predictions(path, work.windows, vocab_size=size, threads=threads)
        found[place] = RuntimeStream(stack.enter_context(model))
    return found


def _artifact(one: Decoded, stream: Stream, real: RuntimeStream | None, runtime: str | None) -> ArtifactQuality:
    divergence = stream.comparison.result()
    return ArtifactQuality(
        path=str(one.path),
        size=one.size,
        bits_per_weight=8 * one.size / max(1, one.weights),
        divergence=divergence,
        grade=grades.grade(divergence.kld),
        notes=one.notes,
        runtime=None if real is None else _runtime_quality(stream, real, runtime or ""),
        inputs=one.inputs_text(),
        cache=one.cache_text(),
    )


def _runtime_quality(stream: Stream, real: RuntimeStream, runtime: str) -> RuntimeQuality:
    inside, streamed = real.comparison.result(), stream.comparison.result()
    rounding = real.rounding.result()
    paired = pair([real.comparison, stream.comparison], 0, 1)
    apart = abs(math.sqrt(max(0.0, inside.kld)) - math.sqrt(max(0.0, streamed.kld)))
    explained = rounding.kld <= ROUNDING_LIMIT and apart <= 1.25 * math.sqrt(max(0.0, rounding.kld)) + 1e-6
    return RuntimeQuality(runtime, inside, rounding, paired.kld_difference, paired.kld_difference_sem, explained)


def _warn(artifacts: Sequence[ArtifactQuality], on_event: EventSink) -> None:
    for one in artifacts:
        if one.runtime is not None and not one.runtime.explained:
            text = (
                f"{Path(one.path).name}: what {one.runtime.runtime} computes is not what its weights say: KLD "
                f"{one.runtime.rounding.kld:.2g} between the two, more than the rounding of activations explains"
            )
            on_event(events.Caution(text))


def _noise_floor(comparison: Comparison) -> NoiseFloor:
    found = comparison.result()
    return NoiseFloor(found.kld, found.kld_max, found.same_top, found.tokens)
