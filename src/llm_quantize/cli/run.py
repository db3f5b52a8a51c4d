"""``llm-quantize run``."""

from __future__ import annotations

import sys
from unicodedata import category

import click

from llm_quantize.cli.common import emit_json, json_option, line, mode
from llm_quantize.cli.progress import told
from llm_quantize.cli.streams import reader_gone
from llm_quantize.runtimes import RUNTIMES, generate


@click.command("run")
@click.argument("artifact", type=click.Path())
@click.argument("prompt")
@click.option("-n", "--max-tokens", default=64, show_default=True, type=click.IntRange(1, 1 << 20))
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(0.0, 10.0), help="0 is greedy.")
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0, (1 << 63) - 1), help="Seed of the sampling."
)
@click.option("--chat", is_flag=True, help="Put the prompt into the model's own chat template.")
@click.option(
    "--runtime",
    type=click.Choice(list(RUNTIMES)),
    help="[default: llama.cpp for .gguf, transformers for a directory]",
)
@click.option("--threads", type=click.IntRange(1, 1024), metavar="N", help="[default: all CPUs]")
@json_option
@click.pass_context
def command(
    ctx: click.Context, as_json: bool, artifact: str, prompt: str, max_tokens: int, temperature: float, seed: int,
    chat: bool, runtime: str | None, threads: int | None,
) -> int:  # fmt: skip
    """Generate text: a .gguf file (or the directory of a split one) runs in llama.cpp, a Hugging Face directory
    in transformers or vLLM. Quantized directories may need `make transformers-runtime` or `make vllm` first."""
    shown = mode(ctx, as_json)
    pieces = []
    with told(shown, "run", live=False) as sink:
        for piece in generate(
            artifact, prompt, max_tokens=max_tokens, temperature=temperature, seed=seed, chat=chat, threads=threads,
            runtime=runtime, on_event=sink,
        ):  # fmt: skip
            pieces.append(piece)
            if not shown.json:
                click.echo(_safe(piece) if sys.stdout.isatty() else piece, nl=False)
            if reader_gone():
                break
    if shown.json:
        emit_json({"artifact": artifact, "prompt": prompt, "text": "".join(pieces)})
    else:
        click.echo()
    return 0


def _safe(text: str) -> str:
    """Generated text for a terminal: its lines and tabs as they are, other control characters escaped."""
    return "".join(line(c) if category(c) == "Cc" and c not in "\n\t" else c for c in text)
