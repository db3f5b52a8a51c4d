"""The meaning of the kernels in plain numpy: slow, readable, and equal to the native ones bit for bit.

``QUANTIZE[name](rows, importance)``: float32 (R, C) and float32 (C,) or None → uint8 (R, row bytes).
``DEQUANTIZE[name](packed, columns)``: uint8 (R, row bytes) → float32 (R, columns).
The rules are ggml's (ggml/src/ggml-quants.c, the owner of these formats); the code is not.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from llm_quantize.kernels import reference_iq1, reference_iq2, reference_iq3, reference_kquants, reference_legacy

__all__ = ["DEQUANTIZE", "QUANTIZE"]

Quantizer = Callable[[npt.NDArray[np.float32], npt.NDArray[np.float32] | None], npt.NDArray[np.uint8]]
Dequantizer = Callable[[npt.NDArray[np.uint8], int], npt.NDArray[np.float32]]

QUANTIZE: dict[str, Quantizer] = {
    **reference_legacy.QUANTIZE,
    **reference_kquants.QUANTIZE,
    **reference_iq1.QUANTIZE,
    **reference_iq2.QUANTIZE,
    **reference_iq3.QUANTIZE,
}
DEQUANTIZE: dict[str, Dequantizer] = {
    **reference_legacy.DEQUANTIZE,
    **reference_kquants.DEQUANTIZE,
    **reference_iq1.DEQUANTIZE,
    **reference_iq2.DEQUANTIZE,
    **reference_iq3.DEQUANTIZE,
}
