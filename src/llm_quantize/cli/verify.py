"""``llm-quantize verify``."""

from __future__ import annotations

import click

from llm_quantize.cli.common import emit_json, json_option, mode, verbose_option
from llm_quantize.cli.progress import told


@click.command("verify")
@click.argument("artifact", type=click.Path())
@click.option("--source", metavar="MODEL", help="Also compare every tensor with the model it was made from.")
@click.option("--revision", metavar="R", help="Branch, tag or commit of a hub source.")
@verbose_option
@json_option
@click.pass_context
def command(
    ctx: click.Context, as_json: bool, verbose: int, artifact: str, source: str | None, revision: str | None
) -> int:
    """Check every tensor of ARTIFACT: structure, manifest hashes, finite values, and the error against --source.

    ARTIFACT is a .gguf file, the directory of a split one, or a model directory (safetensors, GPTQ, AWQ,
    compressed-tensors). Exits with 8 where something does not match.
    """
    from llm_quantize.artifacts.verify import verify
    from llm_quantize.errors import IntegrityError
    from llm_quantize.reports import terminal

    shown = mode(ctx, as_json, verbose)
    with told(shown, "verify") as sink:
        outcome = verify(artifact, source=source, revision=revision, on_event=sink)
    if shown.json:
        emit_json(outcome.to_dict())
        return 0 if outcome.ok else IntegrityError.exit_code
    terminal.print_verification(outcome, verbose=shown.verbose)
    outcome.raise_on_problems()
    return 0
