"""``llm-quantize analyze``: the commands that look at numbers; each lives in ``analyze_NAME.py``."""

from __future__ import annotations

import click

from llm_quantize.cli import LazyGroup

COMMANDS: dict[str, str] = {
    "importance": "Run text through a model and write how much each input channel matters.",
    "quality": "Measure what artifacts lost against the model they were made from.",
    "profile": "Measure what each tensor costs at each type, and write the best recipe for a size.",
    "tasks": "Run benchmark tasks on an artifact, through lm-evaluation-harness.",
}


@click.group(cls=LazyGroup, table=COMMANDS, prefix="analyze_")
def command() -> None:
    """Calibrate, and measure what an artifact lost."""
