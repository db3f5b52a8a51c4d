"""Artifacts in their real runtimes, one file each; imported only when used."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from llm_quantize.errors import UsageError
from llm_quantize.events import EventSink, ignore
from llm_quantize.io.artifact_files import artifact_files
from llm_quantize.io.json_file import read_json_object
from llm_quantize.io.paths import inside
from llm_quantize.models.files import CONFIG_LIMIT

__all__ = ["first_file", "generate", "warn_beyond"]


def first_file(artifact: str | Path) -> Path:
    """The GGUF file to open: the artifact itself, or the first part of a split one (its directory or any part).

    Raises UsageError where there is no such artifact, or a directory holds several.
    """
    return artifact_files(Path(artifact))[0]


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
    """Pieces of text that continue ``prompt``: a GGUF file in llama.cpp, a Hugging Face directory in transformers or,
    where ``runtime`` is "vllm", in vLLM.

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
    directory = path.is_dir() and (path / "config.json").is_file()
    if directory:
        # Runtimes follow any link and break off in their own ways: what our readers refuse is not shown to them.
        for name in sorted(entry.name for entry in path.iterdir() if entry.is_symlink()):
            inside(path, name)
        read_json_object(inside(path, "config.json"), limit_bytes=CONFIG_LIMIT)
    possible = ("transformers", "vllm") if directory else ("llama.cpp",)
    if runtime is not None and runtime not in possible:
        raise UsageError("this runtime does not open it", file=path, expected=" or ".join(possible), found=runtime)
    if runtime == "vllm":
        from llm_quantize.runtimes import vllm
        from llm_quantize.runtimes.isolated import Request

        asked = Request(
            prompts=(prompt,), max_tokens=max_tokens, temperature=temperature, seed=seed, chat=chat, threads=threads
        )
        yield vllm.run(path, asked).texts[0]
        return
    if directory:
        from llm_quantize.runtimes import transformers

        yield from transformers.generate(
            path,
            prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            chat=chat,
            threads=threads,
            on_event=on_event,
        )
        return
    from llm_quantize.runtimes.llama_cpp import LlamaCpp

    with LlamaCpp(first_file(path), context=context_for(prompt, max_tokens), threads=threads) as model:
        yield from model.generate(
            prompt, max_tokens=max_tokens, temperature=temperature, chat=chat, seed=seed, on_event=on_event
        )


def warn_beyond(prompt: int, answer: int, trained: int, on_event: EventSink) -> None:
    """Warn where ``prompt`` and ``answer`` (tokens) may pass the ``trained`` context length; 0: it is not known."""
    if 0 < trained < prompt + answer:
        text = (
            f"{prompt} tokens of prompt and up to {answer} of answer pass the {trained} that the model was trained for"
        )
        on_event({"event": "warning", "text": text})


def context_for(prompt: str, max_tokens: int) -> int:
    """A context length that surely holds the prompt (no more tokens than bytes, plus a template) and the answer."""
    return min(32_768, len(prompt.encode("utf-8", "surrogatepass")) + 512 + max_tokens)
