"""Integer grids with one float scale for each group of weights: GPTQ, AWQ and compressed-tensors tensors.

A pure description of names, bits and groups; the mathematics is in ``llm_quantize.methods``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from llm_quantize.errors import UsageError
from llm_quantize.qtypes.range import HALF

__all__ = ["GROUPS", "SCALE_TYPES", "WHOLE_ROW", "IntegerType", "dividing", "integer_type", "is_integer"]

WHOLE_ROW = -1

GROUPS = (128, 64, 32)
"""Weights that share a scale where nobody asks for a number: those that kernels know, the usual one first."""

SCALE_TYPES = ("float16", "bfloat16", "float32")
_NAME = re.compile(r"int([2-8])(?:_g([1-9][0-9]*))?(_asym)?")


@dataclass(frozen=True)
class IntegerType:
    """Codes of ``bits`` bits, one scale for each ``group_size`` weights of a row.

    ``bits``: 2 to 8. ``group_size``: weights that share a scale, -1 for a whole row. ``symmetric``: value = scale *
    level with levels -2^(bits-1) .. 2^(bits-1) - 1; otherwise value = scale * (code - zero), codes and zeros
    0 .. 2^bits - 1. ``scale``: how scales are stored, "float16", "bfloat16" or "float32".
    Raises UsageError for values outside of these.
    """

    bits: int
    group_size: int
    symmetric: bool
    scale: str = "float16"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise UsageError("An integer type has an impossible width", expected="2 to 8 bits", found=self.bits)
        if self.group_size != WHOLE_ROW and self.group_size < 1:
            raise UsageError(
                "An integer type has an impossible group size",
                expected="a positive number of weights, or -1 for a whole row",
                found=self.group_size,
                remedy="for example --group-size 128",
            )
        if self.scale not in SCALE_TYPES:
            raise UsageError("Scales cannot be stored so", expected=", ".join(SCALE_TYPES), found=self.scale)

    @property
    def name(self) -> str:
        """For example ``int4_g128``, ``int3_g64_asym``, ``int8``; :func:`integer_type` reads it back."""
        group = "" if self.group_size == WHOLE_ROW else f"_g{self.group_size}"
        return f"int{self.bits}{group}{'' if self.symmetric else '_asym'}"

    @property
    def largest(self) -> float:
        """The largest magnitude that it holds; infinite where its scales are no float16."""
        levels = 1 << (self.bits - 1) if self.symmetric else (1 << self.bits) - 1
        return HALF * levels if self.scale == "float16" else math.inf

    def group(self, columns: int) -> int:
        """Weights that share a scale in a row of ``columns``. UsageError where the row is not whole groups."""
        size = columns if self.group_size == WHOLE_ROW else self.group_size
        if columns < 1 or columns % size:
            raise UsageError(
                f"A row of {columns} weights cannot be stored as {self.name}",
                expected=f"a multiple of {self.group_size}",
                found=columns,
                remedy="choose a group size that divides the row, or -1 for the whole row, or leave this tensor out",
            )
        return size

    def groups(self, columns: int) -> int:
        """Groups in a row of ``columns`` weights. UsageError where the row is not whole groups."""
        return columns // self.group(columns)


def is_integer(name: str) -> bool:
    """Whether :func:`integer_type` knows ``name``."""
    return _NAME.fullmatch(name) is not None


def dividing(sizes: Sequence[int], columns: Sequence[int]) -> int | None:
    """The first of ``sizes`` of which rows of all ``columns`` are whole multiples; None: none is."""
    return next((size for size in sizes if not any(row % size for row in columns)), None)


def integer_type(name: str, scale: str = "float16") -> IntegerType:
    """The type called ``name``: int4_g128 (symmetric), int4_g128_asym, int8 (one group is the whole row).

    Raises UsageError for another name or another ``scale`` than float16, bfloat16 and float32.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise UsageError(
            "No such integer type", expected="intB, intB_gN, intB_asym or intB_gN_asym with B from 2 to 8", found=name
        )
    bits, group, asymmetric = found.groups()
    return IntegerType(int(bits), int(group) if group else WHOLE_ROW, asymmetric is None, scale)
