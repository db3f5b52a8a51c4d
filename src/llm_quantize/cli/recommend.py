"""``llm-quantize recommend``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llm_quantize.cli.common import emit_json, json_option, line, lora_option, mode
from llm_quantize.cli.progress import told
from llm_quantize.cli.sizes import Size
from llm_quantize.errors import ResourceError
from llm_quantize.reports.wording import said, spoken

if TYPE_CHECKING:
    from llm_quantize.advice.answer import Advice, Answer
    from llm_quantize.advice.choice import Choice

_STEPS = {"quantize": "make", "try": "try", "run": "serve"}
_MARKS = {"published": "*", "estimated": "~", "elsewhere": "^", "measured": "", "exact": ""}


@click.command("recommend")
@click.argument("model")
@click.option("--ram", type=Size(), help="Memory of the computer in GB, for example 16. [default: this one's]")
@click.option(
    "--vram", type=Size(), help="Memory of the GPU in GB, for example 8. [default: what is free on this one's]"
)
@click.option(
    "--gpu",
    metavar="NAME",
    help="The NVIDIA GPU: a name (RTX 4090, L4, A100 80GB), or its compute capability (8.9). It says which kernels "
    "there are, and a name also how much memory. [default: this computer's]",
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "apple"]), default="auto", show_default=True)
@click.option(
    "--runtime",
    type=click.Choice(["auto", "llama.cpp", "vllm", "transformers", "ctranslate2", "mlx"]),
    default="auto",
    show_default=True,
    help="Answer for this runtime alone. [auto: all that the machine has, the usual one first]",
)
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
@lora_option
@json_option
@click.pass_context
def command(
    ctx: click.Context, as_json: bool, model: str, ram: int | None, vram: int | None, gpu: str | None, device: str,
    runtime: str, context: int | None, priority: str, measured: str | None, revision: str | None,
    lora: tuple[str, ...],
) -> int:  # fmt: skip
    """Say which format and level of MODEL to take for this machine, why, and the commands to make and run it.

    For each runtime of the machine: adds weights, cache and buffers of every level as that runtime counts them, leaves
    out what does not fit or has no kernel, and uses the figures that `compare` measured where there are any. Reads
    headers only.

    Example: llm-quantize recommend Qwen/Qwen3-0.6B --gpu "RTX 4090" --runtime vllm
    """
    from llm_quantize.advice.experience import experience_of
    from llm_quantize.advice.machine import detect
    from llm_quantize.advice.recommend import recommend
    from llm_quantize.models.opening import open_source

    shown = mode(ctx, as_json)
    machine = detect(device, ram=ram, vram=vram, gpu=gpu)
    with told(shown, "recommend") as sink:
        source = open_source(model, revision=revision, lora=lora, on_event=sink, headers_only=True)
        with source.checkpoint:
            advice = recommend(
                source, machine, model=model, revision=revision, lora=lora, context=context, priority=priority,
                experience=experience_of(source, None if measured is None else Path(measured), sink),
                runtime=None if runtime == "auto" else runtime,
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
    from llm_quantize.reports.terminal import human_bytes
    from llm_quantize.runtimes import RUNTIMES

    if advice.take is not None:
        return None
    choices = [choice for answer in advice.answers for choice in answer.choices]
    if any(choice.placement is not None for choice in choices):
        return ResourceError(
            "what fits this machine has a loss that nobody has measured",
            found=", ".join(choice.name for choice in choices if choice.placement is not None),
            remedy="measure it with llm-quantize compare, or take more memory",
        )
    pairs = [(answer, choice) for answer in advice.answers for choice in answer.choices]
    answer, smallest = min(pairs, key=lambda pair: pair[1].need.total, default=(None, None))
    if answer is None or smallest is None:
        return ResourceError(
            "no level of this model fits this machine",
            expected="a level that can be made of it",
            remedy="take a smaller model, a smaller --context, or more memory",
        )
    machine, room = advice.machine, answer.way.room(advice.machine)
    needed, ram, gpu = human_bytes(smallest.need.total), human_bytes(machine.usable_ram), human_bytes(machine.vram)
    found = f"{ram} of RAM for a model, {gpu} of GPU memory" if machine.vram else f"{ram} of RAM for a model"
    if room is not None:
        found = f"{human_bytes(room)} of room in {RUNTIMES[answer.runtime].LABEL}"
    return ResourceError(
        "no level of this model fits this machine",
        expected=f"{needed} or more for {smallest.name}",
        found=found,
        remedy="take a smaller model, a smaller --context, or more memory",
    )


def _print(advice: Advice) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    machine = advice.machine

    def say(text: str, style: str = "") -> None:
        console.print(*map(line, said(text).split("\n")), sep="\n", style=style, markup=False)

    if advice.take is not None:
        _answer(advice, advice.take, say)
    say(_machine(advice))
    say(f"  ({'; '.join(map(said, machine.sources))})")
    _print_table(console, advice)
    for answer in advice.answers:
        shown = {choice.name for choice in answer.choices}
        own = "" if answer is advice.answer else f" ({answer.runtime})"
        for reason, levels in _alike(answer, shown).items():
            names = f"{', '.join(levels)}{own}"
            say(f"not {names}: {reason}")
    for note in advice.notes:
        say(f"note: {note}")


def _machine(advice: Advice) -> str:
    """For what machine, and for how much text, the answer is."""
    from llm_quantize.reports.terminal import human_bytes

    machine, context = advice.machine, f"{advice.context:,}"
    ram, gpu = human_bytes(machine.ram), human_bytes(machine.vram)
    if not machine.vram:
        return f"{advice.name} on {machine.device}: RAM {ram}, {context} tokens of context"
    if machine.capability is None:
        return f"{advice.name} on {machine.device}: RAM {ram}, GPU {gpu}, {context} tokens of context"
    return (
        f"{advice.name} on {machine.device}: RAM {ram}, GPU {gpu} (compute capability {machine.capability:.1f}), "
        f"{context} tokens of context"
    )


def _alike(answer: Answer, shown: set[str]) -> dict[str, list[str]]:
    """{reason: levels} of what is excluded and not in the table."""
    found: dict[str, list[str]] = {}
    for level, reason in answer.excluded:
        if level not in shown:
            found.setdefault(reason, []).append(level)
    return found


def _answer(advice: Advice, take: Choice, say: Callable[..., None]) -> None:
    """What to take, why, how to make and run it, the rule that says so, and what other runtimes would be given."""
    from llm_quantize.reports.labels import labels
    from llm_quantize.reports.terminal import human_bytes
    from llm_quantize.runtimes import RUNTIMES

    told = f"take {take.name} ({human_bytes(take.size)})"
    if not advice.answer.way.usual:
        told = f"take {take.name} ({human_bytes(take.size)}) in {RUNTIMES[advice.runtime].LABEL}"
    say(told, "bold green")
    for reason in advice.why:
        say(f"  {said(reason)}")
    for label, other in (("better", advice.better), ("smaller", advice.smaller)):
        if other is not None:
            say(f"the next {label}: {other.name} ({human_bytes(other.size)}), {_loss(other)}{_where(other)}")
    for name, text in advice.commands(take).items():
        say(f"to {_STEPS[name]} it: {text}")
    say(labels(spoken())[f"rule_{advice.priority}"], "dim")
    for answer in advice.others:
        found, own = _nothing(answer), answer.take
        if own is not None:
            found = f"{own.name} ({human_bytes(own.size)}, {human_bytes(own.need.total)} of memory), {_loss(own)}"
        say(f"in {RUNTIMES[answer.runtime].LABEL} ({answer.way.suits}): {found}")
    say("")


def _nothing(answer: Answer) -> str:
    """What is said of a runtime without a choice."""
    if any(choice.placement is not None for choice in answer.choices):
        return "what fits has a loss that nobody has measured"
    least = min((choice.need.total for choice in answer.choices), default=None)
    from llm_quantize.reports.terminal import human_bytes

    return "no level can be made" if least is None else f"nothing fits: the least is {human_bytes(least)}"


def _loss(choice: Choice) -> str:
    from llm_quantize.measures.grades import grade

    if choice.loss is None:
        return "loss not known"
    if choice.loss.basis == "exact":
        return "nothing is lost"
    mark = _MARKS[choice.loss.basis]
    if choice.loss.basis == "elsewhere":
        return f"mean KLD {choice.loss.kld:.2g}{mark}"
    return f"{grade(choice.loss.kld)} (mean KLD {choice.loss.kld:.2g}{mark})"


def _where(choice: Choice) -> str:
    return ", does not fit" if choice.placement is None else ""


def _print_table(console: Any, advice: Advice) -> None:
    """All levels of each runtime from the largest to the smallest; lines with tabs where no terminal listens."""
    from rich.table import Table

    from llm_quantize.reports.terminal import human_bytes

    rows, choices = [], [choice for answer in advice.answers for choice in answer.choices]
    for choice in choices:
        placement = choice.placement
        where = said("does not fit" if placement is None else placement.kind)
        if placement is not None and placement.kind == "split":
            where = said(f"-ngl {placement.gpu_layers} of {placement.layers}")
        mark = "take" if choice is advice.take else f"{choice.dominated} is better" if choice.dominated else ""
        if any(choice is other.take for other in advice.others):
            mark = f"take in {choice.runtime}"
        mark = said(mark)
        speed = "" if choice.speed is None else f"{choice.speed:.1f}"
        loss = "?" if choice.loss is None else f"{choice.loss.kld:.2g}{_MARKS[choice.loss.basis]}"
        rows.append((choice.runtime, choice.format, choice.level, human_bytes(choice.size),
                     f"{choice.bits_per_weight:.2f}", human_bytes(choice.memory), where, loss, speed,
                     mark))  # fmt: skip
    labels = ("runtime", "format", "level", "file", "bits", "memory", "runs", "KLD", "tokens/s", "")
    if not console.is_terminal:
        for row in ([said(label) for label in labels], *rows):
            console.file.write("\t".join(row).rstrip() + "\n")
        return
    table = Table(box=None)
    for number, label in enumerate(labels):
        table.add_column(said(label), justify="right" if number in (3, 4, 5, 7, 8) else "left", no_wrap=True)
    for choice, row in zip(choices, rows, strict=True):
        table.add_row(*row, style="bold green" if choice is advice.take else "dim" if choice.placement is None else "")
    console.print(table, soft_wrap=False)
