"""Float grids in plain numpy: f32, f16, bf16, FP8 E4M3 sources, and the search for non-finite values.

The rounding is the format owner's (ggml's ``ggml_fp32_to_fp16`` and ``ggml_fp32_to_bf16``): to nearest, ties to even,
every NaN quiet. Rows are (R, C); packed rows are uint8 (R, bytes), little-endian.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Bits16 = npt.NDArray[np.uint16]


def half_bits(values: Float32) -> Bits16:
    """IEEE half bit patterns of float32 values; overflow becomes infinity, a NaN becomes 0x7e00 with its sign."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        bits = values.astype(np.float16).view(np.uint16)
    sign = (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16) & np.uint16(0x8000)
    return np.where(np.isnan(values), sign | np.uint16(0x7E00), bits)


def half_values(bits: Bits16) -> Float32:
    """float32 values of IEEE half bit patterns."""
    return bits.view(np.float16).astype(np.float32)


def bfloat16_bits(values: Float32) -> Bits16:
    """bfloat16 bit patterns of float32 values; subnormals are kept, a NaN keeps its upper bits and becomes quiet."""
    bits = values.view(np.uint32)
    upper = bits >> np.uint32(16)
    rounded = ((bits.astype(np.uint64) + np.uint64(0x7FFF) + (upper & np.uint32(1))) >> np.uint64(16)) & np.uint64(
        0xFFFF
    )
    return np.where(np.isnan(values), upper | np.uint32(64), rounded).astype(np.uint16)


def bfloat16_values(bits: Bits16) -> Float32:
    """float32 values of bfloat16 bit patterns, exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def quantize_f32(rows: Float32, importance: Float32 | None = None) -> Bytes:
    """The rows' own bytes: (R, 4 C)."""
    return np.ascontiguousarray(rows, dtype="<f4").view(np.uint8)


def quantize_f16(rows: Float32, importance: Float32 | None = None) -> Bytes:
    """(R, 2 C) bytes of IEEE half values."""
    return half_bits(np.ascontiguousarray(rows)).astype("<u2").view(np.uint8)


def quantize_bf16(rows: Float32, importance: Float32 | None = None) -> Bytes:
    """(R, 2 C) bytes of bfloat16 values."""
    return bfloat16_bits(np.ascontiguousarray(rows)).astype("<u2").view(np.uint8)


def dequantize_f32(packed: Bytes, columns: int) -> Float32:
    """float32 (R, bytes / 4)."""
    return np.ascontiguousarray(packed).view("<f4").astype(np.float32)


def dequantize_f16(packed: Bytes, columns: int) -> Float32:
    """float32 (R, bytes / 2)."""
    return half_values(np.ascontiguousarray(packed).view("<u2").astype(np.uint16))


def dequantize_bf16(packed: Bytes, columns: int) -> Float32:
    """float32 (R, bytes / 2)."""
    return bfloat16_values(np.ascontiguousarray(packed).view("<u2").astype(np.uint16))


def scan_nonfinite(rows: npt.NDArray[np.float32] | npt.NDArray[np.float16] | Bits16) -> tuple[int, int]:
    """How many values are infinite or NaN, and the flat index of the first one (-1 when there is none).

    ``rows``: float32, float16, or uint16 holding bfloat16 bits, any shape.
    """
    values = bfloat16_values(rows.view(np.uint16)) if rows.dtype == np.uint16 else rows
    bad = ~np.isfinite(values)
    where = np.flatnonzero(bad)
    return len(where), int(where[0]) if len(where) else -1
