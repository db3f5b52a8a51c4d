"""Every grid that matrices of model directories are on, by name."""

from __future__ import annotations

from llm_quantize.qtypes.affine import AffineType, affine_type, is_affine
from llm_quantize.qtypes.codebook import CodebookType, codebook_type, is_codebook
from llm_quantize.qtypes.integer import IntegerType, integer_type

__all__ = ["PackedType", "packed_type"]

PackedType = IntegerType | CodebookType | AffineType


def packed_type(name: str, scale: str = "float16") -> PackedType:
    """The type called ``name``; ``scale``: how scales are stored that are floats. Raises UsageError."""
    if is_affine(name):
        return affine_type(name, scale)
    return codebook_type(name, scale) if is_codebook(name) else integer_type(name, scale)
