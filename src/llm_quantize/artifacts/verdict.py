"""What became of a source's numbers in what was converted from it.

    exact          the artifact decodes to the source's very values (of a zero, whatever its sign), which was looked at
    rounded        put on another grid, or into a narrower type of floats: the relative error says how far
    re-quantized   codes were chosen anew by a method that reads text

Values are compared in float32, as both sides decode them; NaN is equal to NaN.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_quantize import kernels

EXACT, ROUNDED, REQUANTIZED = "exact", "rounded", "re-quantized"
_WORST_LAST = (EXACT, ROUNDED, REQUANTIZED)
MEASURED = "measured"
"""Where the verdict of a whole has what was measured after it was made."""
FACTS = ("unequal", "square_error", "square_norm")
"""What the record of a unit says of how far it is from the source."""

Floats = npt.NDArray[np.float32]


@dataclass
class Difference:
    """How far values are from those that they were made of; rows come in any number of calls."""

    unequal: int = 0
    error: float = 0.0
    norm: float = 0.0

    def add(self, values: Floats, wanted: Floats) -> None:
        """Rows of both, float32."""
        off = values != wanted
        if _all_finite(values) and _all_finite(wanted):  # as below, where nothing is left out
            self.unequal += int(np.count_nonzero(off))
            self.error += float(np.sum(np.square(values - wanted, dtype=np.float64))) if off.any() else 0.0
            self.norm += float(np.sum(np.square(wanted, dtype=np.float64)))
            return
        if off.any():
            off &= ~(np.isnan(values) & np.isnan(wanted))
            self.unequal += int(np.count_nonzero(off))
            known = np.isfinite(values) & np.isfinite(wanted)
            self.error += float(np.sum(np.square(np.where(known, values - wanted, 0), dtype=np.float64)))
        self.norm += float(np.sum(np.square(np.where(np.isfinite(wanted), wanted, 0), dtype=np.float64)))

    def facts(self) -> dict[str, Any]:
        """For the record of a unit."""
        return dict(zip(FACTS, (self.unequal, self.error, self.norm), strict=True))

    def verdict(self, *, chosen: bool = False) -> dict[str, Any]:
        """What a manifest says; ``chosen``: a method that reads text chose the codes."""
        if not self.unequal:
            return {"verdict": EXACT}
        return {"verdict": REQUANTIZED if chosen else ROUNDED, "relative_error": self.relative}

    @property
    def relative(self) -> float:
        """||Q - W|| / ||W||; ||Q - W|| where W is zero."""
        return float(np.sqrt(self.error / self.norm)) if self.norm > 0 else float(np.sqrt(self.error))


def _all_finite(values: Floats) -> bool:
    if values.flags.c_contiguous:
        return kernels.scan_nonfinite(values)[0] == 0
    return bool(np.isfinite(values).all())


def of_units(units: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The verdict of a tensor by the records of its units."""
    whole = Difference()
    for unit in units:
        unequal, error, norm = (unit[fact] for fact in FACTS)
        whole = Difference(whole.unequal + unequal, whole.error + error, whole.norm + norm)
    return whole.verdict()


def conversion(judged: Iterable[tuple[str, int, Mapping[str, Any]]]) -> dict[str, Any]:
    """What a manifest says of the whole. ``judged``: (name, weights, verdict) of every matrix, and of every tensor that
    is no field of one.

    {"verdict", "tensors": {verdict: count}, "weights": {verdict: count}, "worst": {"tensor", "relative_error"}}, the
    last unless all are exact.
    """
    tensors: dict[str, int] = {}
    weights: dict[str, int] = {}
    worst: tuple[float, str] = (-1.0, "")
    for name, count, facts in judged:
        word = facts["verdict"]
        tensors[word] = tensors.get(word, 0) + 1
        weights[word] = weights.get(word, 0) + count
        if word != EXACT:
            worst = max(worst, (facts.get("relative_error", 0.0), name), key=lambda one: one[0])
    found: dict[str, Any] = {"verdict": max(tensors, key=_WORST_LAST.index, default=EXACT)}
    found |= {"tensors": tensors, "weights": weights}
    return found | ({"worst": {"tensor": worst[1], "relative_error": worst[0]}} if worst[1] else {})
