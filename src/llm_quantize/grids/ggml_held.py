"""Between ggml's blocks and grids of any format: what a GGUF file stores, as formats of directories have it, and what
they store, as ggml's blocks.

A row of blocks is a grid as it stands (``held``). The other way (``hold``) a grid has to be one of the type: with
value = d (q - z) + m, d of a group of whole blocks,

    q4_0, q5_0, q8_0   whole q - z from -8, -16 or -128 on          m = 0, or such that m / d is whole
    q4_1, q5_1         whole q from 0 to 15 or 31                   m - d z in float16
    q2_0               whole q - z from -1 to 2; from -2 to 1 with every sign turned round
    mxfp4              E2M1 with scales of E8M0 in groups of 32
    nvfp4              E2M1 with scales of E4M3 in groups of 16, times one number for the matrix

Codes are kept as they are. Whether the values are the same to the last bit is for those to find out who decode both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm_quantize.errors import UsageError
from llm_quantize.grids import ggml_pack
from llm_quantize.grids.grid import Grid, Ladder
from llm_quantize.grids.holding import Floats, as_affine, as_integers, grouped, stored
from llm_quantize.kernels import dequantize, quantize
from llm_quantize.kernels.reference.floats import half_bits, half_values
from llm_quantize.qtypes import QTYPES
from llm_quantize.qtypes.blocks import OFFSETS, SYMMETRIC
from llm_quantize.qtypes.codebook import CODEBOOKS, SCALES

__all__ = ["held", "hold", "is_other", "pack"]

Bytes = npt.NDArray[np.uint8]
Values = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Fours:
    """E2M1 in ``group`` weights with scales of ``nested``; ``scales`` of them stand before ``codes`` bytes of codes,
    of each group in halves: weight j low, j + group / 2 high."""

    group: int
    nested: str
    scales: int
    codes: int


_MIRRORED = "q2_0"  # its levels are -1 to 2, where those of two bits are -2 to 1 elsewhere
_TERNARY = ("tq1_0", "tq2_0")
_FOURS = {"mxfp4": _Fours(32, "e8m0", 1, 16), "nvfp4": _Fours(16, "e4m3", 4, 32)}
_E2M1 = np.array(CODEBOOKS["e2m1"], np.float32)
_BYTES = "q8_0"
_HALF = 8  # codes of E2M1 with either sign


@dataclass(frozen=True)
class GgmlType:
    """What the grid types of ggml's blocks have in common, each a GridType. ``name``: the type."""

    name: str

    @property
    def block(self) -> int:
        """Columns must be a multiple of it."""
        return QTYPES[self.name].block_size

    @property
    def joint(self) -> int:
        """See ``GridType``."""
        return 1

    def encoded(self, weight: Tensor, importance: Tensor | None) -> Bytes:
        """The bytes (rows, row_bytes) that ggml's quantizer writes of ``weight`` float32 (rows, columns), columns whole
        blocks; ``importance`` float32 (columns,) is used as it is. Raises UsageError for other shapes."""
        rows = np.ascontiguousarray(weight.detach().to("cpu", torch.float32).numpy())
        channel = None
        if importance is not None:
            channel = np.ascontiguousarray(importance.detach().to("cpu", torch.float32).numpy())
        elif QTYPES[self.name].needs_importance:  # then all channels weigh the same
            channel = np.ones(weight.shape[1], np.float32)
        return quantize(self.name, rows, channel)

    def hold(self, grid: Grid, codes: Tensor) -> tuple[Grid, Tensor] | None:
        """See ``GridType``."""
        return hold(self.name, grid, codes)

    def near(self, grid: Grid, codes: Tensor) -> tuple[Grid, Tensor] | None:
        """See ``GridType``."""
        return hold(self.name, grid, codes, exact=False)


