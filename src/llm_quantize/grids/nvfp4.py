"""The grids of ggml's NVFP4 and MXFP4: twice the E2M1 values, one scale for 16 or 32 weights, which is a code of 8 bits
itself (E4M3, or E8M0: powers of two).

    value = d * level,  d half of what the code stands for, as the levels are doubled

NVFP4 has 127 numbers from 0 to 224 for d, and no scale for the whole tensor in these bytes: what is below 2^-11 of a
level of 1 is lost, and 2688 is the largest magnitude. ``plain`` is ggml's quantizer, unpacked; ``fit`` looks for the
rung of small importance-weighted error near it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm_quantize.errors import UsageError
from llm_quantize.grids.codebook import best_rung
from llm_quantize.grids.ggml_held import GgmlType
from llm_quantize.grids.grid import Grid, Ladder, row_tiles
from llm_quantize.grids.integer import TILE, channel_importance
from llm_quantize.grids.search import Levels, fine_factors, from_lanes, lanes, symmetric_scales, weighted_error
from llm_quantize.kernels.reference.mxfp4 import DOUBLED, half_of_e4m3, half_scale
from llm_quantize.qtypes import QTYPES

__all__ = ["FOURS", "FoursGridType", "pack", "unpack"]

Bytes = npt.NDArray[np.uint8]

LEVELS = np.concatenate([-DOUBLED[1:8][::-1], DOUBLED[:8]]).astype(np.float32)
"""float32 (15,), ascending; of the two zeros of the format the one that its quantizer writes."""

_ZERO = 7  # the place of zero among LEVELS
_FACTORS = (tuple(1.1 * 1.06**-step for step in range(12)), fine_factors(4))


@dataclass(frozen=True, eq=False)
class Fours:
    """How a type stores E2M1: in groups of ``group`` weights, each with one of ``rungs`` float32 for d, by its number;
    ``scales`` such numbers stand before the nibbles of a block, those of each group in halves: weight j low,
    j + group / 2 high."""

    group: int
    scales: int
    rungs: npt.NDArray[np.float32]


FOURS: Mapping[str, Fours] = {
    "nvfp4": Fours(16, 4, half_of_e4m3(np.arange(127, dtype=np.uint8))),
    "mxfp4": Fours(32, 1, half_scale(np.arange(256, dtype=np.uint8))),
}


@dataclass(frozen=True)
class FoursGridType(GgmlType):
    """A GridType; ``name``: of FOURS."""

    def plain(self, weight: Tensor, importance: Tensor | None) -> tuple[Grid, Tensor]:
        """Grid and codes uint8 (rows, columns) of the bytes that ggml's quantizer writes; importance is not used."""
        grid, codes = unpack(self.name, self.encoded(weight, importance), weight.shape[1])
        return grid.to(weight.device), codes.to(weight.device)

    def fit(self, weight: Tensor, importance: Tensor | None, *, refine: bool = True) -> Grid:
        """The plain grid, and with ``refine`` the best one found near it: no group's weighted error is larger.

        Any subset of the rows gives the same numbers as the whole.
        """
        grid = self.plain(weight, importance)[0]
        if not refine or weight.shape[0] == 0:
            return grid
        h, levels, scales = channel_importance(importance, weight), Levels.of(grid.levels), grid.d.clone()
        for first, last in row_tiles(weight.shape[0], weight.shape[1], TILE):
            x, w = (lanes(part, grid.group) for part in (weight[first:last], self.weights(weight[first:last], h)))
            start = grid.d[first:last].reshape(-1)
            found = symmetric_scales(x, w, levels, _FACTORS, torch.float32, signed=False)
            found = best_rung(x, w, levels, found, _ladder(self.name, start))
            better = weighted_error(x, w, found, levels) < weighted_error(x, w, start, levels)
            scales[first:last] = from_lanes(torch.where(better, found, start), last - first)
        return grid.with_floats(scales)

    def weights(self, x: Tensor, importance: Tensor) -> Tensor:
        """w (rows, columns): ``importance`` (columns,) alone."""
        return importance.expand(x.shape)


def _ladder(name: str, like: Tensor) -> Ladder:
    return Ladder.of(0.0, torch.ones_like(like), torch.from_numpy(FOURS[name].rungs.copy()).to(like.device))


def unpack(name: str, packed: Bytes, columns: int) -> tuple[Grid, Tensor]:
    """Grid and codes uint8 (rows, ``columns``) of ``packed`` uint8 (rows, row_bytes), on the CPU.

    UsageError for a wrong shape, or bytes that ggml's quantizer never writes: a negative zero, a scale that is none of
    the type's.
    """
    rows, size, form = len(packed), QTYPES[name].row_bytes(columns), FOURS[name]
    if packed.ndim != 2 or packed.dtype != np.uint8 or packed.shape[1] != size:
        expected = f"(rows, {size}), uint8"
        raise UsageError("Packed rows have the wrong form", expected=expected, found=(packed.shape, packed.dtype))
    blocks = np.ascontiguousarray(packed).reshape(-1, QTYPES[name].block_bytes)
    scales, low = blocks[:, : form.scales].reshape(rows, -1), blocks[:, form.scales :].reshape(-1, form.group // 2)
    nibbles = np.concatenate([low & np.uint8(15), low >> np.uint8(4)], axis=1)
    if (scales >= len(form.rungs)).any() or (nibbles == 8).any():
        found = f"a scale above the code {len(form.rungs) - 1}, or a negative zero"
        raise UsageError(f"An {name} block holds what ggml never writes", found=found)
    magnitude = (nibbles & np.uint8(7)).astype(np.int16)
    codes = (_ZERO + np.where(nibbles > 8, -magnitude, magnitude)).astype(np.uint8).reshape(rows, columns)
    d = torch.from_numpy(form.rungs[scales])
    ladder = _ladder(name, d)
    held = Ladder(ladder.base, ladder.steps, ladder.levels, torch.from_numpy(scales.copy()))
    levels, ones = torch.from_numpy(LEVELS.copy()), torch.ones_like(d)
    grid = Grid(levels, form.group, form.group, d, ones, storage=torch.float32, ladder=held)
    return grid, torch.from_numpy(codes)


def pack(name: str, grid: Grid, codes: Tensor) -> Bytes:
    """Bytes uint8 (rows, row_bytes) of ``codes`` uint8 (rows, columns) on ``grid``; undoes :func:`unpack`. UsageError
    for a grid of another kind."""
    form = FOURS[name]
    if grid.ladder is None or grid.group != form.group or not np.array_equal(grid.levels.cpu().numpy(), LEVELS):
        expected = f"groups of {form.group}, scales that are codes of 8 bits"
        raise UsageError(f"This number grid is not one of {name}", expected=expected)
    if codes.shape != grid.shape:
        raise UsageError("A matrix does not fit its number grid", expected=grid.shape, found=tuple(codes.shape))
    steps = codes.detach().cpu().numpy().astype(np.int16) - _ZERO
    nibbles = (np.abs(steps) | np.where(steps < 0, 8, 0)).astype(np.uint8).reshape(-1, 2, form.group // 2)
    low = (nibbles[:, 0] | nibbles[:, 1] << np.uint8(4)).reshape(-1, form.scales * form.group // 2)
    scales = grid.ladder.codes.detach().cpu().numpy().reshape(-1, form.scales)
    return np.ascontiguousarray(np.concatenate([scales, low], axis=1).reshape(len(codes), -1))
