"""The ternary grids tq1_0 and tq2_0 in plain numpy: what the native kernels mean.

Layouts are ggml's (ggml/src/ggml-quants.c): 256 weights per block, the scale is the largest magnitude. Rows are float32
(R, C), C a multiple of 256; the importance is not used; results are uint8 (R, row_bytes).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

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

BLOCK = 256


def _digits(rows: Float32) -> tuple[Bytes, Bytes]:
    """Half scales (N, 2) as bytes, and base-3 digits 0, 1, 2 for -1, 0, +1 as uint8 (N, 256)."""
    with np.errstate(all="ignore"):
        x = split_blocks(rows, BLOCK)
        scale = np.abs(x).max(axis=1)
        inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
        digits = low_byte(round_half_away(x * inverse[:, None])) + np.uint8(1)
    return half_bits(scale).astype("<u2").view(np.uint8).reshape(-1, 2), digits


def _five_digits(digits: Bytes) -> Bytes:
    """Five digits (N, 5, width), most significant first, as a fraction of 243 in 256ths, rounded up: (N, width)."""
    value = np.zeros((len(digits), digits.shape[2]), dtype=np.int64)
    for place in range(5):
        value = (value * 3 + digits[:, place]) & 255
    return ((value * 256 + 242) // 243).astype(np.uint8)


def packed_digits(digits: Bytes) -> Bytes:
    """The 52 bytes (N, 52) of a tq1_0 block before its scale, of digits uint8 (N, 256)."""
    wide = _five_digits(digits[:, :160].reshape(-1, 5, 32))
    middle = _five_digits(digits[:, 160:240].reshape(-1, 5, 16))
    last = digits[:, 240:].reshape(-1, 4, 4)
    tail = _five_digits(np.concatenate([last, np.zeros_like(last[:, :1])], axis=1))
    return np.concatenate([wide, middle, tail], axis=1)


def digits_of(packed: Bytes) -> Bytes:
    """Digits uint8 (N, 256) of ``packed_digits``."""
    powers = np.array([1, 3, 9, 27, 81], dtype=np.uint8)[:, None]
    parts = []
    for part, places in ((packed[:, :32], 5), (packed[:, 32:48], 5), (packed[:, 48:], 4)):
        shifted = part[:, None, :] * powers[:places]
        parts.append((shifted.astype(np.uint16) * 3 >> 8).reshape(len(part), -1))
    return np.concatenate(parts, axis=1).astype(np.uint8)


def quantize_tq1_0(rows: Float32, importance: Float32 | None = None) -> Bytes:
    """54 bytes per block: 48 bytes of five digits, 4 bytes of four digits, half scale."""
    scale, digits = _digits(rows)
    return join_blocks(rows, packed_digits(digits), scale)


def quantize_tq2_0(rows: Float32, importance: Float32 | None = None) -> Bytes:
    """66 bytes per block: 64 bytes of four two-bit digits (weights j, j + 32, j + 64, j + 96), half scale."""
    scale, digits = _digits(rows)
    places = (digits & 3).reshape(-1, 2, 4, 32)
    packed = places[:, :, 0] | places[:, :, 1] << 2 | places[:, :, 2] << 4 | places[:, :, 3] << 6
    return join_blocks(rows, packed.astype(np.uint8).reshape(-1, 64), scale)


def _scaled(digits: npt.NDArray[np.integer], scale: Bytes, rows: int, columns: int) -> Float32:
    factor = half_values(scale.view("<u2").astype(np.uint16))
    return ((digits.astype(np.float32) - np.float32(1)) * factor).reshape(rows, columns)


def dequantize_tq1_0(packed: Bytes, columns: int) -> Float32:
    """float32 (R, C) of packed tq1_0 rows."""
    digits, scale = split_bytes(packed, 52, 2)
    return _scaled(digits_of(digits), scale, len(packed), columns)


def dequantize_tq2_0(packed: Bytes, columns: int) -> Float32:
    """float32 (R, C) of packed tq2_0 rows."""
    codes, scale = split_bytes(packed, 64, 2)
    digits = codes.reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], dtype=np.uint8)[:, None] & 3
    return _scaled(digits.reshape(-1, BLOCK), scale, len(packed), columns)
