"""Artifacts in their real runtimes: RUNTIMES, one row and one module for each.

Without a name, the first row that opens a path runs it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llm_quantize import events
from llm_quantize.errors import UsageError
from llm_quantize.events import EventSink, ignore
from llm_quantize.io.artifact_files import first_file
from llm_quantize.models.hub import ollama
from llm_quantize.models.hub.runnable import fetch_runnable, is_hub_id
from llm_quantize.models.quantized import is_stored_directory
from llm_quantize.runtimes import ctranslate2, llama_cpp, mlx, transformers, vllm
from llm_quantize.runtimes.base import OpenModel, Request, Runtime
from llm_quantize.runtimes.conversation import Conversation

__all__ = ["RUNTIMES", "artifact_at", "converse", "generate", "open_model", "runtime_for", "what_opens_what"]

RUNTIMES: Mapping[str, Runtime] = {
    "llama.cpp": llama_cpp,
    "transformers": transformers,
    "vllm": vllm,
    "ctranslate2": ctranslate2,
    "mlx": mlx,
}


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
    return ", ".join(f"{kind} (with {' or '.join(names)})" for kind, names in kinds.items())


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
    revision: str | None = None,
    on_event: EventSink = ignore,
    **more: Any,
) -> Iterator[str]:
    """Pieces of text that continue ``prompt``, from ``runtime`` (a name of RUNTIMES) or the usual one for ``artifact``.
    ``artifact``: a path, ollama:NAME of Ollama's store, or a hub id as ``fetch_runnable`` takes it, with
    ``revision``. ``more``: ``system``, ``top_p``, ``context`` and ``gpu_layers`` of a ``Request``.

    ``on_event`` hears a warning where the text may pass the context that the model was trained for, and where a chat
    is not set in the model's own template; at the end, how many tokens were written in which time.

    Raises MissingExtraError where the runtime is not installed, UsageError where there is no such artifact, the prompt
    is empty, the runtime is for other artifacts, or a setting has no effect.
    """
    if not prompt:
        raise UsageError("the prompt is empty", remedy="give the text to continue")
    path = _found(artifact, revision, on_event)
    request = Request(
        prompts=(prompt,), max_tokens=max_tokens, temperature=temperature, seed=seed, chat=chat, threads=threads, **more
    )
    chosen = runtime_for(path, runtime)
    _refuse_idle(request, chosen)
    yield from chosen.generate(path, request, on_event)


@contextmanager
def converse(
    artifact: str | Path,
    *,
    max_tokens: int | None = None,
    system: str | None = None,
    runtime: str | None = None,
    revision: str | None = None,
    on_event: EventSink = ignore,
    **more: Any,
) -> Iterator[Conversation]:
    """A conversation with ``artifact`` in ``runtime``, or the usual one, where it stays loaded until this ends.

    ``max_tokens`` of each answer; None: until the model ends it or the context is full. ``system``: a message before
    all others. ``more``: ``temperature``, ``top_p``, ``seed``, ``context`` (of the conversation; None: TALK_CONTEXT, or
    what the model was trained for, if that is less), ``gpu_layers`` and ``threads`` of a ``Request``.

    Raises as ``generate``, and UnsupportedError for a model without a chat template.
    """
    path = _found(artifact, revision, on_event)
    request = Request(chat=True, **more)
    chosen = runtime_for(path, runtime)
    _refuse_idle(request, chosen, among=("gpu_layers",))
    with chosen.converse(path, request, on_event) as session:
        yield Conversation(session, system=system, max_tokens=max_tokens, on_event=on_event)


def _found(artifact: str | Path, revision: str | None, on_event: EventSink) -> Path:
    """Where ``artifact``, a path, a name in Ollama's store or a hub id, is. Raises UsageError where there is none, and
    what ``ollama.stored`` raises."""
    path, text = Path(artifact), str(artifact)
    named = ollama.is_named(text) and not path.exists()
    if is_hub_id(text) and not named:
        path = fetch_runnable(text, revision, on_event)
    elif revision is not None:
        raise UsageError("a path has no revisions", file=path, found=f"--revision {revision}", remedy="leave it out")
    elif named:
        found = ollama.stored(text)
        path = found.path
        for note in found.notes:
            on_event(events.Caution(note))
    if not path.exists():
        raise UsageError("no such artifact", file=path, remedy="check the path")
    return path


def _refuse_idle(request: Request, chosen: Runtime, among: Collection[str] = ("context", "gpu_layers")) -> None:
    """Raise UsageError for a setting that would do nothing; ``among``: those that only some runtimes take."""
    if request.system is not None and not request.chat:
        raise UsageError("a system message is part of a chat", remedy="set the prompt as a chat, too: --chat")
    if request.top_p < 1 and request.temperature == 0:
        raise UsageError(
            "nothing is drawn at the temperature 0, so that --top-p has no effect",
            remedy="give a --temperature above 0, or leave --top-p out",
        )
    for name, unset in (("context", None), ("gpu_layers", 0)):
        if name in among and getattr(request, name) != unset and name not in chosen.TAKES:
            able = [one.LABEL for one in RUNTIMES.values() if name in one.TAKES]
            raise UsageError(
                f"{chosen.LABEL} has no use for --{name.replace('_', '-')}",
                expected=f"{' or '.join(able)}, or the option left out",
                found=getattr(request, name),
            )
