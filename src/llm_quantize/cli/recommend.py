"""``llm-quantize recommend``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llm_quantize.cli.common import emit_json, json_option, line, mode
from llm_quantize.cli.progress import told
from llm_quantize.cli.sizes import Size
from llm_quantize.errors import ResourceError
from llm_quantize.reports.wording import said, spoken

if TYPE_CHECKING:
    from llm_quantize.advice.recommend import Advice, Choice

_STEPS = {"quantize": "make", "try": "try", "run": "serve"}
_MARKS = {"published": "*", "estimated": "~", "measured": "", "exact": ""}


@click.command("recommend")
@click.argument("model")
@click.option("--ram", type=Size(), help="Memory of the computer in GB, for example 16. [default: this one's]")
@click.option(
    "--vram", type=Size(), help="Memory of the GPU in GB, for example 8. [default: what is free on this one's]"
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "apple"]), default="auto", show_default=True)
@click.option(
    "--context",
    type=click.IntRange(1, 1 << 24),
    metavar="N",
    help="Tokens of the cache. [default: 8192, or what the model was made for]",
)
@click.option("--priority", type=click.Choice(["quality", "speed", "size"]), default="quality", show_default=True)
@click.option(
    "--measured",
    type=click.Path(),
    metavar="FILE",
    help="A comparison.json of this model. [default: report/comparison.json, if there is one]",
)
@click.option("--revision", metavar="R", help="Branch, tag or commit of a hub model.")
@json_option
@click.pass_context
def command(
    ctx: click.Context, as_json: bool, model: str, ram: int | None, vram: int | None, device: str, context: int | None,
    priority: str, measured: str | None, revision: str | None,
) -> int:  # fmt: skip
    """Say which level of MODEL to take for this machine, why, and the commands to make and run it.

    Adds weights, cache and buffers of every level, leaves out what does not fit or cannot run, and uses the figures
    that `compare` measured where there are any. Reads headers only.

    Example: llm-quantize recommend Qwen/Qwen3-0.6B --ram 16G --vram 8G
    """
    from llm_quantize.advice.experience import experience_of
    from llm_quantize.advice.machine import detect
    from llm_quantize.advice.recommend import recommend
    from llm_quantize.models.opening import open_source

    shown = mode(ctx, as_json)
    machine = detect(device, ram=ram, vram=vram)
    with told(shown, "recommend") as sink:
        source = open_source(model, revision=revision, on_event=sink, headers_only=True)
        with source.checkpoint:
            advice = recommend(
                source, machine, model=model, revision=revision, context=context, priority=priority,
                experience=experience_of(source, None if measured is None else Path(measured), sink),
            )  # fmt: skip
    error = _nothing_fits(advice)
    if shown.json:
        emit_json({**advice.to_dict(), **({} if error is None else error.to_dict())})
        return 0 if error is None else error.exit_code
    _print(advice)
    if error is not None:
        raise error
    return 0


def _nothing_fits(advice: Advice) -> ResourceError | None:
    """The error that an answer without a choice is."""
    if advice.take is not None:
        return None
    smallest = min(advice.choices, key=lambda choice: choice.need.total)
    return ResourceError(
        "no level of this model fits this machine",
        expected=f"{smallest.need.total} bytes for the smallest, {smallest.level}",
        found=f"{advice.machine.usable_ram} bytes of RAM for a model, {advice.machine.vram} of GPU memory",
        remedy="take a smaller model, a smaller --context, or more memory",
    )


def _print(advice: Advice) -> None:
    from rich.console import Console

    from llm_quantize.reports.terminal import human_bytes

    console = Console(highlight=False, soft_wrap=True)

    def say(text: str, style: str = "") -> None:
        console.print(*map(line, said(text).split("\n")), sep="\n", style=style, markup=False)

    machine = advice.machine
    gpu = f", GPU {human_bytes(machine.vram)}" if machine.vram else ""
    if advice.take is not None:
        _answer(advice, advice.take, say)
    say(f"{advice.name} on {machine.device}: RAM {human_bytes(machine.ram)}{gpu}, {advice.context:,} tokens of context")
    say(f"  ({'; '.join(map(said, machine.sources))})")
    _print_table(console, advice)
    for level, reason in advice.excluded:
        if level not in {choice.level for choice in advice.choices}:
            say(f"not {level}: {reason}")
    for note in advice.notes:
        say(f"note: {note}")


def _answer(advice: Advice, take: Choice, say: Callable[..., None]) -> None:
    """What to take, why, how to make and run it, and the rule that says so."""
    from llm_quantize.reports.labels import labels
    from llm_quantize.reports.terminal import human_bytes

    say(f"take {take.level} ({human_bytes(take.size)})", "bold green")
    for reason in advice.why:
        say(f"  {said(reason)}")
    for label, other in (("better", advice.better), ("smaller", advice.smaller)):
        if other is not None:
            say(f"the next {label}: {other.level} ({human_bytes(other.size)}), {_loss(other)}{_where(other)}")
    for name, text in advice.commands(take).items():
        say(f"to {_STEPS[name]} it: {text}")
    say(labels(spoken())[f"rule_{advice.priority}"] + "\n", "dim")


def _loss(choice: Choice) -> str:
    from llm_quantize.measures.grades import grade

    if choice.loss is None:
        return "loss not known"
    if choice.loss.basis == "exact":
        return "nothing is lost"
    return f"{grade(choice.loss.kld)} (mean KLD {choice.loss.kld:.2g}{_MARKS[choice.loss.basis]})"


def _where(choice: Choice) -> str:
    return ", does not fit" if choice.placement is None else ""


def _print_table(console: Any, advice: Advice) -> None:
    """All levels from the largest to the smallest; lines with tabs where no terminal listens."""
    from rich.table import Table

    from llm_quantize.reports.terminal import human_bytes

    rows = []
    for choice in advice.choices:
        placement = choice.placement
        where = said("does not fit" if placement is None else placement.kind)
        if placement is not None and placement.kind == "split":
            where = said(f"-ngl {placement.gpu_layers} of {placement.layers}")
        mark = "take" if choice is advice.take else f"{choice.dominated} is better" if choice.dominated else ""
        mark = said(mark)
        speed = "" if choice.speed is None else f"{choice.speed:.1f}"
        loss = "?" if choice.loss is None else f"{choice.loss.kld:.2g}{_MARKS[choice.loss.basis]}"
        rows.append((choice.level, human_bytes(choice.size), f"{choice.bits_per_weight:.2f}",
                     human_bytes(choice.need.total), where, loss, speed, mark))  # fmt: skip
    labels = ("level", "file", "bits", "memory", "runs", "KLD", "tokens/s", "")
    if not console.is_terminal:
        for row in ([said(label) for label in labels], *rows):
            console.file.write("\t".join(row).rstrip() + "\n")
        return
    table = Table(box=None)
    for number, label in enumerate(labels):
        table.add_column(said(label), justify="right" if number in (1, 2, 3, 5, 6) else "left", no_wrap=True)
    for choice, row in zip(advice.choices, rows, strict=True):
        table.add_row(*row, style="bold green" if choice is advice.take else "dim" if choice.placement is None else "")
    console.print(table, soft_wrap=False)
