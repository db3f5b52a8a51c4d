"""``llm-quantize demo``."""

from __future__ import annotations

import math
import shlex
from typing import TYPE_CHECKING

import click

from llm_quantize.cli.common import emit_json, json_option, line, mode
from llm_quantize.cli.progress import told
from llm_quantize.reports.wording import said, wraps_at_spaces

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from llm_quantize.compare.demo import DemoResult, Methods, Run


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

    First GGUF levels. Then GGUF, GPTQ, AWQ and compressed-tensors files rounded and with error feedback, and those of
    bitsandbytes and CTranslate2 where these packages are installed: this needs the extra [torch], and for GPTQ and AWQ
    the environment that LLM_QUANTIZE_TRANSFORMERS or LLM_QUANTIZE_VLLM names.
    Without torch the GGUF levels are measured in llama.cpp. The model has 5.8 million weights and writes grammatical
    nonsense. Nothing is downloaded. A few minutes.
    """
    from llm_quantize.compare.demo import run_demo

    shown = mode(ctx, as_json)
    with told(shown, "quantize") as sink:
        result = run_demo(output_dir, threads=threads, on_event=sink)
    if shown.json:
        emit_json(result.to_dict())
    else:
        _show(result, output_dir)
    return 0


def _show(result: DemoResult, output_dir: str | None) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    console.print(_table(result))
    where = said(
        "BF16 holds the source's own weights. Weights as our decoder reads them, in float32."
        if result.methods.rows
        else "Measured in llama.cpp, against F32: the line of BF16, which holds the source's own weights, is the noise "
        "floor of its arithmetic."
    )
    explained = said(
        f"KL divergence (± standard error) of the next-token probabilities to the source, over {result.tokens:,} "
        f"tokens of held-out English and Japanese in windows of {result.context}."
    )
    console.print(f"{explained} {where}", style="dim", soft_wrap=not wraps_at_spaces())
    console.print("\n" + said(f"After “{result.prompt}” they write:"), markup=False)
    for row in result.rows:
        text = Text(f"  {row.level:8}")
        text.append(line(" ".join(row.text.split())))
        text.truncate(console.width, overflow="ellipsis")
        console.print(text)
    agreement = said(f"F32 in llama.cpp against the source in transformers: {_agreement(result.agreement)}")
    console.print("\n" + line(agreement), markup=False, soft_wrap=not wraps_at_spaces())
    _show_methods(console, result.methods, result.prompt)
    last = f"{said(f'{result.seconds:.0f} seconds in all.')} {said(_next_step(output_dir))}"
    console.print("\n" + line(last), markup=False, soft_wrap=True)


def _show_methods(console: Console, found: Methods, prompt: str) -> None:
    console.print("\n" + said("Rounding against error feedback, at the same bytes:") + "\n", markup=False)
    if not found.rows:
        told = said(f"not shown: {found.problem}. What to do: {found.remedy}")
        console.print(line(told), markup=False, soft_wrap=not wraps_at_spaces())
        return
    console.print(_methods_table(found))
    took = f" (made in {found.importance_seconds:.1f} s)" if found.importance_seconds else ""
    explained = said(
        "Ratio: KL divergence with feedback over that of the rounded file, ± paired standard error; below 1, less is "
        f"lost. Over {found.tokens:,} tokens of held-out text. Feedback "
        f"saw {found.calibration_tokens:,} tokens of other text; rounded GGUF files have an importance matrix of the "
        f"same{took}. AWQ with feedback also rescales channels."
    )
    console.print(explained, style="dim", soft_wrap=not wraps_at_spaces())
    console.print("\n" + said(f"In their runtimes, with feedback, after “{prompt}”:") + "\n", markup=False)
    if any(row.run is not None and not row.run.problem for row in found.rows):
        console.print(_runtimes_table(found, console.width))
        explained = said(
            "To decoder: KL divergence between what the runtime predicts and what the weights say that our decoder "
            "reads from the same file. llama.cpp and CTranslate2 round activations to 8 bits; vLLM computes in "
            "float16, transformers in float32."
        )
        console.print(explained, style="dim", soft_wrap=not wraps_at_spaces())
    for label, package in found.left_out:
        told = said(f"{label} is not shown. What to do: pip install {package}")
        console.print(line(told), markup=False, soft_wrap=not wraps_at_spaces())
    for row in found.rows:
        if row.run is not None and row.run.problem:
            told = f"{row.label} was not run in {row.run.runtime}: {row.run.problem}"
            told = f"{told}. What to do: {row.run.remedy}" if row.run.remedy else told
            console.print(line(said(told)), markup=False, soft_wrap=not wraps_at_spaces())


def _columns(left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in left:
        table.add_column(said(name), no_wrap=True)
    for name in right:
        table.add_column(said(name), justify="right", no_wrap=True)
    return table


def _methods_table(found: Methods) -> Table:
    table = _columns(("file", "method"), ("size", "KL divergence", "ratio", "same top", "CPU"))
    for row in found.rows:
        lost, ratio = row.divergence, row.ratio
        if lost is not None:
            table.add_row(
                row.label,
                said(row.method),
                f"{row.size / 1e6:.2f} MB",
                f"{lost.kld:.5f} {_plus_minus(lost.kld_sem)}",
                "" if ratio is None else f"{ratio.kld_ratio:.2f} {_plus_minus(ratio.kld_ratio_sem, 2)}",
                f"{100 * lost.same_top:.1f} %",
                f"{row.seconds:.1f} s" if row.seconds else "–",
            )
    return table


def _runtimes_table(found: Methods, width: int) -> Table:
    from rich.text import Text

    table = _columns(("file", "runtime"), ("to decoder", "same top"))
    table.add_column(said("first words"), no_wrap=True)
    for row in found.rows:
        if row.run is not None and not row.run.problem:
            run, words = row.run, Text(line(" ".join(row.run.text.split())))
            words.truncate(max(11, width - _OTHER_COLUMNS), overflow="ellipsis")
            table.add_row(row.label, run.runtime, f"{run.kld:.1e}", f"{100 * run.same_top:.1f} %", words)
    return table


def _table(result: DemoResult) -> Table:
    table = _columns(("level",), ("size", "bits/weight", "CPU time", "perplexity", "KL divergence", "same top"))
    for row in result.rows:
        lost = row.divergence
        table.add_row(
            row.level,
            f"{row.size / 1e6:.2f} MB",
            f"{row.bits_per_weight:.2f}",
            f"{row.seconds:.2f} s" if row.seconds else "–",
            f"{row.perplexity:.2f}",
            said("source") if lost is None else f"{lost.kld:.5f} {_plus_minus(lost.kld_sem)}",
            "" if lost is None else f"{100 * lost.same_top:.1f} %",
        )
    return table


def _plus_minus(error: float, places: int = 5) -> str:
    if not math.isfinite(error):  # one window
        return ""
    shown = error == 0 or error >= 0.5 * 10.0**-places
    return f"±{error:.{places}f}" if shown else f"±{error:.0e}".rjust(places + 3)


def _agreement(found: Run) -> str:
    if found.problem:
        return f"not checked ({found.problem})."
    return f"KL divergence {found.kld:.1e}, same top token {100 * found.same_top:.1f} % ({found.tokens} tokens)."


def _next_step(output_dir: str | None) -> str:
    if output_dir is None:
        return "The files were temporary; -o DIR keeps them."
    artifact = shlex.quote(f"{output_dir}/demo-llama-Q4_K_M.gguf")
    return f"The files are in {output_dir}. Try: llm-quantize run {artifact} 'Once upon a time'"
