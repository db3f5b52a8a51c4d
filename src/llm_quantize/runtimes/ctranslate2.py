"""CTranslate2 models in CTranslate2's Generator, on the CPU, in a process of its own: this interpreter's, or the one
that LLM_QUANTIZE_CTRANSLATE2 names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llm_quantize.events import EventSink
from llm_quantize.formats.gguf.vocabulary.special import read_optional
from llm_quantize.models.ctranslate2 import CTranslate2Directory, is_ctranslate2
from llm_quantize.runtimes.base import Opener, Reply, Request, Written, refuse_hostile
from llm_quantize.runtimes.isolated import Worker, continued, interpreter
from llm_quantize.runtimes.isolated import run as run_isolated
from llm_quantize.runtimes.scored import ScoredDirectory
from llm_quantize.runtimes.session import WorkerSession, talking, written_once

LABEL = "CTranslate2"
OPENS = "CTranslate2 models"
TAKES: frozenset[str] = frozenset()
VARIABLE = "LLM_QUANTIZE_CTRANSLATE2"
open_model: Opener | None = None

CTRANSLATE2 = Worker(
    name=LABEL,
    script="in_ctranslate2.py",
    variable=VARIABLE,
    packages=("ctranslate2", "tokenizers"),
    extra="ctranslate2",
)


def opens(path: Path) -> bool:
    """Whether a CTranslate2 model lies at ``path``. Raises AccessError (a link that leaves the directory) and
    MalformedInputError (config.json, or a tokenizer larger than any)."""
    if not (path.is_dir() and (path / "config.json").is_file() and is_ctranslate2(path)):
        return False
    refuse_hostile(path)
    return True


def require() -> None:
    """Raises MissingExtraError where no interpreter has CTranslate2."""
    interpreter(CTRANSLATE2)


def run(directory: Path, request: Request) -> Reply:
    """``request`` answered by CTranslate2 for the model in ``directory``, in the type that it is stored in, as far as
    the CPU computes in it (float16 and bfloat16 become float32). Raises MalformedInputError for a damaged model.bin,
    and what ``isolated.run`` raises."""
    CTranslate2Directory(directory).close()
    return run_isolated(CTRANSLATE2, directory, request, settings={}, options={})


def timer(path: Path, request: Request) -> Reply:
    """As ``run``."""
    return run(path, request)


def write(path: Path, request: Request) -> list[Written]:
    """What CTranslate2 writes after each prompt. Raises as ``run``."""
    return continued(run(path, request), request.max_tokens)


def predictions(
    path: Path, windows: npt.NDArray[np.integer], *, vocab_size: int, threads: int | None
) -> AbstractContextManager[ScoredDirectory]:
    """Log-probabilities of ``windows`` in their order."""

    def score(some: npt.NDArray[np.int32]) -> Reply:
        return run(path, Request(windows=some, threads=threads))

    return nullcontext(ScoredDirectory(path, windows, score, vocab_size=vocab_size))


def generate(path: Path, request: Request, on_event: EventSink) -> Iterator[str]:
    """Pieces of the text that CTranslate2 writes after the first prompt, as they are made. Raises as ``run``."""
    CTranslate2Directory(path).close()
    return written_once(CTRANSLATE2, path, request, on_event)


def converse(path: Path, request: Request, _on_event: EventSink) -> AbstractContextManager[WorkerSession]:
    """As ``Runtime.converse``. Raises as ``run``."""
    CTranslate2Directory(path).close()
    return talking(CTRANSLATE2, path, request, trained=_trained(path))


def _trained(path: Path) -> int:
    """The context that the model was trained for, as its tokenizer says it; 0 where it does not."""
    said = read_optional(path, "tokenizer_config.json").get("model_max_length")
    return int(said) if isinstance(said, int | float) and 0 < said < float("inf") else 0
