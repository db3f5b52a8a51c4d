"""What commands share: output modes, progress, and the options that plan and quantize have in common."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from llm_quantize.cli.method_options import build_method
from llm_quantize.cli.sizes import Size
from llm_quantize.cli.streams import json_text
from llm_quantize.errors import printable
from llm_quantize.reports.wording import said

if TYPE_CHECKING:
    pass

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Mode:
    """How this call talks: JSON or text, how much, and whether stderr is a terminal."""

    json: bool
    verbose: int
    quiet: bool

    @property
    def live(self) -> bool:
        return not self.json and not self.quiet and sys.stderr.isatty()


def mode(ctx: click.Context, as_json: bool, verbose: int = 0) -> Mode:
    """The output mode, from the global options and the command's own --json and --verbose."""
    found: dict[str, Any] = ctx.obj or {}
    return Mode(as_json or found.get("json", False), verbose + found.get("verbose", 0), found.get("quiet", False))


def json_option(function: Function) -> Function:
    """``--json`` and ``--quiet`` after the command's name, too."""
    function = click.option(
        "-s", "--quiet", is_flag=True, expose_value=False, callback=_be_quiet, help="Print results and errors only."
    )(function)
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(function)


def _be_quiet(ctx: click.Context, _param: click.Parameter, given: bool) -> None:
    if given:
        ctx.obj = {**(ctx.obj or {}), "quiet": True}


def verbose_option(function: Function) -> Function:
    """``--verbose`` after the command's name, too."""
    return click.option("-v", "--verbose", count=True, help="List every tensor.")(function)


