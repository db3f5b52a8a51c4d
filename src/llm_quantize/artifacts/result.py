"""What a run returns for each artifact, and what in it is not what the source says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_quantize.artifacts.manifest import fallbacks, nonfinite_counts, read_manifest
from llm_quantize.io.artifact_paths import manifest_path
from llm_quantize.plan import ArtifactPlan

_DEGRADED = {
    "nonfinite_replaced": "{count} NaN or infinite weights were replaced by zero",
    "nonfinite_lost": "{count} NaN or infinite weights are lost, their blocks damaged: {type} cannot hold them",
    "scales_overflowed": "{count} finite blocks became infinite or NaN: their float16 scale overflows in {type}",
}


@dataclass(frozen=True)
class ArtifactResult:
    """A finished artifact. ``status``: "written", or "already complete".

    ``seconds``: CPU time of this run's units (read, hash, quantize, write), work that several artifacts share divided
    equally among them. ``nonfinite``: {fact: {tensor: count}} as in the manifest, see ``manifest.NONFINITE_FACTS``.
    ``fallbacks``: {what a method could not do as asked: the matrices}. ``measured``: what a calibrated run lost on text
    that it was not calibrated on (blockwise/measure.py), None where it was not measured.
    """

    plan: ArtifactPlan
    path: Path
    status: str
    seconds: float
    resumed_units: int
    nonfinite: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    fallbacks: Mapping[str, Sequence[str]] = field(default_factory=dict)
    measured: Mapping[str, Any] | None = None

    @property
    def level(self) -> str:
        return self.plan.level

    @property
    def size(self) -> int:
        return self.plan.size

    @property
    def degraded(self) -> dict[str, int]:
        """How many values are not what the source says, per tensor; kept NaN and infinite ones are what it says."""
        counts: dict[str, int] = {}
        for fact in _DEGRADED:
            for name, count in self.nonfinite.get(fact, {}).items():
                counts[name] = counts.get(name, 0) + count
        return dict(sorted(counts.items()))

    def degradations(self) -> list[str]:
        """What the user should know, as sentences: tensors, counts and what became of values; then what a method could
        not do as asked, each with the first of its matrices."""
        types = {tensor.name: tensor.qtype for tensor in self.plan.tensors}
        values = [
            f"{name}: " + text.format(count=count, type=types[name])
            for fact, text in _DEGRADED.items()
            for name, count in self.nonfinite.get(fact, {}).items()
        ]
        return values + [
            f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {text}"
            for text, names in self.fallbacks.items()
        ]

    @property
    def bits_per_weight(self) -> float:
        return self.plan.bits_per_weight


def complete_result(artifact: ArtifactPlan, path: Path) -> ArtifactResult:
    """The result of an artifact that an earlier run finished: as degraded as its manifest says."""
    manifest = read_manifest(manifest_path(path)) or {}
    counts, told = nonfinite_counts(manifest.get("tensors", [])), fallbacks(manifest.get("matrices", []))
    return ArtifactResult(artifact, path, "already complete", 0.0, 0, counts, told, manifest.get("measured"))