def held(qtype: str, packed: Bytes, columns: int, whole: Values | None = None) -> tuple[Grid, Tensor] | None:
    """Grid and codes uint8 (rows, ``columns``) of ``packed`` uint8 (rows, row_bytes), whose ``Grid.decode`` is what a
    decoder of GGUF gives. ``whole``: float32 (rows, 1), what the values of each row are multiplied with.

    None for a type that is no grid of this form, for scales that are no numbers, and for a ``whole`` of other types
    than nvfp4. Raises UsageError for a wrong shape.
    """
    if qtype in _FOURS:
        return _fours(_FOURS[qtype], packed, columns, whole)
    if qtype not in ggml_pack.LAYOUTS or whole is not None:
        return None
    if qtype in _TERNARY:
        found = _ternary(qtype, packed, columns)
    else:
        found = _bytes(packed, columns) if qtype == _BYTES else ggml_pack.unpack(qtype, packed, columns)
    grid = found[0]
    numbers = (part for part in (grid.d, grid.m) if part is not None)
    return found if all(bool(part.isfinite().all()) for part in numbers) else None


def _bytes(packed: Bytes, columns: int) -> tuple[Grid, Tensor]:
    """Q8_0 with all 256 levels: ggml's own encoder never writes the lowest, others may."""
    parts = packed.reshape(len(packed), -1, QTYPES[_BYTES].block_bytes)
    d = half_values(np.ascontiguousarray(parts[:, :, :2]).view("<u2").astype(np.uint16)[:, :, 0])
    codes = np.ascontiguousarray(parts[:, :, 2:]).reshape(len(packed), columns) ^ np.uint8(128)
    levels = torch.arange(-128, 128, dtype=torch.float32)
    return Grid(levels, 32, 32, torch.from_numpy(d), torch.ones(d.shape)), torch.from_numpy(codes)


def _ternary(qtype: str, packed: Bytes, columns: int) -> tuple[Grid, Tensor]:
    """The levels -1 to 2 of tq2_0, of which ggml's own encoder writes the first three, as tq1_0 has them: what the
    blocks decode to with a scale of one."""
    parts = packed.reshape(len(packed), -1, QTYPES[qtype].block_bytes)
    d = half_values(np.ascontiguousarray(parts[:, :, -2:]).view("<u2").astype(np.uint16)[:, :, 0])
    plain = np.array(parts)
    plain[:, :, -2:] = np.array([1.0], "<f2").view(np.uint8)
    places = dequantize(qtype, plain.reshape(len(packed), -1), columns) + np.float32(1)
    levels, size = torch.arange(-1, 3, dtype=torch.float32), QTYPES[qtype].block_size
    grid = Grid(levels, size, size, torch.from_numpy(d), torch.ones(d.shape))
    return grid, torch.from_numpy(places.astype(np.uint8))


def _fours(form: _Fours, packed: Bytes, columns: int, whole: Values | None) -> tuple[Grid, Tensor] | None:
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


def hold(qtype: str, grid: Grid, codes: Tensor, *, exact: bool = True) -> tuple[Grid, Tensor] | None:
    """``codes`` uint8 (rows, columns) on ``grid``, of whatever format, on a grid that ``grids.pack_ggml`` takes for
    ``qtype``; None where they are none of its, and with ``exact`` where float16 does not hold the numbers. Without, the
    numbers are the nearest of float16: codes that were chosen with care lose less so than when they are chosen again.
    """
    if grid.index is not None:  # a block is of neighbours
        return None
    if qtype in _FOURS:
        return _of_fours(_FOURS[qtype], grid, codes)
    if _is_own(qtype, grid) and _is_half(grid.d) and _is_half(grid.m):
        return grid, codes
    if grid.ladder is not None or qtype not in (*SYMMETRIC, *OFFSETS) or grid.group % QTYPES[qtype].block_size:
        return None
    size, floats = QTYPES[qtype].block_size, Floats(torch.float16, exact)
    if qtype == _MIRRORED and (own := _as_it_is(grid, size, floats)) is not None:
        return own, codes
    if qtype in OFFSETS:
        found = as_affine(grid, codes, bits=OFFSETS[qtype], size=size, floats=floats)
    else:
        bits = SYMMETRIC[qtype]
        found = as_integers(grid, codes, bits=bits, size=size, symmetric=True, zeros=(0, 0), floats=floats)
    if found is None or not (found[0].d.isfinite().all() and (found[0].m is None or found[0].m.isfinite().all())):
        return None
    if qtype != _MIRRORED:
        return found
    return replace(found[0], levels=-found[0].levels.flip(0), d=-found[0].d), 3 - found[1]


