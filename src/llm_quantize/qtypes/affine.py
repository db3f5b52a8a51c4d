"""Integer grids with a float scale and a float offset for each group of weights, as MLX has them.

A pure description; how scales and offsets are found is in ``llm_quantize.grids.affine``.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from llm_quantize.errors import UsageError
from llm_quantize.qtypes.range import HALF

__all__ = ["GROUPS", "WIDTHS", "AffineType", "affine_type", "is_affine"]

WIDTHS = (2, 3, 4, 5, 6, 8)
"""Bits of a code, as MLX's kernels know them."""

GROUPS = (32, 64, 128)
"""Weights that share a scale and an offset, as MLX's kernels know them."""

_NAME = re.compile(r"affine([2-8])_g([1-9][0-9]*)")


@dataclass(frozen=True)
class AffineType:
    """value = scale * code + offset, codes 0 .. 2^bits - 1, one scale and offset for each ``group_size`` weights of a
    row, stored as ``scale`` says. The other attributes are those of ``IntegerType``. Raises UsageError for what kernels
    do not know."""

    bits: int
    group_size: int
    scale: str = "float16"
    symmetric: bool = False

    def __post_init__(self) -> None:
        for what, known, found in (("codes", WIDTHS, self.bits), ("groups", GROUPS, self.group_size)):
            if found not in known:
                raise UsageError(
                    f"MLX has no {what} of this size",
                    expected=", ".join(map(str, known)),
                    found=found,
                    remedy="for example -q 4bit --group-size 64",
                )

    @property
    def name(self) -> str:
        """For example ``affine4_g64``; :func:`affine_type` reads it back."""
        return f"affine{self.bits}_g{self.group_size}"

    @property
    def largest(self) -> float:
        """The largest magnitude that it surely holds, as an offset; infinite where those are no float16."""
        return HALF if self.scale == "float16" else math.inf

    def group(self, columns: int) -> int:
        """Weights that share a scale in a row of ``columns``. UsageError where the row is not whole groups."""
        if columns < 1 or columns % self.group_size:
            raise UsageError(
                f"A row of {columns} weights cannot be stored as {self.name}",
                expected=f"a multiple of {self.group_size}",
                found=columns,
                remedy="choose a group size that divides the row, or leave this tensor out",
            )
        return self.group_size

    def groups(self, columns: int) -> int:
        """Groups in a row of ``columns`` weights. UsageError where the row is not whole groups."""
        return columns // self.group(columns)


def is_affine(name: str) -> bool:
    """Whether :func:`affine_type` knows ``name``."""
    return _NAME.fullmatch(name) is not None


def affine_type(name: str, scale: str = "float16") -> AffineType:
    """The type called ``name``, for example affine4_g64. Raises UsageError for another name or size."""
    found = _NAME.fullmatch(name)
    if found is None:
        raise UsageError("No such affine type", expected="affineB_gN", found=name)
    return AffineType(int(found[1]), int(found[2]), scale)
