"""``llm-quantize run``."""

from __future__ import annotations

import sys
from typing import Any
from unicodedata import category

import click

from llm_quantize import events
from llm_quantize.cli.common import Mode, emit_json, json_option, line, mode
from llm_quantize.cli.progress import told
from llm_quantize.cli.streams import reader_gone
from llm_quantize.errors import UsageError
from llm_quantize.reports.wording import said
from llm_quantize.runtimes import RUNTIMES, generate

LONGEST_PROMPT = 16 << 20
"""Bytes of a prompt on standard input."""


@click.command("run")
@click.argument("artifact", type=click.Path())
@click.argument("prompt")
@click.option("-n", "--max-tokens", default=64, show_default=True, type=click.IntRange(1, 1 << 20))
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(0.0, 10.0), help="0 is greedy.")
@click.option(
    "--top-p",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0.0, 1.0, min_open=True),
    metavar="P",
    help="Draw from the likeliest tokens that together have this share.",
)
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0, (1 << 63) - 1), help="Seed of the sampling."
)
@click.option("--chat", is_flag=True, help="Put the prompt into the model's own chat template.")
@click.option("--system", metavar="TEXT", help="A system message before the prompt; implies --chat.")
@click.option(
    "-c",
    "--context",
    type=click.IntRange(1, 1 << 24),
    metavar="N",
    help="Tokens of prompt and answer at most. [default: what they need]",
)
@click.option(
    "--gpu-layers",
    default=0,
    show_default=True,
    type=click.IntRange(0, 100_000),
    metavar="N",
    help="Layers on the GPU.",
)
@click.option(
    "--runtime",
    type=click.Choice(list(RUNTIMES)),
    help="[default: llama.cpp for .gguf, ctranslate2 for its models, transformers for other directories]",
)
@click.option("--threads", type=click.IntRange(1, 1024), metavar="N", help="[default: as many as there are idle CPUs]")
@click.option("--revision", metavar="R", help="Branch, tag or commit of a hub repository.")
@json_option
@click.pass_context
def command(ctx: click.Context, /, as_json: bool, artifact: str, prompt: str, **asked: Any) -> int:
    """Generate text: a .gguf file (or the directory of a split one) runs in llama.cpp, a Hugging Face directory
    in transformers or vLLM, a CTranslate2 model in CTranslate2. A hub id is fetched first; of several GGUF files one
    is named, as in ORG/NAME:Q4_K_M. Quantized directories may need `make transformers-runtime` or `make vllm` first.

    The PROMPT - is read from standard input. How fast the text came is told at the end, on standard error.

    Example: llm-quantize run model-Q4_K_M.gguf "Why is the sky blue?" --chat -n 200
    """
    shown = mode(ctx, as_json)
    if prompt == "-":
        prompt = _from_stdin()
    asked["chat"] = asked["chat"] or asked["system"] is not None
    pieces: list[str] = []
    written: list[events.Generated] = []
    with told(shown, "run", live=False) as sink:

        def hear(event: events.Event) -> None:
            if isinstance(event, events.Generated):
                written.append(event)
            else:
                sink(event)

        for piece in generate(artifact, prompt, on_event=hear, **asked):
            pieces.append(piece)
            if not shown.json:
                click.echo(_safe(piece) if sys.stdout.isatty() else piece, nl=False)
            if reader_gone():
                break
    if shown.json:
        emit_json({"artifact": artifact, "prompt": prompt, "text": "".join(pieces), **_facts(written)})
    else:
        click.echo()
        _tell(shown, written)
    return 0


def _from_stdin() -> str:
    """The prompt on standard input, without the line's end after it."""
    data = sys.stdin.buffer.read(LONGEST_PROMPT + 1)
    if len(data) > LONGEST_PROMPT:
        raise UsageError(
            "the prompt is too long", expected=f"at most {LONGEST_PROMPT} bytes on standard input", found="more"
        )
    try:
        return data.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UsageError(
            "the prompt on standard input is not UTF-8", offset=error.start, remedy="give it as UTF-8"
        ) from error


def _facts(written: list[events.Generated]) -> dict[str, Any]:
    """How much was written and how fast, where the text came to its end."""
    return {
        key: value
        for event in written
        for key, value in {**event.to_dict(), "tokens_per_second": round(event.rate, 3)}.items()
        if key != "event"
    }


def _tell(shown: Mode, written: list[events.Generated]) -> None:
    if shown.quiet:
        return
    for event in written:
        word = "thread" if event.threads == 1 else "threads"
        summary = said(f"{event.tokens:,} tokens, {event.rate:.1f} tokens/s with {event.threads} {word}")
        if event.prompt_tokens is not None and event.prompt_seconds is not None:
            summary += said(f"; the prompt's {event.prompt_tokens:,} in {event.prompt_seconds:.1f} s")
        click.echo(summary, err=True)


def _safe(text: str) -> str:
    """Generated text for a terminal: its lines and tabs as they are, other control characters escaped."""
    return "".join(line(c) if category(c) == "Cc" and c not in "\n\t" else c for c in text)
