"""The grids q1_0 and q2_0 in plain numpy: what the native kernels mean.

Layouts and rules are ggml's (llama.cpp b11549; read from what its library writes and decodes): q1_0 has 128 weights,
each plus or minus their mean magnitude; q2_0 has 64, whose codes 0 to 3 stand for -1 to 2 times a scale, though the
quantizer takes the largest magnitude for the scale and so never reaches 2. Rows are float32 (R, C), C whole blocks; the
importance is not used; results are uint8 (R, row_bytes).
"""

from __future__ import annotations

import numpy as np

from llm_quantize.kernels.reference.blocks import (
    Bytes,
    Float32,
    join_blocks,
    low_byte,
    round_half_away,
    split_blocks,
    split_bytes,
)
from llm_quantize.kernels.reference.floats import half_bits, half_values

SIGNS, DIGITS = 128, 64
"""Weights of a block of q1_0, of q2_0."""

_SHIFTS = np.array([0, 2, 4, 6], np.uint8)


def _half_bytes(values: Float32) -> Bytes:
    return half_bits(values).astype("<u2").view(np.uint8).reshape(-1, 2)


def _halves(part: Bytes) -> Float32:
    return half_values(part.view("<u2").astype(np.uint16))


def quantize_q1_0(rows: Float32, importance: Float32 | None = None) -> Bytes:
    """18 bytes per block: half scale (the mean magnitude, added first to last), a bit for each weight that is not below
    zero, lowest bits first."""
    with np.errstate(all="ignore"):
        x = split_blocks(rows, SIGNS)
        total = np.zeros(len(x), np.float32)
        for column in np.abs(x).T:
            total += column
        scale = (total / np.float32(SIGNS)).astype(np.float32)
        bits = np.packbits(x >= 0, axis=1, bitorder="little")
    return join_blocks(rows, _half_bytes(scale), bits)


def quantize_q2_0(rows: Float32, importance: Float32 | None = None) -> Bytes:
    """18 bytes per block: half scale (the largest magnitude), 16 bytes of four codes each, lowest bits first."""
    with np.errstate(all="ignore"):
        x = split_blocks(rows, DIGITS)
        scale = np.abs(x).max(axis=1)
        inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
        steps = x * inverse[:, None]
        codes = low_byte(round_half_away(steps)) + np.uint8(1)
        codes[~np.isfinite(steps)] = 0  # the inverse of a tiny scale: ggml clamps to the lowest code
    packed = np.bitwise_or.reduce(codes.reshape(-1, DIGITS // 4, 4) << _SHIFTS, axis=2)
    return join_blocks(rows, _half_bytes(scale), packed.astype(np.uint8))


def dequantize_q1_0(packed: Bytes, columns: int) -> Float32:
    """float32 (R, C) of packed q1_0 rows."""
    scale, bits = split_bytes(packed, 2, SIGNS // 8)
    positive = np.unpackbits(bits, axis=1, bitorder="little").astype(bool)
    values = _halves(scale)
    return np.where(positive, values, -values).astype(np.float32).reshape(len(packed), columns)


def dequantize_q2_0(packed: Bytes, columns: int) -> Float32:
    """float32 (R, C) of packed q2_0 rows."""
    scale, codes = split_bytes(packed, 2, DIGITS // 4)
    levels = (codes[:, :, None] >> _SHIFTS & np.uint8(3)).astype(np.float32) - np.float32(1)
    return (levels.reshape(-1, DIGITS) * _halves(scale)).reshape(len(packed), columns)
