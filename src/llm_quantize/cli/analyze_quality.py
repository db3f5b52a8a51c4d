"""``llm-quantize analyze quality``."""

from __future__ import annotations

import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llm_quantize.cli.common import Mode, emit_json, json_option, line, lora_option, mode, verbose_option
from llm_quantize.cli.progress import told
from llm_quantize.cli.sizes import Size
from llm_quantize.measures.amounts import decimals
from llm_quantize.measures.uncertainty import figure
from llm_quantize.reports.labels import LANGUAGES, grade_name, labels
from llm_quantize.reports.wording import said, spoken
from llm_quantize.runtimes import RUNTIMES

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from llm_quantize.compare.assessment import Assessment
    from llm_quantize.evaluation.generation_check import GenerationCheck
    from llm_quantize.options import Options

_WORST = 5


def _number(_ctx: click.Context, _param: click.Parameter, value: float | None) -> float | None:
    """A limit that is a number: NaN is in every range, and nothing is below it."""
    if value is not None and math.isnan(value):
        raise click.BadParameter("nan is no limit")
    return value


@click.command("quality")
@click.argument("artifacts", nargs=-1, required=True, metavar="ARTIFACT...", type=click.Path())
@click.option("--reference", required=True, metavar="MODEL", help="The model that the artifacts were made from.")
@click.option(
    "--text",
    "texts",
    multiple=True,
    metavar="FILE",
    help="Text to measure on: .txt, .json, .jsonl or .parquet; repeatable. "
    "[default: the built-in English and Japanese prose]",
)
@click.option(
    "--context",
    type=click.IntRange(4),
    metavar="N",
    help="Tokens in a window. [default: 512, or the model's context if that is less]",
)
@click.option(
    "--windows",
    type=click.IntRange(1),
    metavar="N",
    help="At most so many windows, at even distances. [default: all of the text]",
)
@click.option(
    "--runtime",
    type=click.Choice(list(RUNTIMES)),
    help="Measure in the real runtime too, and compare.",
)
@click.option("--generate", is_flag=True, help="Let source and artifacts write, and look for loops and silence.")
@click.option(
    "--statistics",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Statistics or imatrix that tensor errors are weighed with.",
)
@click.option(
    "--max-kld",
    type=click.FloatRange(0, min_open=True),
    callback=_number,
    metavar="X",
    help="Exit with 9 if a mean KL divergence is above X.",
)
@click.option("--report", type=click.Path(dir_okay=False), metavar="FILE.html", help="Write a page with all figures.")
@click.option(
    "--lang", type=click.Choice(LANGUAGES), help="Language of the report, and of what is said. [default: the locale's]"
)
@click.option("--device", default="cpu", show_default=True, metavar="NAME", help="cpu, cuda or mps.")
@lora_option
@click.option("--revision", metavar="R", help="Branch, tag or commit of a hub model.")
@click.option("--threads", type=click.IntRange(1, 1024), metavar="N", help="[default: all CPUs]")
@click.option("--max-ram", type=Size(), help="Memory limit, for example 8G.")
@verbose_option
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    as_json: bool,
    verbose: int,
    artifacts: tuple[str, ...],
    reference: str,
    max_kld: float | None,
    report: str | None,
    lang: str | None,
    **arguments: Any,
) -> int:
    """Measure what ARTIFACT lost against --reference: perplexity, KL divergence, agreement, errors of tensors.

    One decoder block of each model is in memory at a time, so the model may be larger than memory. ARTIFACT is a
    .gguf file or the directory of a split one, or a model directory (safetensors, GPTQ, AWQ, compressed-tensors);
    several are compared on the same tokens.

    Example: llm-quantize analyze quality m-Q4_K_M.gguf m-Q3_K_M.gguf --reference ./model --max-kld 0.05
    """
    from llm_quantize.artifacts.preflight import refuse_unwritable
    from llm_quantize.compare.assessment import assess
    from llm_quantize.io.whole_file import refuse_existing, refuse_input

    if report is not None:
        refuse_existing(Path(report), replace=True)
        refuse_unwritable(Path(report).parent)
        refuse_input(Path(report), (*artifacts, *arguments["texts"], arguments["statistics"] or ""))
    shown = mode(ctx, as_json, verbose)
    revision, lora = arguments.pop("revision"), arguments.pop("lora")
    commands = (shlex.join(["llm-quantize", *sys.argv[1:]]),)
    with told(shown, "measure") as sink:
        found = assess(
            reference, artifacts, _built(**arguments), revision=revision, lora=lora, commands=commands, on_event=sink
        )
    if report is not None:
        from llm_quantize.reports.page import write_page

        write_page(found.comparison, report, lang or spoken())
    error = found.gate(max_kld)
    if shown.json:
        emit_json({**found.to_dict(), "report": report, **(error.to_dict() if error is not None else {})})
        return 0 if error is None else error.exit_code
    _show(found, shown, report)
    if error is not None:
        raise error
    return 0


def _built(
    *, threads: int | None, max_ram: int | None, device: str, statistics: str | None, **measurement: Any
) -> Options:
    from llm_quantize.options import CalibrationOptions, MeasurementOptions, Options

    return Options(
        threads=threads,
        max_ram=max_ram,
        statistics=Path(statistics) if statistics else None,
        calibration=CalibrationOptions(device=device),
        measurement=MeasurementOptions(**measurement),
    )


