"""Statistics of several texts, collected apart, made one file: sums are added, tap by tap, in the order given."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_quantize.errors import UsageError
from llm_quantize.io.journal import canonical_json
from llm_quantize.io.statistics_file import StatisticsFile, refuse_other_model
from llm_quantize.io.statistics_layout import StatisticsIdentity, StatisticsLayout, layout_statistics
from llm_quantize.io.whole_file import write_file


def merge_statistics(parts: Sequence[StatisticsFile], path: str | Path, *, replace: bool = False) -> StatisticsLayout:
    """Write the statistics of all ``parts`` together as ``path``; one tap at a time is in memory.

    Sums of squares and counts are those of one run over all texts, up to the last bits of float64; a Hessian is
    rounded to float32 once more. Raises UsageError (fewer than two parts, or of different kinds, taps or the same
    text twice), IntegrityError (of different models) and as ``write_file``.
    """
    if len(parts) < 2:
        raise UsageError("merging needs two files of statistics or more", found=len(parts))
    first = parts[0]
    for other in parts[1:]:
        refuse_other_model(other, str(first.identity.model["sha256"]))
        if (other.kinds, list(other.taps.values())) != (first.kinds, list(first.taps.values())):
            raise UsageError(
                "these statistics cannot be added: they are of different kinds or inputs",
                file=other.path,
                expected=f"{', '.join(first.kinds)} of {len(first.taps)} inputs, as in {first.path}",
                found=f"{', '.join(other.kinds)} of {len(other.taps)} inputs",
                remedy="collect both with the same --collect and the same version",
            )
    hashes = [str(part.identity.text["sha256"]) for part in parts]
    if len(set(hashes)) != len(hashes):
        raise UsageError("the same text would count twice", expected="parts of different texts", found=hashes[0])
    identity = StatisticsIdentity(first.identity.model, _text(parts, hashes))
    layout = layout_statistics(identity, first.blocks(), first.kinds)

    def pieces() -> Iterator[memoryview]:
        yield memoryview(layout.header)
        for block, places in enumerate(layout.places):
            for place in places:
                tap, _, suffix = place.name.rpartition(".")
                values = _sum(parts, tap, suffix)
                for _, piece in layout.array_pieces(block, place, values):
                    yield piece.data

    write_file(path, pieces(), replace=replace)
    return layout


def _sum(parts: Sequence[StatisticsFile], tap: str, suffix: str) -> npt.NDArray[Any]:
    total = parts[0].array(tap, suffix)
    total = total.astype(np.float64) if suffix == "hessian" else total
    for part in parts[1:]:
        values = part.array(tap, suffix)
        total = np.maximum(total, values) if suffix == "absmax" else np.add(total, values, out=total)
    return total


def _text(parts: Sequence[StatisticsFile], hashes: Sequence[str]) -> dict[str, Any]:
    """The parts' identities in order, what they counted added up, and a hash that names them all."""
    texts = [dict(part.identity.text) for part in parts]
    return {
        "sha256": hashlib.sha256(canonical_json(list(hashes))).hexdigest(),
        "datasets": list(dict.fromkeys(name for text in texts for name in text["datasets"])),
        "windows": sum(text["windows"] for text in texts),
        "tokens": sum(text["tokens"] for text in texts),
        "length": max(text["length"] for text in texts),
        "parts": texts,
    }
