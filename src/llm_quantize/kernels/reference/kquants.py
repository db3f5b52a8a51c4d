"""Q2_K, Q3_K, Q4_K, Q5_K and Q6_K in plain numpy: superblocks of 256 weights, what the native kernels mean.

Layouts and searches are ggml's (ggml/src/ggml-quants.c, the format owner). Rows are float32 (R, C), C a multiple of
256; ``importance`` is None or float32 (C,); results are uint8 (R, row bytes). Inside, B = R * C / 256 superblocks of
16 sub-blocks of 16 weights (Q2_K, Q3_K, Q6_K) or 8 of 32 (Q4_K, Q5_K).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from llm_quantize.kernels.reference.blocks import (
    Bytes,
    Float32,
    Integers,
    join_blocks,
    magic_round,
    serial_sum,
    split_blocks,
    split_bytes,
)
from llm_quantize.kernels.reference.floats import half_bits, half_values
from llm_quantize.kernels.reference.legacy import search_symmetric
from llm_quantize.kernels.reference.search import (
    NO_SCALE_BELOW,
    Grid,
    search_asymmetric,
    search_moves,
    search_positive,
    weighted_grid,
)

SUPERBLOCK = 256
ZERO = np.float32(0)
SHIFTS = np.array([0, 2, 4, 6], np.uint8)
NIBBLES = np.array([0, 4], np.uint8)


def _half(values: Float32) -> tuple[Bytes, Float32]:
    """(B, 2) little-endian bytes of (B,) scales as halves, and what they stand for."""
    bits = half_bits(values)
    return bits.astype("<u2").view(np.uint8).reshape(-1, 2), half_values(bits)


def _from_half(part: Bytes) -> Float32:
    """(B, 2) bytes as (B, 1) float32."""
    return half_values(np.ascontiguousarray(part).view("<u2").astype(np.uint16))


def _weights(rows: Float32, importance: Float32, size: int, factor: float) -> Float32:
    """importance * sqrt(factor * mean square of the superblock + x^2), (sub-blocks, size)."""
    x = split_blocks(rows, SUPERBLOCK)
    mean = np.float32(factor) * serial_sum(x * x) / np.float32(SUPERBLOCK)
    spread = np.sqrt(mean[:, None] + x * x)
    return split_blocks(_importance(rows, importance, SUPERBLOCK) * spread, size)


def _importance(rows: Float32, importance: Float32, size: int) -> Float32:
    return split_blocks(np.ascontiguousarray(np.broadcast_to(importance, rows.shape)), size)


def _first_largest(scales: Float32) -> Float32:
    """Of each superblock (B, 16), the first scale of largest magnitude; NaN is passed over, and none gives 0."""
    most = magnitude = np.zeros(len(scales), np.float32)
    for index in range(scales.shape[1]):
        value = scales[:, index]
        larger = np.abs(value) > magnitude
        magnitude = np.where(larger, np.abs(value), magnitude)
        most = np.where(larger, value, most)
    return most


def _largest(values: Float32) -> Float32:
    most = np.zeros(len(values), np.float32)
    for index in range(values.shape[1]):
        most = np.where(values[:, index] > most, values[:, index], most)
    return most


def _encode(
    x: Float32, scale: Float32, offset: Float32 | None, bounds: tuple[int, int], searched: Integers
) -> Integers:
    """Codes (B, 256) for the stored sub-scales (B, s); where a sub-scale is zero the searched codes stay."""
    count, sub_blocks = scale.shape
    values = x.reshape(count, sub_blocks, -1)
    shifted = values if offset is None else values + offset[:, :, None]
    low, high = bounds
    codes = np.clip(magic_round(shifted / scale[:, :, None]), low, high) - low
    kept = searched.reshape(codes.shape)
    return np.where(scale[:, :, None] != 0, codes, kept).reshape(count, SUPERBLOCK)


def _asymmetric(
    rows: Float32, importance: Float32 | None, size: int, plain: Grid, scale_levels: int
) -> tuple[Float32, Float32, Integers, Integers, Integers]:
    """Superscale and superminimum (B,), codes of the sub-scales and of the minima (B, s), searched weight codes."""
    x = split_blocks(rows, size)
    per = SUPERBLOCK // size
    if importance is not None:
        weight = _weights(rows, importance, size, 1.0 if size == 16 else 2.0)
        scale, minimum, searched = search_asymmetric(x, weight, weighted_grid(plain.levels))
        total = serial_sum(weight).reshape(-1, per)
        top_scale, scale_codes = search_positive(scale.reshape(-1, per), total, scale_levels)
        top_minimum, minimum_codes = search_positive(-minimum.reshape(-1, per), total, scale_levels)
        return top_scale, top_minimum, scale_codes, minimum_codes, searched
    weight = np.abs(x)
    if not plain.absolute:
        weight = np.sqrt(serial_sum(x * x) / np.float32(size))[:, None] + weight
    scale, minimum, searched = search_asymmetric(x, weight, plain)
    levels = np.float32(scale_levels)
    tops, codes = [], []
    for values in (scale.reshape(-1, per), -minimum.reshape(-1, per)):
        top = _largest(values)
        inverse = np.where(top > 0, levels / top, ZERO)
        tops.append(top / levels)
        codes.append(magic_round(inverse[:, None] * values) & 255)
    return tops[0], tops[1], codes[0], codes[1], searched


def _two_bits(codes: Integers) -> Bytes:
    """(B, 256) two-bit codes as (B, 64): byte l of a half holds weights l, l + 32, l + 64 and l + 96."""
    quarters = codes.reshape(-1, 2, 4, 32) << SHIFTS[:, None]
    packed: Integers = np.bitwise_or.reduce(quarters, axis=2)
    return packed.reshape(-1, 64).astype(np.uint8)


def _from_two_bits(part: Bytes) -> Bytes:
    codes: Bytes = part.reshape(-1, 2, 1, 32) >> SHIFTS[:, None] & np.uint8(3)
    return codes.reshape(-1, SUPERBLOCK)


def _high_bits(bits: Integers) -> Bytes:
    """(B, 256) bits as (B, 32): bit k of byte l is that of weight 32 k + l."""
    return np.packbits(bits.reshape(-1, 8, 32).astype(np.uint8), axis=1, bitorder="little").reshape(-1, 32)


def _from_high_bits(part: Bytes) -> Bytes:
    return np.unpackbits(part.reshape(-1, 1, 32), axis=1, bitorder="little").reshape(-1, SUPERBLOCK)


def _pack_scales(scale: Integers, minimum: Integers) -> Bytes:
    """Eight six-bit scales and minima as (B, 12). A code above 63 spills into its neighbour's bits, as in ggml."""
    low = scale[:, :4] | (scale[:, 4:] >> 4) << 6
    middle = minimum[:, :4] | (minimum[:, 4:] >> 4) << 6
    high = (scale[:, 4:] & 15) | (minimum[:, 4:] & 15) << 4
    return np.concatenate([low, middle, high], axis=1).astype(np.uint8)


