"""The search of the I-quants iq2_* and iq3_* in plain numpy, many sub-blocks at a time.

x: (N, n) weights of N sub-blocks whose signs were taken away, weight: (N, n) their importance, codes: (N, n); a group
is the 8 or 4 codes that one grid entry holds, and code c stands for the level 2 c + 1. Every step is float32 in ggml's
order (ggml/src/ggml-quants.c, the owner of these formats); sums run serially.

ggml stops the process where no neighbour has a finite error, or where a scale is NaN: values around 1e19 and more. Here
the first neighbour is taken, and the scale counts as zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llm_quantize.kernels.iq_grids import Codebook
from llm_quantize.kernels.reference.blocks import Bytes, Float32, Integers, magic_round, serial_sum
from llm_quantize.kernels.reference.floats import half_bits

SUPERBLOCK = 256
ZERO = np.float32(0)
LARGEST = np.finfo(np.float32).max

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Tries:
    """Inverse scales (top + step * s) / largest magnitude, s = -count..count, top the largest level.

    ``again``: which groups of a sub-block are rounded once more with the scale that was found: "all", those that were
    "off" the grid, or all of them if any was off the grid ("all if off").
    """

    count: int
    step: float
    again: str


def take_signs(x: Float32) -> tuple[Float32, Integers]:
    """Magnitudes (N, n) and sign bytes (N, n / 8), bit i for weight i of eight; -0 counts as positive."""
    negative = ~(x >= 0)
    bits = (negative.reshape(len(x), -1, 8) << np.arange(8)).sum(axis=2)
    return np.where(negative, -x, x), bits


def take_even_signs(x: Float32, weight: Float32) -> tuple[Float32, Integers]:
    """The same with an even number of negative signs among eight, of which seven are kept: (N, n), (N, n / 8).

    Where it is odd, the weight whose sign costs least (the first of them) keeps its value with the other sign.
    """
    magnitude, bits = take_signs(x)
    cost = (weight * x * x).reshape(len(x), -1, 8)
    cheapest, least = np.zeros(bits.shape, np.int64), cost[:, :, 0]
    for index in range(1, 8):
        less = cost[:, :, index] < least
        cheapest, least = np.where(less, index, cheapest), np.where(less, cost[:, :, index], least)
    odd = (bits[:, :, None] >> np.arange(8) & 1).sum(axis=2) % 2 == 1
    turned = (np.arange(8) == cheapest[:, :, None]) & odd[:, :, None]
    magnitude = np.where(turned.reshape(x.shape), -magnitude, magnitude)
    return magnitude, (bits ^ np.where(odd, 1 << cheapest, 0)) & 127


def largest_of(x: Float32) -> Float32:
    """The largest value of each row (N, n), by C's MAX: a NaN replaces what came before it."""
    largest = x[:, 0]
    for index in range(1, x.shape[1]):
        largest = np.where(largest > x[:, index], largest, x[:, index])
    return largest


def nearest_entries(book: Codebook, points: Integers, x: Float32, root: Float32, scale: Float32) -> Integers:
    """Numbers (M,) of the neighbours of ``points`` (M,) with the least sum of root * (scale * level - x)^2."""
    begin, count = book.start[points], book.start[points + 1] - book.start[points]
    best, entry = np.full(len(points), LARGEST), book.neighbours[begin]
    for position in range(count.max(initial=0)):
        (open_,) = np.nonzero(count > position)
        tried = book.neighbours[begin[open_] + position]
        difference = scale[open_, None] * (2 * book.codes[tried] + 1).astype(np.float32) - x[open_]
        error = serial_sum(root[open_] * difference * difference)
        better = error < best[open_]
        best[open_] = np.where(better, error, best[open_])
        entry[open_] = np.where(better, tried, entry[open_])
    return entry


def round_to_grid(
    book: Codebook, x: Float32, root: Float32, inverse: Float32, scale: Float32
) -> tuple[Integers, Flags]:
    """Codes (N, n) of the grid for the inverse scales (N,), and which groups (N, groups) were on it to begin with."""
    size = book.codes.shape[1]
    free = magic_round(np.float32(0.5) * (inverse[:, None] * x - np.float32(1)))
    codes = np.clip(free, 0, book.levels - 1).reshape(len(x), -1, size)
    points = book.points(codes)
    on_grid = book.index[points] >= 0
    row, group = np.nonzero(~on_grid)
    values, roots = x.reshape(codes.shape)[row, group], root.reshape(codes.shape)[row, group]
    codes[row, group] = book.codes[nearest_entries(book, points[row, group], values, roots, scale[row])]
    return codes.reshape(x.shape), on_grid


