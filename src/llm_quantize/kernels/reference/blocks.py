"""Small steps shared by the numpy reference kernels: blocks, ggml's roundings, serial sums, importance weights."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]


def split_blocks(rows: Float32, block: int) -> Float32:
    """(R, C) as (R * C / block, block)."""
    return rows.reshape(-1, block)


def join_blocks(rows: Float32, *parts: Bytes) -> Bytes:
    """Parts (N, b) side by side, and the blocks of one row one after the other: uint8 (R, row_bytes)."""
    return np.concatenate(parts, axis=1).reshape(len(rows), -1)


def split_bytes(packed: Bytes, *sizes: int) -> list[Bytes]:
    """The parts of every block: arrays (N, size) whose sizes sum to the bytes of a block."""
    blocks = np.ascontiguousarray(packed).reshape(-1, sum(sizes))
    return [np.ascontiguousarray(part) for part in np.split(blocks, np.cumsum(sizes)[:-1], axis=1)]


def serial_sum(terms: Float32) -> Float32:
    """Sum over the last axis in float32, first to last, starting from +0 as a C loop does."""
    total = np.zeros(terms.shape[:-1], dtype=np.float32)
    for index in range(terms.shape[-1]):
        total = total + terms[..., index]
    return total


def magic_round(values: Float32) -> Integers:
    """ggml's nearest_int: adding 1.5 * 2^23 rounds to nearest even, the mantissa is the integer.

    Outside of |v| < 2^22 the result is meaningless, but it is the one that ggml then clips, so it is kept.
    """
    bits = (values + np.float32(12582912.0)).view(np.int32)
    return ((bits & 0x007FFFFF) - 0x00400000).astype(np.int64)


def round_half_away(values: Float32) -> npt.NDArray[np.float64]:
    """C's roundf, exact: nearest, ties away from zero."""
    wide = values.astype(np.float64)
    return np.copysign(np.floor(np.abs(wide) + 0.5), wide)


def low_byte(values: npt.NDArray[np.floating]) -> Bytes:
    """The low byte of a C cast to int; a value that no int can hold (infinity, NaN) gives 0, as on x86-64."""
    return np.where(np.abs(values) < 2.0**31, values, 0).astype(np.int64).astype(np.uint8)


def signed_extreme(x: Float32) -> tuple[Float32, Float32]:
    """The first value of largest magnitude in each row of (N, n), and that magnitude; NaN is passed over, as in C."""
    magnitude = np.where(np.isnan(x), np.float32(0), np.abs(x))
    at = magnitude.argmax(axis=1)[:, None]
    extreme = np.take_along_axis(x, at, axis=1)[:, 0]
    largest = np.take_along_axis(magnitude, at, axis=1)[:, 0]
    # C starts from +0 and replaces it only by something larger.
    return np.where(largest > 0, extreme, np.float32(0)), largest


def importance_weights(rows: Float32, importance: Float32, block: int) -> Float32:
    """importance * sqrt(mean of the row's squares + x^2) as (N, block); its sum is a serial float32 one."""
    mean = serial_sum(rows * rows) / np.float32(rows.shape[1])
    return split_blocks(importance * np.sqrt(mean[:, None] + rows * rows), block)


def extremes(x: Float32) -> tuple[Float32, Float32]:
    """Smallest and largest value of each row of (N, n); of -0 and +0 the one that comes first."""
    low = high = x[:, 0]
    for index in range(1, x.shape[1]):
        value = x[:, index]
        low = np.where(value < low, value, low)
        high = np.where(value > high, value, high)
    return low, high
