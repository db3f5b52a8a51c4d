"""Hugging Face directories in transformers, on the CPU. No code of the model repository is run.

They run in a process of their own, under the interpreter that LLM_QUANTIZE_TRANSFORMERS names, or this one: GPTQ and
AWQ need packages that ask for another torch than the rest (``make transformers-runtime``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llm_quantize.errors import MalformedInputError, UnsupportedError
from llm_quantize.events import EventSink
from llm_quantize.models.quantized import PackedDirectory, is_packed_directory
from llm_quantize.runtimes import isolated
from llm_quantize.runtimes.base import Opener, Reply, Request, Written, is_torch_directory, refuse_incomplete
from llm_quantize.runtimes.isolated import Worker
from llm_quantize.runtimes.scored import ScoredDirectory
from llm_quantize.runtimes.session import WorkerSession, talking, written_once

LABEL = "transformers"
OPENS = "model directories"
TAKES: frozenset[str] = frozenset()
VARIABLE = "LLM_QUANTIZE_TRANSFORMERS"
opens = is_torch_directory
open_model: Opener | None = None

TRANSFORMERS = Worker(
    name="transformers",
    script="in_transformers.py",
    variable=VARIABLE,
    packages=("torch", "transformers"),
    remedy="compressed-tensors: pip install compressed-tensors==0.20.0; bitsandbytes: pip install bitsandbytes; "
    "GPTQ and AWQ: make transformers-runtime in a "
    "checkout, elsewhere: pip install accelerate pypcre logbar threadpoolctl device-smi tokenicer defuser pillow "
    "requests && pip install --no-deps --no-build-isolation optimum==2.3.0 gptqmodel==7.7.0",
)
_SETTINGS = {"GPTQMODEL_CPU_WORKERS": "2"}  # at least two: the loader waits for a second one


def run(directory: Path, request: Request, *, backend: str | None = None) -> Reply:
    """``request`` answered by transformers for the model in ``directory``. ``backend``: None (kernels in plain torch),
    the name of a kernel of GPTQModel, or "dequantize" (compressed-tensors: floats from the start).

    Raises as ``refuse_incomplete`` and ``isolated.run``, UnsupportedError for what transformers misreads.
    """
    refuse_incomplete(directory)
    _refuse_misread(directory)
    return isolated.run(TRANSFORMERS, directory, request, settings=_SETTINGS, options={"backend": backend})


def _refuse_misread(directory: Path) -> None:
    """Raise UnsupportedError for a quantized model of which transformers would compute with other values than stand in
    it, without a word; what our reader cannot read is transformers' own to judge."""
    try:
        if not is_packed_directory(directory):
            return
        with PackedDirectory(directory) as packed:
            found = packed.misread
    except (MalformedInputError, UnsupportedError):
        return
    if found:
        raise UnsupportedError(
            "transformers would compute with other values than this model has",
            file=directory,
            found=found[0],
            remedy="run it in vLLM: --runtime vllm",
        )


def timer(path: Path, request: Request) -> Reply:
    """As ``run``."""
    return run(path, request)


def require() -> None:
    """Raises MissingExtraError where no interpreter has transformers."""
    isolated.interpreter(TRANSFORMERS)


def write(path: Path, request: Request) -> list[Written]:
    """What transformers writes after each prompt, in a process of its own. Raises as ``run``."""
    return isolated.continued(run(path, request), request.max_tokens)


def predictions(
    path: Path, windows: npt.NDArray[np.integer], *, vocab_size: int, threads: int | None
) -> AbstractContextManager[ScoredDirectory]:
    """Log-probabilities, computed in float32, of ``windows`` in their order."""

    def score(some: npt.NDArray[np.int32]) -> Reply:
        return run(path, Request(windows=some, dtype="float32", threads=threads))

    return nullcontext(ScoredDirectory(path, windows, score, vocab_size=vocab_size))


def generate(path: Path, request: Request, on_event: EventSink) -> Iterator[str]:
    """Pieces of the text that transformers writes after the first prompt, as they are made. Raises as ``run``."""
    refuse_incomplete(path)
    _refuse_misread(path)
    return written_once(TRANSFORMERS, path, request, on_event, settings=_SETTINGS, options={"backend": None})


def converse(path: Path, request: Request, _on_event: EventSink) -> AbstractContextManager[WorkerSession]:
    """As ``Runtime.converse``. Raises as ``run``."""
    refuse_incomplete(path)
    _refuse_misread(path)
    return talking(TRANSFORMERS, path, request, settings=_SETTINGS, options={"backend": None})
