"""``llm-quantize compare``."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llm_quantize.cli.common import (
    build_calibration,
    calibration_options,
    emit_json,
    json_option,
    line,
    lora_option,
    mode,
)
from llm_quantize.cli.progress import told
from llm_quantize.cli.sizes import Size
from llm_quantize.reports.labels import LANGUAGES, grade_name
from llm_quantize.reports.wording import said, spoken, wraps_at_spaces

if TYPE_CHECKING:
    from rich.table import Table

    from llm_quantize.options import Options
    from llm_quantize.reports.findings import ComparisonResult

_LINE = 90
_NOT_REPEATED = ("model", "artifacts", "output_dir", "as_json", "keep", "variants", "lang")


def _options(function: Callable[..., Any]) -> Callable[..., Any]:
    options = [
        click.option("--variants", metavar="LIST",
                     help="What to make, for example gguf:Q4_K_M,gptq:4bit,awq:4bit,compressed-tensors:W4A16. "
                     "[default without ARTIFACT: Q8_0 to Q2_K]"),
        click.option("-o", "--output-dir", default="report", show_default=True, type=click.Path(file_okay=False),
                     metavar="DIR", help="Where the report, and what is made for it, is written."),
        click.option("--lang", type=click.Choice(LANGUAGES),
                     help="Language of the report, and of what is said. [default: the locale's]"),
        click.option("--text", "texts", multiple=True, metavar="FILE",
                     help="Text to measure on: .txt, .json, .jsonl or .parquet; repeatable. "
                     "[default: the built-in English and Japanese prose]"),
        click.option("--context", type=click.IntRange(4), metavar="N",
                     help="Tokens in a window. [default: 512, or the model's context if that is less]"),
        click.option("--windows", type=click.IntRange(1), metavar="N",
                     help="At most so many windows, at even distances. [default: all of the text]"),
        click.option("--prompt", "prompts", multiple=True, metavar="TEXT",
                     help="What every variant continues; repeatable. [default: one English, one Japanese]"),
        click.option("--speed/--no-speed", default=True,
                     help="Run each variant in its runtime, for speed, memory and generated text."),
        click.option("--keep/--no-keep", default=True, help="Keep the artifacts that were made, in DIR/artifacts."),
        click.option("--imatrix", type=click.Path(dir_okay=False), metavar="FILE",
                     help="llama.cpp importance matrix (GGUF or legacy .dat) to quantize with."),
        click.option("--statistics", type=click.Path(dir_okay=False), metavar="FILE",
                     help="Statistics that analyze importance made of this model."),
        click.option("--calibrate/--no-calibration", "calibrate", default=None,
                     help="Calibrate, or never. [default: where a level needs it]"),
        click.option("--revision", metavar="R", help="Branch, tag or commit of a hub model."),
        click.option("--threads", type=click.IntRange(1, 1024), metavar="N", help="[default: all CPUs]"),
        click.option("--max-ram", type=Size(), help="Memory limit, for example 8G."),
    ]  # fmt: skip
    function = calibration_options(function)
    for option in reversed(options):
        function = option(function)
    return lora_option(function)


@click.command("compare")
@click.argument("model")
@click.argument("artifacts", nargs=-1, type=click.Path(), metavar="[ARTIFACT]...")
@_options
@json_option
@click.pass_context
def command(
    ctx: click.Context, /, as_json: bool, model: str, artifacts: tuple[str, ...], output_dir: str, **arguments: Any
) -> int:
    """Measure variants of MODEL side by side, and write a page that shows size, loss and speed.

    Variants are made, those of a format in one read of the source, or taken as they are (ARTIFACT: .gguf files, and
    model directories: safetensors, GPTQ, AWQ, compressed-tensors). DIR then holds index.html, which needs nothing else
    and works offline, comparison.md for a model card, and comparison.json. The same command after an interruption
    continues.

    Example: llm-quantize compare ./Llama-3.2-1B --variants gguf:Q8_0,gguf:Q4_K_M,gguf:Q2_K
    """
    from llm_quantize.compare import comparison

    shown = mode(ctx, as_json)
    variants = comparison.parse_variants(arguments["variants"]) if arguments["variants"] else ()
    with told(shown, "quantize") as sink:
        result = comparison.compare(
            model,
            output_dir,
            variants=variants,
            artifacts=artifacts,
            options=_built(arguments),
            revision=arguments["revision"],
            lora=arguments["lora"],
            commands=_commands(ctx, model, artifacts, variants),
            on_event=sink,
        )
    written = comparison.write_reports(result, Path(output_dir), arguments["lang"] or spoken())
    if not arguments["keep"]:
        comparison.remove_made(Path(output_dir), result, artifacts)
    if shown.json:
        emit_json({**result.to_dict(), "reports": {kind: str(path) for kind, path in written.items()}})
    else:
        _show(result, written["html"])
    return 0


def _built(arguments: Mapping[str, Any]) -> Options:
    """No recipe of the user's own, so that a level means the same in every report."""
    from llm_quantize.options import PROMPTS, MeasurementOptions, Options

    return Options(
        threads=arguments["threads"],
        max_ram=arguments["max_ram"],
        imatrix=Path(arguments["imatrix"]) if arguments["imatrix"] else None,
        statistics=Path(arguments["statistics"]) if arguments["statistics"] else None,
        calibrate=True if arguments["calibration_data"] else arguments["calibrate"],
        calibration=build_calibration(arguments),
        measurement=MeasurementOptions(
            texts=arguments["texts"],
            context=arguments["context"],
            windows=arguments["windows"],
            speed=arguments["speed"],
            prompts=arguments["prompts"] or PROMPTS,
        ),
    )


