"""``llm-quantize analyze profile``."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llm_quantize import events
from llm_quantize.cli.common import emit_json, json_option, line, lora_option, mode, verbose_option
from llm_quantize.cli.progress import told
from llm_quantize.cli.sizes import Size
from llm_quantize.measures.uncertainty import figure
from llm_quantize.reports.wording import said
from llm_quantize.results import json_ready

if TYPE_CHECKING:
    from llm_quantize.evaluation.allocation import Choice, Target
    from llm_quantize.evaluation.ladders import Ladder
    from llm_quantize.evaluation.profile import ProfilePlan
    from llm_quantize.evaluation.sensitivity import Profile
    from llm_quantize.events import EventSink
    from llm_quantize.io.imatrix_file import Imatrix
    from llm_quantize.models.opening import Source

SHOWN = 20
_UNKNOWN = (
    "no Hessians were given: the figures are of rounding, the artifact is made with error feedback, and the recipe may "
    "be worse than the plain level; llm-quantize analyze importance MODEL --collect hessian --format statistics "
    "-o FILE makes them (--statistics FILE)"
)
_WORDS = {"gguf": ""}  # what the file of figures has in its name for its format; elsewhere the format's own name


def _options(function: Any) -> Any:
    options = [
        click.option("--preset", type=click.Choice(["quality", "balanced", "speed"]),
                     help="Size and types: quality has the bytes of Q5_K_M, balanced of Q4_K_M, speed of Q4_K_S in "
                     "types that are computed fast on CPUs; of compressed-tensors quality has those of W5A16, balanced "
                     "of W4A16. [default: balanced]"),
        click.option("--like", metavar="LEVEL", help="As many bytes as this level."),
        click.option("--size", type=Size(), help="Largest size of the file, for example 4G."),
        click.option("--bpw", type=click.FloatRange(1, 16), metavar="BITS", help="Bits per weight of the whole file."),
        click.option("--types", metavar="LIST",
                     help="Types to measure and choose from, with commas between. [default: q8_0,q6_k,q5_k,q4_k,"
                     "iq4_xs,q3_k,q2_k; of compressed-tensors int8_g128 to int2_g64]"),
        click.option("-o", "--output", type=click.Path(dir_okay=False), metavar="FILE",
                     help="The recipe. [default: MODEL-NAME.recipe.json]"),
        click.option("--name", metavar="NAME", help="Of the recipe; the artifact is called MODEL-NAME."),
        click.option("--profile", "profile_path", type=click.Path(dir_okay=False), metavar="FILE",
                     help="The figures: read if it is there, else measured and written. [default: MODEL.profile.json]"),
        click.option("--imatrix", type=click.Path(dir_okay=False), metavar="FILE",
                     help="llama.cpp importance matrix that will be quantized with."),
        click.option("--statistics", type=click.Path(dir_okay=False), metavar="FILE",
                     help="Statistics that analyze importance made of this model; for directories with "
                     "--collect hessian, and codes are then chosen by error feedback, as the artifact's will be."),
        click.option("--text", "texts", multiple=True, metavar="TEXT",
                     help="Text to measure on: a file or a built-in set; repeatable. [default: the built-in mix]"),
        click.option("--windows", type=click.IntRange(1), default=8, show_default=True, metavar="N",
                     help="Windows of text at most."),
        click.option("--context", type=click.IntRange(4), default=512, show_default=True, metavar="N",
                     help="Tokens in a window."),
        click.option("--dry-run", is_flag=True, help="Print what measuring takes, and stop."),
        click.option("--overwrite", is_flag=True, help="Measure again, and replace recipe and profile."),
        click.option("--revision", metavar="R", help="Branch, tag or commit of a hub model."),
        click.option("--threads", type=click.IntRange(1, 1024), metavar="N", help="[default: all CPUs]"),
        click.option("--max-ram", type=Size(), help="Memory limit, for example 8G."),
        click.option("--device", type=click.Choice(["cpu", "cuda", "mps"]), default="cpu", show_default=True,
                     help="Where the model is run."),
    ]  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return lora_option(function)


@click.command("profile")
@click.argument("model")
@click.argument("format", metavar="FORMAT", default="gguf")
@_options
@verbose_option
@json_option
@click.pass_context
def command(ctx: click.Context, /, as_json: bool, verbose: int, model: str, format: str, **arguments: Any) -> int:
    """Measure what it costs to hold each tensor of MODEL alone at each type, and write the best recipe for a size.

    The cost is the mean KL divergence from the source. quantize --recipe takes the recipe. The figures are kept: the
    same command after an interruption goes on, and one with another size measures nothing. FORMAT: gguf (the default),
    compressed-tensors or mlx; of directories all that runtimes make one module is held together.

    \b
    Examples:
      llm-quantize analyze profile ./Llama-3.2-1B --preset balanced
      llm-quantize analyze profile ./Llama-3.2-1B compressed-tensors --like W4A16
    """
    from llm_quantize.compare.making import lora_words
    from llm_quantize.evaluation.ladders import ladder_of
    from llm_quantize.evaluation.profile import ProfilePlan
    from llm_quantize.formats.recipe_file import write_recipe
    from llm_quantize.formats.table import format_name
    from llm_quantize.io.whole_file import refuse_existing
    from llm_quantize.models.opening import open_source

    shown = mode(ctx, as_json, verbose)
    ladder = ladder_of(format_name(format))
    target = _target(arguments, ladder)
    with told(shown, "measure") as sink:
        source = open_source(model, revision=arguments["revision"], lora=arguments["lora"], on_event=sink)
        with source.checkpoint:
            stem = source.stem
            kept = Path(arguments["profile_path"] or f"{stem}{_WORDS.get(ladder.form, f'.{ladder.form}')}.profile.json")
            output = Path(arguments["output"] or f"{stem}-{arguments['name'] or target.name}.recipe.json")
            refuse_existing(output, replace=arguments["overwrite"])
            profile = _profile(source, ladder, kept, arguments, sink)
            if not isinstance(profile, ProfilePlan):
                choice = ladder.choose(source, profile, target, name=arguments["name"])
                made = {"summed_kld": choice.allocation.kld, "size": choice.size, "text": dict(profile.text)}
                write_recipe(output, choice.recipe, model_name=profile.name, made=made, replace=arguments["overwrite"])
    if isinstance(profile, ProfilePlan):
        if shown.json:
            emit_json({**vars(profile.cost), "cpu_seconds_needed": _seconds(source, profile)})
        else:
            click.echo(said(_cost(source, profile)))
        return 0
    if shown.json:
        emit_json(_facts(profile, choice, kept, output))
    else:
        words = ["llm-quantize", "quantize", model, ladder.form, "--recipe", str(output)]
        for key in ("revision",) if ladder.feeds_back else ("imatrix", "statistics", "revision"):
            words += [f"--{key}", arguments[key]] if arguments[key] else []
        words += lora_words(arguments["lora"])
        _show(profile, choice, kept, shlex.join(words), output, verbose=shown.verbose > 0)
    return 0


def _target(arguments: Mapping[str, Any], ladder: Ladder) -> Target:
    from llm_quantize.errors import UsageError
    from llm_quantize.evaluation.allocation import Target

    given = [key for key in ("preset", "like", "size", "bpw") if arguments[key] is not None]
    if len(given) > 1:
        raise UsageError("only one of these can be given", found=" and ".join(f"--{key}" for key in given))
    types = _types(arguments, ladder)
    if given in ([], ["preset"]):
        asked = arguments["preset"] or "balanced"
        if asked not in ladder.presets:
            raise UsageError(
                f"there is no such preset of {ladder.form}", expected=", ".join(ladder.presets), found=asked
            )
        preset = ladder.presets[asked]
        return Target(like=preset.like, types=types or preset.types, form=ladder.form)
    return Target(like=arguments["like"], size=arguments["size"], bpw=arguments["bpw"], types=types, form=ladder.form)


def _types(arguments: Mapping[str, Any], ladder: Ladder) -> tuple[str, ...]:
    from llm_quantize.formats.table import FORMATS

    named = (arguments["types"] or "").split(",")
    return tuple(FORMATS[ladder.form].recipe_type(name) for name in named if name.strip())


def _profile(
    source: Source, ladder: Ladder, kept: Path, arguments: Mapping[str, Any], on_event: EventSink
) -> Profile | ProfilePlan:
    """The figures: those that are kept, or measured now; after --dry-run what measuring them takes."""
    from llm_quantize.evaluation.profile import measure_profile
    from llm_quantize.evaluation.sensitivity import read_profile, refuse_other_model, write_profile

    if kept.is_file() and not arguments["overwrite"] and not arguments["dry_run"]:
        profile = read_profile(kept)
        refuse_other_model(profile, source.content(on_event), kept)
        _check_kept(source, ladder, kept, profile, arguments, on_event)
        on_event(events.Note(f"nothing is measured: the figures are those in {kept}"))
        return profile
    journal = kept.with_name(kept.name + ".journal")
    plan = _plan(source, ladder, arguments, journal, on_event)
    if arguments["dry_run"]:
        return plan
    if ladder.feeds_back and plan.statistics is None:
        on_event(events.Caution(_UNKNOWN))
    on_event(events.Note(_cost(source, plan)))
    profile = measure_profile(plan, journal=journal, on_event=on_event)
    write_profile(kept, profile, replace=arguments["overwrite"])
    journal.unlink(missing_ok=True)
    return profile


def _seconds(source: Source, plan: ProfilePlan) -> float:
    from llm_quantize.blockwise.estimate import forward_seconds

    return forward_seconds(source, plan.cost.forwards * plan.cost.tokens)


def _cost(source: Source, plan: ProfilePlan) -> str:
    from llm_quantize.measures.amounts import bytes_text, time_text

    time, memory = time_text(_seconds(source, plan)), bytes_text(plan.memory)
    return f"{plan.cost.sentence()}: about {time} of CPU time and {memory} of memory"


def _check_kept(
    source: Source, ladder: Ladder, kept: Path, profile: Profile, arguments: Mapping[str, Any], on_event: EventSink
) -> None:
    """Raise UsageError where kept figures were measured for another format, or with another importance than the one
    that is given."""
    from llm_quantize.errors import UsageError
    from llm_quantize.evaluation.profile import importance_of

    if profile.form != ladder.form:
        raise UsageError(
            "the kept figures are of the types of another format",
            file=kept,
            expected=ladder.form,
            found=profile.form,
            remedy="give them another file with --profile",
        )
    imatrix = _imatrix(source, ladder, arguments, on_event)
    asked = importance_of(source, imatrix, _statistics(ladder, arguments), on_event)
    if asked is not None and asked != profile.importance:
        raise UsageError(
            "the kept figures were measured with another importance matrix",
            file=kept,
            expected=f"importance {asked}",
            found=f"importance {profile.importance}" if profile.importance else "none",
            remedy="measure again with --overwrite, or keep the figures in another file with --profile",
        )


def _plan(
    source: Source, ladder: Ladder, arguments: Mapping[str, Any], journal: Path, on_event: EventSink
) -> ProfilePlan:
    import numpy as np

    from llm_quantize.calibration.text import load_texts
    from llm_quantize.calibration.tokens import TextTokenizer
    from llm_quantize.calibration.windows import sample_windows
    from llm_quantize.evaluation.profile import plan_profile

    preset = ladder.presets.get(arguments["preset"] or "")
    imatrix = _imatrix(source, ladder, arguments, on_event)
    context = min(arguments["context"], source.architecture.hyper.context_length)
    drawn = sample_windows(
        load_texts(arguments["texts"]),
        TextTokenizer(source),
        samples=arguments["windows"],
        length=context,
        on_event=on_event,
    )
    return plan_profile(
        source,
        drawn.ids.astype(np.int32),
        _types(arguments, ladder) or (preset.types if preset is not None else ()) or ladder.default_types,
        imatrix,
        texts=drawn.datasets,
        journal=journal,
        threads=arguments["threads"],
        max_ram=arguments["max_ram"],
        device=arguments["device"],
        form=ladder.form,
        statistics=_statistics(ladder, arguments),
        on_event=on_event,
    )


def _imatrix(source: Source, ladder: Ladder, arguments: Mapping[str, Any], on_event: EventSink) -> Imatrix | None:
    from llm_quantize.calibration.choose import from_statistics
    from llm_quantize.errors import UsageError
    from llm_quantize.io.imatrix_file import read_imatrix

    if arguments["imatrix"] and arguments["statistics"]:
        raise UsageError("only one of these can be given", found="--imatrix and --statistics")
    if arguments["imatrix"] and ladder.feeds_back:
        raise UsageError(
            f"an importance matrix is of no use for {ladder.form}",
            found="--imatrix",
            remedy="give --statistics with Hessians: llm-quantize analyze importance MODEL --collect hessian "
            "--format statistics -o FILE",
        )
    if arguments["imatrix"]:
        return read_imatrix(arguments["imatrix"])
    if not arguments["statistics"] or ladder.feeds_back:
        return None
    return from_statistics(Path(arguments["statistics"]), source, on_event=on_event)


def _statistics(ladder: Ladder, arguments: Mapping[str, Any]) -> Path | None:
    """The file of Hessians that codes are chosen with."""
    return Path(arguments["statistics"]) if arguments["statistics"] and ladder.feeds_back else None


def _facts(profile: Profile, choice: Choice, kept: Path, output: Path) -> dict[str, Any]:
    return {
        "profile": str(kept),
        "recipe": str(output),
        "name": choice.recipe.name,
        "level": choice.recipe.level,
        "size": choice.size,
        "summed_kld": choice.allocation.kld,
        "summed_kld_sem": json_ready(choice.allocation.kld_sem),
        "levels": {name: {"size": size, "summed_kld": kld} for name, (size, kld) in choice.levels.items()},
        "tensors": dict(choice.recipe.tensors),
        "sensitivities": profile.to_dict()["sensitivities"],
    }


def _show(profile: Profile, choice: Choice, kept: Path, use: str, output: Path, *, verbose: bool) -> None:
    """Most sensitive tensors first; then the recipe beside the plain levels."""
    from rich.console import Console
    from rich.table import Table

    from llm_quantize.reports.terminal import human_bytes, shown

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = max(console.width, 160)
    figures = profile.by_tensor()
    bits = {row.qtype: row.bits for row in profile.rows}
    types = sorted(bits, key=lambda qtype: -bits[qtype])
    table = Table(box=None, title_justify="left")
    table.add_column(said("tensor"), overflow="fold", min_width=24)
    for word in (*types, said("recipe")):
        table.add_column(word, justify="right", no_wrap=True)
    table.title = said("mean KLD with this tensor alone at a type, in 1e-6 nats per token")
    ordered = sorted(figures.items(), key=lambda item: -max(row.kld / row.nbytes for row in item[1]))
    for name, rows in ordered if verbose else ordered[:SHOWN]:
        known = {row.qtype: _short(1e6 * row.kld) for row in rows}
        cells = [known.get(qtype, "") for qtype in types]
        table.add_row(shown(name.removesuffix(".weight")), *cells, shown(choice.allocation.types.get(name, "")))
    console.print(table)
    if not verbose and len(ordered) > SHOWN:
        console.print(said(f"{len(ordered) - SHOWN} tensors more with -v, per byte less sensitive"), style="dim")
    console.print(shown(f"figures: {kept} ({profile.text.get('tokens', 0):,} scored tokens)"))
    plain = [
        f"{name} {human_bytes(size)} {kld:.5f}"
        for name, (size, kld) in choice.levels.items()
        if size >= 0.8 * choice.size and size <= 1.25 * choice.size
    ]
    summed = said(f"{human_bytes(choice.size)}, summed KLD {figure(choice.allocation.kld, choice.allocation.kld_sem)}")
    levels = ", ".join(plain) or said("none was measured whole")
    console.print(shown(f"recipe: {line(output)} ({summed}; plain levels: {levels})"))
    console.print(shown(f"use it: {line(use)}"), style="dim")


def _short(value: float) -> str:
    """Three digits: 0.52, 46.7, 468, 2.13k."""
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * limit:
            return f"{_short(value / limit)}{unit}"
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"
