"""What commands share: output modes, progress, and the options that plan and quantize have in common."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from llm_quantize.cli.method_options import build_method
from llm_quantize.cli.sizes import Size
from llm_quantize.cli.streams import json_text
from llm_quantize.errors import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llm_quantize.events import EventSink

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
    """``--json`` after the command's name, too."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(function)


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


def recipe_options(function: Function) -> Function:
    """Options that change the plan."""
    options = [
        click.option("-q", "--level", "levels", multiple=True, metavar="LEVEL",
                     help="Level, for example Q4_K_M; repeat for several in one read."),
        click.option("--recipe", type=click.Path(dir_okay=False), metavar="FILE",
                     help="Instead of a level: a type for each tensor, as analyze profile writes it."),
        click.option("-n", "--name", help="Name of the output without level and suffix. [default: the model's name]"),
        click.option("--output-type", metavar="TYPE", help="Type of output.weight."),
        click.option("--embedding-type", metavar="TYPE", help="Type of token_embd.weight."),
        click.option("--tensor-type", "tensor_types", multiple=True, metavar="REGEX=TYPE", callback=tensor_type,
                     help="Type of the tensors whose name matches; repeatable, the first match wins."),
        click.option("--pure", is_flag=True, help="One type for all: no mix rules."),
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
    return function


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
    from llm_quantize.formats.gguf.recipe_file import read_recipe
    from llm_quantize.pipeline import Options

    def typed(name: str | None) -> str | None:
        return None if name is None else parse_qtype(name)

    overrides = Overrides(
        output_type=typed(arguments["output_type"]),
        embedding_type=typed(arguments["embedding_type"]),
        tensor_types=tuple((expression, parse_qtype(name)) for expression, name in arguments["tensor_types"]),
        pure=arguments["pure"],
        recipe=read_recipe(arguments["recipe"]) if arguments["recipe"] else None,
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
        method=build_method(arguments),
    )


def chosen_levels(arguments: Mapping[str, Any], options: Any) -> tuple[str, ...]:
    """The levels of the command line, or the one that the recipe of ``options`` builds on."""
    from llm_quantize.errors import UsageError

    recipe = options.overrides.recipe
    if recipe is None:
        return tuple(arguments["levels"])
    if arguments["levels"]:
        raise UsageError("a recipe is a level of its own", found=f"--recipe and -q {arguments['levels'][0]}")
    return (recipe.level,)


def emit_json(value: Any) -> None:
    """One JSON object on standard output."""
    click.echo(json_text(value))


def line(text: Any) -> str:
    """Text from input as one line that does nothing to a terminal."""
    return printable(str(text), 1 << 20)


def warn(shown: Mode, text: str) -> None:
    """A warning on stderr; --quiet does not hide it, with --json it is in the result."""
    if not shown.json:
        click.secho(f"warning: {line(text)}", fg="yellow", err=True)


@contextmanager
def events(shown: Mode, description: str, *, live: bool = True) -> Iterator[EventSink]:
    """A sink for the library's events: a rich progress bar on a terminal, plain lines elsewhere, JSON with --json.

    ``live`` False: plain lines on a terminal too, for a command that writes text there meanwhile. With --quiet only
    warnings are told.
    """
    if shown.json:
        yield sheltered(_json_sink(shown))
    elif shown.live and live:
        with _live_progress(description, shown) as sink:
            yield sheltered(sink)
    else:
        yield sheltered(_plain_sink(description, shown))


def sheltered(sink: EventSink) -> EventSink:
    """``sink``, whose trouble in writing is its own: progress that cannot be shown stops no job."""

    def safe(event: Mapping[str, Any]) -> None:
        with suppress(OSError):
            sink(event)

    return safe


def _json_sink(shown: Mode) -> EventSink:
    def sink(event: Mapping[str, Any]) -> None:
        if not shown.quiet or event["event"] == "warning":
            click.echo(json.dumps(dict(event)), err=True)

    return sink


def _rate(event: Mapping[str, Any], seconds: float) -> str:
    each = event["done"] / max(seconds, 1e-9)
    return f"{each:.0f} tokens/s" if event.get("unit") == "tokens" else f"{each / 1e6:.0f} Mw/s"


def work_of(event: Mapping[str, Any], description: str) -> str:
    """What a ``progress`` event is of: a quantization that calibrates first counts tokens meanwhile."""
    return "calibrate" if description == "quantize" and event.get("unit") == "tokens" else description


def _memory() -> str:
    from llm_quantize.memory import resident_bytes

    return f"{resident_bytes() / 1e6:.0f} MB"


def _plain_sink(description: str, shown: Mode) -> EventSink:
    began = [time.monotonic()]
    last, checked = [began[0], -1], [began[0]]

    def sink(event: Mapping[str, Any]) -> None:
        if event["event"] == "warning":
            warn(shown, event["text"])
        elif event["event"] == "note" and not shown.quiet:
            click.echo(f"note: {line(event['text'])}", err=True)
        elif event["event"] == "resuming" and not shown.quiet:
            click.echo(f"resuming: reading back {event['units']} finished units", err=True)
        elif event["event"] == "check" and not shown.quiet:
            now, percent = time.monotonic(), int(100 * event["done"] / max(1, event["total"]))
            if event["done"] == 0 or now - checked[0] >= 5:
                checked[0] = now
                click.echo(f"checking {event['what']}: {percent}%", err=True)
        elif event["event"] == "start":
            began[0] = last[0] = time.monotonic()
            last[1] = -1
            if event["resumed_units"] and not shown.quiet:
                click.echo(f"resuming: {event['resumed_units']} finished units kept", err=True)
        elif event["event"] == "progress" and not shown.quiet:
            now, percent = time.monotonic(), int(100 * event["done"] / max(1, event["total"]))
            if percent == 100 or (now - last[0] >= 5 and percent > last[1]):
                last[:] = [now, percent]
                left = (now - began[0]) * (100 - percent) / max(1, percent)
                facts = f"{_rate(event, now - began[0])}, {left:.0f} s left, {_memory()}"
                click.echo(f"{work_of(event, description)}: {percent}% ({facts})", err=True)

    return sink


@contextmanager
def _live_progress(description: str, shown: Mode) -> Iterator[EventSink]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"), TimeRemainingColumn(), TextColumn("{task.fields[memory]}"),
    )  # fmt: skip
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(description, total=None, rate="", memory="")
        began = [time.monotonic()]

        def sink(event: Mapping[str, Any]) -> None:
            if event["event"] == "warning":
                console.print(f"warning: {line(event['text'])}", style="yellow", markup=False, highlight=False)
            elif event["event"] == "note":
                console.print(f"note: {line(event['text'])}", markup=False, highlight=False)
            elif event["event"] == "start":
                began[0] = time.monotonic()
                if event["resumed_units"]:
                    console.print(f"resuming: {event['resumed_units']} finished units kept", highlight=False)
            elif event["event"] == "resuming":
                console.print(f"resuming: reading back {event['units']} finished units", highlight=False)
            elif event["event"] == "check":
                progress.update(task, description=f"checking {event['what']}", completed=event["done"],
                                total=event["total"])  # fmt: skip
            elif event["event"] == "download":
                progress.update(task, description=f"download {line(event.get('file', ''))}",
                                completed=event.get("done"), total=event.get("total"))  # fmt: skip
            elif event["event"] == "progress":
                rate = _rate(event, time.monotonic() - began[0])
                progress.update(task, description=work_of(event, description), completed=event["done"],
                                total=event["total"], rate=rate, memory=_memory())  # fmt: skip

        yield sink


