"""``llm-quantize push``."""

from __future__ import annotations

from typing import Any

import click

from llm_quantize.cli.common import emit_json, json_option, line, mode
from llm_quantize.cli.progress import told
from llm_quantize.measures.amounts import bytes_text
from llm_quantize.reports.wording import said


@click.command("push")
@click.argument("artifact", type=click.Path())
@click.option(
    "--repo",
    metavar="ORG/NAME",
    help="The repository, made if it is not there. [default: the artifact's name, in the account of the token]",
)
@click.option("--private", is_flag=True, help="Make the repository private, if it is made.")
@click.option("--base-model", metavar="ORG/NAME", help="The source on the hub, where it was a local directory.")
@click.option(
    "--measured",
    type=click.Path(dir_okay=False, exists=True),
    metavar="FILE",
    help="What analyze quality --json printed of it: perplexity and divergence for the card.",
)
@click.option("--dry-run", is_flag=True, help="Verify, list what would be sent, and stop.")
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    as_json: bool,
    artifact: str,
    repo: str | None,
    private: bool,
    base_model: str | None,
    measured: str | None,
    dry_run: bool,
) -> int:
    """Put a finished ARTIFACT (a GGUF file, or a model directory) on the Hugging Face hub.

    It is verified first. Sent are the files that its manifest lists, the manifest, and the model card with what was
    measured, in one commit; nothing that lies beside them. Needs a token: hf auth login, or HF_TOKEN. The same command
    after an interruption goes on.

    Example: llm-quantize push out/Llama-3.2-1B-GPTQ-4bit --repo me/Llama-3.2-1B-GPTQ-4bit --private
    """
    from llm_quantize.artifacts import publish

    shown = mode(ctx, as_json)
    about: dict[str, Any] = {"base_model": base_model, "measured": measured}
    with told(shown, "push", live=False) as sink:
        if dry_run:
            owner = publish.owner_of(repo) or "you"
            upload = publish.upload_of(artifact, owner=owner, on_event=sink, **about)
            address = None
        else:
            address, upload = publish.push(artifact, repo, private=private, bars=shown.live, on_event=sink, **about)
    sizes = upload.sizes()
    if shown.json:
        facts: dict[str, Any] = {"files": [{"name": name, "size": size} for name, size in sizes], "commit": address}
        emit_json({"artifact": artifact, "name": upload.name, "level": upload.level, **facts})
        return 0
    for name, size in sizes:
        click.echo(f"{line(name)}: {bytes_text(size)}")
    click.echo(line(said(f"nothing was sent: {len(sizes)} files would be")) if address is None else line(address))
    return 0
