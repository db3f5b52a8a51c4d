"""``llm-quantize info``."""

from __future__ import annotations

import click

from llm_quantize.cli.common import emit_json, json_option, lora_option, mode
from llm_quantize.cli.progress import told


@click.command("info")
@click.argument("model")
@click.option("--revision", metavar="R", help="Branch, tag or commit of a hub model.")
@lora_option
@click.option(
    "--recipe",
    is_flag=True,
    help="Print the types of a GGUF file's or directory's tensors as a recipe, for quantize --recipe.",
)
@click.option("--tensors", is_flag=True, help="List every tensor.")
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    as_json: bool,
    model: str,
    revision: str | None,
    lora: tuple[str, ...],
    recipe: bool,
    tensors: bool,
) -> int:
    """Show what MODEL is: architecture, parameters, layers, heads, dtypes, tokenizer, memory.

    MODEL is a local directory, quantized or not, a hub id, or a .gguf file; with --recipe a quantized
    directory or a .gguf file, also one of the hub (ORG/NAME:FILE). Reads headers only.
    """
    from llm_quantize.advice.describe import describe
    from llm_quantize.reports import terminal

    shown = mode(ctx, as_json)
    if recipe:
        from llm_quantize.formats.recipe_file import recipe_bytes
        from llm_quantize.models.recipes import recipe_from

        with told(shown, "info") as sink:
            found = recipe_from(model, revision=revision, on_event=sink)
        click.echo(recipe_bytes(found).decode(), nl=False)
        return 0
    with told(shown, "info") as sink:
        facts = describe(model, revision=revision, lora=lora, on_event=sink)
    if shown.json:
        emit_json(facts)
    else:
        terminal.print_facts(facts, tensors=tensors)
    return 0
