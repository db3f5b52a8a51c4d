"""The scale searches of ggml's K-quants in plain numpy, many sub-blocks at a time.

x: (N, n) weights of N sub-blocks, weight: (N, n) their importance, codes: integers, ``levels`` the largest code.
Every step is float32 in ggml's order; sums run serially over the n weights. ``NaN`` and infinity pass through as in C.
Source: ggml/src/ggml-quants.c (make_qkx2, make_qkx3, make_qp and make_q3), the owner of these formats.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llm_quantize.kernels.reference.blocks import Float32, Integers, extremes, magic_round, serial_sum, signed_extreme

NO_SCALE_BELOW = np.float32(1e-15)  # a sub-block whose largest magnitude is below this has scale zero


@dataclass(frozen=True)
class Grid:
    """Inverse scales (first + step * s + levels) / range, s = 0..steps, that an asymmetric search tries.

    ``absolute``: the error is the sum of |difference|, else of its square. ``guarded``: inverse scales so large that
    integer rounding would wrap give the nearest code instead, as in ggml's search with an imatrix.
    """

    levels: int
    first: float
    step: float
    steps: int
    absolute: bool = False
    guarded: bool = False

    def inverse(self, s: int, spread: Float32) -> Float32:
        """The s-th inverse scale for ranges ``spread`` (N,)."""
        numerator = np.float32(self.first) + np.float32(self.step) * np.float32(s) + np.float32(self.levels)
        return numerator / spread


def weighted_grid(levels: int) -> Grid:
    """The grid that every asymmetric K-quant uses with an imatrix."""
    return Grid(levels, -0.9, 0.05, 36, guarded=True)


def search_asymmetric(x: Float32, weight: Float32, grid: Grid) -> tuple[Float32, Float32, Integers]:
    """Scale (N,), minimum <= 0 (N,) and codes (N, n) such that x is near scale * code + minimum.

    Each accepted step replaces the minimum, and the later steps start from the new one.
    """
    low, high = extremes(x)
    minimum = np.where(low > 0, np.float32(0), low)
    flat = high == minimum
    weights, moments = serial_sum(weight), serial_sum(weight * x)

    def error(scale: Float32, offset: Float32, codes: Integers) -> Float32:
        difference = scale[:, None] * codes.astype(np.float32) + offset[:, None] - x
        return serial_sum(weight * (np.abs(difference) if grid.absolute else difference * difference))

    inverse = np.float32(grid.levels) / (high - minimum)
    scale: Float32 = np.float32(1) / inverse
    codes = np.clip(magic_round(inverse[:, None] * (x - minimum[:, None])), 0, grid.levels)
    best = error(scale, minimum, codes)
    for s in range(grid.steps + 1):
        position = grid.inverse(s, high - minimum)[:, None] * (x - minimum[:, None])
        if grid.guarded:
            top = np.float32(grid.levels)
            position = np.where(position > 0, np.where(position < top, position, top), np.float32(0))
        trial = np.clip(magic_round(position), 0, grid.levels)
        level = trial.astype(np.float32)
        first, second = serial_sum(weight * level), serial_sum(weight * level * level)
        cross = serial_sum(weight * level * x)
        determinant = weights * second - first * first
        free_minimum = (second * moments - first * cross) / determinant
        positive = free_minimum > 0
        new_scale: Float32 = np.where(positive, cross / second, (weights * cross - moments * first) / determinant)
        new_minimum: Float32 = np.where(positive, np.float32(0), free_minimum)
        new_error = error(new_scale, new_minimum, trial)
        better = (determinant > 0) & (new_error < best) & ~flat
        codes = np.where(better[:, None], trial, codes)
        best = np.where(better, new_error, best)
        scale = np.where(better, new_scale, scale)
        minimum = np.where(better, new_minimum, minimum)
    return np.where(flat, np.float32(0), scale), minimum, np.where(flat[:, None], 0, codes)


def search_positive(x: Float32, weight: Float32, levels: int) -> tuple[Float32, Integers]:
    """Scale (N,) and codes (N, n) of the non-negative values of N superblocks: nine inverse scales, then moves.

    Codes are bytes in ggml and wrap as bytes do.
    """
    largest = np.zeros(len(x), np.float32)
    for index in range(x.shape[1]):
        largest = np.where(largest > x[:, index], largest, x[:, index])
    empty = largest < NO_SCALE_BELOW
    largest = np.where(empty, np.float32(1), largest)

    def nearest(inverse: Float32) -> Integers:
        return magic_round(inverse[:, None] * x)

    def error(inverse: Float32, codes: Integers) -> Float32:
        difference = x - (np.float32(1) / inverse)[:, None] * codes.astype(np.float32)
        return serial_sum(weight * difference * difference)

    inverse: Float32 = np.float32(levels) / largest
    best = error(inverse, nearest(inverse) & 255)
    for s in [*range(-4, 0), *range(1, 5)]:
        trial: Float32 = (np.float32(0.1) * np.float32(s) + np.float32(levels)) / largest
        new_error = error(trial, np.minimum(nearest(trial), levels))
        better = new_error < best
        best = np.where(better, new_error, best)
        inverse = np.where(better, trial, inverse)
    codes = np.minimum(nearest(inverse), levels)
    level = codes.astype(np.float32)
    cross, square = serial_sum(weight * x * level), serial_sum(weight * level * level)
    codes, scale = _move_codes(x, weight, codes & 255, cross, square, (None, levels))
    return np.where(empty, np.float32(0), scale), np.where(empty[:, None], 0, codes)


def search_moves(x: Float32, levels: int) -> tuple[Float32, Integers]:
    """Scale (N,) and codes 0..2 levels - 1 (N, n) of Q3_K without an imatrix: one guess, then moves, weights x^2."""
    extreme, magnitude = signed_extreme(x)
    empty = magnitude < NO_SCALE_BELOW
    extreme = np.where(empty, np.float32(1), extreme)
    inverse: Float32 = np.float32(-levels) / extreme
    codes = np.clip(magic_round(inverse[:, None] * x), -levels, levels - 1)
    level, weight = codes.astype(np.float32), x * x
    cross, square = serial_sum(weight * x * level), serial_sum(weight * level * level)
    codes, scale = _move_codes(x, weight, codes, cross, square, (-levels, levels - 1))
    return np.where(empty, np.float32(0), scale), np.where(empty[:, None], 0, codes + levels)


def _move_codes(
    x: Float32, weight: Float32, codes: Integers, cross: Float32, square: Float32, bounds: tuple[int | None, int]
) -> tuple[Integers, Float32]:
    """Up to five passes: each code in turn moves to its best value given the others, if cross^2 / square grows.

    ``bounds``: smallest code (None: codes are bytes) and largest. Returns codes and cross / square, 0 where there is
    none.
    """
    codes = codes.copy()
    smallest, largest = bounds
    for _ in range(5):
        for index in range(x.shape[1]):
            value, w = x[:, index], weight[:, index]
            level = codes[:, index].astype(np.float32)
            new_cross, new_square = cross - w * value * level, square - w * level * level
            free = new_cross > 0 if smallest is not None else (new_cross > 0) & (new_square > 0)
            moved = np.minimum(magic_round(np.divide(value * new_square, new_cross, dtype=np.float32)), largest)
            moved = moved if smallest is None else np.maximum(moved, smallest)
            free &= moved != codes[:, index]
            level = moved.astype(np.float32)
            new_cross, new_square = new_cross + w * value * level, new_square + w * level * level
            free &= new_cross * new_cross * square > cross * cross * new_square
            if smallest is not None:
                free &= new_square > 0
            codes[:, index] = np.where(free, moved & 255 if smallest is None else moved, codes[:, index])
            cross, square = np.where(free, new_cross, cross), np.where(free, new_square, square)
    return codes, np.where(square > 0, cross / square, np.float32(0))
