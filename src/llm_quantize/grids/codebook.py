"""Grids of a fixed table of levels with one scale for each block of weights: bitsandbytes' NF4, FP4 and INT8.

The plain rule is bitsandbytes' own (0.50): the scale is the largest magnitude of the block, the code the level nearest
to the weight times 1 / scale (NF4, FP4), or round(w * (127 / scale)) of the weight in float16 (LLM.int8). A decoder
multiplies whatever scale is stored, so ``fit`` searches for the scale of small importance-weighted error instead.

Where scales are stored in 8 bits (double quantization), the ladder of each is fixed by the whole matrix, as the owner
fixes it, before any code is chosen; see ``nested_ladder``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llm_quantize.grids.grid import Grid, Ladder, row_tiles
from llm_quantize.grids.integer import TILE, channel_importance
from llm_quantize.grids.search import Levels, fine_factors, from_lanes, lanes, symmetric_scales, weighted_error
from llm_quantize.qtypes.codebook import CODEBOOKS, NESTED_BLOCK, CodebookType

__all__ = ["CodebookGridType", "block_maxima", "dynamic_map", "nested_ladder"]

_LEAST = 1e-38  # what bitsandbytes divides by at least
_WIDEST, _RATIO, _TRIES = 1.1, 1.06, 12


@dataclass(frozen=True)
class CodebookGridType:
    """The grids of one :class:`CodebookType`; a GridType. ``ladder``: of the scales of the very rows that are asked
    for, where they are stored in 8 bits; None: scales are float32."""

    qtype: CodebookType
    ladder: Ladder | None = None

    @property
    def name(self) -> str:
        """The qtype's name."""
        return self.qtype.name

    @property
    def block(self) -> int:
        """Columns must be a multiple of it."""
        return max(1, self.qtype.group_size)

    def rows(self, start: int, stop: int) -> CodebookGridType:
        """The same for rows ``start`` to ``stop`` of those that ``ladder`` is for."""
        return self if self.ladder is None else replace(self, ladder=_rows_of(self.ladder, start, stop))

    def plain(self, weight: Tensor, importance: Tensor | None) -> tuple[Grid, Tensor]:
        """Grid and codes uint8 (rows, columns) of the owner's own encoder; importance is not used."""
        rows, columns = weight.shape
        block = self.qtype.group(columns)
        maxima = block_maxima(self.qtype, weight)
        if self.qtype.codebook == "row8":
            half = weight.to(torch.float16)
            scaled = half * torch.where(maxima > 0, 127.0 / maxima, 0.0)
            return self._grid(maxima, block), (scaled.round() + 127).to(torch.uint8)
        scaled = weight.reshape(rows, -1, block) * (1.0 / maxima.clamp(min=_LEAST))[:, :, None]
        table = self._levels(weight.device)
        codes = torch.bucketize(scaled.clamp(-1, 1), (table[:-1] + table[1:]) / 2, out_int32=True)
        return self._grid(maxima, block), codes.to(torch.uint8).flatten(1)

    def fit(self, weight: Tensor, importance: Tensor | None, *, refine: bool = True) -> Grid:
        """The grid of small importance-weighted error; with ``refine`` False the plain one.

        ``weight`` float32 (rows, columns), finite; ``importance`` float32 (columns,). Any subset of the rows gives the
        same scales as the whole. UsageError where the columns are not whole blocks.
        """
        rows, columns = weight.shape
        block = self.qtype.group(columns)
        maxima = block_maxima(self.qtype, weight)
        if not refine:
            return self._grid(maxima, block)
        shares = channel_importance(importance, weight)
        levels, scales = Levels.of(self._levels(weight.device)), torch.empty_like(maxima)
        for first, last in row_tiles(rows, columns, max(TILE, 32 * block)):
            x = lanes(weight[first:last], block)
            w = lanes(shares[None], block).repeat(1, last - first)
            start = maxima[first:last].reshape(-1) / levels.highest
            found = symmetric_scales(x, w, levels, self._factors(), torch.float32, signed=False, start=start)
            if self.ladder is not None:
                found = _best_rung(x, w, levels, found, _rows_of(self.ladder, first, last))
            scales[first:last] = from_lanes(found * levels.highest, last - first)
        return self._grid(scales, block)

    def _grid(self, scales: Tensor, block: int) -> Grid:
        """``scales``: of the highest level, which is stored as 1 (or 127 parts of it)."""
        levels = self._levels(scales.device)
        unit = torch.full((1, 1), 1 / float(levels[-1]), dtype=torch.float32, device=scales.device).expand(scales.shape)
        grid = Grid(levels, block, block, scales, unit, storage=torch.float32, ladder=self.ladder)
        return grid if self.ladder is None else grid.with_floats(scales)

    def _levels(self, device: torch.device) -> Tensor:
        return torch.tensor(CODEBOOKS[self.qtype.codebook], dtype=torch.float32, device=device)

    def _factors(self) -> tuple[Sequence[float], Sequence[float]]:
        if self.qtype.codebook == "row8":
            return tuple(1.01 * 1.01**-step for step in range(_TRIES)), fine_factors(8)
        return tuple(_WIDEST * _RATIO**-step for step in range(_TRIES)), fine_factors(4)


def block_maxima(qtype: CodebookType, weight: Tensor) -> Tensor:
    """float32 (rows, blocks): the largest magnitude of each block, as the owner's encoder sees it (LLM.int8: float16).

    ``weight`` float32 (rows, columns).
    """
    seen = weight.to(torch.float16).to(torch.float32) if qtype.codebook == "row8" else weight
    return seen.reshape(len(weight), -1, qtype.group(weight.shape[1])).abs().amax(dim=2)


def nested_ladder(maxima: Tensor) -> Ladder:
    """The ladder of the scales of a whole matrix, as bitsandbytes makes it of the blocks' ``maxima`` float32 (rows,
    blocks): offset their mean; NESTED_BLOCK of them, in the order of the file, share the largest distance from it."""
    flat = maxima.reshape(-1)
    base = flat.mean()
    away = torch.nn.functional.pad((flat - base).abs(), (0, -len(flat) % NESTED_BLOCK))
    steps = away.reshape(-1, NESTED_BLOCK).amax(dim=1)
    each = steps.repeat_interleave(NESTED_BLOCK)[: len(flat)].reshape(maxima.shape)
    return Ladder.of(float(base), each, dynamic_map().to(maxima.device))


def _rows_of(ladder: Ladder, start: int, stop: int) -> Ladder:
    return ladder.mapped(lambda steps: steps[start:stop])


def dynamic_map() -> Tensor:
    """float32 (256,), ascending: the signed dynamic 8-bit type (Dettmers 2016, arXiv 1511.04561, section 2): seven
    decades, each with twice as many evenly spaced fractions as the one below, and 0 and 1."""
    found = [torch.zeros(1), torch.ones(1)]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2
        values = 10.0 ** (decade - 6) * middles
        found += [values, -values]
    return torch.cat(found).sort().values


def _best_rung(x: Tensor, w: Tensor, levels: Levels, scales: Tensor, ladder: Ladder) -> Tensor:
    """Of the rungs around each scale (N,) the one with the least error."""
    flat = ladder.mapped(lambda part: part.reshape(-1)).at(scales)
    best, least = flat.decode(), torch.full_like(scales, torch.inf)
    for step in (0, 1, -1):
        trial = flat.moved(step).decode()
        error = weighted_error(x, w, trial, levels)
        better = error < least
        best, least = torch.where(better, trial, best), torch.where(better, error, least)
    return best
