"""The microscaling grids mxfp4 and nvfp4 in plain numpy: what the native kernels mean.

E2M1 elements, and an E8M0 scale per 32 weights (OCP Microscaling Formats 1.0, sections 5.3 and 5.4) or an E4M3 scale
per 16, in ggml's layout and with ggml's choice of scale. Rows are float32 (R, C), C whole blocks; the importance is not
used; results are uint8 (R, row_bytes).
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


def e4m3_bytes(values: Float32) -> Bytes:
    """E4M3 of float32 values that are not negative, as ggml rounds: halves up, from 256 on the largest (448)."""
    clipped = np.minimum(values, np.float32(448)).astype(np.float32)
    bits = clipped.view(np.uint32).astype(np.int64)
    exponent = (bits >> 23) - 127 + 7
    rounded = (exponent << 3 | bits >> 20 & 7) + (bits >> 19 & 1)
    steps = np.minimum((clipped * np.float32(512) + np.float32(0.5)).astype(np.int64), 7)
    normal = np.where((exponent >= 15) | (rounded >= 0x78), 0x7E, rounded)
    return np.where(clipped > 0, np.where(exponent <= 0, steps, normal), 0).astype(np.uint8)


def half_of_e4m3(codes: Bytes) -> Float32:
    """Half of what E4M3 bytes stand for, for the doubled element values; no sign; 0x7f is 0, as in ggml."""
    exponent, mantissa = codes.astype(np.int32) >> 3 & 15, (codes & np.uint8(7)).astype(np.float32)
    normal = np.ldexp(np.float32(1) + mantissa / np.float32(8), exponent - 8)
    found = np.where(exponent == 0, np.ldexp(mantissa, -10), normal)
    return np.where(codes == 0x7F, np.float32(0), found).astype(np.float32)


def quantize_nvfp4(rows: Float32, importance: Float32 | None = None) -> Bytes:
    """36 bytes per block of 64: four E4M3 scales, of 16 weights each 8 bytes of nibbles (weight j low, j + 8 high)."""
    with np.errstate(all="ignore"):
        x = split_blocks(rows, 16)
        scales = e4m3_bytes(np.abs(x).max(axis=1) / np.float32(6))
        levels = DOUBLED * half_of_e4m3(scales)[:, None]
        codes = np.abs(levels[:, None, :] - x[:, :, None]).argmin(axis=2)
    nibbles = (codes[:, :8] | codes[:, 8:] << 4).astype(np.uint8)
    return join_blocks(rows, scales.reshape(-1, 4), nibbles.reshape(-1, 32))


def dequantize_nvfp4(packed: Bytes, columns: int) -> Float32:
    """float32 (R, C) of packed nvfp4 rows."""
    scales, nibbles = split_bytes(packed, 4, 32)
    parts = nibbles.reshape(-1, 8)
    levels: Float32 = DOUBLED[np.concatenate([parts & 15, parts >> 4], axis=1)]
    return (levels * half_of_e4m3(scales).reshape(-1, 1)).reshape(len(packed), columns)


def dequantize_mxfp4(packed: Bytes, columns: int) -> Float32:
    """float32 (R, C) of packed mxfp4 rows."""
    exponent, nibbles = split_bytes(packed, 1, 16)
    levels: Float32 = DOUBLED[np.concatenate([nibbles & 15, nibbles >> 4], axis=1)]
    with np.errstate(over="ignore"):
        return (levels * half_scale(exponent)).reshape(len(packed), columns)
