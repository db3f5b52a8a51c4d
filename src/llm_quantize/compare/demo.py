"""The built-in model at several levels: quantized in one pass, run in llama.cpp, and measured against its source; then
with error feedback, in every format that has it (demo_methods.py)."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from llm_quantize import data
from llm_quantize.compare.demo_methods import MethodsResult, run_methods
from llm_quantize.evaluation.in_runtime import measure_in_runtime
from llm_quantize.events import EventSink, ignore
from llm_quantize.measures.divergence import Comparison, Divergence
from llm_quantize.measures.perplexity import Tokens, scored

REFERENCE = "F32"
LEVELS = ("BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")
PROMPT = "The old man looked at the sea and"
CONTEXT = 256
WINDOWS = 48
NEW_TOKENS = 40


@dataclass(frozen=True)
class DemoRow:
    """One file. ``size`` in bytes, ``seconds`` of CPU time to quantize it (0 if the file was there already),
    ``divergence`` from the F32 file, None for that file itself; ``text`` continues PROMPT."""

    level: str
    path: str
    size: int
    bits_per_weight: float
    seconds: float
    perplexity: float
    divergence: Divergence | None
    text: str


@dataclass(frozen=True)
class Agreement:
    """llama.cpp on our F32 file against transformers on the source. ``problem`` says why it was not checked."""

    checked: bool
    problem: str = ""
    tokens: int = 0
    kld: float = 0.0
    same_top: float = 0.0
    largest_difference: float = 0.0
    logit_range: float = 0.0


@dataclass(frozen=True)
class DemoResult:
    """``rows``: F32 first, then LEVELS. ``tokens``: scored positions. ``methods``: rounding against error feedback.
    ``kept``: the files are still there."""

    rows: tuple[DemoRow, ...]
    tokens: int
    context: int
    prompt: str
    agreement: Agreement
    methods: MethodsResult
    seconds: float
    kept: bool

    def to_dict(self) -> dict[str, Any]:
        """The same facts, JSON-ready."""
        return asdict(self)


def run_demo(
    output_dir: str | Path | None = None, *, threads: int | None = None, on_event: EventSink = ignore
) -> DemoResult:
    """Quantize the built-in model to F32 and LEVELS, run each file in llama.cpp, and compare it to the F32 file; then
    compare rounding and error feedback in GGUF, GPTQ, AWQ and compressed-tensors (``run_methods``).

    Without ``output_dir`` the files live in a temporary directory and are removed. ``on_event`` hears the events of
    ``pipeline.quantize``, then ``{"event": "measure", "done": n, "total": n}``, ``{"event": "stage", "text": s}``, and
    what ``run_methods`` tells. Raises MissingExtraError before any work if xllamacpp is not installed, and the errors
    of the pipeline, of LlamaCpp and of ``run_methods``.
    """
    from llm_quantize.pipeline import Options, quantize
    from llm_quantize.runtimes.llama_cpp_library import load_library

    load_library()
    began = time.monotonic()
    with ExitStack() as stack:
        folder = Path(output_dir or stack.enter_context(tempfile.TemporaryDirectory(prefix="llm-quantize-demo-")))
        folder.mkdir(parents=True, exist_ok=True)
        results = quantize(
            str(data.demo_model()),
            "gguf",
            levels=[REFERENCE, *LEVELS],
            output_dir=folder,
            options=Options(threads=threads),
            on_event=on_event,
        )
        paths = [result.path for result in results]
        divergences = measure_in_runtime(
            paths[0],
            paths[1:],
            _windows(WINDOWS),
            threads=threads,
            on_window=lambda done, total: on_event({"event": "measure", "done": done, "total": total}),
        )
        on_event({"event": "stage", "text": "generate"})
        texts = [_continue(path) for path in paths]
        on_event({"event": "stage", "text": "compare with transformers"})
        agreement = compare_with_transformers(data.demo_model(), paths[0])
        methods = run_methods(folder, PROMPT, threads=threads, on_event=on_event)
    rows = tuple(
        DemoRow(
            level=result.level,
            path=str(result.path),
            size=result.size,
            bits_per_weight=result.bits_per_weight,
            seconds=result.seconds,
            perplexity=divergences[0].reference_perplexity if divergence is None else divergence.perplexity,
            divergence=divergence,
            text=text,
        )
        for result, divergence, text in zip(results, [None, *divergences], texts, strict=True)
    )
    seconds = time.monotonic() - began
    kept = output_dir is not None
    return DemoResult(rows, divergences[0].tokens, CONTEXT, PROMPT, agreement, methods, seconds, kept)


def _windows(limit: int) -> Tokens:
    from llm_quantize.calibration.tokens import TextTokenizer
    from llm_quantize.evaluation.texts import evaluation_text
    from llm_quantize.models.opening import open_source

    source = open_source(str(data.demo_model()))
    with source.checkpoint:
        return evaluation_text(TextTokenizer(source), context=CONTEXT, limit=limit).windows


def _continue(path: Path) -> str:
    from llm_quantize.runtimes.llama_cpp import LlamaCpp

    with LlamaCpp(path, context=CONTEXT, threads=1) as model:  # a token at a time: threads would only wait
        return "".join(model.generate(PROMPT, max_tokens=NEW_TOKENS, temperature=0.0, chat=False))


def compare_with_transformers(model: Path, gguf: Path, *, windows: int = 4, threads: int | None = None) -> Agreement:
    """Logits of the float32 GGUF file in llama.cpp against the source checkpoint in transformers, float32.

    A few windows of the evaluation text; not checked, and said so, where torch or transformers is not installed.
    """
    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if missing:
        return Agreement(checked=False, problem=f"{' and '.join(missing)} not installed")
    from llm_quantize.runtimes.llama_cpp import LlamaCpp

    rows = _windows(windows)
    with LlamaCpp(gguf, context=CONTEXT, threads=1) as runtime:
        ours = [runtime.logits(row.tolist()) for row in rows]
    theirs = _transformers_logits(model, rows)
    comparison = Comparison()
    for row, base, other in zip(rows, theirs, ours, strict=True):
        where, targets = scored(row)
        comparison.add(base[where], other[where], targets)
    result = comparison.result()
    return Agreement(
        checked=True,
        tokens=result.tokens,
        kld=result.kld,
        same_top=result.same_top,
        largest_difference=max(float(np.abs(a - b).max()) for a, b in zip(theirs, ours, strict=True)),
        logit_range=max(float(a.max() - a.min()) for a in theirs),
    )


def _transformers_logits(model: Path, rows: Tokens) -> Sequence[np.ndarray[Any, np.dtype[np.float32]]]:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    had_bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, local_files_only=True).eval()
    finally:
        if had_bar:
            logging.enable_progress_bar()
    with torch.inference_mode():
        return [network(torch.from_numpy(row.astype(np.int64))[None]).logits[0].numpy() for row in rows]
