"""The stages of error feedback and their settings, without torch: a plan may hold them."""

from __future__ import annotations

from dataclasses import dataclass

from llm_quantize.errors import UsageError
from llm_quantize.results import Settings

__all__ = ["GptqOptions", "held_back"]

ORDERS = ("descending", "natural")

PART = 4
"""One window of so many is held back to decide how much is corrected."""


def held_back(windows: int) -> int:
    """How many of ``windows``, the last ones, are held back (methods/correction.py)."""
    return windows // PART


@dataclass(frozen=True, repr=False)
class GptqOptions(Settings):
    """Every stage is a switch of its own.

    ``damp``: what is added to the diagonal of the Hessian, as a share of its mean. ``shrink``: off-diagonal entries
    shrink by min(0.9, columns / tokens). ``order``: columns by falling mean square ("descending") or as they stand
    ("natural"). ``refine``: the longer search for the grid. ``feedback``: later columns take over the error of earlier
    ones. ``sweeps`` of coordinate descent, each time; ``refit``: the free floats are solved for, ``alternations``
    times, each followed by sweeps. ``correction``: share of the full-precision-target correction, 0 for none; None: as
    text that is held back tells, input by input (methods/correction.py).
    ``compare``: rows that the format owner's own codes serve better get those. Raises UsageError for values that
    mean nothing.
    """

    damp: float = 0.01
    shrink: bool = True
    order: str = "descending"
    refine: bool = True
    feedback: bool = True
    sweeps: int = 3
    refit: bool = True
    alternations: int = 1
    correction: float | None = None
    compare: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.damp < 10:
            raise UsageError(
                "The damping is a share of the mean diagonal", expected="above 0, below 10", found=self.damp
            )
        if self.order not in ORDERS:
            raise UsageError("No such order of columns", expected=", ".join(ORDERS), found=self.order)
        if self.sweeps < 0 or self.alternations < 0:
            raise UsageError(
                "Sweeps and alternations are counts",
                expected="0 or more",
                found=f"{self.sweeps} and {self.alternations}",
            )
        if self.correction is not None and not 0 <= self.correction <= 1:
            raise UsageError("The correction is a share", expected="0 to 1", found=self.correction)

    @property
    def corrects(self) -> bool:
        """Whether anything of the correction may be left."""
        return self.correction is None or self.correction > 0
