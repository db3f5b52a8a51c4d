"""The built-in model in every format that the optimiser serves: rounded, and with error feedback, at the same bytes.

Every file is measured against the source over held-out text, each pair token by token; then the better one of each pair
runs in the runtime that people use, and what that computes is compared with what our decoder reads from the file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llm_quantize import data
from llm_quantize.errors import MissingExtraError, ResourceError, UnsupportedError
from llm_quantize.events import EventSink
from llm_quantize.measures.divergence import Comparison, Divergence, Paired
from llm_quantize.measures.perplexity import Logits, Tokens, scored
from llm_quantize.models.opening import Source, open_source
from llm_quantize.options import CalibrationOptions, MethodOptions
from llm_quantize.pipeline import ArtifactResult, Options, quantize

if TYPE_CHECKING:
    from llm_quantize.evaluation.quality import QualityResult

PAIRS = (("gguf", "Q4_K_M"), ("gguf", "Q2_K"), ("gptq", "4bit"), ("awq", "4bit"), ("compressed-tensors", "W4A16"))
CALIBRATION = CalibrationOptions(samples=40, length=256)
CONTEXT = 256
WINDOWS = 48
RUNTIME_WINDOWS = 2
NEW_TOKENS = 24
TORCH = ("torch", "transformers")
_LABELS = {"gguf": "GGUF {}", "gptq": "GPTQ {}", "awq": "AWQ {}", "compressed-tensors": "{}"}


@dataclass(frozen=True)
class RuntimeRun:
    """A file in its real ``runtime`` (``versions`` of its packages, ``kernels``: classes that compute the linears).
    ``text`` continues the prompt; ``kld`` (mean, nats) and ``same_top`` are of its predictions against those of our
    decoder of the same file, at ``tokens`` positions. ``problem``: why it did not run, with the ``remedy``."""

    runtime: str
    versions: Mapping[str, str]
    kernels: tuple[str, ...]
    text: str
    tokens: int
    kld: float
    same_top: float
    problem: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class MethodRow:
    """One file or directory. ``label``: format and level; ``method``: "rounded" or "feedback". ``size`` of all its
    files and ``tensor_bytes`` of its tensors, ``seconds`` of CPU time to make it (0: it was there already).
    ``ratio``: of its mean KLD to the rounded one's, paired; ``run``: both None where ``method`` is "rounded"."""

    label: str
    format: str
    level: str
    method: str
    path: str
    size: int
    tensor_bytes: int
    seconds: float
    divergence: Divergence
    ratio: Paired | None
    run: RuntimeRun | None


@dataclass(frozen=True)
class MethodsResult:
    """``rows``: each pair's rounded one first. ``tokens``: scored positions; ``calibration_tokens``: of the text whose
    errors are fed back; ``importance_seconds``: CPU time of the importance matrix that the rounded GGUF files take
    (0: it was kept from an earlier run). ``problem``: why there are no rows, with the ``remedy``."""

    rows: tuple[MethodRow, ...] = ()
    tokens: int = 0
    context: int = CONTEXT
    calibration_tokens: int = 0
    importance_seconds: float = 0.0
    problem: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class _Made:
    format: str
    level: str
    method: str
    result: ArtifactResult
    seconds: float