def _as_it_is(grid: Grid, size: int, floats: Floats) -> Grid | None:
    """``grid`` in groups of ``size``, where its levels are those of _MIRRORED."""
    levels = torch.from_numpy(ggml_pack.LAYOUTS[_MIRRORED].level_values())
    found = grouped(grid, size) if torch.equal(grid.levels, levels) else None
    scale = None if found is None or found.zero is not None or found.offset is not None else floats.kept(found.scale)
    return None if scale is None else Grid(levels, size, size, scale, torch.ones(scale.shape), storage=floats.storage)


def _is_half(values: Tensor | None) -> bool:
    """Whether ``values`` are finite numbers of float16."""
    return values is None or (bool(values.isfinite().all()) and stored(values, torch.float16))


def _is_own(qtype: str, grid: Grid) -> bool:
    """Whether ``grid`` is one that blocks of ``qtype`` were unpacked to."""
    layout = ggml_pack.LAYOUTS.get(qtype)
    if layout is None or grid.z is not None or grid.ladder is not None:
        return False
    same = (grid.group, grid.span) == (layout.group, layout.span) and (grid.m is None) == (layout.sub_minima == 0)
    return same and np.array_equal(grid.levels.numpy(), layout.level_values()) and grid.storage == torch.float16


def _of_fours(form: _Fours, grid: Grid, codes: Tensor) -> tuple[Grid, Tensor] | None:
    ladder = grid.ladder
    if ladder is None or grid.group != form.group or ladder.base or codes.shape[1] % (form.scales * form.group):
        return None
    alike = bool((ladder.steps == ladder.steps[:, :1]).all())  # of a row; rows of a stack differ
    same = np.array_equal(grid.levels.numpy(), _E2M1) and bool((grid.scale() == grid.d).all())
    same = same and np.array_equal(ladder.levels.numpy(), np.array(SCALES[form.nested], np.float32))
    alone = form.scales > 1 or bool((ladder.steps == 1).all())
    return (grid, codes) if same and alike and alone else None


def is_other(qtype: str, grid: Grid) -> bool:
    """Whether ``grid`` is one of ``qtype`` that ``pack`` knows, and no other module: E2M1 with both zeros, bytes with
    all of their levels."""
    return grid.levels.numel() == (len(_E2M1) if qtype in _FOURS else 256 if qtype == _BYTES else 0)


def pack(qtype: str, grid: Grid, codes: Tensor) -> Bytes:
    """The blocks, uint8 (rows, row_bytes), of what ``hold`` gave. What the scales of E2M1's groups are multiplied with
    (``Ladder.steps``) is not among them."""
    rows, places = len(codes), codes.numpy()
    if qtype not in _FOURS:
        d = half_bits(np.ascontiguousarray(grid.d.numpy().reshape(-1))).astype("<u2").view(np.uint8).reshape(-1, 2)
        stored = places.reshape(-1, 32) ^ np.uint8(128)
        return np.ascontiguousarray(np.concatenate([d, stored], axis=1).reshape(rows, -1))
    form, ladder = _FOURS[qtype], grid.ladder
    if ladder is None:
        raise UsageError(f"This number grid is not one of {qtype}", found="scales that are floats")
    stored = np.where(places < _HALF, 2 * _HALF - 1 - places, places - _HALF).astype(np.uint8)
    halves = stored.reshape(rows, -1, 2, form.group // 2)
    low = (halves[:, :, 0] | halves[:, :, 1] << np.uint8(4)).reshape(rows, -1, form.codes)
    rungs = ladder.codes.numpy().reshape(rows, -1, form.scales)
    return np.ascontiguousarray(np.concatenate([rungs, low], axis=2).reshape(rows, -1))
