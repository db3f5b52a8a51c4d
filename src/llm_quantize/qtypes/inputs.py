"""How a runtime rounds what goes into a quantized matrix, where it multiplies in few bits: a pure description.

The rules are those of compressed-tensors (0.20): a token's inputs x are divided by a scale, rounded to the nearest code
(ties to even), and multiplied by the scale again. m is the largest magnitude among the inputs that share it:

    intB            whole numbers -2^(B-1) .. 2^(B-1) - 1       scale m / (2^B - 1) * 2
    e4m3, e2m1      as in ``codebook``                           scale m / 448, m / 6
    nested e8m0     the power of two that is at most 8/7 of m / (the largest power of two of a code)
    nested e4m3     m / 6, times ``whole``, as the nearest e4m3 number; divided by ``whole``

``llm_quantize.grids.inputs`` computes it.
"""

from __future__ import annotations

from dataclasses import dataclass

from llm_quantize.qtypes.integer import WHOLE_ROW

_WORDS = {"e4m3": "8-bit floats", "e2m1": "4-bit floats"}


@dataclass(frozen=True)
class InputGrid:
    """``codes``: int8 and the like, e4m3, e2m1. ``group_size``: inputs of a token that share a scale, -1 for all of
    them. ``nested``: scales that are codes themselves, "e4m3" or "e8m0"; "": floats. ``static``: some number of it was
    calibrated and stands in the artifact: ``whole``, the scale of all inputs of the matrix or, with ``nested`` e4m3,
    what the scales were multiplied by; None where it is not known yet."""

    codes: str
    group_size: int = WHOLE_ROW
    nested: str = ""
    static: bool = False
    whole: float | None = None

    @property
    def text(self) -> str:
        """In words: 8-bit integers, a scale for each token."""
        codes = _WORDS.get(self.codes) or f"{self.codes.removeprefix('int')}-bit integers"
        if self.static and not self.nested:
            return f"{codes}, one calibrated scale"
        return f"{codes}, a scale for each {'token' if self.group_size == WHOLE_ROW else f'group of {self.group_size}'}"
