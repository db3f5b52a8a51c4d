"""Hugging Face directories in transformers, on the CPU. No code of the model repository is run.

Quantized ones run in a process of their own, under the interpreter that LLM_QUANTIZE_TRANSFORMERS names, or this one:
GPTQ and AWQ need packages that ask for another torch than the rest (``make transformers-runtime``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_quantize.errors import MalformedInputError, MissingExtraError, UnsupportedError, printable
from llm_quantize.events import EventSink
from llm_quantize.models.quantized import PackedDirectory, is_packed_directory
from llm_quantize.runtimes import isolated
from llm_quantize.runtimes.base import (
    Opener,
    Reply,
    Request,
    Stopwatch,
    Written,
    is_torch_directory,
    refuse_incomplete,
    warn_beyond,
)
from llm_quantize.runtimes.chat import in_template
from llm_quantize.runtimes.isolated import Worker, incomplete
from llm_quantize.runtimes.scored import ScoredDirectory
from llm_quantize.runtimes.threads import idle_threads
from llm_quantize.runtimes.workers.telling import IncompleteError, Pieces, refuse_unfilled

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


def is_quantized(directory: Path) -> bool:
    """True where config.json has a quantization_config."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and bool(config.get("quantization_config"))


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
    """Pieces of the text that transformers writes after the first prompt, as they are made.

    Raises MissingExtraError without torch and transformers, MalformedInputError or IntegrityError where weights are
    missing, UnsupportedError for a model that transformers cannot load and for a chat without template.
    """
    if is_quantized(path):
        refuse_incomplete(path)
        _refuse_misread(path)
        reply = yield from isolated.spoken(TRANSFORMERS, path, request, settings=_SETTINGS, options={"backend": None})
        on_event(isolated.generated(reply))
        return
    if find_spec("torch") is None or find_spec("transformers") is None:
        raise MissingExtraError("Running a Hugging Face directory", "torch")
    refuse_incomplete(path)
    model, tokenizer = _load(path)
    prompt = request.prompts[0]
    if request.chat:
        (prompt,) = in_template(path, [request.messages(prompt)])
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not request.chat)
    inputs.pop("token_type_ids", None)
    trained = getattr(model.config, "max_position_embeddings", None) or 0
    warn_beyond(inputs["input_ids"].shape[1], request.max_tokens, int(trained), on_event)
    yield from _written(model, tokenizer, inputs, request, on_event)


def _load(path: Path) -> tuple[Any, Any]:
    """The model, every parameter of which came from its files, and its tokenizer."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(path), **local)
        model, told = AutoModelForCausalLM.from_pretrained(
            str(path), use_safetensors=True, output_loading_info=True, **local
        )
        refuse_unfilled(told)
    except IncompleteError as error:
        raise incomplete(path, str(error)) from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise UnsupportedError(
            "transformers cannot load this model",
            file=path,
            found=printable(f"{type(error).__name__}: {error}", 300),
            remedy="see llm-quantize info for what its files are",
        ) from error
    return model, tokenizer


def _written(model: Any, tokenizer: Any, inputs: Any, request: Request, on_event: EventSink) -> Iterator[str]:
    """Text after ``inputs``, a piece at a time: transformers writes in a thread, which ends when this is closed."""
    import torch

    pieces: SimpleQueue[str | None] = SimpleQueue()
    closed = Event()
    threads = request.threads or idle_threads()
    clock = Stopwatch()

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    def stop(ids: Any, _scores: Any, **_more: Any) -> Any:
        return torch.full((ids.shape[0],), closed.is_set(), dtype=torch.bool, device=ids.device)

    def write(streamer: Pieces) -> None:
        torch.manual_seed(request.seed)
        warm = request.temperature > 0
        sampling = {"temperature": request.temperature, "top_p": request.top_p} if warm else {}
        try:
            with torch.inference_mode():
                model.generate(
                    **inputs,
                    max_new_tokens=request.max_tokens,
                    do_sample=warm,
                    streamer=streamer,
                    stopping_criteria=[stop],
                    **sampling,
                )
        finally:
            pieces.put(None)

    streamer, before = Pieces(decode, pieces.put), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(write, streamer)
            try:
                while (piece := pieces.get()) is not None:
                    yield piece
            finally:
                closed.set()
            done.result()
    finally:
        torch.set_num_threads(before)
    clock.tokens = streamer.count
    on_event(clock.told(threads))
