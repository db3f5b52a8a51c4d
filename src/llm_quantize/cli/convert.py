"""``llm-quantize convert``."""

from __future__ import annotations

from typing import Any

import click

from llm_quantize.cli.common import calibration_options, emit_json, json_option, lora_option, mode, verbose_option
from llm_quantize.cli.progress import told
from llm_quantize.cli.quantize import DEGRADED
from llm_quantize.cli.sizes import Size
from llm_quantize.cli.words import LevelsCommand


@click.command("convert", cls=LevelsCommand)
@click.argument("model")
@click.argument("format", metavar="FORMAT")
@click.option("-q", "--level", metavar="LEVEL", help="Level. [default: the one that holds what the model has]")
@click.option("-o", "--output-dir", default=".", show_default=True, type=click.Path(file_okay=False), metavar="DIR")
@click.option("-n", "--name", help="Name of the output without level and suffix. [default: the model's name]")
@click.option(
    "--method",
    type=click.Choice(["rtn", "gptq"]),
    help="rtn rounds everything anew; gptq feeds errors back and needs text. [default: codes are kept where they can "
    "be, else rounded]",
)
@click.option("--exact", is_flag=True, help="Refuse, or remove, what is not exactly the model.")
@click.option("--measure", is_flag=True, help="Measure the KL divergence against the model afterwards.")
@click.option(
    "--group-size", type=int, metavar="N", help="Weights that share a scale, -1: a whole row. [default: the model's]"
)
@click.option("--sym/--asym", "symmetric", default=None, help="Symmetric grids, or zero points. [default: the model's]")
@click.option("--ignore", multiple=True, metavar="REGEX", help="Modules that become floats; repeatable; not for gguf.")
@click.option(
    "--output-shard-size",
    "shard_size",
    type=Size(),
    default="5G",
    show_default=True,
    help="Largest file of a directory; not for gguf.",
)
@click.option("--include", multiple=True, metavar="GLOB", help="Files of the model to copy; repeatable; not for gguf.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option("--checkpoints/--no-checkpoints", default=True, help="Keep a journal, so that a stopped run can go on.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output, or an unfinished one of another command.")
@click.option("--ignore-space", is_flag=True, help="Try even if the disk looks too small.")
@click.option("--revision", metavar="R", help="Branch, tag or commit of a hub model.")
@click.option("--threads", type=click.IntRange(1, 1024), metavar="N", help="[default: all CPUs]")
@click.option("--max-ram", type=Size(), help="Memory limit, for example 4G.")
@lora_option
@calibration_options
@verbose_option
@json_option
@click.pass_context
def command(ctx: click.Context, /, as_json: bool, verbose: int, model: str, format: str, **arguments: Any) -> int:
    """Put MODEL, quantized or not, into FORMAT with the numbers that it has, and say what changed.

    Codes and scales stay what they are where FORMAT holds them; everything else is rounded. Each tensor is decoded and
    held against the model's: exact, rounded (with its relative error), or with --method gptq re-quantized.

    \b
    Examples:
      llm-quantize convert ./Qwen3-8B-GPTQ compressed-tensors -o out
      llm-quantize convert ./Qwen3-8B-AWQ gptq --exact -o out
      llm-quantize convert ./Qwen3-8B-AWQ safetensors -q BF16 --measure -o out
      llm-quantize convert ./Qwen3-8B-NF4 compressed-tensors -q W4A16 --method gptq -o out
    """
    from llm_quantize import conversion
    from llm_quantize.artifacts import preflight
    from llm_quantize.reports import terminal

    shown = mode(ctx, as_json, verbose)
    options = _options(arguments)
    common = {"lora": arguments["lora"], "options": options, **{key: arguments[key] for key in ("name", "revision")}}
    if arguments["dry_run"]:
        with told(shown, "plan") as sink:
            found = conversion.foresee(model, format, arguments["level"], on_event=sink, **common)
        threads, needed = preflight.fit([found.plan], threads=options.threads, max_ram=options.max_ram)
        if shown.json:
            plans = terminal.plans_to_dict([found.plan], threads=threads, memory_needed=needed)
            emit_json({**plans, "verdict": found.verdict, "verdicts": found.tensors})
        else:
            terminal.print_plans(
                [found.plan], threads=threads, memory_needed=needed, verbose=shown.verbose, quiet=shown.quiet
            )
            terminal.print_foreseen(found.plan, found.tensors, verbose=shown.verbose)
        return 0
    with told(shown, "quantize") as sink:
        result = conversion.convert(
            model,
            format,
            arguments["level"],
            output_dir=arguments["output_dir"],
            measure=arguments["measure"],
            on_event=sink,
            **common,
        )
    if shown.json:
        emit_json({"artifacts": [result.to_dict()]})
    else:
        terminal.print_results([result])
    return DEGRADED if result.degradations() else 0


def _options(arguments: dict[str, Any]) -> Any:
    """pipeline.Options from the parsed command line."""
    from llm_quantize.cli.common import build_calibration
    from llm_quantize.options import MethodOptions, Options

    method = MethodOptions(
        method=arguments["method"],
        group_size=arguments["group_size"],
        symmetric=arguments["symmetric"],
        ignore=arguments["ignore"],
        shard_size=arguments["shard_size"],
        include=arguments["include"],
    )
    return Options(
        threads=arguments["threads"],
        max_ram=arguments["max_ram"],
        calibrate=True if arguments["calibration_data"] else None,
        calibration=build_calibration(arguments),
        checkpoints=arguments["checkpoints"],
        overwrite=arguments["overwrite"],
        ignore_space=arguments["ignore_space"],
        method=method,
        exact=arguments["exact"],
    )
