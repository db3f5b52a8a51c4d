"""``llm-quantize plan``."""

from __future__ import annotations

from typing import Any

import click

from llm_quantize.cli.common import build_options, emit_json, events, json_option, mode, recipe_options


@click.command("plan")
@click.argument("model")
@click.argument("format", metavar="FORMAT", default="gguf")
@recipe_options
@json_option
@click.pass_context
def command(ctx: click.Context, /, as_json: bool, model: str, format: str, **arguments: Any) -> int:
    """Print each tensor's type and bytes, the exact size of the file, and the disk and memory needed.

    Reads headers only. Example: llm-quantize plan ./Llama-3.2-1B gguf -q Q4_K_M
    """
    from llm_quantize import pipeline, report

    shown = mode(ctx, as_json)
    options = build_options(arguments)
    common = {"levels": arguments["levels"], "name": arguments["name"], "revision": arguments["revision"]}
    with events(shown, "plan") as sink:
        plans = pipeline.plan(model, format, options=options, on_event=sink, **common)
    if shown.json:
        emit_json(report.plans_to_dict(plans, threads=options.threads))
    else:
        report.print_plans(plans, verbose=1, threads=options.threads)
    return 0
