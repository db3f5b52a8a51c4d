"""``llm-quantize verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from llm_quantize.cli.common import emit_json, json_option, lora_option, mode, verbose_option
from llm_quantize.cli.progress import told
from llm_quantize.cli.quantize import DEGRADED
from llm_quantize.cli.sizes import Size
from llm_quantize.reports.wording import said

_FILES = ("imatrix", "statistics", "attest", "against")


@click.command("verify")
@click.argument("artifacts", nargs=-1, required=True, metavar="ARTIFACT...", type=click.Path())
@click.option("--source", metavar="MODEL", help="Also compare every tensor with the model it was made from.")
@click.option("--revision", metavar="R", help="Branch, tag or commit of a hub source.")
@lora_option
@click.option(
    "--rederive", is_flag=True, help="Also make it again from what its manifest records, and compare every byte."
)
@click.option(
    "--calibration-data",
    multiple=True,
    metavar="FILE",
    help="With --rederive: a text that it was calibrated on, under the same name; repeatable.",
)
@click.option(
    "--imatrix",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="With --rederive: the importance matrix that it was made with.",
)
@click.option(
    "--statistics",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="With --rederive: the statistics that it was made with.",
)
@click.option(
    "--attest",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Write what was found as an in-toto statement: its tests, with --rederive its provenance (SLSA).",
)
@click.option(
    "--against",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Also hold its files against the hashes of such a statement.",
)
@click.option("--threads", type=click.IntRange(1, 1024), metavar="N", help="Of --rederive. [default: all CPUs]")
@click.option("--max-ram", type=Size(), help="Memory limit of --rederive, for example 4G.")  # fmt: skip
@verbose_option
@json_option
@click.pass_context
def command(ctx: click.Context, /, as_json: bool, verbose: int, artifacts: tuple[str, ...], **arguments: Any) -> int:
    """Check every tensor of each ARTIFACT: structure, manifest hashes, finite values, and the error against --source.

    ARTIFACT is a .gguf file, the directory of a split one, a model directory (safetensors, GPTQ, AWQ,
    compressed-tensors), or a directory that holds several of these. Exits with 8 where something does not match.

    --rederive makes an artifact of llm-quantize again and says whether the bytes are the same. Its source is --source,
    else the hub's commit or the built-in model that it was made from.
    """
    from llm_quantize.errors import IntegrityError, UsageError
    from llm_quantize.io.artifact_files import artifacts_in
    from llm_quantize.made import Given
    from llm_quantize.provenance.check import check
    from llm_quantize.reports import terminal

    shown = mode(ctx, as_json, verbose)
    paths = list(dict.fromkeys(path for artifact in artifacts for path in artifacts_in(Path(artifact))))
    places = {key: Path(arguments[key]) if arguments[key] else None for key in _FILES}
    if len(paths) > 1 and (places["attest"] or places["against"]):
        raise UsageError("a statement is of one artifact", found=f"{len(paths)} artifacts", remedy="name one of them")
    given = Given(arguments["calibration_data"], places["imatrix"], places["statistics"])
    outcomes = []
    for path in paths:
        with told(shown, "verify") as sink:
            outcomes.append(
                check(
                    path,
                    source=arguments["source"],
                    revision=arguments["revision"],
                    lora=arguments["lora"],
                    rederive=arguments["rederive"],
                    given=given,
                    attest=places["attest"],
                    against=places["against"],
                    threads=arguments["threads"],
                    max_ram=arguments["max_ram"],
                    on_event=sink,
                )
            )
        if not shown.json:
            terminal.print_verification(outcomes[-1], verbose=shown.verbose)
    wrong = [outcome for outcome in outcomes if not outcome.ok]
    again = [outcome.rederived for outcome in outcomes if outcome.rederived is not None]
    done = 0 if all(one.same for one in again) else DEGRADED
    if shown.json:
        facts = [outcome.to_dict() for outcome in outcomes]
        emit_json(facts[0] if len(facts) == 1 else {"ok": not wrong, "artifacts": facts})
        return IntegrityError.exit_code if wrong else done
    if len(outcomes) > 1:
        click.echo(said(f"{len(outcomes) - len(wrong)} of {len(outcomes)} artifacts are ok"))
    for outcome in wrong:
        outcome.raise_on_problems()
    return done
