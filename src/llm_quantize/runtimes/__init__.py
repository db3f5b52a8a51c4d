"""Artifacts in their real runtimes: RUNTIMES, one row and one module for each.

Without a name, the first row that opens a path runs it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from llm_quantize.errors import UsageError
from llm_quantize.events import EventSink, ignore
from llm_quantize.io.artifact_files import first_file
from llm_quantize.models.quantized import is_stored_directory
from llm_quantize.runtimes import llama_cpp, transformers, vllm
from llm_quantize.runtimes.base import OpenModel, Request, Runtime

__all__ = ["RUNTIMES", "artifact_at", "generate", "open_model", "runtime_for", "what_opens_what"]

RUNTIMES: Mapping[str, Runtime] = {"llama.cpp": llama_cpp, "transformers": transformers, "vllm": vllm}


def runtime_for(path: Path, name: str | None = None) -> Runtime:
    """The runtime ``name``, or the usual one, for what lies at ``path``.

    Raises UsageError where ``name`` is not for it, and what reading the configuration at ``path`` raises.
    """
    possible = [key for key, one in RUNTIMES.items() if one.opens(path)]
    if name is not None and name not in possible:
        raise UsageError("this runtime does not open it", file=path, expected=" or ".join(possible), found=name)
    return RUNTIMES[name or possible[0]]


def what_opens_what() -> str:
    """What each runtime opens, as one phrase for messages."""
    kinds: dict[str, list[str]] = {}
    for name, one in RUNTIMES.items():
        kinds.setdefault(one.OPENS, []).append(name)
    return ", ".join(f"{kind} with {' or '.join(names)}" for kind, names in kinds.items())


def artifact_at(path: Path) -> Path:
    """What of ``path`` is measured: a model directory as it is; else its GGUF file, the first of a split one.

    Raises UsageError where there is no artifact or there are several, and what reading the configuration raises.
    """
    return path if is_stored_directory(path) else first_file(path)


def open_model(artifact: str | Path, *, context: int, threads: int | None) -> OpenModel:
    """The artifact, held open in this process by the first runtime that can do so with it.

    Raises what that runtime raises; where there is none, the first one's refusal.
    """
    path = Path(artifact)
    able = [(one.opens, one.open_model) for one in RUNTIMES.values() if one.open_model is not None]
    chosen = next((opener for opens, opener in able if opens(path)), able[0][1])
    return chosen(path, context=context, threads=threads)


def generate(
    artifact: str | Path,
    prompt: str,
    *,
    max_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    threads: int | None = None,
    runtime: str | None = None,
    on_event: EventSink = ignore,
) -> Iterator[str]:
    """Pieces of text that continue ``prompt``, from ``runtime`` (a name of RUNTIMES) or the usual one for ``artifact``.

    ``on_event`` hears a warning where the text may pass the context that the model was trained for, and where a chat
    is not set in the model's own template.

    Raises MissingExtraError where the runtime is not installed, UsageError where there is no such artifact, the prompt
    is empty, or the runtime is for other artifacts.
    """
    path = Path(artifact)
    if not prompt:
        raise UsageError("the prompt is empty", remedy="give the text to continue")
    if not path.exists():
        raise UsageError("no such artifact", file=path, remedy="check the path")
    request = Request(
        prompts=(prompt,), max_tokens=max_tokens, temperature=temperature, seed=seed, chat=chat, threads=threads
    )
    yield from runtime_for(path, runtime).generate(path, request, on_event)
