"""``llm-quantize demo``."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from llm_quantize.cli.common import Mode, emit_json, events, json_option, line, mode, sheltered

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from llm_quantize.compare.demo import Agreement, DemoResult
    from llm_quantize.compare.demo_methods import MethodsResult
    from llm_quantize.events import EventSink


_OTHER_COLUMNS = 11 + 12 + 10 + 8 + 4 * 2
"""Cells beside the words in the table of runtimes: without a limit they would squeeze the other columns."""


@click.command("demo")
@click.option("-o", "--output-dir", type=click.Path(file_okay=False), metavar="DIR",
              help="Keep the files here. [default: a temporary directory, removed]")  # fmt: skip
@click.option("--threads", type=click.IntRange(1, 1024), metavar="N", help="[default: all CPUs]")
@json_option
@click.pass_context
def command(ctx: click.Context, as_json: bool, output_dir: str | None, threads: int | None) -> int:
    """Quantize the built-in model to every kind of file, run it in real runtimes, and measure what was lost.

    First GGUF levels in llama.cpp. Then GGUF, GPTQ, AWQ and compressed-tensors files rounded and with error feedback:
    this needs the extra [torch], and for GPTQ and AWQ the environment that LLM_QUANTIZE_TRANSFORMERS or
    LLM_QUANTIZE_VLLM names. The model has 5.8 million weights and writes grammatical nonsense. Nothing is downloaded.
    A few minutes.
    """
    from llm_quantize.compare.demo import run_demo

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
    """One bar for all stages on a terminal; elsewhere a line when a stage begins or ends."""
    if not shown.live:
        with events(shown, "quantize") as sink:
            yield sink if shown.json or shown.quiet else _with_stage_lines(sink)
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("quantize", total=None)
        stage = [""]

        def draw(event: Mapping[str, Any]) -> None:
            if event["event"] == "warning":
                console.print(f"warning: {line(event['text'])}", style="yellow", markup=False, highlight=False)
            elif event["event"] in ("progress", "measure"):
                default = "quantize" if event["event"] == "progress" else stage[0] or "measure in llama.cpp"
                text = event.get("text", default)
                progress.update(task, description=text, completed=event["done"], total=event["total"])
            elif event["event"] == "stage":
                stage[0] = event["text"]
                progress.update(task, description=event["text"], completed=0, total=None)

        yield sheltered(draw)


def _with_stage_lines(sink: EventSink) -> EventSink:
    files = [False]

    def plain(event: Mapping[str, Any]) -> None:
        kind = event["event"]
        if kind == "measure" and event["done"] == event["total"]:
            windows = f"{event['total']} windows through every file in llama.cpp"
            click.echo(f"measure: 100% ({'every file against the source' if files[0] else windows})", err=True)
        elif kind == "made":
            files[0] = True
            click.echo(f"{line(event['text'])}: 100% ({event['seconds']:.1f} s of CPU time)", err=True)
        if kind != "progress" or "text" not in event:
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
    _show_methods(console, result.methods, result.prompt)
    console.print(
        f"\n{result.seconds:.0f} seconds in all. {line(_next_step(output_dir))}", markup=False, soft_wrap=True
    )


def _show_methods(console: Console, found: MethodsResult, prompt: str) -> None:
    console.print("\nRounding against error feedback, at the same bytes:\n", markup=False)
    if not found.rows:
        console.print(f"not shown: {line(found.problem)}. What to do: {line(found.remedy)}", markup=False)
        return
    console.print(_methods_table(found))
    took = f" (made in {found.importance_seconds:.1f} s)" if found.importance_seconds else ""
    console.print(
        "Ratio: KL divergence with feedback over that of the rounded file, ± paired standard error; below 1, less is "
        f"lost. Weights as our decoder reads them, in float32, over {found.tokens:,} tokens of held-out text. Feedback "
        f"saw {found.calibration_tokens:,} tokens of other text; rounded GGUF files have an importance matrix of the "
        f"same{took}. AWQ with feedback also rescales channels.",
        style="dim",
    )
    console.print(f"\nIn their runtimes, with feedback, after “{prompt}”:\n", markup=False)
    if any(row.run is not None and not row.run.problem for row in found.rows):
        console.print(_runtimes_table(found, console.width))
        console.print(
            "To decoder: KL divergence between what the runtime predicts and what the weights say that our decoder "
            "reads from the same file. llama.cpp rounds activations to 8 bits; vLLM computes in bfloat16, transformers "
            "in float32.",
            style="dim",
        )
    for row in found.rows:
        if row.run is not None and row.run.problem:
            told = f"{row.label} was not run in {row.run.runtime}: {line(row.run.problem)}"
            console.print(f"{told}. What to do: {line(row.run.remedy)}" if row.run.remedy else told, markup=False)


def _methods_table(found: MethodsResult) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("file", "method"):
        table.add_column(name, no_wrap=True)
    for name in ("size", "KL divergence", "ratio", "same top", "CPU"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in found.rows:
        lost, ratio = row.divergence, row.ratio
        table.add_row(
            row.label,
            row.method,
            f"{row.size / 1e6:.2f} MB",
            f"{lost.kld:.5f} {_plus_minus(lost.kld_sem)}",
            "" if ratio is None else f"{ratio.kld_ratio:.2f} ±{ratio.kld_ratio_sem:.2f}",
            f"{100 * lost.same_top:.1f} %",
            f"{row.seconds:.1f} s" if row.seconds else "–",
        )
    return table


def _runtimes_table(found: MethodsResult, width: int) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for name in ("file", "runtime"):
        table.add_column(name, no_wrap=True)
    for name in ("to decoder", "same top"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("first words", no_wrap=True)
    for row in found.rows:
        if row.run is not None and not row.run.problem:
            run, words = row.run, Text(line(" ".join(row.run.text.split())))
            words.truncate(max(11, width - _OTHER_COLUMNS), overflow="ellipsis")
            table.add_row(row.label, run.runtime, f"{run.kld:.1e}", f"{100 * run.same_top:.1f} %", words)
    return table


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
