"""Dense packing: codes of b bits, least significant bit first, in int32 words along one axis of a matrix.

Value i of a row occupies the bits b i .. b i + b - 1 of the row's bit stream, whose bit j is bit j % 32 of word
j // 32. 32 values fill exactly b words, so values of 3, 5, 6 and 7 bits cross from one word to the next. GPTQ
(AutoGPTQ's layout) and compressed-tensors' ``pack-quantized`` are both this; AWQ packs so too, in another order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["pack_bits", "packed_words", "unpack_bits"]

Codes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.int32]
_GROUP = 32
_TILE = 1 << 19  # codes that stay in the cache of a core while they are packed
_WHOLE = (1, 2, 4, 8)  # bits of codes that never cross bytes


def packed_words(count: int, bits: int) -> int:
    """Words that ``count`` values of ``bits`` bits take; the last may be part full."""
    return -(-count * bits // 32)


def pack_bits(codes: Codes, bits: int, axis: int) -> Words:
    """int32 words of ``codes`` uint8 (n, m), each below 2^``bits``, packed along ``axis`` (0 or 1).

    (ceil(n b / 32), m) for axis 0, (n, ceil(m b / 32)) for axis 1; bits beyond the last value are zero. Raises
    ValueError for codes that do not fit, another number of dimensions or another axis.
    """
    _check(codes, bits, axis)
    if codes.size and int(codes.max()) >> bits:
        raise ValueError(f"code {int(codes.max())} does not fit {bits} bits")
    count = codes.shape[axis]
    if axis == 1 and bits in _WHOLE:
        words = np.empty((len(codes), packed_words(count, bits)), np.int32)
        for start in range(0, len(codes), step := max(1, _TILE // max(1, count))):
            words[start : start + step] = _packed_bytes(codes[start : start + step], bits)
        return words
    lanes = _grouped(codes, -(-count // _GROUP) * _GROUP, _GROUP, axis)
    words = np.zeros(_group_shape(lanes.shape, bits, axis), np.uint32)
    for index in range(_GROUP):
        word, shift = divmod(index * bits, 32)
        value = lanes[_lane(index, axis)].astype(np.uint32)
        words[_lane(word, axis)] |= value << np.uint32(shift)
        if shift + bits > 32:
            words[_lane(word + 1, axis)] |= value >> np.uint32(32 - shift)
    return np.ascontiguousarray(_ungrouped(words, packed_words(count, bits), axis)).view(np.int32)


def unpack_bits(words: Words, bits: int, count: int, axis: int) -> Codes:
    """The ``count`` codes uint8 along ``axis`` that ``words`` int32 hold: the inverse of :func:`pack_bits`.

    Raises ValueError where there are not exactly the words that so many codes take.
    """
    _check(words, bits, axis)
    if words.shape[axis] != packed_words(count, bits):
        raise ValueError(f"{words.shape[axis]} words for {count} values of {bits} bits: {packed_words(count, bits)}")
    if axis == 1 and bits in _WHOLE:
        return _unpacked_bytes(words, bits, count)
    groups = -(-count // _GROUP)
    lanes = _grouped(words.view(np.uint32), groups * bits, bits, axis)
    codes = np.empty(_group_shape(lanes.shape, _GROUP, axis), np.uint8)
    mask = np.uint32((1 << bits) - 1)
    for index in range(_GROUP):
        word, shift = divmod(index * bits, 32)
        value = lanes[_lane(word, axis)] >> np.uint32(shift)
        if shift + bits > 32:
            value = value | (lanes[_lane(word + 1, axis)] << np.uint32(32 - shift))
        codes[_lane(index, axis)] = value & mask
    return np.ascontiguousarray(_ungrouped(codes, count, axis))


def _packed_bytes(codes: Codes, bits: int) -> Words:
    """``pack_bits`` along rows where codes do not cross bytes: byte by byte, which is what little-endian words are."""
    rows, count = codes.shape
    each = 8 // bits
    padded = codes
    if count % (4 * each):
        padded = np.zeros((rows, packed_words(count, bits) * 4 * each), np.uint8)
        padded[:, :count] = codes
    if bits == 4:
        pairs = np.ascontiguousarray(padded).view("<u2")
        found: Words = (pairs | pairs >> np.uint16(4)).astype(np.uint8).view("<i4").astype(np.int32, copy=False)
        return found
    packed = np.ascontiguousarray(padded[:, ::each])
    for place in range(1, each):
        packed |= padded[:, place::each] << np.uint8(place * bits)
    return packed.view("<i4").astype(np.int32, copy=False)


def _unpacked_bytes(words: Words, bits: int, count: int) -> Codes:
    """``unpack_bits`` along rows where codes do not cross bytes."""
    stored = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    if bits == 4:
        pairs = stored.astype("<u2")
        pairs |= pairs << np.uint16(4)
        pairs &= np.uint16(0x0F0F)
        return np.ascontiguousarray(pairs.view(np.uint8)[:, :count])
    each, mask = 8 // bits, np.uint8((1 << bits) - 1)
    codes = np.empty((len(words), stored.shape[1], each), np.uint8)
    for place in range(each):
        np.right_shift(stored, np.uint8(place * bits), out=codes[:, :, place])
    codes &= mask
    return np.ascontiguousarray(codes.reshape(len(words), -1)[:, :count])


def _check(values: npt.NDArray[Any], bits: int, axis: int) -> None:
    if values.ndim != 2 or axis not in (0, 1) or not 1 <= bits <= 8:
        raise ValueError(
            f"{values.ndim} dimensions, {bits} bits along axis {axis}: packing knows matrices, 1 to 8, 0 or 1"
        )


def _grouped(values: npt.NDArray[Any], padded: int, group: int, axis: int) -> npt.NDArray[Any]:
    """``values`` padded with zeros to ``padded`` along ``axis``, and that axis cut in groups."""
    missing = padded - values.shape[axis]
    if missing:
        values = np.pad(values, ((0, missing), (0, 0)) if axis == 0 else ((0, 0), (0, missing)))
    rows, columns = values.shape
    return values.reshape((-1, group, columns) if axis == 0 else (rows, -1, group))


def _group_shape(shape: tuple[int, ...], group: int, axis: int) -> tuple[int, ...]:
    return (shape[0], group, shape[2]) if axis == 0 else (shape[0], shape[1], group)


def _lane(index: int, axis: int) -> tuple[slice | int, ...]:
    return (slice(None), index) if axis == 0 else (slice(None), slice(None), index)


def _ungrouped(values: npt.NDArray[Any], count: int, axis: int) -> npt.NDArray[Any]:
    if axis == 0:
        return values.reshape(-1, values.shape[2])[:count]
    return values.reshape(values.shape[0], -1)[:, :count]
