"""``llm-quantize verify``."""

from __future__ import annotations

from pathlib import Path

import click

from llm_quantize.cli.common import emit_json, json_option, lora_option, mode, verbose_option
from llm_quantize.cli.progress import told
from llm_quantize.reports.wording import said


@click.command("verify")
@click.argument("artifacts", nargs=-1, required=True, metavar="ARTIFACT...", type=click.Path())
@click.option("--source", metavar="MODEL", help="Also compare every tensor with the model it was made from.")
@click.option("--revision", metavar="R", help="Branch, tag or commit of a hub source.")
@lora_option
@verbose_option
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    as_json: bool,
    verbose: int,
    artifacts: tuple[str, ...],
    source: str | None,
    revision: str | None,
    lora: tuple[str, ...],
) -> int:
    """Check every tensor of each ARTIFACT: structure, manifest hashes, finite values, and the error against --source.

    ARTIFACT is a .gguf file, the directory of a split one, a model directory (safetensors, GPTQ, AWQ,
    compressed-tensors), or a directory that holds several of these. Exits with 8 where something does not match.
    """
    from llm_quantize.artifacts.verify import verify
    from llm_quantize.errors import IntegrityError
    from llm_quantize.io.artifact_files import artifacts_in
    from llm_quantize.reports import terminal

    shown = mode(ctx, as_json, verbose)
    paths = list(dict.fromkeys(path for artifact in artifacts for path in artifacts_in(Path(artifact))))
    outcomes = []
    for path in paths:
        with told(shown, "verify") as sink:
            outcomes.append(verify(path, source=source, revision=revision, lora=lora, on_event=sink))
        if not shown.json:
            terminal.print_verification(outcomes[-1], verbose=shown.verbose)
    wrong = [outcome for outcome in outcomes if not outcome.ok]
    if shown.json:
        facts = [outcome.to_dict() for outcome in outcomes]
        emit_json(facts[0] if len(facts) == 1 else {"ok": not wrong, "artifacts": facts})
        return IntegrityError.exit_code if wrong else 0
    if len(outcomes) > 1:
        click.echo(said(f"{len(outcomes) - len(wrong)} of {len(outcomes)} artifacts are ok"))
    for outcome in wrong:
        outcome.raise_on_problems()
    return 0
