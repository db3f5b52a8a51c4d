"""``verify`` whole: the artifact as it is, made again where that is asked for, and what is stated of it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from llm_quantize.artifacts.verification import Verification
from llm_quantize.artifacts.verify import located, verify
from llm_quantize.errors import UsageError
from llm_quantize.events import EventSink, Part, ignore
from llm_quantize.io.whole_file import refuse_existing, refuse_input, write_file
from llm_quantize.made import Given
from llm_quantize.provenance.rederive import ready
from llm_quantize.provenance.rederive import rederive as made_again
from llm_quantize.provenance.statement import files_of, statement_bytes, statement_of, unlike

_VERIFYING = 0.1
"""What of the time goes into looking at the artifact, where it is made again too: a guess."""


def check(
    artifact: str | Path,
    *,
    source: str | None = None,
    revision: str | None = None,
    lora: Sequence[str] = (),
    rederive: bool = False,
    given: Given | None = None,
    attest: Path | None = None,
    against: Path | None = None,
    threads: int | None = None,
    max_ram: int | None = None,
    on_event: EventSink = ignore,
) -> Verification:
    """``artifacts.verify.verify``; with ``rederive`` the artifact is made again with the files ``given``; ``attest``:
    the file of a statement to be written, ``against``: of one to be held against the artifact.

    A statement of provenance is written only where all tensors are the same; of an artifact that is merely looked at
    one is written whatever was found. Raises as ``verify``, ``rederive`` and ``write_file``.
    """
    if given is not None and given != Given() and not rederive:
        raise UsageError(
            "files that the artifact was made with are for making it again", remedy="add --rederive, or leave them out"
        )
    if attest is not None:
        refuse_existing(attest, replace=False)
    begun = ready(located(artifact), source=source, revision=revision, given=given) if rederive else None
    first, second = (Part(on_event, 0.0, _VERIFYING), Part(on_event, _VERIFYING, 1.0)) if rederive else (on_event,) * 2
    outcome = verify(artifact, source=source, revision=revision, lora=lora, on_event=first)
    if against is not None:
        outcome.problems += unlike(outcome.path, against)
    began = datetime.now(UTC)
    if begun is not None:
        outcome.rederived = made_again(
            begun,
            lora=lora,
            threads=threads,
            max_ram=max_ram,
            digests=attest is not None,
            on_event=second,
        )
    if attest is not None and (outcome.ok or not rederive):
        refuse_input(attest, files_of(outcome.path).values())
        write_file(attest, [statement_bytes(statement_of(outcome, began))])
        outcome.statement = attest
    return outcome
