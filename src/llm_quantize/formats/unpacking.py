"""What the fields of a quantized matrix mean, as arrays (the fields themselves: packed.py).

    q   codes (n, K), unsigned, in words of 32 bits with the lowest bits first: along K in GPTQ (qweight's columns of
        words) and compressed-tensors, along N in AWQ, whose every eight columns stand as 0 2 4 6 1 3 5 7
    z   zero points (n, G): qzeros, packed along N as AWQ's or in plain order; GPTQ's first format stores z - 1
    s   scales (n, G) of the group of each column: column // group, or g_idx[column]
    value = s (q - z), in float32; compressed-tensors stores signed codes plus 2^(b-1), and signed zero points so too

A stored zero point of all ones in GPTQ's first format is z = 2^b: readers that add 1 to whole words carry it into
the neighbour instead, which verify tells; this one follows the format.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llm_quantize.formats.bitpack import unpack_bits

if TYPE_CHECKING:
    from llm_quantize.models.quantized import Packed

_WORD = 32
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

Fields = Mapping[str, npt.NDArray[Any]]


def codes_of(matrix: Packed, fields: Fields, first: int, last: int) -> npt.NDArray[np.int16]:
    """q of rows [first, last), int16 (n, K); ``first`` is a multiple of 32. Signed for compressed-tensors."""
    bits, n, k = matrix.bits, last - first, matrix.columns
    if matrix.layout == "gptq":
        return unpack_bits(fields["qweight"][:, first:last], bits, k, 0).T.astype(np.int16)
    if matrix.layout == "awq":
        codes = _awq_columns(fields["qweight"][:, first * bits // _WORD : -(-last * bits // _WORD)], bits, n)
        return codes.T.astype(np.int16)
    if matrix.layout == "pack-quantized":
        return unpack_bits(fields["weight_packed"][first:last], bits, k, 1).astype(np.int16) - np.int16(1 << (bits - 1))
    return fields["weight"][first:last].astype(np.int16)


def zeros_of(matrix: Packed, fields: Fields, first: int, last: int) -> npt.NDArray[np.int16] | None:
    """z of rows [first, last), int16 (n, G); ``first`` is a multiple of 32. None: all zero."""
    bits, n = matrix.bits, last - first
    words = slice(first * bits // _WORD, -(-last * bits // _WORD))
    if matrix.layout == "gptq":
        zeros = unpack_bits(fields["qzeros"][:, words], bits, n, 1).T.astype(np.int16)
        return zeros + np.int16(1) if matrix.minus_one else zeros
    if matrix.layout == "awq":
        return _awq_columns(fields["qzeros"][:, words], bits, n).T.astype(np.int16)
    stored = fields.get("weight_zero_point")
    if stored is None:
        return None
    if matrix.layout == "pack-quantized":
        return unpack_bits(stored[words], bits, n, 0).astype(np.int16) - np.int16(1 << (bits - 1))
    whole = stored.reshape(-1, matrix.groups) if stored.size > 1 else stored.reshape(1, 1)
    return np.broadcast_to(whole, (matrix.rows, matrix.groups))[first:last].astype(np.int16)


def scales_of(matrix: Packed, fields: Fields, first: int, last: int) -> npt.NDArray[np.float32]:
    """s of rows [first, last), float32 (n, G)."""
    if matrix.layout in ("gptq", "awq"):
        by_group: npt.NDArray[np.float32] = fields["scales"][:, first:last].T
        return by_group
    stored = fields["weight_scale"]
    whole = stored.reshape(-1, matrix.groups) if stored.size > 1 else stored.reshape(1, 1)
    return np.broadcast_to(whole, (matrix.rows, matrix.groups))[first:last]


def group_index(matrix: Packed, fields: Fields) -> npt.NDArray[np.int64]:
    """int64 (K,): the group of each column."""
    stored = fields.get("g_idx", fields.get("weight_g_idx"))
    if stored is None or not stored.size:
        return np.arange(matrix.columns, dtype=np.int64) // matrix.group
    return stored.astype(np.int64)


def rows(matrix: Packed, fields: Fields, first: int, last: int) -> npt.NDArray[np.float32]:
    """Values of rows [first, last), float32 (n, K); ``first`` is a multiple of 32, ``last`` too, or the last row."""
    index = group_index(matrix, fields)
    values = codes_of(matrix, fields, first, last).astype(np.float32)
    zeros = zeros_of(matrix, fields, first, last)
    if zeros is not None:
        values -= zeros.astype(np.float32)[:, index]
    with np.errstate(invalid="ignore", over="ignore"):
        values *= scales_of(matrix, fields, first, last)[:, index]
    return np.ascontiguousarray(values)


def _awq_columns(words: npt.NDArray[np.int32], bits: int, count: int) -> npt.NDArray[np.uint8]:
    """uint8 (rows, count) of int32 (rows, count / 8): plain order of columns."""
    codes = unpack_bits(words, bits, count, 1)
    straight = np.empty_like(codes).reshape(len(codes), -1, 8)
    straight[..., _AWQ_ORDER] = codes.reshape(len(codes), -1, 8)
    return straight.reshape(len(codes), -1)
