"""Measured sensitivity: what it costs in mean KL divergence to hold one tensor alone at one type.

For each tensor t and each candidate type q: KLD(source || source with t quantized to q and decoded again), nats, over
the scored positions of a text (evaluation/perplexity.py); nothing is modelled or extrapolated. The way there is
evaluation/sensitivity_stream.py; what the figures are used for is evaluation/allocation.py.

This file needs no torch: candidates, cost and results.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm_quantize.architectures.base import OutputTensor
from llm_quantize.architectures.rows import matrix_shape, weights_of
from llm_quantize.errors import IntegrityError, MalformedInputError, UnsupportedError, UsageError, printable
from llm_quantize.formats.gguf.levels import TensorShape, is_quantizable
from llm_quantize.formats.gguf.mixes import FALLBACKS
from llm_quantize.io.json_file import read_json
from llm_quantize.io.whole_file import write_file
from llm_quantize.models.opening import Source
from llm_quantize.qtypes import QTYPES
from llm_quantize.qtypes.affine import is_affine
from llm_quantize.qtypes.integer import is_integer

FORMAT = "llm-quantize-profile"
VERSION = 2  # 1 knew the model by some rows of its tensors
MAX_BYTES = 256 << 20
DEFAULT_TYPES = ("q8_0", "q6_k", "q5_k", "q4_k", "iq4_xs", "q3_k", "q2_k")
"""What is measured unless the user names types: the ladder of K-quants and the smallest good 4-bit grid."""

FLOATS = frozenset(("f32", "f16", "bf16"))
"""Types of which nothing is measured."""

KEPT = "kept"
"""In the place of a type: as the source has it, in directories."""


@dataclass(frozen=True)
class Candidate:
    """``outputs`` held together at ``qtype``, which takes ``nbytes``. ``name``: of the one, or of all together."""

    name: str
    outputs: tuple[OutputTensor, ...]
    qtype: str
    nbytes: int

    @property
    def weights(self) -> int:
        """How many weights they have."""
        return sum(weights_of(output.shape) for output in self.outputs)

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return 8 * self.nbytes / self.weights

    @property
    def key(self) -> tuple[str, str]:
        return self.name, self.qtype


def candidates(source: Source, types: Sequence[str], covered: Mapping[str, Any]) -> list[Candidate]:
    """Every tensor that a recipe may quantize at every type that it can hold, in the order of the artifact.

    A type whose blocks do not divide the rows is replaced by llama.cpp's fallback for it. ``covered``: names with
    importance; types that need it are left out elsewhere. Raises UsageError for no type or one that is not there.
    """
    unknown = [qtype for qtype in types if qtype not in QTYPES or qtype in FLOATS]
    if unknown or not types:
        raise UsageError("no such type to measure", expected=", ".join(DEFAULT_TYPES), found=", ".join(unknown))
    found = []
    for output in source.tensors.outputs:
        if not is_quantizable(TensorShape(output.name, output.shape)) or not output.pieces:
            continue
        rows, columns = matrix_shape(output.shape)
        fitting = dict.fromkeys(_fitting(qtype, columns) for qtype in types)
        for qtype in fitting:
            if qtype is None or (QTYPES[qtype].needs_importance and output.name not in covered):
                continue
            found.append(Candidate(output.name, (output,), qtype, rows * QTYPES[qtype].row_bytes(columns)))
    if not found:
        raise UsageError("no tensor of this model can be stored in any of these types", found=", ".join(types))
    return found


def _fitting(qtype: str, columns: int) -> str | None:
    for one in (qtype, FALLBACKS.get(qtype)):
        if one is not None and columns % QTYPES[one].block_size == 0:
            return one
    return None


@dataclass(frozen=True)
class Cost:
    """What measuring will take: ``streams`` of ``tokens`` tokens each, ``passes`` of a stream through a block, heads
    of every stream; ``forwards``: the same work in whole forwards of the text, ``groups``: how many times the model is
    read (each on the average by half). ``estimated``: there is one stream, forward and back, and its gradients tell of
    so many variants."""

    tensors: int
    streams: int
    tokens: int
    passes: int
    forwards: float
    groups: int
    estimated: bool = False

    def sentence(self) -> str:
        """The plan in one line."""
        if self.estimated:
            return (
                f"{self.tensors} tensors, {self.streams} variants by the gradients of {self.tokens:,} tokens: the work "
                f"of {self.forwards:,.0f} forwards of the text, in {self.groups} readings of the model"
            )
        return (
            f"{self.tensors} tensors, {self.streams} variants over {self.tokens:,} tokens: the work of "
            f"{self.forwards:,.0f} forwards of the text, in {self.groups} readings of the model"
        )


@dataclass(frozen=True)
class Sensitivity:
    """One figure: ``tensor`` alone at ``qtype``. ``kld`` and its standard error in nats, clustered by window (NaN for
    one window), 0 of an estimate; ``bits`` per weight."""

    tensor: str
    qtype: str
    bits: float
    nbytes: int
    kld: float
    kld_sem: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: an error that is not known is null."""
        return {**asdict(self), "kld_sem": self.kld_sem if math.isfinite(self.kld_sem) else None}

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> Sensitivity:
        """The inverse. Raises TypeError for other keys."""
        return cls(**{**facts, "kld_sem": math.nan if facts["kld_sem"] is None else facts["kld_sem"]})


