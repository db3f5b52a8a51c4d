"""Grids of ggml's block types: the owner's own answer, and better ones in the same bytes.

``plain`` is ggml's quantizer, unpacked. ``fit`` starts from its grid and lowers the weighted error

    E = sum_i w_i (x_i - value_i)^2,  w_i = h_i sqrt(k * mean x^2 + x_i^2)

with h the importance of the input channels (ggml's imatrix), and ggml's own k and mean for each type. Blocks of 32 with
float16 numbers alone are searched here, superblocks of 256 in ``ggml_grid_super``. A block keeps ggml's grid unless
its error falls.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llm_quantize.grids.ggml_held import GgmlType
from llm_quantize.grids.ggml_pack import LAYOUTS, unpack
from llm_quantize.grids.ggml_super import fit_superblocks
from llm_quantize.grids.grid import Grid, row_tiles
from llm_quantize.grids.integer import channel_importance
from llm_quantize.grids.search import (
    Levels,
    affine_scales,
    divided,
    fine_factors,
    fold,
    from_lanes,
    lanes,
    symmetric_scales,
)

__all__ = ["GgmlGridType"]

TILE = 1 << 18  # weights searched at once
# (k, weights of the mean): 0 is the whole row. Q6_K goes by the importance alone, as in ggml.
SPREAD: dict[str, tuple[float, int]] = {
    **dict.fromkeys(("q4_0", "q4_1", "q5_0", "q5_1", "q8_0"), (1.0, 0)),
    "iq4_nl": (2.0, 32),
    "q2_k": (1.0, 256),
    **dict.fromkeys(("q3_k", "q4_k", "q5_k", "iq4_xs"), (2.0, 256)),
}
# Of the scale that maps the largest magnitude to the lowest level.
FACTORS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "q4_0": ((0.55, 0.65, 0.74, 0.82, 0.9, 0.98, 1.06, 1.14), fine_factors(4, 4)),
    "q5_0": ((0.6, 0.7, 0.8, 0.88, 0.94, 1.0, 1.06), fine_factors(5, 4)),
    "q8_0": (tuple(0.957 + 0.003 * step for step in range(17)), ()),
    "q2_0": ((0.22, 0.28, 0.34, 0.4, 0.47, 0.55, 0.65, 0.8, 1.0), fine_factors(2, 4)),
    **dict.fromkeys(("tq1_0", "tq2_0"), ((0.15, 0.25, 0.35, 0.5, 0.7, 1.0), fine_factors(2, 4))),
    "q1_0": ((0.15, 0.25, 0.35, 0.5, 0.7), ()),
    "iq4_nl": ((0.6, 0.7, 0.79, 0.87, 0.94, 1.0, 1.06, 1.13), fine_factors(4, 4)),
}


@dataclass(frozen=True)
class GgmlGridType(GgmlType):
    """The grids of one block type of ggml; a GridType. ``name`` as in ``grid.GGML_GRIDS``."""

    def plain(self, weight: Tensor, importance: Tensor | None) -> tuple[Grid, Tensor]:
        """Grid and codes uint8 (rows, columns) of the bytes that ggml's quantizer writes.

        ``weight`` float32 (rows, columns), columns whole blocks; ``importance`` float32 (columns,) is used as it is.
        Raises UsageError for other shapes.
        """
        grid, codes = unpack(self.name, self.encoded(weight, importance), weight.shape[1])
        return grid.to(weight.device), codes.to(weight.device)

    def fit(self, weight: Tensor, importance: Tensor | None, *, refine: bool = True) -> Grid:
        """The plain grid, and with ``refine`` the best one found near it: no block's weighted error is larger.

        Any subset of the rows gives the same numbers as the whole.
        """
        grid = self.plain(weight, importance)[0]
        if not refine or weight.shape[0] == 0:
            return grid
        # Weights beyond float16 make ggml write infinite scales; the largest finite one is where the search begins.
        grid = grid.with_floats(grid.d.nan_to_num(0), None if grid.m is None else grid.m.nan_to_num(0))
        h = channel_importance(importance, weight)
        tiles = row_tiles(weight.shape[0], weight.shape[1], TILE)
        return Grid.stack([self._refined(grid.rows(a, b), weight[a:b], self.weights(weight[a:b], h)) for a, b in tiles])

    def weights(self, x: Tensor, importance: Tensor) -> Tensor:
        """w (rows, columns): ``importance`` (columns,) times sqrt(k * mean x^2 + x^2) over the root of the mean."""
        if self.name not in SPREAD:
            return importance.expand(x.shape)
        factor, block = SPREAD[self.name]
        square = x * x
        size = block or x.shape[1]
        mean = from_lanes(divided(fold(lanes(square, size)), size), len(x)).repeat_interleave(size, dim=1)
        spread = (square + factor * mean).sqrt_() / mean.sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        return importance * spread

    def _refined(self, grid: Grid, x: Tensor, w: Tensor) -> Grid:
        if grid.span != grid.group:
            layout = LAYOUTS[self.name]
            return fit_superblocks(grid, x, w, bounds=layout.sub_scales, v_most=layout.sub_minima)
        rows = len(x)
        x_lanes, w_lanes, d = lanes(x, grid.group), lanes(w, grid.group), grid.d.reshape(-1)
        levels = Levels.of(grid.levels)
        if grid.m is None:
            signed = levels.lowest != -levels.highest  # where the levels lean to one side, the sign chooses which
            factors = FACTORS[self.name]
            found = symmetric_scales(x_lanes, w_lanes, levels, factors, grid.storage, signed=signed, start=d)
            return grid.with_floats(from_lanes(found, rows))
        scale, offset = affine_scales(x_lanes, w_lanes, levels, (d, -grid.m.reshape(-1)), grid.storage)
        return grid.with_floats(from_lanes(scale, rows), from_lanes(-offset, rows))
