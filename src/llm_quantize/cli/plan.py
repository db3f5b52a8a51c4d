"""``llm-quantize plan``."""

from __future__ import annotations

from typing import Any

import click

from llm_quantize.cli.common import (
    build_options,
    chosen_levels,
    emit_json,
    json_option,
    mode,
    recipe_options,
    verbose_option,
)
from llm_quantize.cli.method_options import method_options
from llm_quantize.cli.progress import told
from llm_quantize.cli.words import LevelsCommand


@click.command("plan", cls=LevelsCommand)
@click.argument("model")
@click.argument("format", metavar="FORMAT", default="gguf")
@recipe_options
@method_options
@verbose_option
@json_option
@click.pass_context
def command(ctx: click.Context, /, as_json: bool, verbose: int, model: str, format: str, **arguments: Any) -> int:
    """Print the exact size of the file, how many tensors get which type, and the disk and memory needed.

    With -v each tensor's type and bytes, too. Refuses where the memory limit is too small, as quantize would. Reads
    headers only.

    Example: llm-quantize plan ./Llama-3.2-1B gguf -q Q4_K_M
    """
    from llm_quantize import pipeline
    from llm_quantize.artifacts import preflight
    from llm_quantize.reports import terminal

    shown = mode(ctx, as_json, verbose)
    options = build_options(arguments)
    common = {"levels": chosen_levels(arguments, options), "name": arguments["name"], "revision": arguments["revision"]}
    common["lora"] = arguments["lora"]
    with told(shown, "plan") as sink:
        plans = pipeline.plan(model, format, options=options, on_event=sink, **common)
    threads, needed = preflight.fit(plans, threads=options.threads, max_ram=options.max_ram)
    if shown.json:
        emit_json(terminal.plans_to_dict(plans, threads=threads, memory_needed=needed))
    else:
        terminal.print_plans(plans, threads=threads, memory_needed=needed, verbose=shown.verbose, quiet=shown.quiet)
    return 0
