"""Grids whose levels are a table that never changes, with one scale for each block of weights: bitsandbytes' types.

    nf4   16 quantiles of the normal distribution (Dettmers et al. 2023, arXiv 2305.14314, appendix E)
    fp4   sign, two bits of exponent, one of mantissa: 0, 1/16, 2, 3, 4, 6, 8, 12, of 12
    row8  the whole numbers -127 .. 127, of 127, one scale for a row: LLM.int8 (Dettmers et al. 2022, arXiv 2208.07339)

A pure description; how scales are found is in ``llm_quantize.grids.codebook``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from llm_quantize.errors import UsageError
from llm_quantize.qtypes.integer import WHOLE_ROW

__all__ = ["BLOCKS", "CODEBOOKS", "NESTED_BLOCK", "CodebookType", "codebook_type", "is_codebook"]

_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4 = tuple(part / 12 for part in (-12, -8, -6, -4, -3, -2, -0.0625, 0, 0, 0.0625, 2, 3, 4, 6, 8, 12))

CODEBOOKS: Mapping[str, tuple[float, ...]] = {
    "nf4": _NF4,
    "fp4": _FP4,
    "row8": tuple(float(level) for level in range(-127, 128)),
}
"""Levels by name, ascending; fp4 has two zeros. Those of row8 count in units of 1/127."""

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Weights that share a scale, as bitsandbytes' kernels know them."""

NESTED_BLOCK = 256
"""Scales that share a scale of their own, where scales are stored in 8 bits (double quantization)."""

_NAME = re.compile(r"(nf4|fp4)_b([1-9][0-9]*)(_dq)?|row8")


@dataclass(frozen=True)
class CodebookType:
    """``codebook``: a name of CODEBOOKS. ``group_size``: weights that share a scale, -1 for a whole row. ``nested``:
    scales are stored in 8 bits, NESTED_BLOCK of them with a scale of their own. The other attributes are those of
    ``IntegerType``. Raises UsageError for a block that kernels do not know."""

    codebook: str
    group_size: int
    nested: bool = False
    scale: str = "float32"
    symmetric: bool = True

    def __post_init__(self) -> None:
        if (self.codebook == "row8") != (self.group_size == WHOLE_ROW):
            raise UsageError(
                "this type has one scale for each row, or blocks, and not the other", found=self.group_size
            )
        if self.group_size != WHOLE_ROW and self.group_size not in BLOCKS:
            raise UsageError(
                "bitsandbytes has no blocks of this size",
                expected=", ".join(map(str, BLOCKS)),
                found=self.group_size,
                remedy="for example --blocksize 64",
            )

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 8 if self.codebook == "row8" else 4

    @property
    def name(self) -> str:
        """For example ``nf4_b64``, ``fp4_b128_dq``, ``row8``; :func:`codebook_type` reads it back."""
        if self.group_size == WHOLE_ROW:
            return self.codebook
        return f"{self.codebook}_b{self.group_size}{'_dq' if self.nested else ''}"

    def group(self, columns: int) -> int:
        """Weights that share a scale in a row of ``columns``. UsageError where the row is not whole blocks."""
        size = columns if self.group_size == WHOLE_ROW else self.group_size
        if columns < 1 or columns % size:
            raise UsageError(
                f"a row of {columns} weights is not whole blocks of {size}",
                expected=f"a multiple of {size}",
                found=columns,
                remedy="choose a --blocksize that divides the row, or leave this tensor out with --ignore",
            )
        return size

    def groups(self, columns: int) -> int:
        """Blocks in a row of ``columns`` weights. UsageError where the row is not whole blocks."""
        return columns // self.group(columns)


def is_codebook(name: str) -> bool:
    """Whether :func:`codebook_type` knows ``name``."""
    return _NAME.fullmatch(name) is not None


def codebook_type(name: str) -> CodebookType:
    """The type called ``name``: nf4_b64, fp4_b64_dq, row8. Raises UsageError for another name."""
    found = _NAME.fullmatch(name)
    if found is None:
        raise UsageError(
            "there is no such codebook type", expected="nf4_bN, fp4_bN, either with _dq, or row8", found=name
        )
    codebook, block, nested = found.groups()
    if codebook is None:
        return CodebookType("row8", WHOLE_ROW)
    return CodebookType(codebook, int(block), nested is not None)
