"""``llm-quantize demo``."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from llm_quantize.cli.common import Mode, emit_json, events, json_option, line, mode, sheltered

if TYPE_CHECKING:
    from rich.table import Table

    from llm_quantize.demo import Agreement, DemoResult
    from llm_quantize.events import EventSink


@click.command("demo")
@click.option("-o", "--output-dir", type=click.Path(file_okay=False), metavar="DIR",
              help="Keep the files here. [default: a temporary directory, removed]")  # fmt: skip
@click.option("--threads", type=click.IntRange(1, 1024), metavar="N", help="[default: all CPUs]")
@json_option
@click.pass_context
def command(ctx: click.Context, as_json: bool, output_dir: str | None, threads: int | None) -> int:
    """Quantize the built-in model, run every level in llama.cpp, and measure what was lost.

    The model has 5.8 million weights and writes grammatical nonsense. Nothing is downloaded. Under a minute.
    """
    from llm_quantize.demo import run_demo

    shown = mode(ctx, as_json)
    with _progress(shown) as sink:
        result = run_demo(output_dir, threads=threads, on_event=sink)
    if shown.json:
        emit_json(result.to_dict())
    else:
        _show(result, output_dir)
    return 0


@contextmanager
def _progress(shown: Mode) -> Iterator[EventSink]:
    """One bar for both stages on a terminal; elsewhere a line when a stage begins or ends."""
    if not shown.live:
        with events(shown, "quantize") as sink:
            yield sink if shown.json or shown.quiet else _with_stage_line(sink)
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("quantize", total=None)

        def draw(event: Mapping[str, Any]) -> None:
            if event["event"] == "warning":
                console.print(f"warning: {line(event['text'])}", style="yellow", markup=False, highlight=False)
            elif event["event"] in ("progress", "measure"):
                stage = "quantize" if event["event"] == "progress" else "measure in llama.cpp"
                progress.update(task, description=stage, completed=event["done"], total=event["total"])
            elif event["event"] == "stage":
                progress.update(task, description=event["text"], completed=0, total=None)

        yield sheltered(draw)


def _with_stage_line(sink: EventSink) -> EventSink:
    def plain(event: Mapping[str, Any]) -> None:
        if event["event"] == "measure" and event["done"] == event["total"]:
            click.echo(f"measure: 100% ({event['total']} windows through every file in llama.cpp)", err=True)
        sink(event)

    return sheltered(plain)


def _show(result: DemoResult, output_dir: str | None) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    console.print(_table(result))
    console.print(
        f"KL divergence (± standard error) of the next-token probabilities to the source, over {result.tokens:,} "
        f"tokens of held-out English and Japanese in windows of {result.context}. BF16 holds the source's own "
        "weights: its line is the noise floor of the runtime's arithmetic.",
        style="dim",
    )
    console.print(f"\nAfter “{result.prompt}” they write:", markup=False)
    for row in result.rows:
        text = Text(f"  {row.level:8}")
        text.append(line(" ".join(row.text.split())))
        text.truncate(console.width, overflow="ellipsis")
        console.print(text)
    agreement = line(_agreement(result.agreement))
    console.print(f"\nF32 in llama.cpp against the source in transformers: {agreement}", markup=False)
    console.print(f"{result.seconds:.0f} seconds in all. {line(_next_step(output_dir))}", markup=False, soft_wrap=True)


def _table(result: DemoResult) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("level")
    for name in ("size", "bits/weight", "CPU time", "perplexity", "KL divergence", "same top"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in result.rows:
        lost = row.divergence
        table.add_row(
            row.level,
            f"{row.size / 1e6:.2f} MB",
            f"{row.bits_per_weight:.2f}",
            f"{row.seconds:.2f} s" if row.seconds else "–",
            f"{row.perplexity:.2f}",
            "source" if lost is None else f"{lost.kld:.5f} {_plus_minus(lost.kld_sem)}",
            "" if lost is None else f"{100 * lost.same_top:.1f} %",
        )
    return table


def _plus_minus(error: float) -> str:
    return f"±{error:.5f}" if error >= 5e-6 else f"±{error:.0e}".rjust(8)


def _agreement(found: Agreement) -> str:
    if not found.checked:
        return f"not checked ({found.problem})."
    return (
        f"KL divergence {found.kld:.1e}, same top token {100 * found.same_top:.1f} %, largest logit difference "
        f"{found.largest_difference:.1e} of a range of {found.logit_range:.0f} ({found.tokens} tokens)."
    )


def _next_step(output_dir: str | None) -> str:
    if output_dir is None:
        return "The files were temporary; -o DIR keeps them."
    artifact = shlex.quote(f"{output_dir}/demo-llama-Q4_K_M.gguf")
    return f"The files are in {output_dir}. Try: llm-quantize run {artifact} 'Once upon a time'"
