"""``demo``: the built-in model in every kind of file, by the way that everything goes: the pipeline makes them, quality
measures them all against the source in one streamed pass, and the runtimes of the table run them."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llm_quantize import data, events
from llm_quantize.calibration.tokens import TextTokenizer
from llm_quantize.errors import MissingExtraError, ResourceError, UnsupportedError
from llm_quantize.evaluation.in_runtime import measure_in_runtime
from llm_quantize.evaluation.quality import measure_quality
from llm_quantize.evaluation.texts import evaluation_text
from llm_quantize.events import EventSink, ignore
from llm_quantize.formats.table import FORMATS
from llm_quantize.measures.divergence import Divergence, Paired
from llm_quantize.measures.perplexity import Tokens
from llm_quantize.models.opening import Source, open_source
from llm_quantize.options import CalibrationOptions, MethodOptions
from llm_quantize.pipeline import ArtifactResult, Options, quantize
from llm_quantize.runtimes import RUNTIMES, runtime_for
from llm_quantize.runtimes.base import Request

LEVELS = ("F32", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")
"""GGUF levels, the reference first."""

Pair = tuple[str, str, str]
PAIRS: tuple[Pair, ...] = (
    ("GGUF Q4_K_M", "gguf", "Q4_K_M"),
    ("GGUF Q2_K", "gguf", "Q2_K"),
    ("GPTQ 4bit", "gptq", "4bit"),
    ("AWQ 4bit", "awq", "4bit"),
    ("W4A16", "compressed-tensors", "W4A16"),
)
WHERE_INSTALLED: tuple[Pair, ...] = (
    ("NF4", "bitsandbytes", "NF4"),
    ("CT2 int8", "ctranslate2", "int8"),
)
"""Further pairs, where the package of the format's name is there to run them, in the runtime of WHERE_RUN."""
WHERE_RUN = {"bitsandbytes": "transformers", "ctranslate2": "ctranslate2"}
METHODS = {"feedback": "gptq", "rounded": "rtn"}
PROMPT = "The old man looked at the sea and"
CALIBRATION = CalibrationOptions(samples=40, length=256)
CONTEXT = 256
WINDOWS = 48
RUNTIME_WINDOWS = 2
NEW_TOKENS = 40
_REFUSALS = (MissingExtraError, UnsupportedError, ResourceError)

SHARES = (1.0, 10.0, 6.0, 4.0)
"""How long the parts take beside one another, for progress: levels, pairs, measuring, and running files."""
FED_BACK, SHARE_OF_RUNTIMES = 3.0, 0.8


@dataclass(frozen=True)
class Run:
    """A file in its real ``runtime``, and what it writes after the prompt (``text``). ``kld`` (mean, nats) and
    ``same_top`` are of its predictions against those of the same file's weights in float32, at ``tokens`` positions.
    ``problem``: why it did not run, with the ``remedy``."""

    runtime: str
    text: str = ""
    tokens: int = 0
    kld: float = 0.0
    same_top: float = 0.0
    problem: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class DemoRow:
    """One file or directory. ``method``: "rounded" or "feedback"; ``size`` of all its files and ``tensor_bytes`` of its
    tensors; ``seconds`` of CPU time to make it (0: it was there already); ``divergence`` from the source, None: it is
    the source's own values; ``ratio``: of its mean KLD to that of its pair, paired; ``text`` continues PROMPT."""

    label: str
    format: str
    level: str
    method: str
    path: str
    size: int
    bits_per_weight: float
    tensor_bytes: int
    seconds: float
    perplexity: float
    divergence: Divergence | None
    ratio: Paired | None = None
    text: str = ""
    run: Run | None = None


@dataclass(frozen=True)
class Methods:
    """Rounding against error feedback. ``rows``: each pair's feedback follows its rounded one. ``tokens``: scored
    positions; ``calibration_tokens``: of the text whose errors are fed back; ``importance_seconds``: CPU time of the
    importance matrix (0: it was kept from an earlier run). ``left_out``: pairs whose package is not there, by the
    extra or package to install. ``problem``: why there are no rows, with the ``remedy``."""

    rows: tuple[DemoRow, ...] = ()
    tokens: int = 0
    context: int = CONTEXT
    calibration_tokens: int = 0
    importance_seconds: float = 0.0
    problem: str = ""
    remedy: str = ""
    left_out: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class DemoResult:
    """``rows``: LEVELS. ``tokens``: scored positions. ``agreement``: the first level in its runtime against the source.
    ``kept``: the files are still there."""

    rows: tuple[DemoRow, ...]
    tokens: int
    context: int
    prompt: str
    agreement: Run
    methods: Methods
    seconds: float
    kept: bool

    def to_dict(self) -> dict[str, Any]:
        """The same facts, JSON-ready."""
        return asdict(self)