def _unpack_scales(packed: Bytes) -> tuple[Bytes, Bytes]:
    """The scales and minima (B, 8) of :func:`_pack_scales`."""
    low, middle, high = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scale = np.concatenate([low & 63, (high & 15) | (low >> 6) << 4], axis=1)
    minimum = np.concatenate([middle & 63, high >> 4 | (middle >> 6) << 4], axis=1)
    return scale.astype(np.uint8), minimum.astype(np.uint8)


def quantize_q2_k(rows: Float32, importance: Float32 | None = None) -> Bytes:
    """84 bytes per superblock: 16 bytes of 4-bit scales and minima, 64 of codes, half scale, half minimum."""
    with np.errstate(all="ignore"):
        plain = Grid(3, -0.5, 0.1, 15, absolute=True)
        top, top_minimum, scale, minimum, searched = _asymmetric(rows, importance, 16, plain, 15)
        packed = (scale | minimum << 4) & 255
        top_bytes, d = _half(top)
        minimum_bytes, dmin = _half(top_minimum)
        sub_scale = d[:, None] * (packed & 15).astype(np.float32)
        offset = dmin[:, None] * (packed >> 4).astype(np.float32)
        codes = _encode(split_blocks(rows, SUPERBLOCK), sub_scale, offset, (0, 3), searched)
    return join_blocks(rows, packed.astype(np.uint8), _two_bits(codes), top_bytes, minimum_bytes)


def dequantize_q2_k(packed: Bytes, columns: int) -> Float32:
    """Value = d * scale * code - dmin * minimum, float32 (R, columns)."""
    scales, codes, d, dmin = split_bytes(packed, 16, 64, 2, 2)
    scale = _from_half(d) * (scales & 15).astype(np.float32)
    minimum = _from_half(dmin) * (scales >> 4).astype(np.float32)
    return _decode(_from_two_bits(codes).astype(np.float32), scale, minimum, len(packed), columns)


def _decode(codes: Float32, scale: Float32, minimum: Float32 | None, rows: int, columns: int) -> Float32:
    values = scale[:, :, None] * codes.reshape(*scale.shape, -1)
    if minimum is not None:
        values = values - minimum[:, :, None]
    return values.reshape(rows, columns)


