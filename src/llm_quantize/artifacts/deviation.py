"""How far a tensor of an artifact is from its source's, and how far a sound one may be."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_quantize.artifacts.verification import TensorCheck
from llm_quantize.methods.table import METHODS
from llm_quantize.qtypes import QTYPES
from llm_quantize.qtypes.codebook import codebook_type, is_codebook
from llm_quantize.transforms.table import TRANSFORMS

# Largest plausible relative error ||Q - W|| / ||W|| of a sound tensor, by type: about twice what heavy-tailed weights
# (Student's t of 2 to 4 degrees, outliers of 3 to 30 deviations, pruned rows) give, and below 1, which zeros give.
_ERROR_BOUNDS = {
    **{"f32": 0.0, "f16": 0.005, "bf16": 0.005, "q8_0": 0.03, "q6_k": 0.08},
    **{"q5_0": 0.15, "q5_1": 0.12, "q5_k": 0.12, "q4_0": 0.25, "q4_1": 0.22, "q4_k": 0.22, "iq4_nl": 0.22},
    **{"iq4_xs": 0.22, "mxfp4": 0.3, "q3_k": 0.4, "q2_k": 0.6, "tq1_0": 0.98, "tq2_0": 0.98},
    **{"q1_0": 0.98, "q2_0": 0.98, "nvfp4": 0.3},
    "line16": 0.3,  # one scale for a whole matrix, of 1024 levels to each side
    **{"iq3_s": 0.6, "iq3_xxs": 0.65, "iq2_s": 0.85, "iq2_xs": 0.85, "iq2_xxs": 0.95, "iq1_m": 0.98, "iq1_s": 0.98},
}
# The same for integers in groups, by bits; a whole row of one scale is coarser where it has outliers, and error
# feedback trades a larger error of weights for a smaller one of outputs.
_INTEGER_BOUNDS = {8: 0.1, 7: 0.15, 6: 0.25, 5: 0.4, 4: 0.6, 3: 0.85, 2: 0.98}
# And for tables of levels with a scale for each block.
_CODEBOOK_BOUNDS = {"nf4": 0.3, "fp4": 0.4, "row8": 0.2, "line8": 0.2, "e2m1": 0.3, "e4m3": 0.1}
_FEEDBACK = 1.5
# Where a few channels are a billion times as important as the others, the others' weights may be cut.
_WEIGHED = 2.5
_MOST = 0.98
_INTEGER = re.compile(r"(?:int|affine)(\d)(_g\d+)?(_asym)?")
_STEPS = 6

RESCALED = (
    "of {n} matrices the errors are those of the function: scales that a transform moved between weights are taken out"
)
LAYER = (
    "{n} matrices lie further from the source than rounding does: their codes were chosen for what comes out of their "
    "layers, and there, as the manifest says, they lose no more than plain rounding"
)


def error_bound(qtype: str, *, feedback: bool = False, weighed: bool = False) -> float:
    """The relative error above which a tensor of this type is not taken for a quantization of its source. ``feedback``:
    its codes were chosen for what comes out of the layer; ``weighed``: its scales for channels by their importance.
    Raises KeyError for a type without a bound."""
    found = _INTEGER.fullmatch(qtype)
    if is_codebook(qtype):
        bound, plain = _CODEBOOK_BOUNDS[codebook_type(qtype).codebook], False
    elif found is None:
        bound = _ERROR_BOUNDS[qtype]
        plain = qtype in ("f32", "f16", "bf16")
    else:
        bound, plain = _INTEGER_BOUNDS[int(found[1])] * (1 if found[2] else 2), False
    if plain:
        return bound
    weighs = weighed and qtype in QTYPES and QTYPES[qtype].uses_importance
    return min(_MOST, bound * max(_FEEDBACK if feedback else 1.0, _WEIGHED if weighs else 1.0))


@dataclass(frozen=True)
class Made:
    """How an artifact was made: ``feedback``: codes were chosen for what comes out of a layer; ``weighed``: scales were
    chosen for channels by their importance; ``rescaled``: a transform moved scales between tensors."""

    feedback: bool = False
    rescaled: bool = False
    weighed: bool = False

    def bound(self, qtype: str) -> float:
        """``error_bound`` of a type made so."""
        return error_bound(qtype, feedback=self.feedback, weighed=self.weighed)


def made_how(manifest: Mapping[str, Any] | None, unmarked: Made) -> Made:
    """What the manifest says of it; ``unmarked`` where there is none."""
    if manifest is None:
        return unmarked
    identity = manifest["identity"]
    method, transform = METHODS.get(identity.get("method", "rtn")), TRANSFORMS.get(identity.get("transform", "none"))
    feedback = method is None or method.reads_text
    weighed = identity.get("imatrix") is not None and not feedback
    return Made(feedback, transform is None or transform.passes > 0, weighed)


class Deviation:
    """How far one matrix Q (rows, columns) of an artifact is from its source's W; rows come in any number of calls.

    ``relative``: ||Q - W|| / ||W|| (||Q - W|| where W is zero). ``rescaled``: the same after the scale of every row
    and column that fits best, the columns' in closed form: what is left where a transform like AWQ moved scales. The
    rows' scales follow from columns' that the first rows give, alternating. ``known``: the scales were known, and are
    taken out of Q already.
    """

    def __init__(self, *, rescaled: bool = False, known: bool = False) -> None:
        self.known = known
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


def judge_whole(check: TensorCheck, found: Sequence[Deviation], made: Made, keeps: Callable[[str], bool]) -> str:
    """The error of all matrices of a tensor together; rescaled, of the worst of them. Returns as ``judge_part``."""
    norm, error = sum(one.norm for one in found), sum(one.error for one in found)
    whole, note = float(np.sqrt(error / norm)) if norm > 0 else float(np.sqrt(error)), ""
    bound = made.bound(check.type)
    if made.rescaled and not any(one.rescaled_rows for one in found) and not whole <= bound:
        check.relative_error = whole
        return ""  # a vector that the transform divides: any factor is possible
    straight = max((one.rescaled for one in found), default=whole)
    if made.rescaled and straight < whole:
        whole, note, bound = straight, RESCALED, max(bound, error_bound("bf16"))
    return _judge(check, whole, bound, check.type, note, made, keeps)


def judge_part(
    check: TensorCheck, found: Deviation, qtype: str, made: Made, keeps: Callable[[str], bool] = lambda name: False
) -> str:
    """The error of one part of a tensor, or of a matrix that is spread over several. ``keeps``: whether the run kept
    what it promises of a matrix (promise.py). Returns what a reader of the error should know: RESCALED, LAYER or ""."""
    error, note = found.relative, RESCALED if found.known else ""
    if made.rescaled and found.rescaled < error:
        error, note = found.rescaled, RESCALED
    return _judge(check, error, made.bound(qtype), qtype, note, made, keeps)


def _judge(
    check: TensorCheck, error: float, bound: float, qtype: str, note: str, made: Made, keeps: Callable[[str], bool]
) -> str:
    check.relative_error = max(error, check.relative_error or 0.0)
    if error <= bound:
        return note
    if made.feedback and math.isfinite(error) and keeps(check.name):
        return LAYER
    check.problems.append(f"relative error {error:.4g} is above {bound:.4g} for {qtype}")
    return note


def judge_kept(check: TensorCheck, found: Deviation, free: bool, *, is_vector: bool) -> str:
    """A tensor that is not quantized is the source's, value for value, unless a transform moved scales. Returns as
    ``judge_part``."""
    check.relative_error = max(found.relative, check.relative_error or 0.0)
    if not found.unequal:
        return ""
    if not free:
        check.problems.append(f"{found.unequal} values are not the source's, and nothing says that they were changed")
    elif not is_vector:
        check.relative_error = found.rescaled
        if not found.rescaled <= error_bound("bf16"):
            check.problems.append(f"relative error {found.rescaled:.4g}, scales of rows and columns taken out")
        return RESCALED
    return ""


def told(notes: Iterable[str]) -> list[str]:
    """What readers should know, each sentence once, with how many matrices it is about."""
    counts = Counter(note for note in notes if note)
    return [sentence.format(n=counts[sentence]) for sentence in (RESCALED, LAYER) if sentence in counts]
