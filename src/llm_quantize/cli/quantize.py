"""``llm-quantize quantize``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from llm_quantize.cli.common import (
    Mode,
    build_options,
    chosen_levels,
    emit_json,
    json_option,
    line,
    mode,
    recipe_options,
    verbose_option,
    warn,
)
from llm_quantize.cli.fit_options import fit_asked, fit_facts, fit_options, show_fit
from llm_quantize.cli.method_options import method_options
from llm_quantize.cli.progress import told
from llm_quantize.cli.words import LevelsCommand
from llm_quantize.errors import NumericPolicyError
from llm_quantize.reports.wording import said

if TYPE_CHECKING:
    from llm_quantize.artifacts.result import ArtifactResult

DEGRADED = 20


@click.command("quantize", cls=LevelsCommand)
@click.argument("model")
@click.argument("format", metavar="FORMAT", default="gguf")
@recipe_options
@fit_options
@method_options
@click.option("-o", "--output-dir", default=".", show_default=True, type=click.Path(file_okay=False), metavar="DIR")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option("--checkpoints/--no-checkpoints", default=True, help="Keep a journal, so that a stopped run can go on.")
@click.option("--checkpoint-dir", type=click.Path(file_okay=False), metavar="DIR", help="Where the journal is kept.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output, or an unfinished one of another command.")
@click.option("--ignore-space", is_flag=True, help="Try even if the disk looks too small.")
@click.option(
    "--engine",
    type=click.Choice(["threads", "processes"]),
    default="threads",
    show_default=True,
    help="What does the rounding: threads, or a process each, which helps where many cores wait for one "
    "Python interpreter, and takes more memory. Error feedback always has threads.",
)
@click.option(
    "--export-ollama", is_flag=True, help="Write a Modelfile for Ollama beside each GGUF file, also of a finished one."
)
@click.option("--strict", is_flag=True, help="Exit with 9 instead of 20 when the result is degraded.")
@verbose_option
@json_option
@click.pass_context
def command(ctx: click.Context, /, as_json: bool, verbose: int, model: str, format: str, **arguments: Any) -> int:
    """Quantize MODEL to FORMAT (gguf, gptq, awq, compressed-tensors, safetensors) at one or more levels.

    The same command after an interruption continues, and ends in the same bytes.

    \b
    Examples:
      llm-quantize quantize ./Llama-3.2-1B gguf -q Q4_K_M -q Q8_0 -o out
      llm-quantize quantize ./Llama-3.2-1B gguf --fit 700M
      llm-quantize quantize ./Llama-3.2-1B gguf -q Q4_K_M --method gptq
      llm-quantize quantize ./Llama-3.2-1B gptq -q 4bit
      llm-quantize quantize ./Llama-3.2-1B awq -q 4bit
      llm-quantize quantize ./Llama-3.2-1B compressed-tensors -q W4A16
      llm-quantize quantize ./Llama-3.2-1B safetensors -q F16 --output-shard-size 4G
    """
    from dataclasses import replace

    from llm_quantize import pipeline
    from llm_quantize.artifacts import preflight
    from llm_quantize.formats.recipe import Recipe
    from llm_quantize.reports import terminal

    shown = mode(ctx, as_json, verbose)
    asked, chosen = fit_asked(arguments), None
    options = build_options(arguments)
    common = {"name": arguments["name"], "revision": arguments["revision"], "lora": arguments["lora"]}
    if asked is not None:
        from llm_quantize.advice import fit

        way = fit.foresee if arguments["dry_run"] else fit.fit
        of = {key: arguments[key] for key in ("revision", "lora")}
        with told(shown, "fit") as sink:
            found = way(model, format, **asked, **of, options=options, on_event=sink)
        if not isinstance(found, Recipe):
            if shown.json:
                emit_json({"fit": found.to_dict()})
            else:
                click.echo(line(said(found.text)))
            return 0
        chosen = found
        options = replace(options, overrides=replace(options.overrides, recipe=chosen))
    common["levels"] = chosen_levels(arguments, options) if chosen is None else (chosen.level,)
    if arguments["dry_run"]:
        with told(shown, "plan") as sink:
            plans = pipeline.plan(model, format, options=options, on_event=sink, **common)
        threads, needed = preflight.fit(plans, threads=options.threads, max_ram=options.max_ram, engine=options.engine)
        if shown.json:
            emit_json(terminal.plans_to_dict(plans, threads=threads, memory_needed=needed))
        else:
            terminal.print_plans(plans, threads=threads, memory_needed=needed, verbose=shown.verbose, quiet=shown.quiet)
        return 0
    with told(shown, "quantize") as sink:
        results = pipeline.quantize(
            model, format, output_dir=arguments["output_dir"], options=options, on_event=sink, **common
        )
    _warn_idle(ctx, shown, results)
    error = terminal.strict_error(results) if arguments["strict"] else None
    if shown.json:
        facts = error.to_dict() if error is not None else {}
        facts |= {} if chosen is None else {"fit": fit_facts(chosen)}
        emit_json({"artifacts": [result.to_dict() for result in results], **facts})
        return _exit_code(results, strict=arguments["strict"])
    terminal.print_results(results)
    if chosen is not None:
        show_fit(chosen)
    if error is not None:
        raise error
    return _exit_code(results, strict=False)


def _warn_idle(ctx: click.Context, shown: Mode, results: Sequence[ArtifactResult]) -> None:
    """Say which options of a calibration or of error feedback had no effect, as there was none."""
    options = ("calibration_samples", "sequence_length", "chat", "device")
    idle, fed = _given(ctx, *options), _given(ctx, "inputs", "correction")
    if fed and not any("inputs" in result.plan.identity for result in results):
        warn(shown, f"{', '.join(fed)} had no effect: no errors are fed back (--method gptq does)")
    given = ctx.params["imatrix"] or ctx.params["statistics"]
    texts = any(result.plan.identity.get("imatrix") or result.plan.identity.get("text") for result in results)
    if idle and (given or not texts):
        names = ", ".join(idle)
        why = "importance was given" if given else "no level here needs it; --calibrate does it all the same"
        warn(shown, f"{names} had no effect: nothing was calibrated ({why})")


def _given(ctx: click.Context, *names: str) -> list[str]:
    """Which of these options stand on the command line, as they are written there."""
    found = [name for name in names if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE]
    return [f"--{name.replace('_', '-')}" for name in found]


def _exit_code(results: Any, *, strict: bool) -> int:
    if not any(result.degradations() for result in results):
        return 0
    return NumericPolicyError.exit_code if strict else DEGRADED
