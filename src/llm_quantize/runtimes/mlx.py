"""MLX directories in mlx_lm, in the interpreter that LLM_QUANTIZE_MLX names, or this one: on Apple silicon, and with
``mlx-cpu`` elsewhere (``make mlx-runtime``).

mlx_lm refuses a directory whose tensors are not exactly its model's parameters. It loads float models too, but of a
configuration that transformers 5 wrote it reads rotary positions for some families only, and computes with others: it
is not asked to.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llm_quantize.events import EventSink
from llm_quantize.formats.mlx import NAME
from llm_quantize.runtimes.base import (
    Opener,
    Reply,
    Request,
    Written,
    is_model_directory,
    own_format,
    refuse_incomplete,
)
from llm_quantize.runtimes.isolated import Worker, continued, interpreter
from llm_quantize.runtimes.isolated import run as run_isolated
from llm_quantize.runtimes.scored import ScoredDirectory
from llm_quantize.runtimes.session import WorkerSession, talking, written_once

LABEL = "MLX"
OPENS = "MLX directories"
TAKES: frozenset[str] = frozenset()
VARIABLE = "LLM_QUANTIZE_MLX"
open_model: Opener | None = None

MLX = Worker(
    name="MLX",
    script="in_mlx.py",
    variable=VARIABLE,
    packages=("mlx", "mlx_lm"),
    remedy="in a checkout: make mlx-runtime; elsewhere: python3 -m venv VENV && VENV/bin/pip install "
    "'mlx-lm[cpu]==0.32.2' (without [cpu] on Apple silicon); then: export LLM_QUANTIZE_MLX=VENV/bin/python",
)


def opens(path: Path) -> bool:
    """As ``Runtime.opens``."""
    return is_model_directory(path) and own_format(path) == NAME


def require() -> None:
    """Raises MissingExtraError where no interpreter has mlx_lm."""
    interpreter(MLX)


def run(directory: Path, request: Request) -> Reply:
    """``request`` answered by mlx_lm for the model in ``directory``. Raises as ``refuse_incomplete`` and
    ``isolated.run``."""
    refuse_incomplete(directory)
    return run_isolated(MLX, directory, request, settings={}, options={})


def generate(path: Path, request: Request, on_event: EventSink) -> Iterator[str]:
    """Pieces of the text that mlx_lm writes after the first prompt, as they are made. Raises as ``run``."""
    refuse_incomplete(path)
    return written_once(MLX, path, request, on_event)


def converse(path: Path, request: Request, _on_event: EventSink) -> AbstractContextManager[WorkerSession]:
    """As ``Runtime.converse``. Raises as ``run``."""
    refuse_incomplete(path)
    return talking(MLX, path, request)


def timer(path: Path, request: Request) -> Reply:
    """As ``run``."""
    return run(path, request)


def write(path: Path, request: Request) -> list[Written]:
    """What mlx_lm writes after each prompt. Raises as ``run``."""
    return continued(run(path, request), request.max_tokens)


def predictions(
    path: Path, windows: npt.NDArray[np.integer], *, vocab_size: int, threads: int | None
) -> AbstractContextManager[ScoredDirectory]:
    """Log-probabilities, computed in float32, of ``windows`` in their order."""

    def score(some: npt.NDArray[np.int32]) -> Reply:
        return run(path, Request(windows=some, dtype="float32", threads=threads))

    return nullcontext(ScoredDirectory(path, windows, score, vocab_size=vocab_size))
