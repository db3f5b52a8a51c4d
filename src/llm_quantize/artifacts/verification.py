"""What a verification finds, whatever the artifact is, and how a tensor's values are held against its source's."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_quantize.errors import IntegrityError
from llm_quantize.io.files_at import HASH_CHUNK
from llm_quantize.io.paths import opened, pread_into

# Largest plausible relative error ||Q - W|| / ||W|| of a sound tensor, by type: about twice what heavy-tailed weights
# (Student's t of 2 to 4 degrees, outliers of 3 to 30 deviations, pruned rows) give, and below 1, which zeros give.
_ERROR_BOUNDS = {
    **{"f32": 0.0, "f16": 0.005, "bf16": 0.005, "q8_0": 0.03, "q6_k": 0.08},
    **{"q5_0": 0.15, "q5_1": 0.12, "q5_k": 0.12, "q4_0": 0.25, "q4_1": 0.22, "q4_k": 0.22, "iq4_nl": 0.22},
    **{"iq4_xs": 0.22, "mxfp4": 0.3, "q3_k": 0.4, "q2_k": 0.6, "tq1_0": 0.98, "tq2_0": 0.98},
    **{"iq3_s": 0.6, "iq3_xxs": 0.65, "iq2_s": 0.85, "iq2_xs": 0.85, "iq2_xxs": 0.95, "iq1_m": 0.98, "iq1_s": 0.98},
}
# The same for integers in groups, by bits; a whole row of one scale is coarser where it has outliers, and error
# feedback trades a larger error of weights for a smaller one of outputs.
_INTEGER_BOUNDS = {8: 0.1, 7: 0.15, 6: 0.25, 5: 0.4, 4: 0.6, 3: 0.85, 2: 0.98}
_FEEDBACK = 1.5
_MOST = 0.98
_INTEGER = re.compile(r"int(\d)(_g\d+)?(_asym)?")
_STEPS = 6


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


@dataclass
class Verification:
    """The outcome. ``problems`` are about the artifact as a whole; each tensor has its own."""

    path: Path
    has_manifest: bool
    compared: bool
    tensors: list[TensorCheck]
    problems: list[str]

    @property
    def ok(self) -> bool:
        return not self.problems and not any(tensor.problems for tensor in self.tensors)

    def all_problems(self) -> list[str]:
        """Every problem in one list, tensor names in front."""
        return self.problems + [f"{check.name}: {text}" for check in self.tensors for text in check.problems]

    def error(self) -> IntegrityError | None:
        """An error that names the first problem, if there is any."""
        problems = self.all_problems()
        if not problems:
            return None
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
            "tensors": [vars(check) for check in self.tensors],
            **(error.to_dict() if error is not None else {}),
        }


def error_bound(qtype: str, *, feedback: bool = False) -> float:
    """The relative error above which a tensor of this type is not taken for a quantization of its source. ``feedback``:
    its codes were chosen for what comes out of the layer. Raises KeyError for a type without a bound."""
    found = _INTEGER.fullmatch(qtype)
    if found is None:
        bound = _ERROR_BOUNDS[qtype]
        plain = qtype in ("f32", "f16", "bf16")
    else:
        bound, plain = _INTEGER_BOUNDS[int(found[1])] * (1 if found[2] else 2), False
    return min(_MOST, bound * _FEEDBACK) if feedback and not plain else min(_MOST, bound)


@dataclass(frozen=True)
class Made:
    """How an artifact was made: ``feedback``: codes were chosen for what comes out of a layer; ``rescaled``: a
    transform moved scales between tensors."""

    feedback: bool = False
    rescaled: bool = False


def made_how(manifest: Mapping[str, Any] | None) -> Made:
    """What the manifest says of it; plainly rounded where there is none."""
    identity = {} if manifest is None else manifest["identity"]
    return Made(identity.get("method", "rtn") != "rtn", identity.get("transform", "none") != "none")


class Deviation:
    """How far one matrix Q (rows, columns) of an artifact is from its source's W; rows come in any number of calls.

    ``relative``: ||Q - W|| / ||W|| (||Q - W|| where W is zero). ``rescaled``: the same after the scale of every row
    and column that fits best, the columns' in closed form: what is left where a transform like AWQ moved scales. The
    rows' scales follow from columns' that the first rows give, alternating.
    """

    def __init__(self, *, rescaled: bool = False) -> None:
        self.error = self.norm = 0.0
        self.unequal = 0
        self._free = rescaled
        self._columns: npt.NDArray[np.float64] | None = None
        self._sums: npt.NDArray[np.float64] | None = None

    def add(self, values: npt.NDArray[np.float32], wanted: npt.NDArray[np.float32]) -> None:
        """Rows of Q and of W, finite both."""
        off = values - wanted
        self.unequal += int(np.count_nonzero(off))
        self.error += float(np.sum(np.square(off, dtype=np.float64)))
        self.norm += float(np.sum(np.square(wanted, dtype=np.float64)))
        if self._free:
            self._add_free(values.astype(np.float64), wanted.astype(np.float64))

    def _add_free(self, q: npt.NDArray[np.float64], w: npt.NDArray[np.float64]) -> None:
        if self._columns is None:
            self._columns, rows = np.ones(q.shape[1]), np.ones(len(q))
            for _ in range(_STEPS):
                self._columns = _fit(q.T, (w * rows[:, None]).T)
                rows = _fit(q, w * self._columns)
        straight = _ratio(q, np.broadcast_to(_fit(q, w * self._columns)[:, None], q.shape))
        sums = np.stack([(straight**2).sum(axis=0), (straight * w).sum(axis=0), (w * w).sum(axis=0)])
        self._sums = sums if self._sums is None else self._sums + sums

    @property
    def relative(self) -> float:
        return float(np.sqrt(self.error / self.norm)) if self.norm > 0 else float(np.sqrt(self.error))

    @property
    def rescaled_rows(self) -> bool:
        """Whether ``rescaled`` says more than ``relative``."""
        return self._sums is not None

    @property
    def rescaled(self) -> float:
        if self._sums is None:
            return self.relative
        qq, qw, ww = self._sums
        left = float(np.sum(qq - _ratio(qw * qw, ww)))
        return float(np.sqrt(max(0.0, left) / qq.sum())) if qq.sum() > 0 else self.relative


def _fit(q: npt.NDArray[np.float64], w: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """For each row, the factor of w that is nearest to q."""
    return _ratio((q * w).sum(axis=1), (w * w).sum(axis=1))


def _ratio(over: npt.NDArray[np.float64], under: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """over / under, 0 where that is not a number."""
    return np.divide(over, under, out=np.zeros_like(over), where=under != 0)


def read_bytes(path: Path, offset: int, nbytes: int) -> bytes:
    """Bytes of a file. Raises IntegrityError where it became shorter, ResourceError where the disk fails."""
    data = bytearray(nbytes)
    with opened(path) as descriptor:
        pread_into(descriptor, memoryview(data), offset, path)
    return bytes(data)


def check_hashes(path: Path, offset: int, nbytes: int, rows: int, known: Mapping[str, Any], check: TensorCheck) -> None:
    """The hashes of ``known``, a manifest's entry, against a tensor's ``nbytes`` at ``offset``; into ``check``."""
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
            digest.update(read_bytes(path, at, min(HASH_CHUNK, end - at)))
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
        kept = f", {check.nonfinite_kept} of the source were kept" if check.nonfinite_kept else ""
        lost = f", {check.nonfinite_lost} of the source were lost" if check.nonfinite_lost else ""
        check.problems.append(f"{check.nonfinite} values are NaN or infinite{kept}{lost}")
    elif poisoned:
        check.problems.append(f"{poisoned} values are NaN or infinite where the source is finite")
    recorded = check.nonfinite_replaced + check.nonfinite_kept + check.nonfinite_lost
    if has_manifest and check.source_nonfinite is not None and check.source_nonfinite != recorded:
        check.problems.append(
            f"{check.source_nonfinite} weights of the source are NaN or infinite, the manifest knows of {recorded}"
        )