@dataclass(frozen=True)
class _Made:
    label: str
    format: str
    method: str
    result: ArtifactResult
    seconds: float

    def row(self, divergence: Divergence, **more: Any) -> DemoRow:
        result = self.result
        first = self.label == LEVELS[0]
        return DemoRow(
            label=self.label,
            format=self.format,
            level=result.level,
            method=self.method,
            path=str(result.path),
            size=result.size,
            bits_per_weight=result.bits_per_weight,
            tensor_bytes=sum(tensor.nbytes for tensor in result.plan.tensors),
            seconds=self.seconds,
            perplexity=divergence.reference_perplexity if first else divergence.perplexity,
            divergence=None if first else divergence,
            **more,
        )


def run_demo(
    output_dir: str | Path | None = None, *, threads: int | None = None, on_event: EventSink = ignore
) -> DemoResult:
    """Quantize the built-in model to LEVELS, to PAIRS and to those of WHERE_INSTALLED that can run, rounded and with
    error feedback; measure every file against the source, and run it. Without torch: LEVELS alone, measured in their
    runtime against the first of them.

    Without ``output_dir`` the files live in a temporary directory and are removed. ``on_event`` hears stages, progress,
    warnings, and ``measure`` as of ``measure_quality``. Raises MissingExtraError before any work where no GGUF file can
    be run, and the errors of the pipeline, of ``measure_quality`` and of the runtime; what a directory's runtime lacks
    is told in its row.
    """
    RUNTIMES["llama.cpp"].require()
    began = time.monotonic()
    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    source = open_source(str(data.demo_model()))
    with ExitStack() as stack:
        stack.enter_context(source.checkpoint)
        folder = Path(output_dir or stack.enter_context(tempfile.TemporaryDirectory(prefix="llm-quantize-demo-")))
        folder.mkdir(parents=True, exist_ok=True)
        windows = evaluation_text(TextTokenizer(source), context=CONTEXT, limit=WINDOWS).windows
        plain, paired, measured, run = events.parts(on_event, SHARES)
        levels = _levels(folder, threads, plain)
        paths = [one.result.path for one in levels]
        if missing:
            problem, remedy = f"{' and '.join(missing)} not installed", MissingExtraError("", "torch").remedy or ""
            agreement, methods = Run("", problem=problem, remedy=remedy), Methods(problem=problem, remedy=remedy)
            lost = _in_runtime(paths, windows, threads, measured)
        else:
            wanted, left_out = pairs_here()
            pairs, seconds = _pairs(source, folder, wanted, threads, paired)
            measured(events.Stage("measure every file against the source"))
            everything = [*paths, *(one.result.path for one in pairs)]
            quality = measure_quality(source, everything, windows, threads=threads, on_event=measured)
            lost = [one.divergence for one in quality.artifacts]
            few = windows[:RUNTIME_WINDOWS]
            rows = _pair_rows(source, pairs, lost[len(levels) :], quality.pairs, few, threads, run)
            count = (CALIBRATION.samples or 0) * CALIBRATION.length
            methods = Methods(rows, quality.tokens, CONTEXT, count, seconds, left_out=left_out)
            agreement = _run(source, paths[0], few, threads)
        run(events.Stage("generate", whole=SHARE_OF_RUNTIMES))
        texts = [_text(path, threads=1) for path in paths]  # a token at a time: threads would only wait
    shown = tuple(one.row(found, text=text) for one, found, text in zip(levels, lost, texts, strict=False))
    kept = output_dir is not None
    return DemoResult(shown, lost[0].tokens, CONTEXT, PROMPT, agreement, methods, time.monotonic() - began, kept)


def _levels(folder: Path, threads: int | None, on_event: EventSink) -> list[_Made]:
    options = Options(threads=threads)
    model = str(data.demo_model())
    found = quantize(model, "gguf", levels=LEVELS, output_dir=folder, options=options, on_event=on_event)
    return [_Made(one.level, "gguf", "rounded", one, one.seconds) for one in found]


def _in_runtime(paths: Sequence[Path], windows: Tokens, threads: int | None, on_event: EventSink) -> list[Divergence]:
    """Of every file from the first one, itself included."""
    return measure_in_runtime(
        paths[0],
        paths,
        windows,
        threads=threads,
        on_window=lambda done, total: on_event(events.Measure(done=done, total=total)),
    )