def _commands(ctx: click.Context, model: str, artifacts: tuple[str, ...], variants: Any) -> tuple[str, ...]:
    """What gives the same figures again: this version, and this command with every option that matters."""
    from llm_quantize import __version__
    from llm_quantize.compare.comparison import DEFAULT_VARIANTS

    words = [["llm-quantize", "compare", model, *artifacts]]
    if not variants and not artifacts:
        variants = [("gguf", level) for level in DEFAULT_VARIANTS]
    if variants:
        words.append(["--variants", ",".join(f"{format}:{level}" for format, level in variants)])
    for option in ctx.command.params:
        value = ctx.params.get(option.name or "")
        if option.name in _NOT_REPEATED or value == option.get_default(ctx) or value in (None, ()):
            continue
        if isinstance(value, bool):
            words.append([option.opts[0] if value else (option.secondary_opts or option.opts)[0]])
            continue
        words += [[option.opts[0], str(one)] for one in (value if isinstance(value, tuple) else (value,))]
    parts = [shlex.join(part) for part in words]
    wrapped = (" " if sum(map(len, parts)) < _LINE else " \\\n    ").join(parts)
    return (f"pip install '.[torch,llamacpp]'  # in a checkout of llm-quantize {__version__}", wrapped)


def _show(result: ComparisonResult, page: Path) -> None:
    """The answer first, and how to get it; then the figures."""
    from rich.console import Console

    from llm_quantize.reports.labels import labels
    from llm_quantize.reports.machines import commands_of
    from llm_quantize.reports.page import verdict

    console = Console(highlight=False)
    words, advice = labels(spoken()), result.advice()
    whole = not wraps_at_spaces()
    console.print(line(verdict(result, advice, words).striptags()), markup=False, soft_wrap=whole)
    if advice.take is not None:
        for name, text in commands_of(result, result.variants[advice.take]).items():
            console.print(f"{words[f'command_{name}']}: {line(text)}", markup=False, soft_wrap=True)
    console.print(words["rule_quality"] + "\n", style="dim", markup=False, soft_wrap=whole)
    for table in _tables(result):
        console.print(table)
        console.print()
    console.print(line(page), markup=False, soft_wrap=True)


def _tables(result: ComparisonResult) -> Iterator[Table]:
    """What to take where; what was lost; then what it takes to run. All fit 80 columns."""
    from llm_quantize.reports.machines import machine_rows
    from llm_quantize.reports.numbers import bytes_text, percent, rate_text, significant
    from llm_quantize.reports.page import kld_text

    machines = [
        (row.machine, row.label or "–", row.size, row.needs, row.grade) for row in machine_rows(result, spoken())
    ]
    if machines:
        yield _aligned(("machine", "take", "size", "memory it takes", "grade"), machines)
    rows = [
        (
            variant.label,
            bytes_text(variant.size),
            f"{variant.bits_per_weight:.2f}",
            kld_text(variant),
            f"{percent(variant.divergence.same_top)} %",
            grade_name(variant.grade, spoken()),
        )
        for variant in result.variants
    ]
    yield _aligned(("variant", "size", "bpw", "KL divergence", "same top", "grade"), rows)
    more = []
    for variant in result.variants:
        speed, measured = variant.speed, variant.divergence
        rates: tuple[str, ...] = ("–", "–", "–")
        if speed is not None:
            figures = (speed.prompt_tokens_per_second, speed.generation_tokens_per_second)
            rates = (bytes_text(speed.memory), *map(rate_text, figures))
        more.append((variant.label, f"{measured.perplexity:.2f}", significant(measured.kld_99), *rates))
    yield _aligned(("variant", "perplexity", "KLD 99 %", "memory", "prompt t/s", "generated t/s"), more)


def _aligned(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Table:
    from rich.table import Table

    from llm_quantize.reports.terminal import shown

    table = Table(box=None, pad_edge=False)
    for head in heads:
        table.add_column(
            said(head), justify="left" if head in ("variant", "grade", "machine", "take") else "right", no_wrap=True
        )
    for row in rows:
        table.add_row(*map(shown, row))
    return table
