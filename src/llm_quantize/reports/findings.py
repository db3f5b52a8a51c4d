"""The measured facts of one model and its variants: what every report is made from, and what ``recommend`` reads.

``comparison.json`` is ``ComparisonResult.to_dict()``: the names of the fields below, sizes in bytes, times in
seconds, KLD in nats, shares from 0 to 1. The statistics of ``Divergence`` stand in each variant itself ("kld",
"kld_sem", ...), and so do the figures of ``Speed``. A figure that was not measured is null; so is NaN.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_quantize.errors import MalformedInputError
from llm_quantize.evaluation.speed import Speed
from llm_quantize.io.json_file import read_json_object
from llm_quantize.measures import advisor
from llm_quantize.measures.advisor import Advice, Offer
from llm_quantize.measures.divergence import Divergence
from llm_quantize.results import Shown, Tabled
from llm_quantize.runtimes import RUNTIMES

KIND = "llm-quantize comparison"
VERSION = 2
MAX_BYTES = 256 << 20

LEAST_KLD = 1e-7
"""What counts as no loss where no noise floor is known: float32 arithmetic shows no less on real text."""


@dataclass(frozen=True)
class ModelFacts:
    """The source. ``fingerprint``: SHA-256 over its content, ``headers``: over what can be told without its weights
    (models/identity.py)."""

    name: str
    source: str
    revision: str | None
    architecture: str
    parameters: int
    size: int
    dtype: str
    layers: int
    fingerprint: str
    headers: str


@dataclass(frozen=True)
class TextFacts:
    """What was read: ``windows`` of ``context`` tokens, of which ``tokens`` positions were scored."""

    names: tuple[str, ...]
    sha256: str
    context: int
    windows: int
    tokens: int


@dataclass(frozen=True)
class MachineFacts:
    """Where speed and memory were measured. ``runtime``: name and version, or why there was none. ``vram``: bytes that
    its GPUs have for a model."""

    cpu: str
    threads: int
    memory: int
    system: str
    runtime: str
    vram: int = 0


@dataclass(frozen=True)
class TensorError:
    """Relative RMS error ||Q - W|| / ||W|| of one tensor. ``layer`` None: not part of a layer."""

    name: str
    layer: int | None
    role: str
    qtype: str
    error: float


@dataclass(frozen=True)
class Sample:
    """``text`` continues ``prompt``, the likeliest token each time. ``flag``: what in it is worse than in the source's
    ("empty", "loop", "repetition", "endless", as evaluation/generation_check.py finds them), or nothing."""

    prompt: str
    text: str
    flag: str = ""


@dataclass(frozen=True)
class Reference:
    """The source itself, on the same text. ``noise_floor``: the KLD that two runs of the source against each other
    show, below which no difference means anything; None where it was not measured."""

    perplexity: float
    perplexity_sem: float
    bits_per_weight: float
    noise_floor: float | None
    samples: tuple[Sample, ...] = ()


@dataclass(frozen=True)
class Needs:
    """What a running artifact takes, in bytes: ``ram`` on the CPU alone, ``gpu`` where all of it is there; None: not
    known. ``here``: where it runs on the machine of the comparison, "cpu", "gpu" or "split"; "": it does not fit."""

    ram: int | None = None
    gpu: int | None = None
    here: str = "cpu"


@dataclass(frozen=True, repr=False)
class Variant(Shown):
    """One artifact. ``quantize_cpu_seconds`` None: it was there already, and nobody knows what it took.
    ``runs_in``: the runtime that usually runs it. ``make``: what stands behind ``llm-quantize quantize MODEL`` to make
    it, None where it was taken as it was; ``path``: where it lies."""

    format: str
    level: str
    file: str
    size: int
    bits_per_weight: float
    quantize_cpu_seconds: float | None
    divergence: Divergence
    grade: str
    speed: Speed | None = None
    tensor_errors: tuple[TensorError, ...] = ()
    samples: tuple[Sample, ...] = ()
    runs_in: str = ""
    needs: Needs = Needs()
    make: tuple[str, ...] | None = None
    path: str = ""

    @property
    def label(self) -> str:
        """What people call it."""
        return self.level or self.file

    def summary(self) -> dict[str, Any]:
        """Its level, its size, its loss."""
        facts = {"format": self.format, "level": self.level, "size": self.size, "bits_per_weight": self.bits_per_weight}
        return facts | {"kld": self.divergence.kld, "grade": self.grade}


@dataclass(frozen=True)
class MachineChoice:
    """The ``file`` to take for a machine with so much ``memory`` (bytes): of the computer ("ram"), or of a GPU that
    holds all of it ("gpu"). ``file`` None: none of those measured fits."""

    kind: str
    memory: int
    file: str | None


@dataclass(frozen=True, repr=False)
class ComparisonResult(Tabled):
    """Everything a report says. ``variants`` in the order they were asked for; ``grades``: (name, largest KLD that
    still has it) from the best on, the last without a limit being infinite; ``created`` an ISO date or empty;
    ``versions``: program to version; ``commands``: what makes these figures again; ``machines``: what to take where,
    with ``cache`` tokens of context."""

    columns = (
        "level", "format", "size", "bits_per_weight", "kld", "kld_sem", "same_top", "perplexity", "grade", "memory",
        "generation_tokens_per_second",
    )  # fmt: skip

    model: ModelFacts
    text: TextFacts
    machine: MachineFacts
    reference: Reference
    variants: tuple[Variant, ...]
    grades: tuple[tuple[str, float], ...]
    versions: Mapping[str, str]
    commands: tuple[str, ...]
    created: str = ""
    notes: tuple[str, ...] = ()
    machines: tuple[MachineChoice, ...] = ()
    cache: int = 0

    def offers(self) -> list[Offer]:
        """The variants as the rule of ``measures.advisor`` sees them, on the machine of the comparison."""
        floor = max(self.reference.noise_floor or 0.0, LEAST_KLD)
        return [
            Offer(
                size=variant.size,
                kld=math.nan if math.isnan(variant.divergence.kld) else max(variant.divergence.kld, floor),
                fits=variant.needs.here != "",
                split=variant.needs.here == "split",
            )
            for variant in self.variants
        ]

    def advice(self, runtime: str | None = None) -> Advice:
        """What to take of the variants that ``runtime`` runs (None: the first one's that runs any), by their places.
        ``front``: of all variants, whatever runs them."""
        offers = self.offers()
        runtime = self.runtimes()[0] if runtime is None and self.variants else runtime
        own = [index for index, variant in enumerate(self.variants) if variant.runs_in == runtime]
        found = advisor.advise([offers[index] for index in own])

        def place(index: int | None) -> int | None:
            return None if index is None else own[index]

        front = advisor.advise([dataclasses.replace(one, fits=True) for one in offers]).front
        return Advice(front, place(found.take), place(found.smaller), place(found.larger), found.reason)

    def runtimes(self) -> list[str]:
        """The runtimes that run the variants, in the order of RUNTIMES."""
        known = [one.LABEL for one in RUNTIMES.values()]
        found = dict.fromkeys(variant.runs_in for variant in self.variants)
        return sorted(found, key=lambda name: known.index(name) if name in known else len(known))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; ``from_dict`` is its inverse."""
        advice = self.advice()
        return {
            "kind": KIND,
            "version": VERSION,
            "model": dataclasses.asdict(self.model),
            "text": _plain(self.text),
            "machine": dataclasses.asdict(self.machine),
            "reference": _plain(self.reference),
            "variants": [_variant_to_dict(variant) for variant in self.variants],
            "pareto_front": [self.variants[index].file for index in advice.front],
            "recommended": None if advice.take is None else self.variants[advice.take].file,
            "machines": [dataclasses.asdict(choice) for choice in self.machines],
            "cache": self.cache,
            "grades": [{"name": name, "max_kld": _number(limit)} for name, limit in self.grades],
            "versions": dict(self.versions),
            "commands": list(self.commands),
            "created": self.created,
            "notes": list(self.notes),
        }

    def summary(self) -> dict[str, Any]:
        """The model, the text, and the variants."""
        labels = [variant.label for variant in self.variants]
        return {"model": self.model.name, "variants": " ".join(labels), "tokens": self.text.tokens}

    def rows(self) -> list[dict[str, Any]]:
        """One for each variant: its size, its loss, its speed. A figure that was not measured is None."""
        nested = ("tensor_errors", "samples")
        found = [_variant_to_dict(variant) for variant in self.variants]
        return [{name: value for name, value in row.items() if name not in nested} for row in found]


def from_dict(data: Mapping[str, Any], *, file: str | Path = "comparison.json") -> ComparisonResult:
    """The result that ``to_dict`` wrote. Raises MalformedInputError where it is another thing or lacks a field."""
    if data.get("kind") != KIND or data.get("version") != VERSION:
        raise MalformedInputError(
            "this is not a comparison that this version reads",
            file=file,
            expected=f"kind {KIND!r}, version {VERSION}",
            found=f"{data.get('kind')!r}, {data.get('version')!r}",
            remedy="make it again with llm-quantize compare",
        )
    try:
        return ComparisonResult(
            model=ModelFacts(**data["model"]),
            text=TextFacts(**{**data["text"], "names": tuple(data["text"]["names"])}),
            machine=MachineFacts(**data["machine"]),
            reference=Reference(**{**data["reference"], "samples": _samples(data["reference"]["samples"])}),
            variants=tuple(_variant_from_dict(entry) for entry in data["variants"]),
            grades=tuple((entry["name"], _limit(entry["max_kld"])) for entry in data["grades"]),
            versions=dict(data["versions"]),
            commands=tuple(data["commands"]),
            created=data["created"],
            notes=tuple(data["notes"]),
            machines=tuple(MachineChoice(**entry) for entry in data["machines"]),
            cache=data["cache"],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MalformedInputError(
            "the comparison lacks a field or has one of another kind",
            file=file,
            found=f"{type(error).__name__}: {error}",
            remedy="make it again with llm-quantize compare",
        ) from error


def read_comparison(path: str | Path) -> ComparisonResult:
    """The result in a ``comparison.json``. Raises MalformedInputError, AccessError, ResourceError."""
    return from_dict(read_json_object(path, limit_bytes=MAX_BYTES), file=path)


_DIVERGENCE = tuple(field.name for field in dataclasses.fields(Divergence))
_LATER = ("acceptance", "acceptance_sem", "clusters")
"""Figures that a comparison made before they were measured lacks."""
_SPEED = tuple(field.name for field in dataclasses.fields(Speed))
_OWN = ("format", "level", "file", "size", "bits_per_weight", "quantize_cpu_seconds", "grade", "runs_in", "path")


def _variant_to_dict(variant: Variant) -> dict[str, Any]:
    speed = dict.fromkeys(_SPEED) if variant.speed is None else dataclasses.asdict(variant.speed)
    return {
        **{name: getattr(variant, name) for name in _OWN},
        **divergence_to_dict(variant.divergence),
        **speed,
        "needs": dataclasses.asdict(variant.needs),
        "make": None if variant.make is None else list(variant.make),
        "tensor_errors": [_plain(entry) for entry in variant.tensor_errors],
        "samples": [_plain(entry) for entry in variant.samples],
    }


def _variant_from_dict(data: Mapping[str, Any]) -> Variant:
    speed = {name: data[name] for name in _SPEED}
    return Variant(
        **{name: data[name] for name in _OWN},
        divergence=divergence_from_dict(data),
        speed=None if all(value is None for value in speed.values()) else Speed(**speed),
        tensor_errors=tuple(TensorError(**_with_nan(entry)) for entry in data["tensor_errors"]),
        needs=Needs(**data["needs"]),
        make=None if data["make"] is None else tuple(data["make"]),
        samples=_samples(data["samples"]),
    )


def divergence_to_dict(divergence: Divergence) -> dict[str, Any]:
    """JSON-ready: a figure that is NaN is null."""
    return {name: _number(value) for name, value in divergence.to_dict().items()}


def divergence_from_dict(data: Mapping[str, Any]) -> Divergence:
    """The inverse; other keys are left alone. Raises KeyError where a figure is absent that every version wrote."""
    names = [name for name in _DIVERGENCE if name in data or name not in _LATER]
    figures: dict[str, Any] = {name: math.nan if data[name] is None else data[name] for name in names}
    return Divergence(**figures)


def _with_nan(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {**entry, "error": math.nan if entry["error"] is None else entry["error"]}


def _samples(entries: Any) -> tuple[Sample, ...]:
    return tuple(Sample(**entry) for entry in entries)


def _plain(value: Any) -> Any:
    """A dataclass or a number as JSON has it: no tuples, no NaN."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return _number(value) if isinstance(value, float) else value


def _number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _limit(value: float | None) -> float:
    return math.inf if value is None else value
