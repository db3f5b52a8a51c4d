"""The non-linear 4-bit grids iq4_nl and iq4_xs in plain numpy: what the native kernels mean.

Layouts and search are ggml's (ggml/src/ggml-quants.c); the 16 levels come from the ``gguf`` package. float32
throughout, sums in ggml's order. Rows are float32 (R, C); ``importance`` is None or float32 (C,); results are uint8
(R, row_bytes).
"""

from __future__ import annotations

import numpy as np
from gguf.quants import IQ4_NL

from llm_quantize.kernels.reference.blocks import (
    Bytes,
    Float32,
    Integers,
    join_blocks,
    magic_round,
    serial_sum,
    signed_extreme,
    split_blocks,
    split_bytes,
)
from llm_quantize.kernels.reference.floats import half_bits, half_values

LEVELS: Float32 = np.array(IQ4_NL.kvalues, dtype=np.float32)
SMALLEST_MAXIMUM = np.float32(1e-15)
TRIES = 7


def nearest_level(values: Float32) -> Integers:
    """Index of the nearest of the 16 levels, the upper one of two equally near; a NaN takes the last."""
    middles = (LEVELS[:-1] + LEVELS[1:]) / np.float32(2)
    index = np.searchsorted(middles, values.ravel(), side="right").reshape(values.shape)
    return np.where(np.isnan(values), len(LEVELS) - 1, index).astype(np.int64)


def search_scale(x: Float32, weight: Float32) -> Float32:
    """The scale of each block (N, 32) with the best weighted fit among 16 starting scales; 0 for a vanishing block."""
    extreme, magnitude = signed_extreme(x)

    def fit(inverse: Float32) -> tuple[Float32, Float32]:
        level = LEVELS[nearest_level(inverse[:, None] * x)]
        return serial_sum(weight * level * x), serial_sum(weight * level * level)

    cross, square = fit(np.float32(1) / (-extreme / LEVELS[0]))
    scale = np.where(square > 0, cross / square, np.float32(0))
    best = scale * cross
    for attempt in range(-TRIES, TRIES + 1):
        cross, square = fit((np.float32(attempt) + LEVELS[0]) / extreme)
        better = (square > 0) & (cross * cross > best * square)
        scale = np.where(better, cross / square, scale)
        best = np.where(better, scale * cross, best)
    return np.where(magnitude < SMALLEST_MAXIMUM, np.float32(0), scale)


def _weights(rows: Float32, importance: Float32 | None, group: int) -> Float32:
    """x^2 without importance; importance * sqrt(2 * mean square of the group + x^2) with it: (N, 32)."""
    if importance is None:
        return split_blocks(rows * rows, 32)
    groups = split_blocks(rows, group)
    mean = serial_sum(groups * groups) * np.float32(2.0 / group)
    weight = np.sqrt(mean[:, None] + groups * groups).reshape(rows.shape)
    return split_blocks(importance * weight, 32)


def _nibbles(codes: Integers) -> Bytes:
    return ((codes[:, :16]) | codes[:, 16:] << 4).astype(np.uint8)


def _reciprocal(values: Float32) -> Float32:
    return np.where(values == 0, np.float32(0), np.float32(1) / values)


def quantize_iq4_nl(rows: Float32, importance: Float32 | None = None) -> Bytes:
    """18 bytes per block of 32: half scale, 16 bytes of nibbles; value = scale * level[code]."""
    with np.errstate(all="ignore"):
        x = split_blocks(rows, 32)
        scale = search_scale(x, _weights(rows, importance, 32))
        codes = nearest_level(_reciprocal(scale)[:, None] * x)
    return join_blocks(rows, half_bits(scale).astype("<u2").view(np.uint8).reshape(-1, 2), _nibbles(codes))


def quantize_iq4_xs(rows: Float32, importance: Float32 | None = None) -> Bytes:
    """136 bytes per block of 256: half scale, high bit pairs and low nibbles of 8 sub-scales, 128 bytes of nibbles."""
    with np.errstate(all="ignore"):
        x = split_blocks(rows, 32)
        scales = search_scale(x, _weights(rows, importance, 256)).reshape(-1, 8)
        usable = np.where(np.isnan(scales), np.float32(0), scales)
        extreme, _ = signed_extreme(usable)
        scale = -extreme / np.float32(32)
        steps = np.clip(magic_round(_reciprocal(scale)[:, None] * scales), -32, 31)
        local = scale[:, None] * steps.astype(np.float32)
        codes = nearest_level(_reciprocal(local).reshape(-1, 1) * x)
    stored = steps + 32
    low = (stored[:, 0::2] & 15) | (stored[:, 1::2] & 15) << 4
    high = ((stored >> 4) << np.arange(0, 16, 2)).sum(axis=1)
    return join_blocks(
        rows,
        half_bits(scale).astype("<u2").view(np.uint8).reshape(-1, 2),
        high.astype("<u2").view(np.uint8).reshape(-1, 2),
        low.astype(np.uint8),
        _nibbles(codes).reshape(-1, 128),
    )


def _halves(part: Bytes) -> Float32:
    return half_values(part.view("<u2").astype(np.uint16))


def _levels(nibbles: Bytes) -> Float32:
    levels: Float32 = LEVELS[np.concatenate([nibbles & 15, nibbles >> 4], axis=-1)]
    return levels


def dequantize_iq4_nl(packed: Bytes, columns: int) -> Float32:
    """float32 (R, C) of packed iq4_nl rows."""
    scale, nibbles = split_bytes(packed, 2, 16)
    return (_halves(scale) * _levels(nibbles)).reshape(len(packed), columns)


def dequantize_iq4_xs(packed: Bytes, columns: int) -> Float32:
    """float32 (R, C) of packed iq4_xs rows."""
    scale, high, low, nibbles = split_bytes(packed, 2, 2, 4, 128)
    pairs = (high.view("<u2").astype(np.int64) >> np.arange(0, 16, 2)) & 3
    lower = np.stack([low & 15, low >> 4], axis=2).reshape(-1, 8).astype(np.int64)
    local = _halves(scale) * ((lower | pairs << 4) - 32).astype(np.float32)
    return (local[:, :, None] * _levels(nibbles.reshape(-1, 8, 16))).reshape(len(packed), columns)
