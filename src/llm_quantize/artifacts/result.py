"""What a run returns for each artifact, and what in it is not what the source says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any

from llm_quantize.artifacts.manifest import NONFINITE_FACTS, fallbacks, nonfinite_counts, read_manifest
from llm_quantize.io.artifact_paths import manifest_path
from llm_quantize.plan import ArtifactPlan
from llm_quantize.results import Shown, json_ready

_DEGRADED = {
    "nonfinite_replaced": "{count} NaN or infinite weights were replaced by zero",
    "nonfinite_lost": "{count} NaN or infinite weights are lost, their blocks damaged: {type} cannot hold them",
    "scales_overflowed": "{count} finite blocks became infinite or NaN: their float16 scale overflows in {type}",
}


@dataclass(frozen=True, repr=False)
class ArtifactResult(Shown):
    """A finished artifact: ``path``, ``level`` and ``format``, ``size`` in bytes, ``bits_per_weight`` with everything
    that its files hold. ``status``: "written", or "already complete".

    ``seconds``: CPU time of this run's units (read, hash, quantize, write), work that several artifacts share divided
    equally among them. ``nonfinite``: {fact: {tensor: count}} as in the manifest, for NaN and infinite weights.
    ``fallbacks``: {what plan or method could not do as asked: the tensors or matrices}. ``measured``: what a
    calibrated run lost on text that it was not calibrated on, None where it was not measured. ``modelfile``: beside it,
    for Ollama, where it was asked for. ``conversion``: the verdict of a conversion, as in the manifest
    (artifacts/verdict.py). The fields are what fits a table.
    """

    artifact: InitVar[ArtifactPlan]
    level: str = field(init=False)
    format: str = field(init=False)
    path: Path
    size: int = field(init=False)
    bits_per_weight: float = field(init=False)
    status: str
    seconds: float
    resumed_units: int
    nonfinite: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    fallbacks: Mapping[str, Sequence[str]] = field(default_factory=dict)
    measured: Mapping[str, Any] | None = None
    modelfile: Path | None = None
    conversion: Mapping[str, Any] | None = None

    def __post_init__(self, artifact: ArtifactPlan) -> None:
        facts = {name: getattr(artifact, name) for name in ("level", "format", "size", "bits_per_weight")}
        self.__dict__.update(facts, _plan=artifact)

    @property
    def plan(self) -> ArtifactPlan:
        """What was planned: every tensor and file of the artifact."""
        found: ArtifactPlan = self.__dict__["_plan"]
        return found

    def summary(self) -> dict[str, Any]:
        """Level, path, size, bits per weight, and what a reader must not overlook."""
        facts = {"level": self.level, "path": self.path, "size": self.size, "bits_per_weight": self.bits_per_weight}
        facts["status"] = self.status
        if self.conversion is not None:
            facts["verdict"] = self.conversion["verdict"]
        if self.measured is not None:
            facts["kld"] = self.measured["kld"]
        found = len(self.degradations())
        return facts | ({"degraded": found} if found else {})

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        facts: dict[str, Any] = {
            "level": self.level,
            "path": str(self.path),
            "size": self.size,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "status": self.status,
            "cpu_seconds": round(self.seconds, 3),
            "resumed_units": self.resumed_units,
            **{fact: dict(self.nonfinite.get(fact, {})) for fact in NONFINITE_FACTS},
            **({"fallbacks": {text: list(names) for text, names in self.fallbacks.items()}} if self.fallbacks else {}),
            "degraded": self.degradations(),
        }
        if self.modelfile is not None:
            facts["modelfile"] = str(self.modelfile)
        if self.conversion is not None:
            facts["conversion"] = json_ready(self.conversion)
        return facts if self.measured is None else facts | {"measured": json_ready(self.measured)}

    @property
    def degraded(self) -> dict[str, int]:
        """How many values are not what the source says, per tensor; kept NaN and infinite ones are what it says."""
        counts: dict[str, int] = {}
        for fact in _DEGRADED:
            for name, count in self.nonfinite.get(fact, {}).items():
                counts[name] = counts.get(name, 0) + count
        return dict(sorted(counts.items()))

    def degradations(self) -> list[str]:
        """What the user should know, a sentence for each kind of thing: what became of values, then what could not be
        done as asked; each with how many tensors it concerns and the first of them."""
        types = {tensor.name: tensor.qtype for tensor in self.plan.tensors}
        found: dict[str, dict[str, int]] = {}
        for fact, text in _DEGRADED.items():
            for name, count in self.nonfinite.get(fact, {}).items():
                found.setdefault(text.replace("{type}", types[name]), {})[name] = count
        values = [
            f"{_first(list(counts))}: {text.format(count=f'{sum(counts.values()):,}')}"
            for text, counts in found.items()
        ]
        planned = {one.text for one in self.plan.substituted}
        other = [one.tensor for one in self.plan.substituted]
        types_told = (
            [f"{_first(other)}: not in the type of the level, whose blocks do not divide the rows"] if other else []
        )
        told = [f"{_first(names)}: {text}" for text, names in self.fallbacks.items() if text not in planned]
        return values + types_told + told


def _first(names: Sequence[str]) -> str:
    """The first of ``names``, and how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1:,} more"


def complete_result(artifact: ArtifactPlan, path: Path) -> ArtifactResult:
    """The result of an artifact that an earlier run finished: as degraded as its manifest says."""
    manifest = read_manifest(manifest_path(path)) or {}
    counts = nonfinite_counts(manifest.get("tensors", []))
    told = fallbacks(manifest.get("fallbacks", {}), manifest.get("matrices", []))
    return ArtifactResult(
        *(artifact, path, "already complete", 0.0, 0, counts, told, manifest.get("measured")),
        conversion=manifest.get("conversion"),
    )
