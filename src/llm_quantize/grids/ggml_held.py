"""Between ggml's blocks and grids of any format: what a GGUF file stores, as formats of directories have it, and what
they store, as ggml's blocks.

A row of blocks is a grid as it stands (``held``). The other way (``blocks``) a grid has to be one of the type: with
value = d (q - z) + m, d of a group of whole blocks,

    q4_0, q5_0, q8_0   whole q - z from -8, -16 or -128 on          m = 0, or such that m / d is whole
    q4_1, q5_1         whole q from 0 to 15 or 31                   m - d z in float16
    q2_0               whole q - z from -1 to 2, or from -2 to 1 under a scale of the other sign
    mxfp4              E2M1 with scales of E8M0 in groups of 32
    nvfp4              E2M1 with scales of E4M3 in groups of 16, times one number for the matrix

Codes are kept as they are; d and m become float16, so that what they do not hold there is rounded. Whether the values
are the same is for those to find out who decode both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm_quantize.grids import ggml_pack
from llm_quantize.grids.grid import Grid, Ladder
from llm_quantize.kernels.reference.floats import half_bits, half_values
from llm_quantize.qtypes import QTYPES
from llm_quantize.qtypes.codebook import CODEBOOKS, SCALES

__all__ = ["Blocks", "blocks", "held"]

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Integers:
    """Whole levels from ``least`` to ``most``; ``offset``: a block has one, and levels are counted from it."""

    least: int
    most: int
    offset: bool = False


@dataclass(frozen=True)
class _Fours:
    """E2M1 in ``group`` weights with scales of ``nested``; ``scales`` of them stand before ``codes`` bytes of codes,
    of each group in halves: weight j low, j + group / 2 high."""

    group: int
    nested: str
    scales: int
    codes: int


_INTEGERS = {
    "q2_0": _Integers(-1, 2),
    "q4_0": _Integers(-8, 7),
    "q5_0": _Integers(-16, 15),
    "q8_0": _Integers(-128, 127),
    "q4_1": _Integers(0, 15, offset=True),
    "q5_1": _Integers(0, 31, offset=True),
}
_FOURS = {"mxfp4": _Fours(32, "e8m0", 1, 16), "nvfp4": _Fours(16, "e4m3", 4, 32)}
_E2M1 = np.array(CODEBOOKS["e2m1"], np.float32)
_HALF = 8  # codes of E2M1 with either sign


@dataclass(frozen=True)
class Blocks:
    """``packed``: uint8 (rows, row_bytes). ``whole``: the number that all of them are multiplied with."""

    packed: Bytes
    whole: float = 1.0


def held(qtype: str, packed: Bytes, columns: int, whole: Floats | None = None) -> tuple[Grid, Tensor] | None:
    """Grid and codes uint8 (rows, ``columns``) of ``packed`` uint8 (rows, row_bytes), whose ``Grid.decode`` is what a
    decoder of GGUF gives. ``whole``: float32 (rows, 1), what the values of each row are multiplied with.

    None for a type that is no grid of this form, for scales that are no numbers, and for a ``whole`` of other types
    than nvfp4. Raises UsageError for a wrong shape.
    """
    if qtype in _FOURS:
        return _fours(_FOURS[qtype], packed, columns, whole)
    if qtype not in ggml_pack.LAYOUTS or whole is not None:
        return None
    found = _bytes(packed, columns) if qtype == "q8_0" else ggml_pack.unpack(qtype, packed, columns)
    grid = found[0]
    numbers = (part for part in (grid.d, grid.m) if part is not None)
    return found if all(bool(part.isfinite().all()) for part in numbers) else None


def _bytes(packed: Bytes, columns: int) -> tuple[Grid, Tensor]:
    """Q8_0 with all 256 levels: ggml's own encoder never writes the lowest, others may."""
    parts = packed.reshape(len(packed), -1, QTYPES["q8_0"].block_bytes)
    d = half_values(np.ascontiguousarray(parts[:, :, :2]).view("<u2").astype(np.uint16)[:, :, 0])
    codes = np.ascontiguousarray(parts[:, :, 2:]).reshape(len(packed), columns) ^ np.uint8(128)
    levels = torch.arange(-128, 128, dtype=torch.float32)
    return Grid(levels, 32, 32, torch.from_numpy(d), torch.ones(d.shape)), torch.from_numpy(codes)