def _quantize_q45_k(rows: Float32, importance: Float32 | None, plain: Grid) -> tuple[Bytes, Bytes, Bytes, Integers]:
    """Half scale, half minimum, 12 bytes of scales, and the codes (B, 256)."""
    with np.errstate(all="ignore"):
        top, top_minimum, scale, minimum, searched = _asymmetric(rows, importance, 32, plain, 63)
        if importance is None or plain.levels == 31:
            scale, minimum = np.minimum(scale, 63), np.minimum(minimum, 63)
        packed = _pack_scales(scale, minimum)
        stored_scale, stored_minimum = _unpack_scales(packed)
        top_bytes, d = _half(top)
        minimum_bytes, dmin = _half(top_minimum)
        sub_scale = d[:, None] * stored_scale.astype(np.float32)
        offset = dmin[:, None] * stored_minimum.astype(np.float32)
        codes = _encode(split_blocks(rows, SUPERBLOCK), sub_scale, offset, (0, plain.levels), searched)
    return top_bytes, minimum_bytes, packed, codes


def _low_nibbles(codes: Integers) -> Bytes:
    """(B, 256) codes as (B, 128): of each 64 weights, byte l holds weight l below and weight l + 32 above."""
    halves = (codes & 15).reshape(-1, 4, 2, 32)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(-1, 128).astype(np.uint8)


def _from_low_nibbles(part: Bytes) -> Bytes:
    codes: Bytes = part.reshape(-1, 4, 1, 32) >> NIBBLES[:, None] & np.uint8(15)
    return codes.reshape(-1, SUPERBLOCK)


def quantize_q4_k(rows: Float32, importance: Float32 | None = None) -> Bytes:
    """144 bytes per superblock: half scale, half minimum, 12 bytes of 6-bit scales and minima, 128 of codes."""
    d, dmin, scales, codes = _quantize_q45_k(rows, importance, Grid(15, -1.0, 0.1, 20))
    return join_blocks(rows, d, dmin, scales, _low_nibbles(codes))


def dequantize_q4_k(packed: Bytes, columns: int) -> Float32:
    """Value = d * scale * code - dmin * minimum, float32 (R, columns)."""
    d, dmin, scales, codes = split_bytes(packed, 2, 2, 12, 128)
    return _decode_q45(d, dmin, scales, _from_low_nibbles(codes), packed, columns)


def _decode_q45(d: Bytes, dmin: Bytes, scales: Bytes, codes: Bytes, packed: Bytes, columns: int) -> Float32:
    scale, minimum = _unpack_scales(scales)
    sub_scale = _from_half(d) * scale.astype(np.float32)
    offset = _from_half(dmin) * minimum.astype(np.float32)
    return _decode(codes.astype(np.float32), sub_scale, offset, len(packed), columns)


def quantize_q5_k(rows: Float32, importance: Float32 | None = None) -> Bytes:
    """176 bytes per superblock: as q4_k, with 32 bytes of fifth bits before the low nibbles."""
    d, dmin, scales, codes = _quantize_q45_k(rows, importance, Grid(31, -0.5, 0.1, 15))
    return join_blocks(rows, d, dmin, scales, _high_bits(codes >> 4), _low_nibbles(codes))


def dequantize_q5_k(packed: Bytes, columns: int) -> Float32:
    """Value = d * scale * code - dmin * minimum, float32 (R, columns)."""
    d, dmin, scales, high, low = split_bytes(packed, 2, 2, 12, 32, 128)
    codes = _from_low_nibbles(low) | _from_high_bits(high) << np.uint8(4)
    return _decode_q45(d, dmin, scales, codes, packed, columns)


def _pack_six_bits(scale: Integers) -> Bytes:
    """Sixteen six-bit scales (B, 16) as (B, 12): low nibbles of j and j + 8, then high bits of j, j+4, j+8, j+12."""
    low = (scale[:, :8] & 15) | (scale[:, 8:] & 15) << 4
    high = np.bitwise_or.reduce((scale >> 4).reshape(-1, 4, 4) << SHIFTS[:, None], axis=1)
    return np.concatenate([low, high], axis=1).astype(np.uint8)


def _unpack_six_bits(packed: Bytes) -> Bytes:
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    high: Bytes = packed[:, None, 8:] >> SHIFTS[:, None] & np.uint8(3)
    scales: Bytes = low | high.reshape(-1, 16) << np.uint8(4)
    return scales