def run_methods(folder: Path, prompt: str, *, threads: int | None, on_event: EventSink) -> MethodsResult:
    """Make PAIRS in ``folder``, measure them, and run those with feedback after ``prompt``.

    ``on_event`` hears ``{"event": "stage", "text": s}``, the progress of each file, ``{"event": "made", "text": s,
    "seconds": s}``, and ``measure`` as of ``measure_quality``. Without torch or transformers there are no rows, and the
    result says so; a runtime that is not installed is told in its row. Raises the errors of the pipeline and of
    ``measure_quality``.
    """
    missing = [name for name in TORCH if find_spec(name) is None]
    if missing:
        error = MissingExtraError("Error feedback", "torch")
        return MethodsResult(problem=f"{' and '.join(missing)} not installed", remedy=error.remedy or "")
    source = open_source(str(data.demo_model()))
    with source.checkpoint:
        matrix, importance_seconds = _importance(source, threads, on_event)
        made = []
        for format, level in PAIRS:
            for method in ("rounded", "feedback"):
                made.append(_make(folder, format, level, method, matrix, threads, on_event))
        windows = _windows(source)
        on_event({"event": "stage", "text": "measure every file against the source"})
        quality = _measure(source, made, windows, threads, on_event)
        runs = _runs(source, made, windows[:RUNTIME_WINDOWS], prompt, threads, on_event)
    rows = tuple(_row(index, one, quality, runs.get(index)) for index, one in enumerate(made))
    tokens = (CALIBRATION.samples or 0) * CALIBRATION.length
    return MethodsResult(rows, quality.tokens, CONTEXT, tokens, importance_seconds)


def _importance(source: Source, threads: int | None, on_event: EventSink) -> tuple[Path, float]:
    """Statistics of the same text for the rounded GGUF files, and the CPU time they took."""
    from llm_quantize.calibration.collect import calibrate

    on_event({"event": "stage", "text": "importance matrix"})
    began = time.process_time()
    found = calibrate(source, replace(CALIBRATION, threads=threads), on_event=_named(on_event, "importance matrix"))
    return found.path, 0.0 if found.reused else time.process_time() - began


def _make(
    folder: Path, format: str, level: str, method: str, matrix: Path, threads: int | None, on_event: EventSink
) -> _Made:
    """One artifact, with the CPU time of its run."""
    rounded = method == "rounded"
    title = f"{_LABELS[format].format(level)}, {'rounded' if rounded else 'error feedback'}"
    options = Options(
        threads=threads,
        statistics=matrix if rounded and format == "gguf" else None,
        calibration=replace(CALIBRATION, threads=threads),
        method=MethodOptions(method="rtn" if rounded else "gptq"),
    )
    on_event({"event": "stage", "text": title})
    began = time.process_time()
    (result,) = quantize(
        str(data.demo_model()),
        format,
        levels=[level],
        output_dir=folder,
        name=f"demo-llama-{method}",
        options=options,
        on_event=_named(on_event, title),
    )
    seconds = 0.0 if result.status == "already complete" else time.process_time() - began
    on_event({"event": "made", "text": title, "seconds": seconds})
    return _Made(format, level, method, result, seconds)


def _named(on_event: EventSink, title: str) -> EventSink:
    """``on_event`` with the progress of a run under the name of what it makes; its stages and notes, the same for every
    file, are left out."""

    def sink(event: Mapping[str, Any]) -> None:
        if event["event"] in ("progress", "check"):
            on_event({**event, "event": "progress", "text": title})
        elif event["event"] == "warning":
            on_event({**event, "text": f"{title}: {event['text']}"})

    return sink


def _windows(source: Source) -> Tokens:
    """Held-out text, cut as for the other table."""
    from llm_quantize.calibration.tokens import TextTokenizer
    from llm_quantize.evaluation.texts import evaluation_text

    return evaluation_text(TextTokenizer(source), context=CONTEXT, limit=WINDOWS).windows


def _measure(
    source: Source, made: Sequence[_Made], windows: Tokens, threads: int | None, on_event: EventSink
) -> QualityResult:
    """Two neighbours change places: the ratio of a pair is then that of feedback to rounding."""
    from llm_quantize.evaluation.quality import measure_quality

    paths = [made[index ^ 1].result.path for index in range(len(made))]
    return measure_quality(source, paths, windows, threads=threads, on_event=on_event)


def _row(index: int, one: _Made, quality: QualityResult, run: RuntimeRun | None) -> MethodRow:
    result = one.result
    return MethodRow(
        label=_LABELS[one.format].format(one.level),
        format=one.format,
        level=one.level,
        method=one.method,
        path=str(result.path),
        size=result.size,
        tensor_bytes=sum(tensor.nbytes for tensor in result.plan.tensors),
        seconds=one.seconds,
        divergence=quality.artifacts[index ^ 1].divergence,
        ratio=next((pair for pair in quality.pairs if (pair.first, pair.second) == (index ^ 1, index)), None),
        run=run,
    )