@dataclass(frozen=True)
class Profile:
    """All figures of a model, in the order of its tensors. ``model``: its digest; ``text``: "sha256" of the windows,
    "datasets", "context", "windows", "tokens" (scored); ``importance``: hash of the importance used, or None.
    ``form``: the format whose types these are; ``estimated``: figures by gradients (evaluation/fisher.py), else each
    was measured."""

    name: str
    model: str
    text: Mapping[str, Any]
    importance: str | None
    rows: tuple[Sensitivity, ...]
    form: str = "gguf"
    estimated: bool = False

    def by_tensor(self) -> dict[str, tuple[Sensitivity, ...]]:
        """Tensor -> its figures."""
        found: dict[str, tuple[Sensitivity, ...]] = {}
        for row in self.rows:
            found[row.tensor] = (*found.get(row.tensor, ()), row)
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "format": FORMAT,
            "format_version": VERSION,
            **({} if self.form == Profile.form else {"for": self.form}),
            **({"estimated": True} if self.estimated else {}),
            "model": {"name": self.name, "sha256": self.model},
            "text": dict(self.text),
            "importance": self.importance,
            "sensitivities": [row.to_dict() for row in self.rows],
        }


def write_profile(path: str | Path, profile: Profile, *, replace: bool = False) -> None:
    """Write a profile as JSON, whole or not at all. Raises as ``write_file``."""
    data = json.dumps(profile.to_dict(), indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    write_file(path, [data], replace=replace)


_FIELDS: Mapping[str, tuple[type, ...]] = {
    "tensor": (str,),
    "qtype": (str,),
    "bits": (float, int),
    "nbytes": (int,),
    "kld": (float, int),
    "kld_sem": (float, int, type(None)),
}


def read_profile(path: str | Path) -> Profile:
    """Read a profile. Raises MalformedInputError (not one, or damaged), UnsupportedError (another version)."""
    path = Path(path)
    fields = read_json(path, limit_bytes=MAX_BYTES)
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise _refuse(path, "this file is not a profile of sensitivities", type(fields).__name__)
    if fields.get("format_version") != VERSION:
        raise UnsupportedError(
            "this profile is of another version",
            file=path,
            expected=VERSION,
            found=printable(repr(fields.get("format_version")), 80),
            remedy="measure it again: llm-quantize analyze profile MODEL --overwrite",
        )
    model, text, rows = fields.get("model"), fields.get("text"), fields.get("sensitivities")
    if not isinstance(model, dict) or not all(isinstance(model.get(key), str) for key in ("name", "sha256")):
        raise _refuse(path, "the profile does not say which model it is of", model)
    if not isinstance(text, dict) or not isinstance(text.get("sha256"), str) or not isinstance(rows, list) or not rows:
        raise _refuse(path, "the profile has no text or no figures", text)
    importance = fields.get("importance")
    if importance is not None and not isinstance(importance, str):
        raise _refuse(path, "the profile's importance is not a hash", importance)
    form = fields.get("for", Profile.form)
    if not isinstance(form, str):
        raise _refuse(path, "the profile's format is not a word", form)
    estimated = fields.get("estimated", False)
    if not isinstance(estimated, bool):
        raise _refuse(path, "the profile does not say whether its figures are estimates", estimated)
    found = tuple(_row(path, row) for row in rows)
    if len({(row.tensor, row.qtype) for row in found}) != len(found):
        raise _refuse(path, "a figure of the profile stands twice", len(found))
    return Profile(model["name"], model["sha256"], text, importance, found, form, estimated)


def _row(path: Path, row: Any) -> Sensitivity:
    if not isinstance(row, dict) or row.keys() != _FIELDS.keys():
        raise _refuse(path, "a figure of the profile is incomplete", row)
    for key, kinds in _FIELDS.items():
        if type(row[key]) not in kinds:
            raise _refuse(path, f"a figure of the profile has no proper {key}", row)
    known = row["qtype"] in QTYPES or is_integer(row["qtype"]) or is_affine(row["qtype"])
    if not known or row["nbytes"] < 1 or row["kld"] < -1e-6:
        raise _refuse(path, "a figure of the profile cannot be", row)
    return Sensitivity.from_dict(row)


def _refuse(path: Path, what: str, found: object) -> MalformedInputError:
    remedy = "make it again with `llm-quantize analyze profile`"
    return MalformedInputError(what, file=path, found=printable(repr(found), 120), remedy=remedy)


def refuse_other_model(profile: Profile, digest: str, path: Path) -> None:
    """Raise IntegrityError, naming both hashes, where the profile is of another model."""
    if profile.model != digest:
        raise IntegrityError(
            "this profile was measured on another model",
            file=path,
            expected=f"model {digest}",
            found=f"model {printable(profile.model, 80)} ({printable(profile.name, 80)})",
            remedy="remove it, or give another --profile",
        )


def windows_sha256(windows: Any) -> str:
    """Hash of token ids (n, length)."""
    return hashlib.sha256(f"{windows.shape}".encode() + windows.astype("<i4").tobytes()).hexdigest()