@contextmanager
def stages(shown: Mode) -> Iterator[EventSink]:
    """One bar for all stages on a terminal; elsewhere a line as each begins."""
    if not shown.live:
        with events(shown, "quantize") as sink:
            yield sink if shown.json or shown.quiet else _with_stage_lines(sink)
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("quantize", total=None)
        stage = ["measure"]

        def draw(event: Mapping[str, Any]) -> None:
            if event["event"] == "warning":
                console.print(f"warning: {line(event['text'])}", style="yellow", markup=False, highlight=False)
            elif event["event"] == "note":
                console.print(f"note: {line(event['text'])}", markup=False, highlight=False)
            elif event["event"] in ("progress", "measure"):
                name = work_of(event, "quantize") if event["event"] == "progress" else stage[0]
                progress.update(task, description=name, completed=event["done"], total=event["total"])
            elif event["event"] == "stage":
                stage[0] = line(event["text"]).replace("[", "(")
                progress.update(task, description=stage[0], completed=0, total=None)

        yield sheltered(draw)


def _with_stage_lines(sink: EventSink) -> EventSink:
    told = [-1]

    def plain(event: Mapping[str, Any]) -> None:
        if event["event"] == "stage":
            click.echo(line(event["text"]), err=True)
        elif event["event"] == "measure":
            tenth = int(10 * event["done"] / max(1, event["total"]))
            if tenth > told[0]:
                told[0] = tenth
                click.echo(f"measure: {10 * tenth}%", err=True)
        sink(event)

    return sheltered(plain)
