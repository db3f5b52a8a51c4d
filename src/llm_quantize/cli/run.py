"""``llm-quantize run``."""

from __future__ import annotations

import sys
from typing import Any

import click

from llm_quantize import events
from llm_quantize.cli.common import Mode, emit_json, json_option, mode
from llm_quantize.cli.conversation import Turns, figures, show_piece, tell_rate
from llm_quantize.cli.progress import told
from llm_quantize.cli.streams import reader_gone
from llm_quantize.errors import UsageError
from llm_quantize.runtimes import RUNTIMES, converse, generate

TOKENS = 64
"""The tokens of an answer to a single prompt, where nobody says."""

LONGEST_PROMPT = 16 << 20
"""Bytes of a prompt on standard input."""


@click.command("run")
@click.argument("artifact", type=click.Path())
@click.argument("prompt", required=False)
@click.option(
    "-n",
    "--max-tokens",
    type=click.IntRange(1, 1 << 20),
    metavar="N",
    help="Tokens of an answer at most. [default: 64; in a conversation, what the context leaves]",
)
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
@click.option(
    "--chat", is_flag=True, help="Put the prompt into the model's own chat template; without a prompt: a conversation."
)
@click.option("--system", metavar="TEXT", help="A system message before all others; implies --chat.")
@click.option(
    "-c",
    "--context",
    type=click.IntRange(1, 1 << 24),
    metavar="N",
    help="Tokens of prompt and answer at most. [default: what they need; in a conversation 4096, or what the model was "
    "trained for, if that is less]",
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
def command(ctx: click.Context, /, as_json: bool, artifact: str, prompt: str | None, **asked: Any) -> int:
    """Generate text: a .gguf file (or the directory of a split one) runs in llama.cpp, a Hugging Face directory
    in transformers or vLLM, a CTranslate2 model in CTranslate2. A hub id is fetched first; of several GGUF files one
    is named, as in ORG/NAME:Q4_K_M. A model of Ollama's store is ollama:NAME. Quantized directories may need `make
    transformers-runtime` or `make vllm` first.

    The PROMPT - is read from standard input. How fast the text came is told at the end, on standard error.

    With --chat and no PROMPT it is a conversation: every line of standard input is a message, and the model stays
    loaded. Ctrl-C stops an answer and keeps what was said, Ctrl-D ends; /help lists what else can be typed. When the
    context is full, the oldest exchanges are left out; the system message stays.

    Example: llm-quantize run model-Q4_K_M.gguf "Why is the sky blue?" --chat -n 200
    """
    shown = mode(ctx, as_json)
    if prompt is None:
        return _talk(shown, artifact, asked)
    asked["max_tokens"] = asked["max_tokens"] or TOKENS
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
                show_piece(piece)
            if reader_gone():
                break
    if shown.json:
        emit_json({"artifact": artifact, "prompt": prompt, "text": "".join(pieces), **_facts(written)})
    else:
        click.echo()
        for event in written:
            tell_rate(shown, event)
    return 0


def _talk(shown: Mode, artifact: str, asked: dict[str, Any]) -> int:
    """A conversation, to its end."""
    if not asked.pop("chat") and asked["system"] is None:
        raise UsageError(
            "there is no prompt", expected="a text to continue, or --chat for a conversation", remedy="give one of them"
        )
    with told(shown, "run", live=False) as sink, converse(artifact, on_event=sink, **asked) as conversation:
        Turns(shown, conversation).run()
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
    return {key: value for event in written for key, value in figures(event).items()}
