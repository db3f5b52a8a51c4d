"""``llm-quantize analyze importance``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llm_quantize.cli.common import (
    build_calibration,
    calibration_options,
    emit_json,
    json_option,
    lora_option,
    mode,
    verbose_option,
)
from llm_quantize.cli.progress import told
from llm_quantize.cli.sizes import Size

if TYPE_CHECKING:
    from llm_quantize.calibration.outcome import Calibration


@click.command("importance")
@click.argument("model")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Where to write; the suffix tells the format: .gguf, .dat, .json, .safetensors, .svg. "
    "[default: MODEL-imatrix.gguf]",
)
@click.option(
    "--format",
    "kind",
    type=click.Choice(["imatrix", "dat", "json", "statistics", "svg"]),
    help="imatrix: llama.cpp's GGUF; dat: its older form; json: a summary; statistics: our own file, for "
    "every format; svg: a picture of how many tokens each expert saw. [default: by the suffix, else imatrix]",
)
@calibration_options
@click.option(
    "--collect",
    default="imatrix",
    show_default=True,
    metavar="KINDS",
    help="Of imatrix, hessian, absmax, with commas between.",
)
@click.option(
    "--expert-minimum",
    type=click.IntRange(0),
    default=16,
    show_default=True,
    metavar="N",
    help="Tokens that each expert should see; more text is drawn until it does.",
)
@lora_option
@click.option("--revision", metavar="R", help="Branch, tag or commit of a hub model.")
@click.option("--threads", type=click.IntRange(1, 1024), metavar="N", help="[default: all CPUs]")
@click.option("--max-ram", type=Size(), help="Memory limit, for example 8G.")
@json_option
@verbose_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    as_json: bool,
    verbose: int,
    model: str,
    output: str | None,
    kind: str | None,
    **arguments: Any,
) -> int:
    """Run text through MODEL, one block in memory at a time, and write how much each input channel matters.

    The statistics are kept and reused by every later run with the same model and text; the same command after an
    interruption continues. Without --calibration-data the built-in mix of texts is used.

    Example: llm-quantize analyze importance ./Llama-3.2-1B -o llama.gguf --calibration-data japanese
    """  # fmt: skip
    from llm_quantize.calibration.collect import calibrate
    from llm_quantize.calibration.outcome import NAMES, kind_of, refuse_export
    from llm_quantize.compare.making import lora_words
    from llm_quantize.models.opening import open_source
    from llm_quantize.reports.experts import export

    shown = mode(ctx, as_json, verbose)
    options = build_calibration(
        arguments, tuple(arguments["collect"].split(",")), expert_minimum=arguments["expert_minimum"]
    )
    with told(shown, "calibrate") as sink:
        source = open_source(model, revision=arguments["revision"], lora=arguments["lora"], on_event=sink)
        with source.checkpoint:
            target = Path(output or f"{source.stem}-{NAMES[kind or 'imatrix']}")
            kind = kind or kind_of(target)
            files = [header.path for header in source.checkpoint.headers]
            inputs = (*files, *source.checkpoint.directory.glob("*.json"), *options.data)
            refuse_export(source, target, kind, options.collect, inputs)
            result = calibrate(source, options, on_event=sink)
            export(result, source, target, kind)
    if shown.json:
        emit_json({**result.to_dict(), "output": str(target), "format": kind})
    else:
        _show(result, [model, *lora_words(arguments["lora"])], target, kind, in_full=shown.verbose > 0)
    return 0


def _show(result: Calibration, model: list[str], target: Path, kind: str, *, in_full: bool) -> None:
    from rich.console import Console

    from llm_quantize.reports.terminal import human_bytes, shown

    console = Console(highlight=False, soft_wrap=True)
    for text in result.sentences(in_full=in_full):
        console.print(shown(text))
    console.print(shown(f"{target}: {kind}, {human_bytes(target.stat().st_size)}"))
    option = {"imatrix": "--imatrix", "dat": "--imatrix", "statistics": "--statistics"}.get(kind)
    if option is not None and "imatrix" in result.kinds:
        words = ["llm-quantize", "quantize", *model, "gguf", "-q", "IQ3_M", option, str(target)]
        console.print(shown(f"use it: {shlex.join(words)}"), style="dim")
