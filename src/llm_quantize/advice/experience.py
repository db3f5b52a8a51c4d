"""What is known about the loss of each level: of this model where ``compare`` measured some, else published figures
(GGUF), else what was measured on the built-in model (elsewhere.py).

The published figures are mean KL divergences of Llama 3 8B (base model, F16 as the reference, wikitext-2 test, windows
of 512) in llama.cpp's table, tools/perplexity/README.md. Other models lose more or less at the same level (Llama 2 7B:
a quarter to two fifths), but the order holds well; where this model was measured at some levels, the published figures
of the others are scaled by the typical ratio, and are then called estimates.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from llm_quantize.advice.elsewhere import ELSEWHERE
from llm_quantize.errors import IntegrityError, MalformedInputError
from llm_quantize.evaluation.speed import LEAST_SHARE
from llm_quantize.events import EventSink, ignore
from llm_quantize.formats.gguf.plan import NAME as RANKED
from llm_quantize.formats.table import FORMATS
from llm_quantize.io.json_file import read_json_object
from llm_quantize.io.paths import open_argument
from llm_quantize.models.identity import header_digest
from llm_quantize.models.opening import Source
from llm_quantize.reports.findings import VERSION

# Mean KLD by level: (without importance, with importance). None: not in the table.
PUBLISHED: Mapping[str, tuple[float | None, float | None]] = {
    "Q8_0": (0.001355, None),
    "Q6_K": (0.005452, None),
    "Q5_K_M": (0.010762, None),
    "Q5_K_S": (0.016595, None),
    "Q5_1": (0.018045, None),
    "Q5_0": (0.022239, None),
    "Q4_K_M": (0.031273, 0.028152),
    "Q4_K_S": (0.043136, 0.031951),
    "IQ4_NL": (None, 0.035742),
    "IQ4_XS": (None, 0.036334),
    "Q4_1": (0.071683, None),
    "Q4_0": (0.071940, None),
    "Q3_K_L": (0.087176, 0.073077),
    "Q3_K_M": (0.101913, 0.084358),
    "IQ3_M": (None, 0.102534),
    "IQ3_S": (None, 0.111278),
    "IQ3_XS": (None, 0.138693),
    "IQ3_XXS": (None, 0.183625),
    "Q3_K_S": (0.228217, 0.199821),
    "IQ2_M": (None, 0.325989),
    "Q2_K": (0.445132, 0.332223),
    "Q2_K_S": (None, 0.403360),
    "IQ2_S": (None, 0.439197),
    "IQ2_XS": (None, 0.546290),
    "IQ2_XXS": (None, 0.812022),
    "IQ1_M": (None, 1.393084),
    "IQ1_S": (None, 2.211278),
}
PUBLISHED_SOURCE = "llama.cpp's table for Llama 3 8B (tools/perplexity/README.md)"

MAKING = (
    *("--imatrix", "--statistics", "--calibrate", "--no-calibration", "--calibration-data", "--calibration-samples"),
    *("--sequence-length", "--device", "--chat", "--revision"),
)
"""Options of a comparison that make a file what it is (compare/making.py)."""

REPORT_BYTES = 256 << 20
DEFAULT_REPORT = Path("report") / "comparison.json"


@dataclass(frozen=True)
class Measured:
    """One artifact of an earlier comparison. ``kld``: mean, nats; ``speed``: generated tokens per second there, None
    where other work disturbed the measurement. ``make``: what made it, behind ``llm-quantize quantize MODEL``; None: it
    was taken as it was. ``runs_in``: the label of the runtime that was timed; "": the format's only one."""

    kld: float | None
    speed: float | None
    size: int | None
    make: tuple[str, ...] | None = None
    runs_in: str = ""


@dataclass(frozen=True)
class Loss:
    """Mean KLD of a level, and how it is known: measured, estimated, published, elsewhere (measured on another model),
    or exact (nothing is lost)."""

    kld: float
    basis: str


@dataclass(frozen=True)
class Experience:
    """Everything known: ``measured`` by format and level, from the report ``file`` (None: there is none)."""

    measured: Mapping[tuple[str, str], Measured] = field(default_factory=dict)
    file: Path | None = None

    def loss(self, format: str, level: str, *, exact: bool = False) -> Loss | None:
        """What the level costs; None where neither this model nor a table has it. ``exact``: it stores the weights as
        they are."""
        found = self.find(format, level)
        if found is not None and found.kld is not None:
            return Loss(found.kld, "measured")
        if exact:
            return Loss(0.0, "exact")
        if format != RANKED:
            seen = ELSEWHERE.get((format, level))
            return None if seen is None else Loss(seen, "elsewhere")
        published = published_loss(level)
        if published is None:
            return None
        ratio = self._ratio()
        return Loss(published, "published") if ratio is None else Loss(published * ratio, "estimated")

    def find(self, format: str, level: str) -> Measured | None:
        """What was measured of the level; None where nothing was."""
        return self.measured.get((format, level.upper()))

    def speed(self, format: str, level: str, runtime: str) -> float | None:
        """Generated tokens per second where it was measured in ``runtime`` (its label)."""
        found = self.find(format, level)
        return None if found is None or found.runs_in not in ("", runtime) else found.speed

    def make(self, format: str, level: str) -> tuple[str, ...] | None:
        """What makes the file that was measured; None where that is not known."""
        found = self.find(format, level)
        return None if found is None else found.make

    def _ratio(self) -> float | None:
        """The typical ratio of measured to published loss, of the levels that have both."""
        ratios = [
            found.kld / published
            for (format, level), found in self.measured.items()
            if format == RANKED and found.kld and (published := published_loss(level))
        ]
        return statistics.median(ratios) if ratios else None


