"""The ternary grids iq1_s and iq1_m in plain numpy: what the native kernels mean.

Layouts and search are ggml's (ggml/src/ggml-quants.c); the 2048 grid points come from the ``gguf`` package. A weight is
``scale * (-1, 0 or 1, plus or minus 1/8)``. The search sorts a block and tries every pair of cuts that makes three
groups of it; then each eight codes move to a grid point. float32 throughout, sums in ggml's order. Rows are float32
(R, C); ``importance`` is None (ggml: only for iq1_m) or float32 (C,); results are uint8 (R, row_bytes).

Equal weights of a block keep their order in the sort. ggml calls C's ``qsort``, which does not promise that, but that
of glibc is a merge sort; with another, ggml's own bytes may differ where weights are equal. Where sums overflow ggml
may stop the process; here the first neighbour is taken then, and a scale that is no number becomes 0.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from llm_quantize.kernels import iq_grids
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

SHIFT = np.float32(0.125)
LEVELS: Float32 = np.array([[-0.875, 0.125, 1.125], [-1.125, -0.125, 0.875]], dtype=np.float32)
SMALLEST_S, SMALLEST_M = np.float32(1e-12), np.float32(1e-7)
FACTOR_S, FACTOR_M = np.float32(1.125), np.float32(1.1125)
HIGHEST = np.float32(np.finfo(np.float32).max)


class _Best:
    """The best candidate so far of N blocks: ggml's comparison, one candidate after the other."""

    def __init__(self, count: int) -> None:
        self.score = np.full(count, -HIGHEST, np.float32)
        self.scale = np.zeros(count, np.float32)
        self.cuts = np.full((count, 2), -1)
        self.shift = np.zeros(count, np.int64)

    def consider(self, cross: Float32, square: Float32, cuts: tuple[int, int], shift: int) -> None:
        better = (square > 0) & (cross * cross > self.score * square)
        scale = cross / square
        self.scale = np.where(better, scale, self.scale)
        self.score = np.where(better, scale * cross, self.score)
        self.cuts[better] = cuts
        self.shift[better] = shift


def _ascending(x: Float32) -> Integers:
    """The places of (N, n) weights in ascending order, equal ones as they come."""
    return x.argsort(axis=1, kind="stable")


def _cuts(count: int) -> Iterator[tuple[int, int]]:
    return ((first, second) for first in range(count + 1) for second in range(first, count + 1))


def _prefix(terms: Float32) -> list[Float32]:
    """Serial sums of the first 0, 1, ..., n terms of (N, n), from +0."""
    sums = [np.zeros(len(terms), np.float32)]
    for index in range(terms.shape[1]):
        sums.append(sums[-1] + terms[:, index])
    return sums


def _search_s(cross: Float32, weight: Float32) -> _Best:
    """Sorted products and weights (N, 32); one shift for the block."""
    best = _Best(len(cross))
    sum_x, sum_w = _prefix(cross), _prefix(weight)
    for first, second in _cuts(32):
        xs = sum_x[first], sum_x[second] - sum_x[first], sum_x[32] - sum_x[second]
        ws = sum_w[first], sum_w[second] - sum_w[first], sum_w[32] - sum_w[second]
        for shift, levels in enumerate(LEVELS):
            terms = [x * level for x, level in zip(xs, levels, strict=True)]
            squares = [w * level * level for w, level in zip(ws, levels, strict=True)]
            best.consider(terms[0] + terms[1] + terms[2], squares[0] + squares[1] + squares[2], (first, second), shift)
    return best


def _search_m(cross: Float32, weight: Float32, upper: npt.NDArray[np.bool_]) -> _Best:
    """Sorted products and weights (N, 16); a shift for each half. ``upper``: the weight is of the second half."""
    best = _Best(len(cross))
    zero = np.float32(0)
    sums_x = [_prefix(np.where(upper == half, cross, zero)) for half in (False, True)]
    sums_w = [_prefix(np.where(upper == half, weight, zero)) for half in (False, True)]
    squared = LEVELS * LEVELS
    for first, second in _cuts(16):
        # A cut lowers all before it by one level: total times the top level, less what is before each cut.
        cross_of = [[x[16] * levels[2] - (x[first] + x[second]) for levels in LEVELS] for x in sums_x]
        square_of = [
            [
                w[16] * levels[2] * levels[2] + w[first] * (sq[0] - sq[1]) + w[second] * (sq[1] - sq[2])
                for levels, sq in zip(LEVELS, squared, strict=True)
            ]
            for w in sums_w
        ]
        for shift in range(4):
            low, high = shift >> 1, shift & 1
            best.consider(
                cross_of[0][low] + cross_of[1][high], square_of[0][low] + square_of[1][high], (first, second), shift
            )
    return best