def fit(x: Float32, weight: Float32, codes: Integers) -> tuple[Float32, Float32]:
    """sum(w x level) and sum(w level^2), each (N,)."""
    level = (2 * codes + 1).astype(np.float32)
    return serial_sum(weight * x * level), serial_sum(weight * level * level)


def search_scale(
    book: Codebook, x: Float32, weight: Float32, top: Float32, first: Float32, tries: Tries
) -> tuple[Float32, Integers]:
    """Scale (N,) and codes (N, n): the best (sum w x level)^2 / sum w level^2 of the tries, then one refinement.

    ``top`` (N,): the value that the largest level is to meet; ``first`` (N,): the scale if no try fits at all.
    """
    root = np.sqrt(weight)
    groups = x.shape[1] // book.codes.shape[1]
    scale, best, codes = first, np.zeros(len(x), np.float32), np.zeros(x.shape, np.int64)
    on_grid = np.full((len(x), groups), tries.again == "off")
    for s in range(-tries.count, tries.count + 1):
        inverse = (np.float32(2 * book.levels - 1) + np.float32(s) * np.float32(tries.step)) / top
        trial, trial_on_grid = round_to_grid(book, x, root, inverse, np.float32(1) / inverse)
        cross, square = fit(x, weight, trial)
        better = (square > 0) & (cross * cross > best * square)
        scale = np.where(better, cross / square, scale)
        best = np.where(better, scale * cross, best)
        codes = np.where(better[:, None], trial, codes)
        on_grid = np.where(better[:, None], trial_on_grid, on_grid)
    which = np.ones_like(on_grid) if tries.again == "all" else np.logical_not(on_grid)
    if tries.again == "all if off":
        which |= np.any(which, axis=1, keepdims=True)
    redo = (scale > 0) & np.any(which, axis=1)
    trial, _ = round_to_grid(book, x, root, np.float32(1) / scale, scale)
    replaced = np.repeat(which & redo[:, None], x.shape[1] // groups, axis=1)
    codes = np.where(replaced, trial, codes)
    cross, square = fit(x, weight, codes)
    return np.where(redo & (square > 0), cross / square, scale), codes


def positive_scale(scale: Float32, signs: Integers, mask: int) -> tuple[Float32, Integers]:
    """A negative scale (N,) and all its signs (N, n / 8) turned; a NaN becomes zero."""
    negative = scale < 0
    turned = np.where(negative, -scale, scale)
    return np.where(np.isnan(turned), ZERO, turned), np.where(negative[:, None], ~signs & mask, signs)


def pack_scales(scales: Float32, fudge: float) -> tuple[Bytes, Integers, Flags]:
    """Half scales (B, 2), four-bit scale codes (B, s) of the sub-blocks' scales (B, s), and which blocks are empty."""
    largest = np.zeros(len(scales), np.float32)
    for index in range(scales.shape[1]):
        largest = np.where(largest > scales[:, index], largest, scales[:, index])
    empty = largest == 0
    unit: Float32 = np.where(empty, ZERO, largest / np.float32(31))
    inverse: Float32 = np.float32(1) / unit
    codes = np.clip(magic_round(np.float32(0.5) * (inverse[:, None] * scales - np.float32(1))), 0, 15)
    halves = half_bits(unit * np.float32(fudge))
    return halves.astype("<u2").view(np.uint8).reshape(-1, 2), np.where(empty[:, None], 0, codes), empty


def as_bytes(values: Integers, dtype: str) -> Bytes:
    """Little-endian bytes (B, k * size of dtype) of integers (B, k)."""
    return values.astype(dtype).view(np.uint8).reshape(len(values), -1)


def nibble_pairs(codes: Integers) -> Integers:
    """Bytes (B, k / 2) of four-bit codes (B, k), the first of two below."""
    return codes[:, 0::2] | codes[:, 1::2] << 4
