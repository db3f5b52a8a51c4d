"""Which grids of directories ggml's blocks hold, told from their names alone: the codes, and how far they go.

Blocks have one float16 scale (and offset) for 32 weights, so groups of whole blocks are held with their numbers
repeated. Of integers with zero points, code - zero point goes as far on either side as there are codes.
"""

from __future__ import annotations

from collections.abc import Iterator

from llm_quantize.errors import UsageError
from llm_quantize.qtypes import QTYPES
from llm_quantize.qtypes.affine import AffineType
from llm_quantize.qtypes.codebook import OF_127, CodebookType
from llm_quantize.qtypes.integer import WHOLE_ROW
from llm_quantize.qtypes.packed import PackedType, packed_type

__all__ = ["OFFSETS", "SYMMETRIC", "WITH_A_SCALE", "blocks_of", "fits", "may_fit"]

WITH_A_SCALE = "e2m1_b16_e4m3"
"""The grid of which GGUF keeps one number for the matrix beside its blocks."""

SYMMETRIC = {"q2_0": 2, "q4_0": 4, "q5_0": 5, "q8_0": 8}
_AROUND_ZEROS = {"q4_0": 3, "q5_0": 4, "q8_0": 7}
_MIRRORED = {"q2_0": 2}
OFFSETS = {"q4_1": 4, "q5_1": 5}
"""{type: the most bits}, types in rising order of their bytes. q2_0 has the levels -1 to 2, all that zero points of 1
or 2 leave."""
_BYTES = "q8_0"
_FLOATS = {"mxfp4": ("e8m0", "e8m0up"), "nvfp4": ("e4m3", "e4m3alone")}
"""{type: how the scales of groups of E2M1 are stored}."""


def _holding(grid: PackedType) -> Iterator[str]:
    """The types that hold every code of ``grid``, the smallest first."""
    if isinstance(grid, CodebookType):
        if grid.codebook in OF_127:
            yield _BYTES
        for name, scales in _FLOATS.items():
            if grid.codebook == "e2m1" and grid.nested in scales:
                yield name
        return
    table = OFFSETS if isinstance(grid, AffineType) else SYMMETRIC if grid.symmetric else _AROUND_ZEROS
    for name, most in table.items():
        if grid.bits <= most and (grid.group_size == WHOLE_ROW or grid.group_size % QTYPES[name].block_size == 0):
            yield name


def _known(qtype: str) -> PackedType | None:
    try:
        return packed_type(qtype)
    except UsageError:
        return None


def blocks_of(qtype: str, columns: int) -> str | None:
    """The smallest type of ggml whose blocks hold rows of ``columns`` on the grid ``qtype``, of a directory or of ggml;
    None where none does."""
    if qtype in QTYPES:
        return qtype if columns % QTYPES[qtype].block_size == 0 else None
    grid = _known(qtype)
    found = () if grid is None else _holding(grid)
    return next((name for name in found if columns % QTYPES[name].block_size == 0), None)


def fits(target: str, source: str) -> bool:
    """Whether blocks of ``target`` hold every code of a matrix on the grid ``source``, and its numbers as they are."""
    grid = _known(source)
    return target == source or (grid is not None and source != WITH_A_SCALE and target in _holding(grid))


def may_fit(target: str, source: str) -> bool:
    """Whether they may, by what its scales and zero points are: WITH_A_SCALE some formats store the inverse of it."""
    grid = _known(source)
    if grid is None or isinstance(grid, CodebookType):
        return grid is not None and target in _holding(grid)
    if grid.group_size != WHOLE_ROW and grid.group_size % QTYPES[target].block_size:
        return False
    if isinstance(grid, AffineType):
        return grid.bits <= SYMMETRIC.get(target, 0)
    return grid.bits <= max(OFFSETS.get(target, 0), _MIRRORED.get(target, 0))