def _codes(order: Integers, best: _Best) -> Integers:
    """Codes 0..2 of (N, n) weights whose ascending order is ``order``."""
    place = np.arange(order.shape[1])
    sorted_codes = (place >= best.cuts[:, :1]).astype(np.int64) + (place >= best.cuts[:, 1:])
    codes = np.empty_like(sorted_codes)
    np.put_along_axis(codes, order, sorted_codes, axis=1)
    return codes


def _grid_entries(codes: Integers, x: Float32, weight: Float32, scale: Float32, levels: Float32) -> Integers:
    """The entry of each eight codes (M, 8): their own, or the neighbour with the least weighted error.

    ``x`` and ``weight`` (M, 8), ``scale`` (M,), ``levels`` (M, 3).
    """
    book = iq_grids.codebook("iq1_s")
    points = book.points(codes)
    entries = book.index[points]
    for row in np.flatnonzero(entries < 0):
        near = book.neighbours[book.start[points[row]] : book.start[points[row] + 1]]
        difference = scale[row] * levels[row][book.codes[near]] - x[row]
        error = serial_sum(weight[row] * difference * difference)
        entries[row] = near[np.argmin(np.where(error < HIGHEST, error, HIGHEST))]
    return entries


def _entry_codes(entries: Integers) -> Integers:
    """Codes 0..2 (N, 8 k) of entries (N, k)."""
    return iq_grids.codebook("iq1_s").codes[entries].reshape(len(entries), -1)