def quantize_q3_k(rows: Float32, importance: Float32 | None = None) -> Bytes:
    """110 bytes per superblock: 32 of high bits, 64 of low two bits, 12 of 6-bit scales (+32), half scale."""
    with np.errstate(all="ignore"):
        x = split_blocks(rows, 16)
        if importance is None:
            scale, searched = search_moves(x, 4)
            scales = scale.reshape(-1, 16)
            most = _first_largest(scales)
            inverse = np.float32(-32) / most
            wrapped = magic_round(inverse[:, None] * scales).astype(np.int8).astype(np.int64)
            scale_codes = np.where(most[:, None] != 0, np.clip(wrapped, -32, 31) + 32, 0)
            top = np.where(most != 0, np.float32(1) / inverse, ZERO)
        else:
            weight = _weights(rows, importance, 16, 2.0)
            scale, searched = search_symmetric(x, weight, 4)
            top, scale_codes = search_symmetric(scale.reshape(-1, 16), serial_sum(weight).reshape(-1, 16), 32)
        top_bytes, d = _half(top)
        sub_scale = d[:, None] * (scale_codes - 32).astype(np.float32)
        codes = _encode(split_blocks(rows, SUPERBLOCK), sub_scale, None, (-4, 3), searched)
    return join_blocks(rows, _high_bits(codes >> 2), _two_bits(codes & 3), _pack_six_bits(scale_codes), top_bytes)


def dequantize_q3_k(packed: Bytes, columns: int) -> Float32:
    """Value = d * (scale - 32) * (code - 4), float32 (R, columns)."""
    high, low, scales, d = split_bytes(packed, 32, 64, 12, 2)
    codes = (_from_two_bits(low) | _from_high_bits(high) << 2).astype(np.float32) - np.float32(4)
    scale = _from_half(d) * (_unpack_six_bits(scales).astype(np.float32) - np.float32(32))
    return _decode(codes, scale, None, len(packed), columns)


def quantize_q6_k(rows: Float32, importance: Float32 | None = None) -> Bytes:
    """210 bytes per superblock: 128 of low nibbles, 64 of high two bits, 16 signed byte scales, half scale."""
    with np.errstate(all="ignore"):
        x = split_blocks(rows, 16)
        weight = x * x if importance is None else _importance(rows, importance, 16)
        scale, searched = search_symmetric(x, weight, 32)
        scales = scale.reshape(-1, 16)
        most = _first_largest(scales)
        inverse = np.float32(-128) / most
        scale_codes = np.minimum(magic_round(inverse[:, None] * scales), 127).astype(np.int8)
        top_bytes, d = _half(np.float32(1) / inverse)
        sub_scale = d[:, None] * scale_codes.astype(np.float32)
        codes = _encode(split_blocks(rows, SUPERBLOCK), sub_scale, None, (-32, 31), searched)
    quarters = (codes & 15).reshape(-1, 2, 4, 32)
    low = np.stack([quarters[:, :, 0] | quarters[:, :, 2] << 4, quarters[:, :, 1] | quarters[:, :, 3] << 4], axis=2)
    blocks = np.concatenate(
        [low.reshape(-1, 128).astype(np.uint8), _two_bits(codes >> 4), scale_codes.view(np.uint8), top_bytes], axis=1
    )
    return join_blocks(rows, np.where(np.abs(most)[:, None] < NO_SCALE_BELOW, np.uint8(0), blocks))


def dequantize_q6_k(packed: Bytes, columns: int) -> Float32:
    """Value = d * scale * (code - 32), float32 (R, columns)."""
    low, high, scales, d = split_bytes(packed, 128, 64, 16, 2)
    halves = low.reshape(-1, 2, 1, 2, 32)
    nibbles = (halves >> NIBBLES[:, None, None] & np.uint8(15)).reshape(-1, SUPERBLOCK)
    codes = (nibbles | _from_two_bits(high) << 4).astype(np.float32) - np.float32(32)
    scale = _from_half(d) * scales.view(np.int8).astype(np.float32)
    return _decode(codes, scale, None, len(packed), columns)


QUANTIZE: dict[str, Callable[[Float32, Float32 | None], Bytes]] = {
    "q2_k": quantize_q2_k,
    "q3_k": quantize_q3_k,
    "q4_k": quantize_q4_k,
    "q5_k": quantize_q5_k,
    "q6_k": quantize_q6_k,
}
DEQUANTIZE: dict[str, Callable[[Bytes, int], Float32]] = {
    "q2_k": dequantize_q2_k,
    "q3_k": dequantize_q3_k,
    "q4_k": dequantize_q4_k,
    "q5_k": dequantize_q5_k,
    "q6_k": dequantize_q6_k,
}
