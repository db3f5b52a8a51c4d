"""Every grid that matrices of model directories are on, by name."""

from __future__ import annotations

from llm_quantize.qtypes.codebook import CodebookType, codebook_type, is_codebook
from llm_quantize.qtypes.integer import IntegerType, integer_type

__all__ = ["PackedType", "packed_type"]

PackedType = IntegerType | CodebookType


def packed_type(name: str, scale: str = "float16") -> PackedType:
    """The type called ``name``; ``scale``: how scales are stored that are floats. Raises UsageError."""
    return codebook_type(name, scale) if is_codebook(name) else integer_type(name, scale)