def pairs_here() -> tuple[list[Pair], tuple[tuple[str, str], ...]]:
    """PAIRS and those of WHERE_INSTALLED that can run here; and the rest, with what to install. An interpreter that the
    user has named for the runtime is trusted to have the package: if it has not, the run will tell."""
    elsewhere = {name for name in WHERE_RUN if os.environ.get(RUNTIMES[WHERE_RUN[name]].VARIABLE)}
    there = [pair for pair in WHERE_INSTALLED if pair[1] in elsewhere or find_spec(pair[1]) is not None]
    return [*PAIRS, *there], tuple((pair[0], pair[1]) for pair in WHERE_INSTALLED if pair not in there)


def _pairs(
    source: Source, folder: Path, pairs: Sequence[Pair], threads: int | None, on_event: EventSink
) -> tuple[list[_Made], float]:
    """Of each of ``pairs`` the one with feedback, then the rounded one; and the CPU time of the importance matrix."""
    from llm_quantize.calibration.collect import calibrate

    calibration = replace(CALIBRATION, threads=threads)
    first, *sinks = events.parts(on_event, [1.0, *([FED_BACK, 1.0] * len(pairs))])
    parts = iter(sinks)
    first(events.Stage("importance matrix"))
    began = time.process_time()
    statistics = calibrate(source, calibration, on_event=_work(first, "importance matrix"))
    importance_seconds = 0.0 if statistics.reused else time.process_time() - began
    made = []
    for label, format, level in pairs:
        for name, method in METHODS.items():
            title, part = f"{label}, {name}", next(parts)
            part(events.Stage(title))
            weighed = FORMATS[format].weighs and name == "rounded"
            options = Options(
                threads=threads,
                statistics=statistics.path if weighed else None,
                calibration=calibration,
                method=MethodOptions(method=method),
            )
            began = time.process_time()
            (result,) = quantize(
                str(data.demo_model()),
                format,
                levels=[level],
                output_dir=folder,
                name=f"demo-llama-{name}",
                options=options,
                on_event=_work(part, title),
            )
            seconds = 0.0 if result.status == "already complete" else time.process_time() - began
            made.append(_Made(label, format, name, result, seconds))
    return made, importance_seconds


def _work(on_event: EventSink, title: str) -> EventSink:
    """``on_event`` with the progress and warnings of a run; its stages and notes, the same for every file, are left
    out."""

    def sink(event: events.Event) -> None:
        if isinstance(event, events.Start | events.Progress):
            on_event(event)
        elif isinstance(event, events.Caution):
            on_event(events.Caution(f"{title}: {event.text}"))

    return sink


def _pair_rows(
    source: Source,
    pairs: Sequence[_Made],
    lost: Sequence[Divergence],
    ratios: Sequence[Paired],
    windows: Tokens,
    threads: int | None,
    on_event: EventSink,
) -> tuple[DemoRow, ...]:
    """The rounded one first; the other with its ratio and its run."""
    rows: list[DemoRow] = []
    places = {(pair.first, pair.second): pair for pair in ratios}
    for index in range(0, len(pairs), 2):
        whole = SHARE_OF_RUNTIMES * index / len(pairs)
        feedback, rounded = pairs[index : index + 2]
        at = len(LEVELS) + index
        on_event(events.Stage(f"{feedback.label} in its runtime", whole=whole))
        run = _run(source, feedback.result.path, windows, threads)
        rows.append(rounded.row(lost[index + 1]))
        rows.append(feedback.row(lost[index], ratio=places[at, at + 1], run=run))
    return tuple(rows)


def _run(source: Source, path: Path, windows: Tokens, threads: int | None) -> Run:
    """The file in the runtime that the user has named for it, or the usual one."""
    able = [name for name, one in RUNTIMES.items() if one.opens(path)]
    name = next((name for name in reversed(able) if os.environ.get(RUNTIMES[name].VARIABLE)), able[0])
    try:
        found = measure_quality(source, [path], windows, threads=threads, runtime=name).artifacts[0].runtime
        text = _text(path, threads=threads, runtime=name)
    except _REFUSALS as error:
        problem = f"{error.what}: {error.found}" if error.found else error.what
        return Run(RUNTIMES[name].LABEL, problem=problem, remedy=error.remedy or "")
    assert found is not None
    close = found.rounding
    return Run(RUNTIMES[name].LABEL, text, close.tokens, close.kld, close.same_top)


def _text(path: Path, *, threads: int | None, runtime: str | None = None) -> str:
    request = Request(prompts=(PROMPT,), max_tokens=NEW_TOKENS, threads=threads)
    return runtime_for(path, runtime).write(path, request)[0].text
