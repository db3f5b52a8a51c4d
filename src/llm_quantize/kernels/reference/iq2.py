"""The 2-bit codebook grids iq2_xxs, iq2_xs and iq2_s in plain numpy: what the native kernels mean.

Layouts and search are ggml's (ggml/src/ggml-quants.c), the grids are in ``iq_grids``. Superblocks of 256 weights, eight
weights per grid entry; value = sign * scale * (1/2 + s) / 4 * magnitude. Rows are float32 (R, C); ``importance`` is
float32 (C,), or None for iq2_s alone; results are uint8 (R, row_bytes).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from llm_quantize.kernels.iq_grids import codebook, grid_codes
from llm_quantize.kernels.reference.blocks import (
    Bytes,
    Float32,
    Integers,
    join_blocks,
    serial_sum,
    split_blocks,
    split_bytes,
)
from llm_quantize.kernels.reference.floats import half_values
from llm_quantize.kernels.reference.iq_search import (
    SUPERBLOCK,
    ZERO,
    Tries,
    as_bytes,
    largest_of,
    nibble_pairs,
    pack_scales,
    positive_scale,
    search_scale,
    take_even_signs,
    take_signs,
)
from llm_quantize.kernels.reference.search import search_positive

MAGNITUDES: Float32 = np.array([8, 25, 43], np.float32)
TRIES_32 = Tries(6, 0.1, "all")
TRIES_16 = Tries(9, 0.1, "off")


def weights_of(rows: Float32, importance: Float32 | None, factor: float, size: int) -> Float32:
    """importance * sqrt(factor * mean square of the superblock + x^2); without one half that mean + x^2: (N, size)."""
    blocks = split_blocks(rows, SUPERBLOCK)
    mean = np.float32(factor) * serial_sum(blocks * blocks) / np.float32(SUPERBLOCK)
    if importance is None:
        return split_blocks(np.float32(0.25) * mean[:, None] + blocks * blocks, size)
    roots = np.sqrt(mean[:, None] + blocks * blocks).reshape(rows.shape)
    return split_blocks(importance * roots, size)


def _entries(qtype: str, codes: Integers) -> Integers:
    """Grid entries (B, 32) of codes (N, n)."""
    book = codebook(qtype)
    return book.index[book.points(codes.reshape(-1, 8))].reshape(-1, 32)


def quantize_iq2_xxs(rows: Float32, importance: Float32 | None = None) -> Bytes:
    """66 bytes per superblock: half scale; per 32 weights four grid bytes and a word of 4 x 7 signs and the scale."""
    with np.errstate(all="ignore"):
        weight = weights_of(rows, importance, 1, 32)
        x, signs = take_even_signs(split_blocks(rows, 32), weight)
        estimate, _ = search_positive(x, weight, 4)
        top = estimate * np.float32(3)
        dead = (largest_of(x) < np.float32(1e-15)) | (top <= 0)
        scale, codes = search_scale(codebook("iq2_xxs"), x, weight, top, estimate, TRIES_32)
        scale, signs = positive_scale(scale, signs, 127)
        half, steps, empty = pack_scales(np.where(dead, ZERO, scale).reshape(-1, 8), 1)
    kept = np.repeat(~(dead.reshape(-1, 8) | empty[:, None]), 4, axis=1)
    entries, signs = np.where(kept, _entries("iq2_xxs", codes), 0), np.where(kept, signs.reshape(-1, 32), 0)
    grid = (entries.reshape(-1, 8, 4) << np.arange(0, 32, 8)).sum(axis=2)
    words = (signs.reshape(-1, 8, 4) << np.arange(0, 28, 7)).sum(axis=2) | steps << 28
    return join_blocks(rows, half, as_bytes(np.stack([grid, words], axis=2).reshape(-1, 16), "<u4"))


def quantize_iq2_xs(rows: Float32, importance: Float32 | None = None) -> Bytes:
    """74 bytes per superblock: half scale, 32 words of 9 grid and 7 sign bits, 16 four-bit scales."""
    with np.errstate(all="ignore"):
        weight = weights_of(rows, importance, 1, 16)
        x, signs = take_even_signs(split_blocks(rows, 16), weight)
        top = largest_of(x)
        dead = top < np.float32(1e-15)
        scale, codes = search_scale(codebook("iq2_xs"), x, weight, top, top / np.float32(5), TRIES_16)
        scale, signs = positive_scale(scale, signs, 127)
        half, steps, empty = pack_scales(np.where(dead, ZERO, scale).reshape(-1, 16), 1)
    kept = np.repeat(~(dead.reshape(-1, 16) | empty[:, None]), 2, axis=1)
    words = np.where(kept, _entries("iq2_xs", codes) | signs.reshape(-1, 32) << 9, 0)
    return join_blocks(rows, half, as_bytes(words, "<u2"), nibble_pairs(steps).astype(np.uint8))


def quantize_iq2_s(rows: Float32, importance: Float32 | None = None) -> Bytes:
    """82 bytes per superblock: half scale, 32 low grid bytes, 32 sign bytes, 8 bytes of grid bits 8-9, 16 scales."""
    with np.errstate(all="ignore"):
        weight = weights_of(rows, importance, 2, 16)
        x, signs = take_signs(split_blocks(rows, 16))
        top = largest_of(x)
        dead = top < np.float32(1e-8)
        scale, codes = search_scale(codebook("iq2_s"), x, weight, top, top / np.float32(5), TRIES_16)
        scale, signs = positive_scale(scale, signs, 255)
        half, steps, _ = pack_scales(np.where(dead, ZERO, scale).reshape(-1, 16), 0.9875)
    kept = np.repeat(~dead.reshape(-1, 16), 2, axis=1)
    entries, signs = np.where(kept, _entries("iq2_s", codes), 0), np.where(kept, signs.reshape(-1, 32), 0)
    high = ((entries >> 8).reshape(-1, 8, 4) << np.arange(0, 8, 2)).sum(axis=2)
    parts = (entries & 255, signs, high, nibble_pairs(steps))
    return join_blocks(rows, half, *(part.astype(np.uint8) for part in parts))


_BITS = np.arange(256)[:, None] >> np.arange(8) & 1
_SIGNS: Float32 = np.where(_BITS, np.float32(-1), np.float32(1))
_PARITY: Integers = np.arange(128) | (_BITS[:128].sum(axis=1) & 1) << 7


def signs_of(bits: Integers) -> Float32:
    """+1 and -1 (..., 8) of sign bytes (...)."""
    return _SIGNS[bits]


def with_parity(bits: Integers) -> Integers:
    """Sign bytes of seven stored signs each: the eighth makes the number of negatives even."""
    return _PARITY[bits]


@cache
def magnitudes_of(qtype: str) -> Float32:
    """float32 (n, 8): the grid's entries as magnitudes."""
    return MAGNITUDES[grid_codes(qtype)[0]]


