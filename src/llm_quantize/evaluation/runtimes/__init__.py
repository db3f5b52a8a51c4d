"""Artifacts in their real runtimes, one file each; imported only when used."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from llm_quantize.errors import UsageError

__all__ = ["first_file", "generate"]


def first_file(artifact: str | Path) -> Path:
    """The GGUF file to open: the artifact itself, or the first part in the directory of a split one."""
    path = Path(artifact)
    if not path.is_dir():
        return path
    parts = sorted(path.glob("*.gguf"))
    if not parts:
        raise UsageError("no GGUF file in this directory", file=path, remedy="give the path of the artifact")
    return parts[0]


def generate(
    artifact: str | Path,
    prompt: str,
    *,
    max_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    threads: int | None = None,
) -> Iterator[str]:
    """Pieces of text that continue ``prompt``: a GGUF file in llama.cpp, a Hugging Face directory in transformers.

    Raises MissingExtraError where the runtime is not installed, UsageError where there is no such artifact.
    """
    path = Path(artifact)
    if not path.exists():
        raise UsageError("no such artifact", file=path, remedy="check the path")
    if path.is_dir() and (path / "config.json").is_file():
        from llm_quantize.evaluation.runtimes import transformers

        yield from transformers.generate(
            path, prompt, max_tokens=max_tokens, temperature=temperature, seed=seed, chat=chat, threads=threads
        )
        return
    from llm_quantize.evaluation.runtimes.llama_cpp import LlamaCpp

    with LlamaCpp(first_file(path), context=context_for(prompt, max_tokens), threads=threads) as model:
        yield from model.generate(prompt, max_tokens=max_tokens, temperature=temperature, chat=chat, seed=seed)


def context_for(prompt: str, max_tokens: int) -> int:
    """A context length that surely holds the prompt (no more tokens than bytes, plus a template) and the answer."""
    return min(32_768, len(prompt.encode()) + 512 + max_tokens)
