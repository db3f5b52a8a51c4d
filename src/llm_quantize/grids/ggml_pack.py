"""Bytes of ggml's block types to number grids and codes, and back without loss.

Layouts are those of ggml (ggml/src/ggml-common.h, the format owner). Inside, a matrix is B = rows * columns / span
blocks: codes (B, span), sub-scales and sub-minima (B, span / group), float16 d and m (B,).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm_quantize.errors import UsageError
from llm_quantize.grids.grid import Grid
from llm_quantize.kernels.reference.floats import half_bits, half_values
from llm_quantize.kernels.reference.iq4 import LEVELS as IQ4_LEVELS
from llm_quantize.kernels.reference.ternary import digits_of, packed_digits
from llm_quantize.qtypes import QTYPES

__all__ = ["LAYOUTS", "Layout", "pack", "unpack"]

Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int16]
Float32 = npt.NDArray[np.float32]

SUPERBLOCK = 256
PAIRS = np.array([0, 2, 4, 6], np.uint8)[:, None]
# Typed constants keep bytes bytes.
TWO, THREE, FOUR, SIX = np.uint8(2), np.uint8(3), np.uint8(4), np.uint8(6)
NIBBLE, SIX_BITS = np.uint8(15), np.uint8(63)


@dataclass(frozen=True)
class Layout:
    """The numbers of a type, bytes apart.

    ``lowest``: the first level, levels are consecutive from it (``levels`` of them); ``table``: those that are not.
    ``group``, ``span`` as in Grid; ``sub_scales`` smallest and largest sub-scale (both 1: there are none);
    ``sub_minima`` the largest sub-minimum, 0 where there are no offsets, 1 where a block has one float offset.
    """

    lowest: int
    levels: int
    group: int
    span: int
    sub_scales: tuple[int, int] = (1, 1)
    sub_minima: int = 0
    table: tuple[float, ...] = ()

    def level_values(self) -> Float32:
        """Levels float32 (n,), ascending."""
        if self.table:
            return np.array(self.table, np.float32)
        return np.arange(self.lowest, self.lowest + self.levels, dtype=np.float32)


_IQ4 = tuple(map(float, IQ4_LEVELS))
LAYOUTS = {
    "q1_0": Layout(0, 2, 128, 128, table=(-1.0, 1.0)),
    "q2_0": Layout(-1, 4, 64, 64),
    "tq1_0": Layout(-1, 3, SUPERBLOCK, SUPERBLOCK),
    "tq2_0": Layout(-1, 3, SUPERBLOCK, SUPERBLOCK),
    "q4_0": Layout(-8, 16, 32, 32),
    "q4_1": Layout(0, 16, 32, 32, sub_minima=1),
    "q5_0": Layout(-16, 32, 32, 32),
    "q5_1": Layout(0, 32, 32, 32, sub_minima=1),
    "q8_0": Layout(-127, 255, 32, 32),  # ggml writes no -128
    "iq4_nl": Layout(0, 16, 32, 32, table=_IQ4),
    "q2_k": Layout(0, 4, 16, SUPERBLOCK, (0, 15), 15),
    "q3_k": Layout(-4, 8, 16, SUPERBLOCK, (-32, 31)),
    "q4_k": Layout(0, 16, 32, SUPERBLOCK, (0, 63), 63),
    "q5_k": Layout(0, 32, 32, SUPERBLOCK, (0, 63), 63),
    "q6_k": Layout(-32, 64, 16, SUPERBLOCK, (-128, 127)),
    "iq4_xs": Layout(0, 16, 32, SUPERBLOCK, (-32, 31), table=_IQ4),
}

# Where the parts of a block stand: sizes in bytes, in order. d and m float16; s scales; low and high bits of codes.
_PARTS: dict[str, tuple[tuple[str, int], ...]] = {
    "q1_0": (("d", 2), ("low", 16)),
    "q2_0": (("d", 2), ("low", 16)),
    "tq1_0": (("low", 52), ("d", 2)),
    "tq2_0": (("low", 64), ("d", 2)),
    "q4_0": (("d", 2), ("low", 16)),
    "q4_1": (("d", 2), ("m", 2), ("low", 16)),
    "q5_0": (("d", 2), ("high", 4), ("low", 16)),
    "q5_1": (("d", 2), ("m", 2), ("high", 4), ("low", 16)),
    "q8_0": (("d", 2), ("low", 32)),
    "iq4_nl": (("d", 2), ("low", 16)),
    "q2_k": (("s", 16), ("low", 64), ("d", 2), ("m", 2)),
    "q3_k": (("high", 32), ("low", 64), ("s", 12), ("d", 2)),
    "q4_k": (("d", 2), ("m", 2), ("s", 12), ("low", 128)),
    "q5_k": (("d", 2), ("m", 2), ("s", 12), ("high", 32), ("low", 128)),
    "q6_k": (("low", 128), ("high", 64), ("s", 16), ("d", 2)),
    "iq4_xs": (("d", 2), ("s", 6), ("low", 128)),
}


# --- codes


def _nibbles(codes: Bytes, half: int) -> Bytes:
    """(B, n) four-bit codes: of each 2 * ``half`` codes, byte i holds code i below and code i + half above."""
    pairs = codes.reshape(len(codes), -1, 2, half)
    return (pairs[:, :, 0] | pairs[:, :, 1] << FOUR).reshape(len(codes), -1)


def _from_nibbles(part: Bytes, half: int) -> Bytes:
    runs = part.reshape(len(part), -1, half)
    return np.stack([runs & NIBBLE, runs >> FOUR], axis=2).reshape(len(part), -1)


def _two_bits(codes: Bytes) -> Bytes:
    """(B, 256) two-bit codes as (B, 64): byte l of a half has codes l, l + 32, l + 64, l + 96 from the low bits up."""
    packed: Bytes = np.bitwise_or.reduce(codes.reshape(-1, 2, 4, 32) << PAIRS, axis=2)
    return packed.reshape(-1, 64)


def _from_two_bits(part: Bytes) -> Bytes:
    return (part.reshape(-1, 2, 1, 32) >> PAIRS & THREE).reshape(-1, SUPERBLOCK)


def _planes(bits: Bytes) -> Bytes:
    """(B, 256) bits as (B, 32): bit k of byte l is that of code 32 k + l."""
    return np.packbits(bits.reshape(-1, 8, 32), axis=1, bitorder="little").reshape(-1, 32)


def _from_planes(part: Bytes) -> Bytes:
    return np.unpackbits(part.reshape(-1, 1, 32), axis=1, bitorder="little").reshape(-1, SUPERBLOCK)


def _six_bit_codes(codes: Bytes) -> Bytes:
    """Low nibbles of Q6_K, (B, 256) as (B, 128): of each 128 codes, byte i holds code i below and i + 64 above."""
    return _nibbles(codes & NIBBLE, 64)


def _pack_codes(qtype: str, codes: Bytes) -> dict[str, Bytes]:
    if qtype == "q1_0":
        return {"low": np.packbits(codes, axis=1, bitorder="little")}
    if qtype == "q2_0":
        return {"low": np.bitwise_or.reduce(codes.reshape(len(codes), -1, 4) << PAIRS[:, 0], axis=2)}
    if qtype == "tq1_0":
        return {"low": packed_digits(codes)}
    if qtype in ("q4_0", "q4_1", "iq4_nl"):
        return {"low": _nibbles(codes, 16)}
    if qtype in ("q5_0", "q5_1"):
        return {"low": _nibbles(codes & NIBBLE, 16), "high": np.packbits(codes >> FOUR, axis=1, bitorder="little")}
    if qtype == "q8_0":
        return {"low": (codes.astype(np.int16) - 127).astype(np.int8).view(np.uint8)}
    if qtype in ("q2_k", "tq2_0"):
        return {"low": _two_bits(codes)}
    if qtype == "q3_k":
        return {"low": _two_bits(codes & THREE), "high": _planes(codes >> TWO)}
    if qtype == "q4_k":
        return {"low": _nibbles(codes, 32)}
    if qtype == "q5_k":
        return {"low": _nibbles(codes & NIBBLE, 32), "high": _planes(codes >> FOUR)}
    if qtype == "q6_k":
        return {"low": _six_bit_codes(codes), "high": _two_bits(codes >> FOUR)}
    return {"low": _nibbles(codes, 16)}  # iq4_xs


def _unpack_codes(qtype: str, parts: dict[str, Bytes]) -> Bytes:
    low = parts["low"]
    if qtype == "q1_0":
        return np.unpackbits(low, axis=1, bitorder="little")
    if qtype == "q2_0":
        return (low[:, :, None] >> PAIRS[:, 0] & THREE).reshape(len(low), -1)
    if qtype == "tq1_0":
        return digits_of(low)
    if qtype == "tq2_0":
        codes = _from_two_bits(low)
        if (codes == 3).any():
            raise UsageError("A tq2_0 block holds the level 2", expected="-1 to 1, as ggml writes", found=2)
        return codes
    if qtype in ("q4_0", "q4_1", "iq4_nl", "iq4_xs"):
        return _from_nibbles(low, 16)
    if qtype in ("q5_0", "q5_1"):
        return _from_nibbles(low, 16) | np.unpackbits(parts["high"], axis=1, bitorder="little") << FOUR
    if qtype == "q8_0":
        if (low == 128).any():
            raise UsageError("A q8_0 block holds the level -128", expected="-127 to 127, as ggml writes", found=-128)
        return (low.view(np.int8).astype(np.int16) + 127).astype(np.uint8)
    if qtype == "q2_k":
        return _from_two_bits(low)
    if qtype == "q3_k":
        return _from_two_bits(low) | _from_planes(parts["high"]) << TWO
    if qtype == "q4_k":
        return _from_nibbles(low, 32)
    if qtype == "q5_k":
        return _from_nibbles(low, 32) | _from_planes(parts["high"]) << FOUR
    return _from_nibbles(low, 64) | _from_two_bits(parts["high"]) << FOUR  # q6_k


# --- sub-scales and sub-minima


def _pack_scales(qtype: str, u: Integers, v: Integers | None) -> Bytes:
    """The part "s" of every block. ``u``, ``v``: integers (B, S), in range."""
    if qtype == "q6_k":
        return u.astype(np.int8).view(np.uint8)
    if qtype == "q3_k":
        scale = (u + 32).astype(np.uint8)
        low = (scale[:, :8] & NIBBLE) | (scale[:, 8:] & NIBBLE) << FOUR
        high = np.bitwise_or.reduce((scale >> FOUR).reshape(-1, 4, 4) << PAIRS, axis=1)
        return np.concatenate([low, high], axis=1)
    if qtype == "iq4_xs":
        scale = (u + 32).astype(np.uint8)
        pairs = np.bitwise_or.reduce((scale >> FOUR).reshape(-1, 2, 4) << PAIRS[:, 0], axis=2)
        return np.concatenate([pairs, (scale[:, 0::2] & NIBBLE) | (scale[:, 1::2] & NIBBLE) << FOUR], axis=1)
    scale, minimum = u.astype(np.uint8), np.zeros_like(u, np.uint8) if v is None else v.astype(np.uint8)
    if qtype == "q2_k":
        return scale | minimum << FOUR
    low = scale[:, :4] | (scale[:, 4:] >> FOUR) << SIX
    middle = minimum[:, :4] | (minimum[:, 4:] >> FOUR) << SIX
    return np.concatenate([low, middle, (scale[:, 4:] & NIBBLE) | (minimum[:, 4:] & NIBBLE) << FOUR], axis=1)


def _unpack_scales(qtype: str, part: Bytes) -> tuple[Integers, Integers | None]:
    if qtype == "q6_k":
        return part.view(np.int8).astype(np.int16), None
    if qtype == "q3_k":
        low = np.concatenate([part[:, :8] & NIBBLE, part[:, :8] >> FOUR], axis=1)
        high = (part[:, None, 8:] >> PAIRS & THREE).reshape(-1, 16)
        return (low | high << FOUR).astype(np.int16) - np.int16(32), None
    if qtype == "iq4_xs":
        high = (part[:, :2, None] >> PAIRS[:, 0] & THREE).reshape(-1, 8)
        low = np.stack([part[:, 2:] & NIBBLE, part[:, 2:] >> FOUR], axis=2).reshape(-1, 8)
        return (low | high << FOUR).astype(np.int16) - np.int16(32), None
    if qtype == "q2_k":
        return (part & NIBBLE).astype(np.int16), (part >> FOUR).astype(np.int16)
    first, middle, last = part[:, :4], part[:, 4:8], part[:, 8:]
    scale = np.concatenate([first & SIX_BITS, (last & NIBBLE) | (first >> SIX) << FOUR], axis=1)
    minimum = np.concatenate([middle & SIX_BITS, last >> FOUR | (middle >> SIX) << FOUR], axis=1)
    return scale.astype(np.int16), minimum.astype(np.int16)


# --- whole rows


def unpack(qtype: str, packed: Bytes, columns: int) -> tuple[Grid, Tensor]:
    """Grid and codes uint8 (rows, ``columns``) of ``packed`` uint8 (rows, row_bytes), on the CPU.

    UsageError for another type, a wrong shape, or a level that ggml's quantizer never writes: -128 in q8_0, 2 in tq2_0.
    """
    layout = _layout(qtype)
    row_bytes = QTYPES[qtype].row_bytes(columns)
    if packed.ndim != 2 or packed.dtype != np.uint8 or packed.shape[1] != row_bytes:
        raise UsageError(
            "Packed rows have the wrong form",
            expected=f"(rows, {row_bytes}), uint8",
            found=(packed.shape, packed.dtype),
        )
    rows = len(packed)
    parts = _split(qtype, packed)
    codes = _unpack_codes(qtype, parts).reshape(rows, columns)
    d = _halves(parts["d"]).reshape(rows, -1)
    ones = np.ones((rows, columns // layout.group), np.float32)
    u, m, v = ones, None, None
    if "s" in parts:
        scales, minima = _unpack_scales(qtype, parts["s"])
        u = scales.astype(np.float32).reshape(rows, -1)
        if minima is not None:
            m, v = _halves(parts["m"]).reshape(rows, -1), minima.astype(np.float32).reshape(rows, -1)
    elif "m" in parts:  # value = d * code + minimum
        m, v = -_halves(parts["m"]).reshape(rows, -1), ones
    grid = Grid(
        levels=torch.from_numpy(layout.level_values().copy()),
        group=layout.group,
        span=layout.span,
        d=torch.from_numpy(d),
        u=torch.from_numpy(u),
        m=None if m is None else torch.from_numpy(m),
        v=None if v is None else torch.from_numpy(v),
    )
    return grid, torch.from_numpy(codes)


def pack(qtype: str, grid: Grid, codes: Tensor) -> Bytes:
    """Bytes uint8 (rows, row_bytes) of ``codes`` uint8 (rows, columns) on ``grid``; undoes :func:`unpack`.

    UsageError where the grid is not one of ``qtype``: other levels or groups, floats that float16 does not hold,
    sub-scales or codes out of range.
    """
    layout = _layout(qtype)
    numbers = _checked(qtype, layout, grid, codes)
    stored = np.ascontiguousarray(codes.detach().cpu().numpy())
    if stored.dtype != np.uint8 or (stored.size and int(stored.max()) >= layout.levels):
        expected = f"uint8, 0 to {layout.levels - 1}"
        raise UsageError(f"codes of a {qtype} grid are out of range", expected=expected, found=stored.dtype)
    parts = _pack_codes(qtype, stored.reshape(-1, layout.span))
    parts["d"] = _half_bytes(numbers["d"])
    if layout.sub_minima == 1:
        parts["m"] = _half_bytes(-numbers["m"])
    elif layout.sub_minima:
        parts["m"] = _half_bytes(numbers["m"])
    if layout.sub_scales != (1, 1):
        per = layout.span // layout.group
        u = numbers["u"].astype(np.int16).reshape(-1, per)
        v = numbers["v"].astype(np.int16).reshape(-1, per) if layout.sub_minima else None
        parts["s"] = _pack_scales(qtype, u, v)
    blocks = np.concatenate([parts[name] for name, _ in _PARTS[qtype]], axis=1)
    return np.ascontiguousarray(blocks.reshape(codes.shape[0], -1))


def _layout(qtype: str) -> Layout:
    if qtype not in LAYOUTS:
        raise UsageError("This type has no number grid of ggml", expected=", ".join(LAYOUTS), found=qtype)
    return LAYOUTS[qtype]


def _split(qtype: str, packed: Bytes) -> dict[str, Bytes]:
    sizes = _PARTS[qtype]
    blocks = np.ascontiguousarray(packed).reshape(-1, sum(size for _, size in sizes))
    ends = np.cumsum([size for _, size in sizes])
    pieces = np.split(blocks, ends[:-1], axis=1)
    return {name: np.ascontiguousarray(piece) for (name, _), piece in zip(sizes, pieces, strict=True)}


def _halves(part: Bytes) -> Float32:
    return half_values(part.view("<u2").astype(np.uint16))


def _half_bytes(values: Float32) -> Bytes:
    return half_bits(np.ascontiguousarray(values.reshape(-1))).astype("<u2").view(np.uint8).reshape(-1, 2)


def _checked(qtype: str, layout: Layout, grid: Grid, codes: Tensor) -> dict[str, npt.NDArray[np.float32]]:
    """The grid's parts as float32 arrays, known to be such that the format holds them."""
    wanted = layout.level_values()
    if grid.group != layout.group or grid.span != layout.span or not np.array_equal(_array(grid.levels), wanted):
        raise UsageError(
            f"This number grid is not one of {qtype}",
            expected=f"{len(wanted)} levels, groups of {layout.group}, spans of {layout.span}",
            found=f"{grid.levels.numel()} levels, groups of {grid.group}, spans of {grid.span}",
        )
    if codes.shape != grid.shape:
        raise UsageError("A matrix does not fit its number grid", expected=grid.shape, found=tuple(codes.shape))
    if grid.z is not None or (grid.m is None) != (layout.sub_minima == 0):
        raise UsageError(f"This number grid is not one of {qtype}", found="other offsets than the format has")
    found = {"d": _array(grid.d), "u": _array(grid.u)}
    bounds = {"u": layout.sub_scales}
    if grid.m is not None and grid.v is not None:
        found |= {"m": _array(grid.m), "v": _array(grid.v)}
        bounds["v"] = (1, 1) if layout.sub_minima == 1 else (0, layout.sub_minima)
    for name, (least, most) in bounds.items():
        values = found[name]
        if not ((values >= least) & (values <= most) & (values == np.rint(values))).all():
            raise UsageError(f"{name} of a {qtype} grid is out of range", expected=f"integers {least} to {most}")
    for name in ("d", "m"):
        if name in found and not np.array_equal(half_values(half_bits(found[name])), found[name], equal_nan=True):
            raise UsageError(f"{name} of a {qtype} grid is not what float16 holds", remedy="round it to float16 first")
    return found


def _array(values: Tensor) -> Float32:
    return np.ascontiguousarray(values.detach().to("cpu", torch.float32).numpy())
