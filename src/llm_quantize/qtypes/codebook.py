"""Grids whose levels are a table that never changes, with one scale for each block of weights.

    nf4   16 quantiles of the normal distribution (Dettmers et al. 2023, arXiv 2305.14314, appendix E)
    fp4   sign, two bits of exponent, one of mantissa: 0, 1/16, 2, 3, 4, 6, 8, 12, of 12 (bitsandbytes)
    row8  the whole numbers -127 .. 127, of 127, one scale for a row: LLM.int8 (Dettmers et al. 2022, arXiv 2208.07339)
    line8 the same levels, of weights in float32, with a scale that divides: CTranslate2
    e2m1  four bits: 0, 0.5, 1, 1.5, 2, 3, 4, 6 (OCP Microscaling Formats 1.0, section 5.3.3)
    e4m3  eight bits up to 448, one scale for a row, a block of 128 by 128, or a matrix (OCP 8-bit Floating Point 1.0)

A pure description; how scales are found is in ``llm_quantize.grids.codebook``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from llm_quantize.errors import UsageError
from llm_quantize.qtypes.integer import WHOLE_ROW
from llm_quantize.qtypes.range import HALF

__all__ = ["BLOCKS", "CODEBOOKS", "NESTED_BLOCK", "CodebookType", "codebook_type", "is_codebook"]

_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4 = (0, 0.0625, 2, 3, 4, 6, 8, 12)
_E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
_E8M0 = tuple(2.0 ** (exponent - 127) for exponent in range(255))
_E4M3 = (*(k / 512 for k in range(8)), *((8 + k) * 2.0 ** (e - 10) for e in range(1, 16) for k in range(8)))[:127]


def _both_signs(magnitudes: tuple[float, ...]) -> tuple[float, ...]:
    return (*(-value for value in reversed(magnitudes)), *magnitudes)


CODEBOOKS: Mapping[str, tuple[float, ...]] = {
    "nf4": _NF4,
    "fp4": _both_signs(tuple(part / 12 for part in _FP4)),
    "row8": tuple(float(level) for level in range(-127, 128)),
    "line8": tuple(float(level) for level in range(-127, 128)),
    "e2m1": _both_signs(_E2M1),
    "e4m3": _both_signs(_E4M3),
}
"""Levels by name, ascending; the floats have two zeros. Those of row8 and line8 count in units of 1/127."""

OF_127 = ("row8", "line8")
"""Whole numbers from -127."""

SCALES: Mapping[str, tuple[float, ...]] = {
    "e4m3": _E4M3,
    "e4m3alone": _E4M3,
    "e8m0": _E8M0,
    "e8m0up": _E8M0,
}
"""What scales can be that are codes of 8 bits themselves, by name, ascending."""

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Weights that share a scale, as bitsandbytes' kernels know them."""

IN_COMMON: Mapping[str, int] = {"rows128": 128, "whole": 0}
"""How many rows have scales in common, by name; 0: all of the matrix, in one."""

NESTED_BLOCK = 256
"""Scales that share a scale of their own, in bitsandbytes' double quantization."""

_NAME = re.compile(
    r"(nf4|fp4)_b([1-9][0-9]*)(?:_(dq))?|(e2m1)_b(16)_(e4m3|e4m3alone)|(e2m1)_b(32)_(e8m0|e8m0up)"
    r"|(e4m3)_b(32)_(e8m0up)|(e4m3)_b(128)_(rows128)|(e4m3)_(whole)|(row8|line8|e4m3)"
)


@dataclass(frozen=True)
class CodebookType:
    """``codebook``: a name of CODEBOOKS. ``group_size``: weights that share a scale, -1 for a whole row. ``nested``:
    how scales are stored that are codes of 8 bits: "dq" (double quantization: NESTED_BLOCK of them have a scale of
    their own), "e4m3" (with one scale for the matrix; "e4m3alone": without), "e8m0" (powers of two; "e8m0up": rounded
    up by the plain rule); or that rows have in common, as floats: "rows128" (so many rows, from a multiple of it on),
    "whole" (all); "": as floats, of the type ``scale``.
    The other attributes are those of ``IntegerType``. Raises UsageError for a block that kernels do not know."""

    codebook: str
    group_size: int
    nested: str = ""
    scale: str = "float32"
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.codebook in ("nf4", "fp4") and self.group_size not in BLOCKS:
            raise UsageError(
                "bitsandbytes has no blocks of this size",
                expected=", ".join(map(str, BLOCKS)),
                found=self.group_size,
                remedy="for example --blocksize 64",
            )

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 4 if len(CODEBOOKS[self.codebook]) == 16 else 8

    @property
    def name(self) -> str:
        """For example ``nf4_b64``, ``fp4_b128_dq``, ``e2m1_b16_e4m3``, ``row8``; :func:`codebook_type` reads it."""
        block = "" if self.group_size == WHOLE_ROW else f"b{self.group_size}"
        return "_".join(filter(None, (self.codebook, block, self.nested)))

    @property
    def largest(self) -> float:
        """The largest magnitude that it holds; infinite where its scales are no float16 and no e4m3 alone."""
        if self.nested == "e4m3alone":
            return SCALES[self.nested][-1] * CODEBOOKS[self.codebook][-1]
        return HALF * CODEBOOKS[self.codebook][-1] if self.scale == "float16" and not self.coded else math.inf

    @property
    def scale_follows(self) -> bool:
        """Whether its scales are floats of the type that its checkpoint has; bitsandbytes' are float32 always."""
        return not self.coded and self.codebook == "e4m3"

    @property
    def coded(self) -> bool:
        """Whether scales are codes themselves."""
        return self.nested not in ("", *IN_COMMON)

    def group(self, columns: int) -> int:
        """Weights that share a scale in a row of ``columns``. UsageError where the row is not whole blocks."""
        size = columns if self.group_size == WHOLE_ROW else self.group_size
        if columns < 1 or columns % size:
            raise UsageError(
                f"a row of {columns} weights is not whole blocks of {size}",
                expected=f"a multiple of {size}",
                found=columns,
                remedy="choose a block that divides the row, or leave this tensor out with --ignore",
            )
        return size

    def groups(self, columns: int) -> int:
        """Blocks in a row of ``columns`` weights. UsageError where the row is not whole blocks."""
        return columns // self.group(columns)


def is_codebook(name: str) -> bool:
    """Whether :func:`codebook_type` knows ``name``."""
    return _NAME.fullmatch(name) is not None


def codebook_type(name: str, scale: str = "float32") -> CodebookType:
    """The type called ``name``: nf4_b64, fp4_b64_dq, e2m1_b16_e4m3, e4m3_b32_e8m0up, e4m3, row8, line8. ``scale``:
    the type of scales that are floats. Raises UsageError for another name."""
    found = _NAME.fullmatch(name)
    if found is None:
        raise UsageError(
            "there is no such codebook type",
            expected="nf4_bN, fp4_bN, e2m1_b16_e4m3, e2m1_b16_e4m3alone, e2m1_b32_e8m0, e2m1_b32_e8m0up, "
            "e4m3_b32_e8m0up, e4m3, e4m3_b128_rows128, e4m3_whole, row8, line8",
            found=name,
        )
    parts = [part for part in found.groups() if part is not None]
    if len(parts) == 1 or not parts[1].isdecimal():
        return CodebookType(parts[0], WHOLE_ROW, "".join(parts[1:]), scale)
    return CodebookType(parts[0], int(parts[1]), "".join(parts[2:]), scale)