def tensor_type(_ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """REGEX=TYPE pairs; the last '=' divides, as a regular expression may hold one."""
    pairs = []
    for value in values:
        expression, separator, name = value.rpartition("=")
        if not separator or not expression or not name:
            raise click.BadParameter(f"{value!r} is not REGEX=TYPE, for example 'ffn_down=q6_k'")
        pairs.append((expression, name))
    return tuple(pairs)


def lora_option(function: Function) -> Function:
    """``--lora``, of every command that makes something of MODEL or measures it."""
    return click.option(
        "--lora",
        multiple=True,
        metavar="DIR[=SCALE]",
        help="LoRA adapter (peft's; a directory or a hub id) that is merged into MODEL as it is read; repeatable. "
        "DIR=0.5 adds half of it.",
    )(function)


def recipe_options(function: Function) -> Function:
    """Options that change the plan."""
    options = [
        click.option("-q", "--level", "levels", multiple=True, metavar="LEVEL",
                     help="Level, for example Q4_K_M (all are listed below); repeat for several in one read."),
        click.option("--recipe", type=click.Path(dir_okay=False), metavar="FILE",
                     help="Instead of a level: a type for each tensor, as analyze profile writes it."),
        click.option("--recipe-from", metavar="FILE",
                     help="Instead of a level: the types of someone's GGUF file of a model of this shape, a path or "
                     "ORG/NAME:FILE of the hub; for compressed-tensors the grids of a directory. Reads headers only."),
        click.option("-n", "--name", help="Name of the output without level and suffix. [default: the model's name]"),
        click.option("--output-type", metavar="TYPE", help="Type of output.weight."),
        click.option("--embedding-type", metavar="TYPE", help="Type of token_embd.weight."),
        click.option("--tensor-type", "tensor_types", multiple=True, metavar="REGEX=TYPE", callback=tensor_type,
                     help="Type of the tensors whose name matches; repeatable, the first match wins."),
        click.option("--pure", is_flag=True, help="One type for all: no mix rules."),
        click.option("--fallback", type=click.Choice(["llamacpp", "best"]), default="llamacpp", show_default=True,
                     help="What a row gets that its type's blocks do not divide: what llama.cpp takes, or what loses "
                     "least in no more bytes, measured."),
        click.option("--split-max-size", type=Size(), help="Split into files of at most this size, for example 4G."),
        click.option("--imatrix", type=click.Path(dir_okay=False), metavar="FILE",
                     help="llama.cpp importance matrix (GGUF or legacy .dat)."),
        click.option("--statistics", type=click.Path(dir_okay=False), metavar="FILE",
                     help="Statistics that analyze importance made of this model."),
        click.option("--calibrate/--no-calibration", "calibrate", default=None,
                     help="Calibrate, or never. [default: where a level needs it]"),
        click.option("--nonfinite", type=click.Choice(["refuse", "zero", "keep"]), default="refuse",
                     show_default=True, help="What to do with NaN and infinite weights."),
        click.option("--revision", metavar="R", help="Branch, tag or commit of a hub model."),
        click.option("--threads", type=click.IntRange(1, 1024), metavar="N", help="[default: all CPUs]"),
        click.option("--max-ram", type=Size(), help="Memory limit, for example 4G."),
    ]  # fmt: skip
    function = calibration_options(function)
    for option in reversed(options):
        function = option(function)
    return lora_option(function)


def calibration_options(function: Function) -> Function:
    """Options that say what is calibrated on."""
    options = [
        click.option("--calibration-data", "calibration_data", multiple=True, metavar="TEXT",
                     help="Text to calibrate on: a .txt, .json, .jsonl or .parquet file, or a built-in set: general, "
                     "code, japanese, chat. Repeatable; NAME=0.3 gives a weight. [default: the mix of all sets]"),
        click.option("--calibration-samples", type=click.IntRange(1), metavar="N",
                     help="Windows of text at most. [default: 256; where errors are fed back, as many as the widest "
                     "matrix needs]"),
        click.option("--sequence-length", type=click.IntRange(2), default=2048, show_default=True, metavar="N",
                     help="Tokens in a window, at most the model's context."),
        click.option("--chat", is_flag=True, help="Set plain text as a conversation in the model's own template."),
        click.option("--device", type=click.Choice(["cpu", "cuda", "mps"]), default="cpu", show_default=True,
                     help="Where the model is run for calibration."),
    ]  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


def build_calibration(arguments: Mapping[str, Any], collect: tuple[str, ...] = ("imatrix",), **more: Any) -> Any:
    """options.CalibrationOptions from the parsed command line."""
    from llm_quantize.options import CalibrationOptions

    return CalibrationOptions(
        data=arguments["calibration_data"],
        samples=arguments["calibration_samples"],
        length=arguments["sequence_length"],
        chat=arguments["chat"],
        collect=collect,
        device=arguments["device"],
        threads=arguments["threads"],
        max_ram=arguments["max_ram"],
        **more,
    )


def build_options(arguments: Mapping[str, Any]) -> Any:
    """pipeline.Options from the parsed command line."""
    from pathlib import Path

    from llm_quantize.formats.gguf.levels import Overrides, parse_qtype
    from llm_quantize.pipeline import Options

    def typed(name: str | None) -> str | None:
        return None if name is None else parse_qtype(name)

    overrides = Overrides(
        output_type=typed(arguments["output_type"]),
        embedding_type=typed(arguments["embedding_type"]),
        tensor_types=tuple((expression, parse_qtype(name)) for expression, name in arguments["tensor_types"]),
        pure=arguments["pure"],
        recipe=_recipe(arguments),
        fallback=arguments["fallback"],
    )
    paths = {key: arguments.get(key) for key in ("imatrix", "statistics", "checkpoint_dir")}
    return Options(
        threads=arguments["threads"],
        max_ram=arguments["max_ram"],
        overrides=overrides,
        split_max_size=arguments["split_max_size"],
        imatrix=Path(paths["imatrix"]) if paths["imatrix"] else None,
        statistics=Path(paths["statistics"]) if paths["statistics"] else None,
        calibrate=True if arguments["calibration_data"] else arguments["calibrate"],
        calibration=build_calibration(arguments),
        nonfinite=arguments["nonfinite"],
        checkpoints=arguments.get("checkpoints", True),
        checkpoint_dir=Path(paths["checkpoint_dir"]) if paths["checkpoint_dir"] else None,
        overwrite=arguments.get("overwrite", False),
        ignore_space=arguments.get("ignore_space", False),
        engine=arguments.get("engine", "threads"),
        modelfile=arguments.get("export_ollama", False),
        method=build_method(arguments),
    )


def _recipe(arguments: Mapping[str, Any]) -> Any:
    """The recipe of the command line, None where there is none. Raises UsageError for two, and what reading raises."""
    from llm_quantize.errors import UsageError
    from llm_quantize.formats.recipe_file import read_recipe
    from llm_quantize.models.recipes import recipe_from

    file, other = arguments["recipe"], arguments["recipe_from"]
    if file and other:
        raise UsageError("only one of these can be given", found="--recipe and --recipe-from")
    if other:
        return recipe_from(other)
    return read_recipe(file) if file else None


def chosen_levels(arguments: Mapping[str, Any], options: Any) -> tuple[str, ...]:
    """The levels of the command line, or the one that the recipe of ``options`` builds on."""
    from llm_quantize.errors import UsageError

    recipe = options.overrides.recipe
    if recipe is None:
        return tuple(arguments["levels"])
    if arguments["levels"]:
        option = "--recipe" if arguments["recipe"] else "--recipe-from"
        raise UsageError("a recipe is a level of its own", found=f"{option} and -q {arguments['levels'][0]}")
    return (recipe.level,)


def emit_json(value: Any) -> None:
    """One JSON object on standard output."""
    click.echo(json_text(value))


def line(text: Any) -> str:
    """Text from input as one line that does nothing to a terminal."""
    return printable(str(text), 1 << 20)


def warn(shown: Mode, text: str) -> None:
    """A warning on stderr, with --json as the event that it is; with --quiet none."""
    if shown.quiet:
        return
    if shown.json:
        click.echo(json.dumps({"event": "warning", "text": text}), err=True)
    else:
        click.secho(line(said(f"warning: {text}")), fg="yellow", err=True)
