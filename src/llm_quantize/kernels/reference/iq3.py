"""The 3-bit codebook grids iq3_xxs and iq3_s in plain numpy: what the native kernels mean.

Layouts and search are ggml's (ggml/src/ggml-quants.c), the grids are in ``iq_grids``. Superblocks of 256 weights, four
weights per grid entry, a four-bit scale for each 32. Rows are float32 (R, C); ``importance`` is None or float32 (C,);
results are uint8 (R, row_bytes).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from llm_quantize.kernels.iq_grids import codebook, grid_codes
from llm_quantize.kernels.reference.blocks import Bytes, Float32, Integers, join_blocks, split_blocks, split_bytes
from llm_quantize.kernels.reference.floats import half_values
from llm_quantize.kernels.reference.iq2 import signs_of, weights_of, with_parity
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

MAGNITUDES: dict[str, Float32] = {
    "iq3_xxs": np.array([4, 12, 20, 28, 36, 44, 52, 62], np.float32),
    "iq3_s": np.arange(1, 16, 2, dtype=np.float32),
}
XXS_TRIES = Tries(15, 0.2, "off")
S_TRIES = Tries(9, 0.2, "all if off")


def _weights(rows: Float32, importance: Float32 | None) -> Float32:
    return split_blocks(rows * rows, 32) if importance is None else weights_of(rows, importance, 2, 32)


def _entries(qtype: str, codes: Integers) -> Integers:
    """Grid entries (B, 8, 8) of codes (N, 32)."""
    book = codebook(qtype)
    return book.index[book.points(codes.reshape(-1, 4))].reshape(-1, 8, 8)


def quantize_iq3_xxs(rows: Float32, importance: Float32 | None = None) -> Bytes:
    """98 bytes per superblock: half scale, 64 grid bytes, 8 words of 4 x 7 signs and the scale of 32 weights."""
    with np.errstate(all="ignore"):
        weight = _weights(rows, importance)
        x, signs = take_even_signs(split_blocks(rows, 32), weight)
        top = largest_of(x)
        dead = top < np.float32(1e-8)
        scale, codes = search_scale(codebook("iq3_xxs"), x, weight, top, top / np.float32(15), XXS_TRIES)
        scale, signs = positive_scale(scale, signs, 127)
        half, steps, empty = pack_scales(np.where(dead, ZERO, scale).reshape(-1, 8), 1.0125)
    kept = ~(dead.reshape(-1, 8, 1) | empty[:, None, None])
    entries = np.where(kept, _entries("iq3_xxs", codes), 0).reshape(-1, 64)
    words = np.where(kept, signs.reshape(-1, 8, 4) << np.arange(0, 28, 7), 0).sum(axis=2) | steps << 28
    return join_blocks(rows, half, entries.astype(np.uint8), as_bytes(words, "<u4"))


def quantize_iq3_s(rows: Float32, importance: Float32 | None = None) -> Bytes:
    """110 bytes per superblock: half scale, 64 low grid bytes, 8 bytes of grid bit 8, 32 sign bytes, 8 scales.

    The bytes of ggml, but for superblocks in which some sub-blocks of 32 are all zeros and others are not: ggml writes
    no grid bytes and no signs for those zeros, so what follows moves up to their place while the grid's high bits and
    the scales stay, and its own decoder reads other weights. Here every sub-block keeps its place.
    """
    with np.errstate(all="ignore"):
        weight = _weights(rows, importance)
        x, signs = take_signs(split_blocks(rows, 32))
        top = largest_of(x)
        dead = (top == 0).reshape(-1, 8)
        scale, codes = search_scale(codebook("iq3_s"), x, weight, top, top / np.float32(15), S_TRIES)
        scale, signs = positive_scale(scale, signs, 255)
        half, steps, _ = pack_scales(np.where(dead.ravel(), ZERO, scale).reshape(-1, 8), 1.033)
    entries = np.where(dead[:, :, None], 0, _entries("iq3_s", codes))
    signs = np.where(dead[:, :, None], 0, signs.reshape(-1, 8, 4))
    high = ((entries >> 8) << np.arange(8)).sum(axis=2)
    parts = ((entries & 255).reshape(-1, 64), high, signs.reshape(-1, 32), nibble_pairs(steps))
    return join_blocks(rows, half, *(part.astype(np.uint8) for part in parts))


@cache
def _magnitudes_of(qtype: str) -> Float32:
    """float32 (n, 4): the grid's entries as magnitudes."""
    return MAGNITUDES[qtype][grid_codes(qtype)[0]]


def _decode(magnitudes: Float32, local: Float32, signs: Integers) -> Float32:
    """float32 (B, 256) of magnitudes (B, 64, 4), scales (B, 8) and sign bytes (B, 32)."""
    unsigned = local[:, :, None] * magnitudes.reshape(-1, 8, 32)
    return unsigned.reshape(-1, SUPERBLOCK) * signs_of(signs).reshape(-1, SUPERBLOCK)


def _halves(scale: Bytes) -> Float32:
    return half_values(scale.view("<u2").astype(np.uint16))


def dequantize_iq3_xxs(packed: Bytes, columns: int) -> Float32:
    """float32 (R, C) of packed iq3_xxs rows: sign * scale * (1/2 + s) / 2 * magnitude."""
    scale, entries, rest = split_bytes(packed, 2, 64, 32)
    words = rest.view("<u4").astype(np.int64)
    local = _halves(scale) * (np.float32(0.5) + (words >> 28).astype(np.float32)) * np.float32(0.5)
    signs = with_parity((words[:, :, None] >> np.arange(0, 28, 7) & 127).reshape(-1, 32))
    magnitudes = _magnitudes_of("iq3_xxs")[entries]
    return _decode(magnitudes, local, signs).reshape(len(packed), columns)


def dequantize_iq3_s(packed: Bytes, columns: int) -> Float32:
    """float32 (R, C) of packed iq3_s rows: sign * scale * (1 + 2 s) * magnitude."""
    scale, low, high, signs, steps = split_bytes(packed, 2, 64, 8, 32, 4)
    bits = (high[:, :, None].astype(np.int64) >> np.arange(8) & 1).reshape(-1, 64)
    nibbles = np.stack([steps & 15, steps >> 4], axis=2).reshape(-1, 8).astype(np.float32)
    local = _halves(scale) * (np.float32(1) + np.float32(2) * nibbles)
    magnitudes = _magnitudes_of("iq3_s")[low.astype(np.int64) | bits << 8]
    return _decode(magnitudes, local, signs.astype(np.int64)).reshape(len(packed), columns)


QUANTIZE: dict[str, Callable[[Float32, Float32 | None], Bytes]] = {
    "iq3_xxs": quantize_iq3_xxs,
    "iq3_s": quantize_iq3_s,
}
DEQUANTIZE: dict[str, Callable[[Bytes, int], Float32]] = {
    "iq3_xxs": dequantize_iq3_xxs,
    "iq3_s": dequantize_iq3_s,
}