def _decode(qtype: str, scale: Bytes, steps: Integers, entries: Integers, signs: Integers) -> Float32:
    """float32 (B, 256) of half scales (B, 2), scale codes (B, 8 or 16), entries and sign bytes (B, 32)."""
    unit = half_values(scale.view("<u2").astype(np.uint16))
    local = unit * (np.float32(0.5) + steps.astype(np.float32)) * np.float32(0.25)
    local = np.repeat(local, 32 // steps.shape[1], axis=1)
    return (local[:, :, None] * magnitudes_of(qtype)[entries] * signs_of(signs)).reshape(-1, SUPERBLOCK)


def _nibbles(packed: Bytes) -> Integers:
    return np.stack([packed & 15, packed >> 4], axis=2).reshape(len(packed), -1).astype(np.int64)


def dequantize_iq2_xxs(packed: Bytes, columns: int) -> Float32:
    """float32 (R, C) of packed iq2_xxs rows."""
    scale, rest = split_bytes(packed, 2, 64)
    words = rest.view("<u4").astype(np.int64).reshape(-1, 8, 2)
    entries = (words[:, :, :1] >> np.arange(0, 32, 8) & 255).reshape(-1, 32)
    signs = with_parity((words[:, :, 1:] >> np.arange(0, 28, 7) & 127).reshape(-1, 32))
    return _decode("iq2_xxs", scale, words[:, :, 1] >> 28, entries, signs).reshape(len(packed), columns)


def dequantize_iq2_xs(packed: Bytes, columns: int) -> Float32:
    """float32 (R, C) of packed iq2_xs rows."""
    scale, rest, steps = split_bytes(packed, 2, 64, 8)
    words = rest.view("<u2").astype(np.int64)
    values = _decode("iq2_xs", scale, _nibbles(steps), words & 511, with_parity(words >> 9))
    return values.reshape(len(packed), columns)


def dequantize_iq2_s(packed: Bytes, columns: int) -> Float32:
    """float32 (R, C) of packed iq2_s rows."""
    scale, low, signs, high, steps = split_bytes(packed, 2, 32, 32, 8, 8)
    bits = (high[:, :, None].astype(np.int64) >> np.arange(0, 8, 2) & 3).reshape(-1, 32)
    entries = low.astype(np.int64) | bits << 8
    return _decode("iq2_s", scale, _nibbles(steps), entries, signs.astype(np.int64)).reshape(len(packed), columns)


QUANTIZE: dict[str, Callable[[Float32, Float32 | None], Bytes]] = {
    "iq2_xxs": quantize_iq2_xxs,
    "iq2_xs": quantize_iq2_xs,
    "iq2_s": quantize_iq2_s,
}
DEQUANTIZE: dict[str, Callable[[Bytes, int], Float32]] = {
    "iq2_xxs": dequantize_iq2_xxs,
    "iq2_xs": dequantize_iq2_xs,
    "iq2_s": dequantize_iq2_s,
}
