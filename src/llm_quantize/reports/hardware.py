"""For which hardware each format of a comparison is, in words, as rows of a table."""

from __future__ import annotations

from dataclasses import dataclass

from llm_quantize.reports.findings import ComparisonResult, Variant
from llm_quantize.reports.labels import labels


@dataclass(frozen=True)
class HardwareRow:
    """Words of one row: the ``variants`` of a format, what ``runs`` them, and on which ``hardware``."""

    variants: str
    runs: str
    hardware: str


def hardware_rows(result: ComparisonResult, lang: str) -> list[HardwareRow]:
    """A row for each format, in the order of the variants; none where all have one format, which needs no comparing.
    A format that these words do not know has no row."""
    words = labels(lang)
    formats: dict[str, list[Variant]] = {}
    for variant in result.variants:
        formats.setdefault(variant.format, []).append(variant)
    if len(formats) < 2:
        return []
    return [
        HardwareRow(
            words["comma"].join(variant.label for variant in variants),
            words[f"runs_{format}"],
            words[f"hardware_{format}"],
        )
        for format, variants in formats.items()
        if f"runs_{format}" in words
    ]