def _show(found: Assessment, shown: Mode, report: str | None) -> None:
    from rich.console import Console

    from llm_quantize.compare.assessment import runtime_sentence
    from llm_quantize.reports.page import grades_text

    console, quality = Console(highlight=False, soft_wrap=True), found.quality
    console.print(_table(found))
    console.print()
    console.print(_details(found))
    texts = ", ".join(quality.texts)
    scored = said(
        f"{quality.tokens:,} scored tokens in {quality.windows} windows of {quality.context} ({texts}); reference "
        f"perplexity {quality.artifacts[0].divergence.reference_perplexity:.4f}."
    )
    console.print(line(scored), markup=False, style="dim")
    console.print(said(_errors_text(quality.windows)), markup=False, style="dim")
    grades = labels(spoken())["method_grades"].format(grades=grades_text(found.comparison, spoken()))
    console.print(grades, markup=False, style="dim")
    floor = said(
        f"Noise floor: the reference against itself, every sum taken in another order: KLD {quality.noise.kld:.1e} "
        f"({quality.noise.tokens} tokens)."
    )
    console.print(floor, markup=False, style="dim")
    for one in quality.artifacts:
        share = figure(100 * one.divergence.acceptance, 100 * one.divergence.acceptance_sem, 2)
        drafts = (
            f"{Path(one.path).name}: of tokens that it drafts the reference accepts {share} % (speculative decoding)"
        )
        console.print(line(said(drafts)), markup=False)
        for sentence in filter(None, (*one.rounded_sentences, runtime_sentence(one))):
            console.print(line(said(sentence)), markup=False)
    _pairs(console, found)
    for index, artifact in enumerate(quality.artifacts):
        _worst(console, found, index, None if shown.verbose else _WORST)
        if found.generation:
            check = found.generation[index]
            console.print(line(said(f"{Path(artifact.path).name} {said(_verdict(check))}")), markup=False)
            for finding in check.findings:
                console.print(line(said(f"  after “{finding.prompt}”: {finding.text}")), markup=False)
    memory = quality.memory
    place = "on disk" if memory.on_disk else "in memory"
    spent = said(
        f"{quality.seconds:.0f} s of CPU time, {memory.threads} threads; memory {memory.peak / 1e6:,.0f} MB, planned "
        f"{memory.planned / 1e6:,.0f} MB, hidden states {place}."
    )
    console.print(spent, markup=False, style="dim")
    if quality.reused:
        text = "The reference's hidden states were kept by an earlier run: its time is not counted."
        console.print(said(text), markup=False, style="dim")
    if report is not None:
        console.print(line(said(f"report: {report}")), markup=False)


def _errors_text(windows: int) -> str:
    """What ± is, in a sentence."""
    if windows < 2:
        return "One window tells no standard errors: give more text, or a smaller --context."
    return f"± are standard errors, clustered by window ({windows} windows)."


def _verdict(check: GenerationCheck) -> str:
    """One finding proves little, so the sentence counts the prompts on both sides."""
    if not check.reference:
        return "writes well" if check.ok else "writes badly"
    counts = f"of {len(check.answers)} prompts, {check.worse} go wrong here only and {check.better} in the source only"
    return f"writes {'about as well as' if check.ok else 'worse than'} the source: {counts}"


def _table(found: Assessment) -> Table:
    """What decides, in less than 80 columns for names of usual length."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column(said("artifact"), overflow="fold")
    for name in ("bits/w", "KL divergence", "same top", "perplexity", "grade"):
        table.add_column(said(name), justify="left" if name == "grade" else "right", no_wrap=True)
    for one in found.quality.artifacts:
        d = one.divergence
        table.add_row(
            Text(line(Path(one.path).name.removesuffix(".gguf"))),
            f"{one.bits_per_weight:.2f}",
            figure(d.kld, d.kld_sem),
            f"{100 * d.same_top:.1f} %",
            f"{d.perplexity:.3f}",
            grade_name(one.grade, spoken()),
        )
    return table


def _details(found: Assessment) -> Table:
    """How the divergence is spread, and the two figures of the token that follows."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("KLD", overflow="fold")
    for name in ("median", "99 %", "99.9 %", "max", "Δp RMS", "ln perplexity ratio"):
        table.add_column(said(name), justify="right", no_wrap=True)
    for one in found.quality.artifacts:
        d = one.divergence
        table.add_row(
            Text(line(Path(one.path).name.removesuffix(".gguf"))),
            decimals(d.kld_median, 5),
            decimals(d.kld_99, 4),
            decimals(d.kld_999, 4),
            decimals(d.kld_max, 3),
            f"{100 * d.rms_delta_p:.2f} %",
            figure(d.ln_ratio, d.ln_ratio_sem, 5, signed=True),
        )
    return table


def _pairs(console: Console, found: Assessment) -> None:
    names = [Path(one.path).name for one in found.quality.artifacts]
    for pair in found.quality.pairs:
        told = said(
            f"{line(names[pair.first])} - {line(names[pair.second])}: KLD "
            f"{figure(pair.kld_difference, pair.kld_difference_sem, 6, signed=True)} (paired), ratio "
            f"{figure(pair.kld_ratio, pair.kld_ratio_sem, 3)}"
        )
        console.print(told, markup=False)


def _worst(console: Console, found: Assessment, index: int, count: int | None) -> None:
    from llm_quantize.evaluation.tensor_errors import worst

    losses = worst(found.tensors[index], count or len(found.tensors[index]))
    if not losses:
        return
    name = line(Path(found.quality.artifacts[index].path).name)
    console.print(said(f"largest errors of tensors in {name} (relative RMS):"), markup=False)
    for loss in losses:
        weighted = "" if loss.weighted is None else f", weighted by importance {decimals(loss.weighted, 4)}"
        broken = f", {loss.nonfinite} values not finite" if loss.nonfinite else ""
        told = f"{loss.qtype} {decimals(loss.relative, 4)}{weighted}, largest {loss.largest:.2f} RMS{broken}"
        console.print(line(f"  {loss.name} {said(told)}"), markup=False)
