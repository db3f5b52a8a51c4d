"""What a reader of a comparison must know beside the figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llm_quantize.advice.elsewhere import ROUNDS_INPUTS
from llm_quantize.compare.bench import MeasuredFile
from llm_quantize.reports.findings import Variant


def importance_notes(found: Sequence[MeasuredFile]) -> Iterator[str]:
    """Which files were made with an importance matrix: the same level without it is another one."""
    for texts in sorted({one.importance for one in found if one.importance is not None}):
        names = [one.path.name for one in found if one.importance == texts]
        which = "every file" if len(names) == len(found) else ", ".join(names)
        yield f"quantized with an importance matrix{f' ({texts})' if texts else ''}: {which}"


def speed_notes(rows: Sequence[Variant]) -> Iterator[str]:
    """Which speeds were taken while other work ran: they say little of the file."""
    names = [row.level for row in rows if row.speed is not None and row.speed.disturbed]
    if names:
        yield f"the machine was busy while the speed of these was measured, which says little: {', '.join(names)}"


def inputs_notes(found: Sequence[MeasuredFile]) -> Iterator[str]:
    """Which figures are of the weights alone, beside others that have the rounding of inputs in them."""
    names = [one.level for one in found if (one.format, one.asked or one.level.rpartition("-")[2]) in ROUNDS_INPUTS]
    if names:
        yield (
            f"what compare measures of {', '.join(names)} is the loss of the weights; the runtime rounds the inputs of "
            "matrices too, which loses more"
        )
