"""Number grids of one matrix: fitted, searched, decoded. Here: which qtype has which grid."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch import Tensor

from llm_quantize.errors import UsageError
from llm_quantize.grids import affine, codebook, ggml, ggml_held, ggml_pack, ggml_words, integer, nvfp4
from llm_quantize.grids.grid import GGML_GRIDS, Grid, GridType
from llm_quantize.qtypes.affine import affine_type, is_affine
from llm_quantize.qtypes.codebook import codebook_type, is_codebook
from llm_quantize.qtypes.integer import integer_type, is_integer

__all__ = ["grid_type", "has_grid", "pack_ggml", "unpack_ggml"]


def has_grid(qtype: str) -> bool:
    """Whether ``qtype`` is a number grid of this form; the others are floats."""
    return (
        qtype in GGML_GRIDS or qtype in ggml_words.WORDS or is_integer(qtype) or is_codebook(qtype) or is_affine(qtype)
    )


def grid_type(
    qtype: str, *, scale: str = "float16", signed: bool = False, least_zero: int = 0, spread: float = 0.0
) -> GridType:
    """The grid maker for ``qtype``: a ggml name, a codebook (nf4_b64, row8 ...), an affine type (affine4_g64 ...) or an
    integer type (int4_g128 ...).

    The rest is for integer types: ``scale`` how scales are stored; ``signed`` lets a symmetric scale be negative,
    which moves the extra level to the other side (not every runtime reads that); ``least_zero`` the smallest zero
    point (1 for GPTQ files of format 1, where zero 0 spills into its neighbour); ``spread`` k weighs errors with
    importance * sqrt(k * mean x^2 + x^2) instead of the importance alone (0: not). UsageError for another name.
    """
    if qtype in ggml_words.WORDS:
        return ggml_words.WordGridType(qtype)
    if qtype in GGML_GRIDS:
        return nvfp4.FoursGridType(qtype) if qtype in nvfp4.FOURS else ggml.GgmlGridType(qtype)
    if is_codebook(qtype):
        return codebook.CodebookGridType(codebook_type(qtype, scale))
    if is_affine(qtype):
        return affine.AffineGridType(affine_type(qtype, scale))
    if not is_integer(qtype):
        raise UsageError(
            "This type has no number grid", expected=f"{', '.join(sorted(GGML_GRIDS))}, intB_gN", found=qtype
        )
    chosen = integer_type(qtype, scale)
    return integer.IntegerGridType(chosen, signed=signed, least_zero=least_zero, spread=spread)


def pack_ggml(qtype: str, grid: Grid, codes: Tensor) -> npt.NDArray[np.uint8]:
    """The bytes of ``codes`` uint8 (rows, columns) on ``grid``: uint8 (rows, row_bytes) as ggml lays them out."""
    if ggml_held.is_other(qtype, grid):
        return ggml_held.pack(qtype, grid, codes)
    if qtype in ggml_words.WORDS:
        return ggml_words.pack(qtype, grid, codes)
    return nvfp4.pack(qtype, grid, codes) if qtype in nvfp4.FOURS else ggml_pack.pack(qtype, grid, codes)


def unpack_ggml(qtype: str, packed: npt.NDArray[np.uint8], columns: int) -> tuple[Grid, Tensor]:
    """Grid and codes uint8 (rows, ``columns``) that ``packed`` uint8 (rows, row_bytes) holds; undoes pack_ggml."""
    if qtype in ggml_words.WORDS:
        return ggml_words.unpack(qtype, packed, columns)
    return nvfp4.unpack(qtype, packed, columns) if qtype in nvfp4.FOURS else ggml_pack.unpack(qtype, packed, columns)
