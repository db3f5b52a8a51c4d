"""The microscaling grid mxfp4 in plain numpy: what the native kernel means.

E2M1 elements and an E8M0 scale per 32 weights (OCP Microscaling Formats 1.0, sections 5.3 and 5.4) in ggml's layout and
with ggml's choice of scale. Rows are float32 (R, C), C a multiple of 32; the importance is not used; results are uint8
(R, row_bytes).
"""

from __future__ import annotations

import numpy as np
from gguf.quants import MXFP4

from llm_quantize.kernels.reference.blocks import Bytes, Float32, Integers, join_blocks, split_blocks, split_bytes

DOUBLED: Float32 = np.array(MXFP4.kvalues, dtype=np.float32)  # twice the E2M1 values, sign in bit 3


def floor_log2(values: Float32) -> Integers:
    """floor(log2f(v)) for positive v, where log2f is the float32 nearest to the logarithm.

    Just below a power of two the logarithm rounds up to the whole number: the result can exceed the exponent by one.
    """
    return np.floor(np.log2(values.astype(np.float64)).astype(np.float32)).astype(np.int64)


def half_scale(exponents: Bytes) -> Float32:
    """Half of the E8M0 scale, 2^(e - 128), for the doubled element values."""
    return np.ldexp(np.float32(1), exponents.astype(np.int32) - 128).astype(np.float32)


def quantize_mxfp4(rows: Float32, importance: Float32 | None = None) -> Bytes:
    """17 bytes per block: E8M0 scale, 16 bytes of nibbles (weight j low, j + 16 high)."""
    with np.errstate(all="ignore"):
        x = split_blocks(rows, 32)
        largest = np.abs(x).max(axis=1)
        positive = largest > 0
        # The C cast wraps: magnitudes below 2^-125 get a huge scale, with which they all become zero.
        exponent = np.where(positive, floor_log2(np.where(positive, largest, 1)) - 2 + 127, 0).astype(np.uint8)
        levels = DOUBLED * half_scale(exponent)[:, None]
        codes = np.abs(levels[:, None, :] - x[:, :, None]).argmin(axis=2)
    nibbles = (codes[:, :16] | codes[:, 16:] << 4).astype(np.uint8)
    return join_blocks(rows, exponent[:, None], nibbles)


def dequantize_mxfp4(packed: Bytes, columns: int) -> Float32:
    """float32 (R, C) of packed mxfp4 rows."""
    exponent, nibbles = split_bytes(packed, 1, 16)
    levels: Float32 = DOUBLED[np.concatenate([nibbles & 15, nibbles >> 4], axis=1)]
    with np.errstate(over="ignore"):
        return (levels * half_scale(exponent)).reshape(len(packed), columns)
