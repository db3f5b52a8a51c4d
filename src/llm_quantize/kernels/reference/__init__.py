"""The meaning of the kernels in plain numpy: slow, readable, and equal to the native ones bit for bit.

``QUANTIZE[name](rows, importance)``: float32 (R, C) and float32 (C,) or None → uint8 (R, row bytes).
``DEQUANTIZE[name](packed, columns)``: uint8 (R, row bytes) → float32 (R, columns).
The rules are ggml's (ggml/src/ggml-quants.c, the owner of these formats); the code is not.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from llm_quantize.kernels.reference import iq1, iq2, iq3, kquants, legacy

__all__ = ["DEQUANTIZE", "QUANTIZE"]

Quantizer = Callable[[npt.NDArray[np.float32], npt.NDArray[np.float32] | None], npt.NDArray[np.uint8]]
Dequantizer = Callable[[npt.NDArray[np.uint8], int], npt.NDArray[np.float32]]

QUANTIZE: dict[str, Quantizer] = {
    **legacy.QUANTIZE,
    **kquants.QUANTIZE,
    **iq1.QUANTIZE,
    **iq2.QUANTIZE,
    **iq3.QUANTIZE,
}
DEQUANTIZE: dict[str, Dequantizer] = {
    **legacy.DEQUANTIZE,
    **kquants.DEQUANTIZE,
    **iq1.DEQUANTIZE,
    **iq2.DEQUANTIZE,
    **iq3.DEQUANTIZE,
}