def published_loss(level: str) -> float | None:
    """The published figure with importance, or without where the table has only that."""
    without, weighted = PUBLISHED.get(level, (None, None))
    return without if weighted is None else weighted


def gains_from_importance(level: str) -> bool:
    """Whether the table has a figure with importance for this level: all that lose visibly do."""
    return PUBLISHED.get(level, (None, None))[1] is not None


@dataclass(frozen=True)
class Wanted:
    """The model whose figures are wanted: its ``headers`` (models/identity.py), its hub ``commit`` if it has one, and
    how to tell its ``content``, which is asked for only where a report has the same headers (None: its weights are not
    here)."""

    headers: str
    content: Callable[[], str] | None
    commit: str | None = None

    def is_of(self, model: Mapping[str, Any]) -> bool:
        """Whether a report whose ``model`` is this is surely of the same content. Raises what ``content`` raises."""
        if model.get("headers") != self.headers:
            return False
        same_commit = self.commit is not None and model.get("revision") == self.commit
        return same_commit or (self.content is not None and model["fingerprint"] == self.content())


def read_report(path: Path, wanted: Wanted, *, given: bool = True) -> Experience:
    """The figures of ``comparison.json`` (or of the directory that holds it) for the model that is ``wanted``.

    Fields that are absent or null count as not measured. Raises MalformedInputError for another kind of file,
    IntegrityError for a comparison of another model, and what reading raises; with ``given`` False, a report that just
    lies there, a comparison of another model or of another version is nothing known.
    """
    file = path / "comparison.json" if path.is_dir() else path
    os.close(open_argument(file, "report of a comparison")[0])
    report = read_json_object(file, limit_bytes=REPORT_BYTES)
    model, variants = report.get("model"), report.get("variants")
    if not isinstance(model, dict) or not isinstance(variants, list) or not isinstance(model.get("fingerprint"), str):
        raise MalformedInputError(
            "this is not a report of llm-quantize compare",
            file=file,
            expected="a model with its fingerprint, and variants",
            remedy="make it again with llm-quantize compare, or leave --measured out",
        )
    if report.get("version") != VERSION:
        if not given:
            return Experience()
        raise MalformedInputError(
            "this report was written by another version",
            file=file,
            expected=f"version {VERSION}",
            found=report.get("version"),
            remedy="make it again with llm-quantize compare, or leave --measured out",
        )
    if not wanted.is_of(model):
        if not given:
            return Experience()
        raise IntegrityError(
            "this report is of another model, or of other weights, configuration or tokenizer",
            file=file,
            expected=f"headers {wanted.headers}, and the same weights"
            + (f", commit {wanted.commit}" * bool(wanted.commit)),
            found=f"headers {str(model.get('headers'))[:100]}, weights {model['fingerprint'][:100]}, "
            f"commit {str(model.get('revision'))[:100]}",
            remedy="give the report of this model, or leave --measured out"
            if wanted.content
            else "give the report of this model, or the model's directory (its weights are not here to compare), or "
            "leave --measured out",
        )
    measured: dict[tuple[str, str], Measured] = {}
    for variant in variants:
        named = _named(variant)
        if named is not None:
            format, level = named
            size, share = _number(variant, "size"), _number(variant, "cpu_share")
            disturbed = share is not None and share < LEAST_SHARE
            runs_in = variant.get("runs_in")
            found = Measured(
                _number(variant, "kld"),
                None if disturbed else _number(variant, "generation_tokens_per_second"),
                None if size is None else int(size),
                _make(variant.get("make"), format, level),
                runs_in if isinstance(runs_in, str) else "",
            )
            measured.setdefault((format, level.upper()), found)
    return Experience(measured, file)


def experience_of(source: Source, report: Path | None = None, on_event: EventSink = ignore) -> Experience:
    """What is known of ``source``: from ``report``, else from a DEFAULT_REPORT of it. ``on_event`` hears how far the
    reading of its weights is, where that has to decide.

    Raises as ``read_report``.
    """
    if report is None and not DEFAULT_REPORT.is_file():
        return Experience()
    model = source.checkpoint
    content = None if model.temporary is not None else lambda: source.content(on_event)
    commit = None if model.adapters else model.revision  # which says nothing of adapters
    wanted = Wanted(header_digest(model), content, commit)
    return read_report(report or DEFAULT_REPORT, wanted, given=report is not None)


def _named(variant: Any) -> tuple[str, str] | None:
    """Format and level of an artifact of a report. A directory is called otherwise than its level (GPTQ-4bit, or by its
    file), so that the words that made it tell; of one that was taken as it was nobody knows with which options it was
    made."""
    if not isinstance(variant, dict) or not isinstance(variant.get("level"), str):
        return None
    form, words = variant.get("format"), variant.get("make")
    if form == RANKED:
        return RANKED, variant["level"]
    match words:
        case [str(first), "-q", str(level), *_] if first == form and form in FORMATS:
            return first, level
    return None


def _make(words: Any, format: str, level: str) -> tuple[str, ...] | None:
    """The words of a report that make ``level``, if they are such words: a report may come from anybody."""
    if not isinstance(words, list) or not all(isinstance(word, str) and word.isprintable() for word in words):
        return None
    words = [
        word for before, word in pairwise(["", *words]) if "--lora" not in (before, word)
    ]  # whose they are is asked
    if words[:3] != [format, "-q", level] or any(word.startswith("-") and word not in MAKING for word in words[3:]):
        return None
    return tuple(words)


def _number(variant: Mapping[str, Any], name: str) -> float | None:
    value = variant.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if -1e300 < value < 1e300 and math.isfinite(value) and value >= 0 else None