def _level_of(codes: Integers, shift: Integers) -> Float32:
    """Levels (N, n) of codes (N, n): shift code (N,) of one bit for the block, or (N, 2) of one bit for each half."""
    spread = shift.reshape(len(codes), -1).repeat(codes.shape[1] // shift.reshape(len(codes), -1).shape[1], axis=1)
    found: Float32 = LEVELS[spread, codes]
    return found


def _fit(x: Float32, weight: Float32, halves: int, smallest: np.float32) -> tuple[Float32, Integers, Integers]:
    """Scale >= 0 (N,), grid entries (N, n / 8) and shift bits (N, halves) of blocks (N, n); 0 where nothing fits."""
    order = _ascending(x)
    sorted_weight = np.take_along_axis(weight, order, axis=1)
    cross = sorted_weight * np.take_along_axis(x, order, axis=1)
    best = _search_s(cross, sorted_weight) if halves == 1 else _search_m(cross, sorted_weight, order >= 8)
    codes = _codes(order, best)
    shift = best.shift[:, None] >> np.arange(halves)[::-1] & 1
    flipped = best.scale < 0
    codes[flipped], shift[flipped] = 2 - codes[flipped], 1 - shift[flipped]
    scale = np.abs(best.scale)
    eights = x.shape[1] // 8
    entries = _grid_entries(
        codes.reshape(-1, 8),
        x.reshape(-1, 8),
        weight.reshape(-1, 8),
        scale.repeat(eights),
        LEVELS[shift.repeat(eights // halves, axis=1).reshape(-1)],
    ).reshape(-1, eights)
    final = _entry_codes(entries)
    level = _level_of(final, shift)
    total, square = serial_sum(weight * level * x), serial_sum(weight * level * level)
    refit = (final != codes).any(axis=1) & (total > 0) & (square > 0)
    scale = np.where(refit, total / square, scale)
    scale = np.where(np.isnan(scale), np.float32(0), scale)
    nothing = (np.abs(x).max(axis=1) < smallest) | (best.cuts[:, 0] < 0)
    scale[nothing], entries[nothing], shift[nothing] = 0, 0, 0
    return scale, entries, shift


def _weights(rows: Float32, importance: Float32 | None, block: int) -> Float32:
    """x^2, or importance * sqrt(twice the mean square of the superblock + x^2): (N, block)."""
    if importance is None:
        return split_blocks(rows * rows, block)
    groups = split_blocks(rows, 256)
    mean = np.float32(2) * serial_sum(groups * groups) / np.float32(256)
    return split_blocks(importance * np.sqrt(mean[:, None] + groups * groups).reshape(rows.shape), block)


def _steps(scales: Float32) -> tuple[Float32, Integers, npt.NDArray[np.bool_]]:
    """Of the sub-scales (S, n): the unit (S,), the steps 0..7 (2 step + 1 units each), and whether any is not 0."""
    largest = np.zeros(len(scales), np.float32)
    for block in range(scales.shape[1]):
        largest = np.where(largest > scales[:, block], largest, scales[:, block])
    unit = largest / np.float32(15)
    inverse = np.float32(1) / unit
    steps = np.clip(magic_round(np.float32(0.5) * (inverse[:, None] * scales - np.float32(1))), 0, 7)
    some = largest != 0
    return np.where(some, unit, np.float32(0)), np.where(some[:, None], steps, 0), some


def _words(values: Integers) -> Bytes:
    """Little-endian 16-bit words (N, n) as bytes (N, 2 n)."""
    return values.astype("<u2").view(np.uint8).reshape(len(values), -1)


def quantize_iq1_s(rows: Float32, importance: Float32 | None = None) -> Bytes:
    """50 bytes per block of 256: half scale; 32 low bytes of the entries of eights; 8 words, one per 32 weights.

    A word holds four times 3 high bits of an entry, 3 bits of the step s and the sign of the shift;
    value = scale * (2 s + 1) * (code - 1 + shift).
    """
    with np.errstate(all="ignore"):
        scales, entries, shift = _fit(split_blocks(rows, 32), _weights(rows, importance, 32), 1, SMALLEST_S)
        unit, steps, some = _steps(scales.reshape(-1, 8))
        scale = half_bits(unit * FACTOR_S)
    high = (entries >> 8 << np.arange(0, 12, 3)).sum(axis=1).reshape(-1, 8)
    words = high | np.where(some[:, None], steps | shift.reshape(-1, 8) << 3, 0) << 12
    return join_blocks(
        rows, _words(scale.astype(np.int64)[:, None]), (entries & 255).astype(np.uint8).reshape(-1, 32), _words(words)
    )


def quantize_iq1_m(rows: Float32, importance: Float32 | None = None) -> Bytes:
    """56 bytes per block of 256: 32 low bytes of the entries of eights; 16 bytes with 3 high bits of two entries and
    the signs of their shifts; 4 words with four 3-bit steps of 16 weights each and a nibble of the half scale."""
    with np.errstate(all="ignore"):
        x, weight = split_blocks(rows, 16), _weights(rows, importance, 16)
        scales, entries, shift = _fit(x, weight, 2, SMALLEST_M)
        unit, steps, some = _steps(scales.reshape(-1, 16))
        odd = (2 * steps + 1).astype(np.float32).reshape(-1, 1)
        level = _level_of(_entry_codes(entries), shift) * odd
        cross = serial_sum((weight * level * x).reshape(-1, 256))
        square = serial_sum((weight * level * level).reshape(-1, 256))
        scale = half_bits(np.where(square > 0, cross / square, unit) * FACTOR_M).astype(np.int64)
    scale = np.where(some, scale, 0)
    signs = np.where(some.repeat(16)[:, None], shift << 3, 0)
    packed = (entries >> 8 | signs) << np.array([0, 4])
    words = (steps.reshape(-1, 4, 4) << np.arange(0, 12, 3)).sum(axis=2)
    words |= (scale[:, None] >> np.arange(0, 16, 4) & 15) << 12
    return join_blocks(
        rows,
        (entries & 255).astype(np.uint8).reshape(-1, 32),
        packed.sum(axis=1).astype(np.uint8).reshape(-1, 16),
        _words(words),
    )


def _values(local: Float32, entries: Integers, minus: npt.NDArray[np.bool_]) -> Float32:
    """local * (code - 1 + shift): local (N, k), entries (N, k) and sign of the shift (N, k) of eights: (N, k, 8)."""
    codes = iq_grids.codebook("iq1_s").codes[entries]
    shift = np.where(minus, -SHIFT, SHIFT)[:, :, None]
    return local[:, :, None] * ((codes - 1).astype(np.float32) + shift)


def dequantize_iq1_s(packed: Bytes, columns: int) -> Float32:
    """float32 (R, C) of packed iq1_s rows."""
    scale, low, high = split_bytes(packed, 2, 32, 16)
    words = high.view("<u2").astype(np.int64)
    local = half_values(scale.view("<u2").astype(np.uint16)) * (2 * (words >> 12 & 7) + 1).astype(np.float32)
    entries = low.reshape(-1, 8, 4) | (words[:, :, None] >> np.arange(0, 12, 3) & 7) << 8
    minus = (words & 0x8000 != 0).repeat(4, axis=1)
    return _values(local.repeat(4, axis=1), entries.reshape(-1, 32), minus).reshape(len(packed), columns)


def dequantize_iq1_m(packed: Bytes, columns: int) -> Float32:
    """float32 (R, C) of packed iq1_m rows."""
    low, high, tail = split_bytes(packed, 32, 16, 8)
    words = tail.view("<u2").astype(np.int64)
    scale = half_values((words >> 12 << np.arange(0, 16, 4)).sum(axis=1).astype(np.uint16))
    steps = (words[:, :, None] >> np.arange(0, 12, 3) & 7).reshape(-1, 16)
    local = scale[:, None] * (2 * steps + 1).astype(np.float32)
    nibbles = np.stack([high & 15, high >> 4], axis=2).reshape(-1, 32).astype(np.int64)
    return _values(local.repeat(2, axis=1), low | (nibbles & 7) << 8, nibbles >= 8).reshape(len(packed), columns)


QUANTIZE = {"iq1_s": quantize_iq1_s, "iq1_m": quantize_iq1_m}
DEQUANTIZE = {"iq1_s": dequantize_iq1_s, "iq1_m": dequantize_iq1_m}
