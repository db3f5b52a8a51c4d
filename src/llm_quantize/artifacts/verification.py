"""What a verification finds, whatever the artifact is: of it as a whole, and of each tensor that it stores."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_quantize.artifacts.manifest import NONFINITE_FACTS
from llm_quantize.artifacts.rederivation import Rederivation
from llm_quantize.errors import IntegrityError
from llm_quantize.io.files_at import HASH_CHUNK
from llm_quantize.io.paths import read_range
from llm_quantize.results import Tabled, json_ready


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it lies in a file of an artifact: ``type`` as the manifest has it; ``rows`` that hashes count."""

    name: str
    type: str
    file: Path
    offset: int
    nbytes: int
    rows: int


@dataclass
class TensorCheck:
    """One tensor: ``hash`` is "ok", "mismatch" or "unknown"; ``relative_error`` (RMS, over the values that are finite
    in both) and ``source_nonfinite`` (NaN and infinite weights) where a source was given. The three counts in the
    middle are what the manifest says of the source's NaN and infinite weights."""

    name: str
    type: str
    hash: str = "unknown"
    nonfinite: int = 0
    nonfinite_replaced: int = 0
    nonfinite_kept: int = 0
    nonfinite_lost: int = 0
    source_nonfinite: int | None = None
    relative_error: float | None = None
    problems: list[str] = field(default_factory=list)


@dataclass(repr=False)
class Verification(Tabled):
    """The outcome. ``problems`` are about the artifact as a whole; each tensor has its own. ``notes``: what a reader of
    the errors should know. ``rederived``: what making it again told, where that was asked for; ``statement``: the file
    that says all of it to others."""

    columns = ("name", "type", "hash", "relative_error", "problems")

    path: Path
    has_manifest: bool
    compared: bool
    tensors: list[TensorCheck]
    problems: list[str]
    notes: list[str] = field(default_factory=list)
    rederived: Rederivation | None = None
    statement: Path | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        again = self.rederived is None or self.rederived.same_tensors
        return again and not self.problems and not any(tensor.problems for tensor in self.tensors)

    def all_problems(self) -> list[str]:
        """Every problem in one list, tensor names in front."""
        return self.problems + [f"{check.name}: {text}" for check in self.tensors for text in check.problems]

    def error(self) -> IntegrityError | None:
        """An error that names the first problem, if there is any."""
        problems = self.all_problems()
        if not problems:
            return None if self.rederived is None else self.rederived.error()
        return IntegrityError(
            "the artifact is not what it should be",
            file=self.path,
            found=f"{problems[0]}" + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""),
            remedy="make it again with --overwrite, or copy it again",
        )

    def raise_on_problems(self) -> None:
        """Raise IntegrityError naming the first problem, if there is any."""
        error = self.error()
        if error is not None:
            raise error

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the outcome, and the facts of ``error()`` beside it where something is wrong."""
        error = self.error()
        return {
            "artifact": str(self.path),
            "ok": self.ok,
            "manifest": self.has_manifest,
            "compared_with_source": self.compared,
            "problems": self.all_problems(),
            **({"notes": self.notes} if self.notes else {}),
            **({} if self.rederived is None else {"rederived": self.rederived.to_dict()}),
            **({} if self.statement is None else {"statement": str(self.statement)}),
            "tensors": self.rows(),
            **(error.to_dict() if error is not None else {}),
        }

    def summary(self) -> dict[str, Any]:
        """Whether it is right, and of how many tensors that is said."""
        facts = {"path": self.path, "ok": self.ok, "tensors": len(self.tensors), "problems": len(self.all_problems())}
        facts |= {"manifest": self.has_manifest, "compared": self.compared}
        return facts if self.rederived is None else facts | {"rederived": self.rederived.verdict}

    def rows(self) -> list[dict[str, Any]]:
        """One for each tensor: its hash, its counts, its error against the source."""
        return [json_ready(check) for check in self.tensors]


def check_stored(stored: StoredTensor, known: Mapping[str, Any] | None) -> TensorCheck:
    """A check of a tensor, with its hashes; ``known``: the manifest's entry for it."""
    check = TensorCheck(stored.name, stored.type)
    if known is not None:
        check.nonfinite_replaced, check.nonfinite_kept, check.nonfinite_lost = (
            sum(unit.get(fact, 0) for unit in known["units"]) for fact in NONFINITE_FACTS[:3]
        )
        _check_hashes(stored, known, check)
    return check


def _check_hashes(stored: StoredTensor, known: Mapping[str, Any], check: TensorCheck) -> None:
    path, offset, nbytes, rows = stored.file, stored.offset, stored.nbytes, stored.rows
    if known["type"] != check.type or known["bytes"] != nbytes or known["offset"] != offset:
        check.problems.append("type, size or offset differ from the manifest")
        check.hash = "mismatch"
        return
    row_bytes = nbytes // max(1, rows)
    check.hash = "ok"
    done = 0
    for unit in known["units"]:
        start, stop = unit["rows"]
        if start != done or not start < stop <= rows:
            break
        first, end = offset + start * row_bytes, offset + stop * row_bytes
        digest = hashlib.sha256()
        for at in range(first, end, HASH_CHUNK):
            digest.update(read_range(path, at, min(HASH_CHUNK, end - at)))
        if digest.hexdigest() != unit["sha256"]:
            check.hash = "mismatch"
            check.problems.append(f"bytes {first} to {end} of {path.name} do not match their hash")
        done = stop
    if done != rows:
        check.hash = "mismatch"
        check.problems.append(f"the manifest's hashes cover {done} of {rows} rows")


def judge_nonfinite(check: TensorCheck, poisoned: int, *, has_manifest: bool) -> None:
    """NaN and infinite values are right only where the manifest says that the source's were kept.

    ``poisoned``: how many stand where the source is finite.
    """
    if check.nonfinite != check.nonfinite_kept:
        kept, lost = check.nonfinite_kept, check.nonfinite_lost
        known = f", {kept} of the source were kept" if kept else ""
        known = f", {lost} of the source were lost" if lost else known
        known = f", {kept} of the source were kept, {lost} of the source were lost" if kept and lost else known
        check.problems.append(f"{check.nonfinite} values are NaN or infinite{known}")
    elif poisoned:
        check.problems.append(f"{poisoned} values are NaN or infinite where the source is finite")
    recorded = check.nonfinite_replaced + check.nonfinite_kept + check.nonfinite_lost
    if has_manifest and check.source_nonfinite is not None and check.source_nonfinite != recorded:
        check.problems.append(
            f"{check.source_nonfinite} weights of the source are NaN or infinite, the manifest knows of {recorded}"
        )