def _fours(form: _Fours, packed: Bytes, columns: int, whole: Floats | None) -> tuple[Grid, Tensor] | None:
    rows, levels = len(packed), np.array(SCALES[form.nested], np.float32)
    parts = packed.reshape(rows, -1, form.scales + form.codes)
    rungs = np.ascontiguousarray(parts[:, :, : form.scales]).reshape(rows, -1)
    if (rungs >= len(levels)).any():
        return None
    low = np.ascontiguousarray(parts[:, :, form.scales :]).reshape(rows, -1, form.group // 2)
    codes = np.concatenate([low & np.uint8(15), low >> np.uint8(4)], axis=2).reshape(rows, columns)
    places = np.where(codes < _HALF, _HALF + codes, 2 * _HALF - 1 - codes).astype(np.uint8)
    steps = np.ones((1, 1), np.float32) if whole is None else whole
    each = np.broadcast_to(steps, rungs.shape).astype(np.float32)
    ladder = Ladder(0.0, torch.from_numpy(each), torch.from_numpy(levels), torch.from_numpy(rungs))
    d = ladder.decode()
    if not bool(d.isfinite().all()):
        return None
    table, ones = torch.from_numpy(_E2M1.copy()), torch.ones(d.shape)
    grid = Grid(table, form.group, form.group, d, ones, storage=torch.float32, ladder=ladder)
    return grid, torch.from_numpy(places)


def blocks(qtype: str, grid: Grid, codes: Tensor) -> Blocks | None:
    """The blocks of ``qtype`` with the codes of a grid, uint8 (rows, columns), whatever format it is of; None where
    they are none of its."""
    if qtype in _FOURS:
        return _of_fours(_FOURS[qtype], grid, codes)
    if qtype in _INTEGERS and codes.shape[1] % QTYPES[qtype].block_size == 0:
        found = _of_integers(qtype, _INTEGERS[qtype], grid, codes)
        if found is not None:
            return Blocks(found)
    if _is_own(qtype, grid):
        return Blocks(ggml_pack.pack(qtype, grid, codes))
    return None


def _is_own(qtype: str, grid: Grid) -> bool:
    """Whether ``grid`` is one that blocks of ``qtype`` were unpacked to."""
    layout = ggml_pack.LAYOUTS.get(qtype)
    if layout is None or grid.z is not None or (grid.group, grid.span) != (layout.group, layout.span):
        return False
    same = np.array_equal(grid.levels.numpy(), layout.level_values())
    return same and (grid.m is None) == (layout.sub_minima == 0) and grid.ladder is None


def _of_fours(form: _Fours, grid: Grid, codes: Tensor) -> Blocks | None:
    rows, columns = codes.shape
    if grid.ladder is None or grid.group != form.group or grid.ladder.base or columns % (form.scales * form.group):
        return None
    steps = grid.ladder.steps.to(torch.float64).numpy()
    whole = float(np.float32(steps.flat[0]))
    same = np.array_equal(grid.levels.numpy(), _E2M1) and (steps == steps.flat[0]).all()
    table = np.array(SCALES[form.nested], np.float32)
    if not same or not np.array_equal(grid.ladder.levels.numpy(), table) or (form.nested == "e8m0" and whole != 1):
        return None
    places = codes.numpy()
    stored = np.where(places < _HALF, 2 * _HALF - 1 - places, places - _HALF).astype(np.uint8)
    halves = stored.reshape(rows, -1, 2, form.group // 2)
    low = (halves[:, :, 0] | halves[:, :, 1] << np.uint8(4)).reshape(rows, -1, form.codes)
    rungs = grid.ladder.codes.numpy().reshape(rows, -1, form.scales)
    return Blocks(np.ascontiguousarray(np.concatenate([rungs, low], axis=2).reshape(rows, -1)), whole)


def _of_integers(qtype: str, form: _Integers, grid: Grid, codes: Tensor) -> Bytes | None:
    """The bytes of a grid of whole numbers; None where it is of another kind, or goes beyond the type's."""
    block = QTYPES[qtype].block_size
    if grid.ladder is not None or not grid.uniform or (grid.group % block and grid.group != codes.shape[1]):
        return None
    scale = grid.scale().numpy()
    away = np.zeros(scale.shape, np.float32) if grid.z is None else grid.z.numpy()
    away = away - float(grid.levels[0])  # of the code: q = code - away
    offset = _per_group(grid, grid.m)
    whole = _whole(scale, offset)
    if whole is not None:
        away, offset = away + whole, None
    numbers = codes.numpy().astype(np.float32).reshape(*scale.shape, -1)
    if form.offset:
        minimum = -scale * away if offset is None else -offset - scale * away
    elif offset is not None:
        return None
    else:
        numbers, minimum = numbers - away[:, :, None], None
        low, high = float(numbers.min(initial=0)), float(numbers.max(initial=0))
        if (low < form.least or high > form.most) and -high >= form.least and -low <= form.most:
            numbers, scale = -numbers, -scale
    wrong = (numbers < form.least) | (numbers > form.most) | (numbers != np.rint(numbers))
    if wrong.any():
        return None
    repeat = grid.group // block
    m = None if minimum is None else np.repeat(minimum, repeat, axis=1)
    return _joined(qtype, numbers.reshape(codes.shape) - form.least, np.repeat(scale, repeat, axis=1), m)


def _per_group(grid: Grid, values: Tensor | None) -> Floats | None:
    if values is None or grid.v is None:
        return None
    return (values.repeat_interleave(grid.span // grid.group, dim=1) * grid.v).numpy()


def _whole(scale: Floats, offset: Floats | None) -> Floats | None:
    """offset / scale, where offsets are whole numbers of steps; None where one is not, or there are none."""
    if offset is None:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.where(scale == 0, np.float32(0), offset / scale)
    right = np.isfinite(steps) & (steps == np.rint(steps)) & (np.abs(steps) <= 255) & (steps * scale == offset)
    return np.asarray(steps, np.float32) if right.all() else None


def _joined(qtype: str, codes: Floats, d: Floats, m: Floats | None) -> Bytes | None:
    """The bytes of ``codes`` (rows, columns), counted from the lowest, under scales and minima (rows, blocks)."""
    rows = len(codes)
    parts = [_half(one) for one in (d, m) if one is not None]
    flat = codes.astype(np.uint8).reshape(-1, QTYPES[qtype].block_size)
    if qtype == "q8_0":
        return np.ascontiguousarray(np.concatenate([*parts, flat ^ np.uint8(128)], axis=1).reshape(rows, -1))
    packed = ggml_pack.code_bytes(qtype, flat)
    return np.ascontiguousarray(np.concatenate([*parts, *packed], axis=1).reshape(rows, -1))


def _half(values: Floats) -> Bytes:
    """(blocks, 2): float16 numbers, the largest that there is for what is beyond it."""
    most = np.float32(65504)
    bounded = np.clip(np.ascontiguousarray(values, np.float32).reshape(-1), -most, most)
    return half_bits(bounded).astype("<u2").view(np.uint8).reshape(-1, 2)
