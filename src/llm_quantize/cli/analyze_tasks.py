"""``llm-quantize analyze tasks``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from llm_quantize.cli.common import emit_json, json_option, line, mode
from llm_quantize.cli.progress import told
from llm_quantize.reports.wording import said

if TYPE_CHECKING:
    from llm_quantize.evaluation.tasks import TaskReport


@click.command("tasks")
@click.argument("artifact", type=click.Path())
@click.option(
    "--tasks",
    "tasks",
    multiple=True,
    required=True,
    metavar="NAME",
    help="Task of the harness, for example arc_easy; repeatable, or several with commas between.",
)
@click.option(
    "--shots",
    type=click.IntRange(0, 100),
    metavar="N",
    help="Examples before each question. [default: the task's own number]",
)
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Only the first N questions of each task.")
@click.option(
    "--context",
    default=2048,
    show_default=True,
    type=click.IntRange(8, 1 << 20),
    metavar="N",
    help="Tokens that the model sees at once.",
)
@click.option("--chat", is_flag=True, help="Put the questions into the model's own chat template.")
@click.option(
    "--include",
    type=click.Path(file_okay=False),
    metavar="DIR",
    help="Directory of task files of your own; code that they name is run.",
)
@click.option("--threads", type=click.IntRange(1, 1024), metavar="N", help="[default: all CPUs]")
@json_option
@click.pass_context
def command(
    ctx: click.Context, as_json: bool, artifact: str, tasks: tuple[str, ...], shots: int | None, limit: int | None,
    context: int, chat: bool, include: str | None, threads: int | None,
) -> int:  # fmt: skip
    """Run benchmark tasks of lm-evaluation-harness on ARTIFACT, a .gguf file, in llama.cpp.

    Needs the extra [tasks] (pip install '.[tasks]'). The data of a task come from the hub. Differences between
    artifacts of four bits and more are within the noise of most tasks; analyze quality tells them apart.
    """
    from llm_quantize.evaluation.tasks import run_tasks

    shown = mode(ctx, as_json)
    names = [name for value in tasks for name in value.split(",") if name]
    with told(shown, "tasks") as sink:
        report = run_tasks(
            artifact, names, shots=shots, limit=limit, context=context, chat=chat, include=include, threads=threads,
            on_event=sink,
        )  # fmt: skip
    if shown.json:
        emit_json(report.to_dict())
    else:
        _show(report)
    return 0


def _show(report: TaskReport) -> None:
    from rich.console import Console
    from rich.table import Table

    from llm_quantize.reports.terminal import shown

    table = Table(box=None, pad_edge=False)
    for name in ("task", "metric", "value", "± error", "questions"):
        table.add_column(said(name), justify="left" if name in ("task", "metric") else "right", no_wrap=True)
    for score in report.scores:
        error = "" if score.error is None else f"{score.error:.4f}"
        table.add_row(
            shown(line(score.task)), shown(line(score.metric)), f"{score.value:.4f}", error, f"{score.samples:,}"
        )
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(shown(f"{report.harness}, {report.seconds:.0f} s"), style="dim")