def _runs(
    source: Source, made: Sequence[_Made], windows: Tokens, prompt: str, threads: int | None, on_event: EventSink
) -> dict[int, RuntimeRun]:
    """{index: the file in its runtime} of those with feedback."""
    found = {}
    for index, one in enumerate(made):
        if one.method == "feedback":
            runtime = _runtime(one.format)
            on_event({"event": "stage", "text": f"{_LABELS[one.format].format(one.level)} in {runtime}"})
            found[index] = _run(source, one, runtime, windows, prompt, threads)
    return found


def _runtime(format: str) -> str:
    if format == "gguf":
        return "llama.cpp"
    return "vLLM" if os.environ.get("LLM_QUANTIZE_VLLM") else "transformers"


def _run(source: Source, one: _Made, runtime: str, windows: Tokens, prompt: str, threads: int | None) -> RuntimeRun:
    path = one.result.path
    try:
        if runtime == "llama.cpp":
            answer = _in_llama_cpp(path, windows, prompt)
        else:
            answer = _in_process(path, runtime, windows, prompt, threads)
    except (MissingExtraError, UnsupportedError, ResourceError) as error:
        words = f"{error.what}: {error.found}" if error.found else error.what
        return RuntimeRun(runtime, {}, (), "", 0, 0.0, 0.0, words, error.remedy or "")
    comparison = Comparison()
    for window, ours, theirs in zip(windows, _decoded(source, path, windows), answer.logits, strict=True):
        where, targets = scored(window)
        comparison.add(ours[where], theirs[where], targets)
    close = comparison.result()
    return RuntimeRun(runtime, answer.versions, answer.kernels, answer.text, close.tokens, close.kld, close.same_top)


@dataclass(frozen=True)
class _Answer:
    """``logits`` float32 (length, vocabulary) of each window, up to a constant of each position."""

    logits: Sequence[Logits]
    text: str
    versions: Mapping[str, str]
    kernels: tuple[str, ...]


def _in_llama_cpp(path: Path, windows: Tokens, prompt: str) -> _Answer:
    from llm_quantize.runtimes.llama_cpp import LlamaCpp

    with LlamaCpp(path, context=CONTEXT, threads=1) as model:  # a token at a time: threads would only wait
        logits = [model.logits(window.tolist()) for window in windows]
        text = "".join(model.generate(prompt, max_tokens=NEW_TOKENS, temperature=0.0, chat=False))
    return _Answer(logits, text, {"xllamacpp": version("xllamacpp")}, ())


def _in_process(path: Path, runtime: str, windows: Tokens, prompt: str, threads: int | None) -> _Answer:
    from llm_quantize.runtimes import transformers, vllm
    from llm_quantize.runtimes.base import Request

    ids = np.asarray(windows, np.int32)
    request = Request(windows=ids, prompts=(prompt,), max_tokens=NEW_TOKENS, threads=threads)
    exact = replace(request, dtype="float32")
    reply = vllm.run(path, request) if runtime == "vLLM" else transformers.run(path, exact)
    logits = [] if reply.logprobs is None else list(reply.logprobs)
    return _Answer(logits, reply.texts[0], reply.versions, reply.kernels)


def _decoded(source: Source, path: Path, windows: Tokens) -> list[Logits]:
    """Logits of the file as our decoder reads it, in float32: what a runtime should compute."""
    import torch

    from llm_quantize.artifacts.decoded_directory import open_decoded
    from llm_quantize.streams.network import open_network

    network, decoded = open_network(source, dtype="float32"), open_decoded(source, path)
    try:
        states = list(network.embed(decoded, torch.from_numpy(windows.astype(np.int64))))
        for index in range(network.n_blocks):
            with network.block(index, decoded) as block:
                states = [block(state) for state in states]
        with network.head(decoded.for_head()) as head:
            return [head(state).numpy() for state in states]
    finally:
        decoded.close()
