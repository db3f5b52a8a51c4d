"""The 32-weight block grids q8_0, q4_0, q4_1, q5_0, q5_1 in plain numpy: what the native kernels mean.

Layouts and searches are those of ggml (ggml/src/ggml-quants.c, the format owner). Every step is float32 in ggml's
order, sums run serially over the 32 weights of a block, so the bytes are ggml's. Rows are float32 (R, C), C a multiple
of 32; ``importance`` is None or float32 (C,); results are uint8 (R, row_bytes).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from llm_quantize.kernels.reference import few_bits, floats, iq4, mxfp4, ternary
from llm_quantize.kernels.reference.blocks import (
    Bytes,
    Float32,
    Integers,
    extremes,
    importance_weights,
    join_blocks,
    low_byte,
    magic_round,
    round_half_away,
    serial_sum,
    signed_extreme,
    split_blocks,
    split_bytes,
)
from llm_quantize.kernels.reference.floats import half_bits, half_values
from llm_quantize.kernels.reference.search import search_asymmetric, weighted_grid

BLOCK = 32
SMALLEST_MAXIMUM = np.float32(1e-15)  # a block whose largest magnitude is below this is written as zero


def _reciprocal(values: Float32) -> Float32:
    """1 / v, and 0 for v = 0."""
    return np.where(values == 0, np.float32(0), np.float32(1) / values)


def _scale_bytes(scales: Float32) -> Bytes:
    return half_bits(scales).astype("<u2").view(np.uint8).reshape(len(scales), 2)


def _nibbles(codes: Integers) -> Bytes:
    """Weight j in the low and weight j + 16 in the high half of byte j."""
    return ((codes[:, :16] & 15) | (codes[:, 16:] & 15) << 4).astype(np.uint8)


def _fifth_bits(codes: Integers) -> Bytes:
    """Bit 4 of weight j as bit j of a little-endian 32-bit word."""
    return np.packbits(((codes >> 4) & 1).astype(np.uint8), axis=1, bitorder="little")


def search_symmetric(x: Float32, weight: Float32, levels: int) -> tuple[Float32, Integers]:
    """Scale and codes of a signed grid by weighted least squares over 19 starting scales (ggml's make_qx_quants).

    x, weight: (N, n). Codes run from 0 to 2 ``levels`` - 1; ``levels`` stands for zero. Returns (N,) scales, (N, n)
    codes.
    """
    extreme, magnitude = signed_extreme(x)

    def fit(inverse: Float32) -> tuple[Integers, Float32, Float32]:
        code = np.clip(magic_round(inverse[:, None] * x), -levels, levels - 1)
        level = code.astype(np.float32)
        return code, serial_sum(weight * x * level), serial_sum(weight * level * level)

    codes, cross, square = fit(np.float32(-levels) / extreme)
    scale = np.where(square != 0, cross / square, np.float32(0))
    best = scale * cross
    for step in [*range(-9, 0), *range(1, 10)]:
        inverse = -(np.float32(levels) + np.float32(0.1) * np.float32(step)) / extreme
        trial, cross, square = fit(inverse)
        better = (square > 0) & (cross * cross > best * square)
        codes = np.where(better[:, None], trial, codes)
        scale = np.where(better, cross / square, scale)
        best = np.where(better, scale * cross, best)
    empty = magnitude < SMALLEST_MAXIMUM
    return np.where(empty, np.float32(0), scale), np.where(empty[:, None], 0, codes + levels)


def quantize_q8_0(rows: Float32, importance: Float32 | None = None) -> Bytes:
    """34 bytes per block: half scale, 32 signed bytes. The importance is not used, as in ggml."""
    with np.errstate(all="ignore"):
        x = split_blocks(rows, BLOCK)
        scale = np.abs(x).max(axis=1) / np.float32(127)
        codes = low_byte(round_half_away(x * _reciprocal(scale)[:, None]))
    return join_blocks(rows, _scale_bytes(scale), codes)


def _symmetric(rows: Float32, importance: Float32 | None, levels: int) -> tuple[Float32, Integers]:
    x = split_blocks(rows, BLOCK)
    if importance is not None:
        return search_symmetric(x, importance_weights(rows, importance, BLOCK), levels)
    extreme, _ = signed_extreme(x)
    scale = extreme / np.float32(-levels)
    shifted = x * _reciprocal(scale)[:, None] + (np.float32(levels) + np.float32(0.5))
    return scale, np.minimum(low_byte(shifted).view(np.int8).astype(np.int64), 2 * levels - 1)


def _affine(rows: Float32, importance: Float32 | None, levels: int) -> tuple[Float32, Float32, Integers]:
    x = split_blocks(rows, BLOCK)
    if importance is not None:
        return search_asymmetric(x, importance_weights(rows, importance, BLOCK), weighted_grid(levels))
    low, high = extremes(x)
    scale = (high - low) / np.float32(levels)
    codes = low_byte((x - low[:, None]) * _reciprocal(scale)[:, None] + np.float32(0.5))
    return scale, low, np.minimum(codes.view(np.int8).astype(np.int64), levels)


def quantize_q4_0(rows: Float32, importance: Float32 | None = None) -> Bytes:
    """18 bytes per block: half scale, 16 bytes of nibbles; value = scale * (code - 8)."""
    with np.errstate(all="ignore"):
        scale, codes = _symmetric(rows, importance, 8)
    return join_blocks(rows, _scale_bytes(scale), _nibbles(codes))


def quantize_q4_1(rows: Float32, importance: Float32 | None = None) -> Bytes:
    """20 bytes per block: half scale, half minimum, 16 bytes of nibbles; value = scale * code + minimum."""
    with np.errstate(all="ignore"):
        scale, low, codes = _affine(rows, importance, 15)
    return join_blocks(rows, _scale_bytes(scale), _scale_bytes(low), _nibbles(codes))


def quantize_q5_0(rows: Float32, importance: Float32 | None = None) -> Bytes:
    """22 bytes per block: half scale, 32 fifth bits, 16 bytes of nibbles; value = scale * (code - 16)."""
    with np.errstate(all="ignore"):
        scale, codes = _symmetric(rows, importance, 16)
    return join_blocks(rows, _scale_bytes(scale), _fifth_bits(codes), _nibbles(codes))


def quantize_q5_1(rows: Float32, importance: Float32 | None = None) -> Bytes:
    """24 bytes per block: half scale, half minimum, 32 fifth bits, 16 bytes of nibbles."""
    with np.errstate(all="ignore"):
        scale, low, codes = _affine(rows, importance, 31)
    return join_blocks(rows, _scale_bytes(scale), _scale_bytes(low), _fifth_bits(codes), _nibbles(codes))


def _halves(part: Bytes) -> Float32:
    return half_values(np.ascontiguousarray(part).view("<u2").astype(np.uint16))


def _codes(nibbles: Bytes, fifth: Bytes | None = None) -> Float32:
    codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=1)
    if fifth is not None:
        codes = codes | np.unpackbits(fifth, axis=1, bitorder="little") << 4
    return codes.astype(np.float32)


def dequantize_q8_0(packed: Bytes, columns: int) -> Float32:
    """float32 (R, C) of packed q8_0 rows."""
    scale, codes = split_bytes(packed, 2, 32)
    return (_halves(scale) * codes.view(np.int8).astype(np.float32)).reshape(len(packed), columns)


def dequantize_q4_0(packed: Bytes, columns: int) -> Float32:
    """float32 (R, C) of packed q4_0 rows."""
    scale, nibbles = split_bytes(packed, 2, 16)
    return (_halves(scale) * (_codes(nibbles) - np.float32(8))).reshape(len(packed), columns)


def dequantize_q4_1(packed: Bytes, columns: int) -> Float32:
    """float32 (R, C) of packed q4_1 rows."""
    scale, low, nibbles = split_bytes(packed, 2, 2, 16)
    return (_halves(scale) * _codes(nibbles) + _halves(low)).reshape(len(packed), columns)


def dequantize_q5_0(packed: Bytes, columns: int) -> Float32:
    """float32 (R, C) of packed q5_0 rows."""
    scale, fifth, nibbles = split_bytes(packed, 2, 4, 16)
    return (_halves(scale) * (_codes(nibbles, fifth) - np.float32(16))).reshape(len(packed), columns)


def dequantize_q5_1(packed: Bytes, columns: int) -> Float32:
    """float32 (R, C) of packed q5_1 rows."""
    scale, low, fifth, nibbles = split_bytes(packed, 2, 2, 4, 16)
    return (_halves(scale) * _codes(nibbles, fifth) + _halves(low)).reshape(len(packed), columns)


Quantizer = Callable[[npt.NDArray[np.float32], npt.NDArray[np.float32] | None], npt.NDArray[np.uint8]]
Dequantizer = Callable[[npt.NDArray[np.uint8], int], npt.NDArray[np.float32]]

# Every type that is not a K-quant, by its ggml name.
QUANTIZE: dict[str, Quantizer] = {
    "f32": floats.quantize_f32,
    "f16": floats.quantize_f16,
    "bf16": floats.quantize_bf16,
    "q8_0": quantize_q8_0,
    "q4_0": quantize_q4_0,
    "q4_1": quantize_q4_1,
    "q5_0": quantize_q5_0,
    "q5_1": quantize_q5_1,
    "iq4_nl": iq4.quantize_iq4_nl,
    "iq4_xs": iq4.quantize_iq4_xs,
    "tq1_0": ternary.quantize_tq1_0,
    "tq2_0": ternary.quantize_tq2_0,
    "mxfp4": mxfp4.quantize_mxfp4,
    "nvfp4": mxfp4.quantize_nvfp4,
    "q1_0": few_bits.quantize_q1_0,
    "q2_0": few_bits.quantize_q2_0,
}
DEQUANTIZE: dict[str, Dequantizer] = {
    "f32": floats.dequantize_f32,
    "f16": floats.dequantize_f16,
    "bf16": floats.dequantize_bf16,
    "q8_0": dequantize_q8_0,
    "q4_0": dequantize_q4_0,
    "q4_1": dequantize_q4_1,
    "q5_0": dequantize_q5_0,
    "q5_1": dequantize_q5_1,
    "iq4_nl": iq4.dequantize_iq4_nl,
    "iq4_xs": iq4.dequantize_iq4_xs,
    "tq1_0": ternary.dequantize_tq1_0,
    "tq2_0": ternary.dequantize_tq2_0,
    "mxfp4": mxfp4.dequantize_mxfp4,
    "nvfp4": mxfp4.dequantize_nvfp4,
    "q1_0": few_bits.dequantize_q1_0,
    "q2_0": few_bits.dequantize_q2_0,
}
