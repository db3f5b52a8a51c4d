"""Grids of a fixed table of levels with one scale for each block of weights (qtypes/codebook.py).

The plain rules are the owners' own. bitsandbytes (0.50): the scale is the largest magnitude of the block, the code the
level nearest to the weight times 1 / scale (NF4, FP4), or round(w * (127 / scale)) of the weight in float16 (LLM.int8).
CTranslate2 (4.8): the same in float32.
compressed-tensors (0.20): the largest magnitude over the largest level, as its scales can hold it, and ties to the
level of even mantissa. MLX (0.32, on a GPU): the same, but powers of two are rounded up, so that nothing is clipped,
and e4m3 scales stand without one for the matrix. A decoder multiplies whatever scale is stored, so ``fit`` searches
for the scale of small importance-weighted error instead.

Where scales are codes of 8 bits themselves, the ladder of each is fixed before any code is chosen, by what the matrix
(or matrices that runtimes join) holds, as the owner fixes it; see ``ladder_of``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llm_quantize.grids.grid import Grid, Ladder, row_tiles, to_storage
from llm_quantize.grids.holding import as_levels, stored
from llm_quantize.grids.integer import TILE, channel_importance
from llm_quantize.grids.search import Levels, fine_factors, from_lanes, lanes, symmetric_scales, weighted_error
from llm_quantize.qtypes.codebook import CODEBOOKS, IN_COMMON, NESTED_BLOCK, OF_127, SCALES, CodebookType

__all__ = ["CodebookGridType", "best_rung", "block_maxima", "dynamic_map", "ladder_of"]

_LEAST = 1e-38  # what bitsandbytes divides by at least
_OWNERS_SCALES = {"e2m1": 6.0, "e4m3": 448.0}
_WIDEST, _RATIO, _TRIES = 1.1, 1.06, 12


@dataclass(frozen=True)
class CodebookGridType:
    """The grids of one :class:`CodebookType`; a GridType. ``ladder``: of the scales of the very rows that are asked
    for, where they are codes of 8 bits; None: scales are floats."""

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

    @property
    def joint(self) -> int:
        """See ``GridType``."""
        return 1

    @property
    def storage(self) -> torch.dtype:
        """The dtype of scales that are floats."""
        found: torch.dtype = getattr(torch, self.qtype.scale)
        return found

    def rows(self, start: int, stop: int) -> CodebookGridType:
        """The same for rows ``start`` to ``stop`` of those that ``ladder`` is for."""
        return self if self.ladder is None else replace(self, ladder=_rows_of(self.ladder, start, stop))

    def plain(self, weight: Tensor, importance: Tensor | None) -> tuple[Grid, Tensor]:
        """Grid and codes uint8 (rows, columns) of the owner's own encoder; importance is not used."""
        rows, columns = weight.shape
        block = self.qtype.group(columns)
        maxima = block_maxima(self.qtype, weight)
        grid = self._grid(self._owners(maxima), block)
        if self.qtype.codebook == "row8":
            half = weight.to(torch.float16)
            scaled = half * torch.where(maxima > 0, 127.0 / maxima, 0.0)
            return grid, (scaled.round() + 127).to(torch.uint8)
        if self.qtype.codebook == "line8":
            scale = torch.full_like(grid.d, 127.0) / grid.d  # a number over a tensor would be its reciprocal times it
            return grid, ((weight * scale).round() + 127).to(torch.uint8)
        blocks, table = weight.reshape(rows, -1, block), self._levels(weight.device)
        if self.qtype.codebook in _OWNERS_SCALES:
            scaled = blocks / torch.where(grid.d > 0, grid.d, 1.0)[:, :, None]
            return grid, _even(scaled, table).flatten(1)
        scaled = (blocks * (1.0 / maxima.clamp(min=_LEAST))[:, :, None]).clamp(-1, 1)
        codes = torch.bucketize(scaled, (table[:-1] + table[1:]) / 2, out_int32=True)
        return grid, codes.to(torch.uint8).flatten(1)

    def fit(self, weight: Tensor, importance: Tensor | None, *, refine: bool = True) -> Grid:
        """The grid of small importance-weighted error; with ``refine`` False the plain one.

        ``weight`` float32 (rows, columns), finite; ``importance`` float32 (columns,). Any subset of the rows gives the
        same scales as the whole. UsageError where the columns are not whole blocks.
        """
        rows, columns = weight.shape
        block = self.qtype.group(columns)
        plain = self._grid(self._owners(block_maxima(self.qtype, weight)), block)
        if not refine or (self.ladder is not None and len(self.ladder.levels) == 1):
            return plain
        shares = channel_importance(importance, weight)
        levels, scales = Levels.of(self._levels(weight.device)), torch.empty_like(plain.d)
        top = self._top()
        for first, last in row_tiles(rows, columns, max(TILE, 32 * block)):
            x = lanes(weight[first:last], block)
            w = lanes(shares[None], block).repeat(1, last - first)
            start = plain.d[first:last].reshape(-1) / top
            found = symmetric_scales(x, w, levels, self._factors(), self.storage, signed=False, start=start)
            if self.ladder is not None:
                found = best_rung(x, w, levels, found, _rows_of(self.ladder, first, last))
            scales[first:last] = from_lanes(found * top, last - first)
        return self._grid(scales, block)

    def hold(self, grid: Grid, codes: Tensor) -> tuple[Grid, Tensor] | None:
        """See ``GridType``: the same levels, and scales on rungs that there are, or shared as they must be."""
        if codes.shape[1] % self.block:
            return None
        size, table = self.qtype.group(codes.shape[1]), self._levels(codes.device)
        if self._is_own(grid, size):
            return grid, codes
        found = as_levels(grid, codes, levels=table, size=size)
        if found is None:
            return None
        groups, moved = found
        top = self._top()
        scale = groups.scale if top == 1 else groups.scale * top
        unit = torch.full((1, 1), 1 / top, dtype=torch.float32, device=scale.device).expand(scale.shape)
        if top != 1 and not torch.equal(scale * unit, groups.scale):
            return None
        held = Grid(table, size, size, scale, unit, storage=self.storage)
        if not self.qtype.nested:
            return (held, moved) if stored(scale, self.storage) else None
        ladder = self._held_ladder(scale, groups.ladder)
        return None if ladder is None else (replace(held, ladder=ladder), moved)

    def _is_own(self, grid: Grid, size: int) -> bool:
        """Whether ``grid`` is one of whole numbers with its scales in units of 1/127 already."""
        bare = grid.z is None and grid.m is None and grid.ladder is None and grid.group == grid.span == size
        if self._top() == 1 or not bare or not torch.equal(grid.levels, self._levels(grid.levels.device)):
            return False
        return bool((grid.u == torch.tensor(1 / self._top(), dtype=torch.float32)).all()) and stored(
            grid.d, self.storage
        )

    def near(self, grid: Grid, codes: Tensor) -> tuple[Grid, Tensor] | None:
        """See ``GridType``: whole numbers, whose scales are rounded; scales that are codes are chosen anew, so nothing
        is near."""
        if self.qtype.codebook not in OF_127 or codes.shape[1] % self.block:
            return None
        size, table = self.qtype.group(codes.shape[1]), self._levels(codes.device)
        found = as_levels(grid, codes, levels=table, size=size)
        return None if found is None else (self._grid(found[0].scale * self._top(), size), found[1])

    def _held_ladder(self, scale: Tensor, given: Ladder | None) -> Ladder | None:
        """The ladder of scales (rows, blocks) that are there already, of which ``given`` may be theirs; None where they
        are on none."""
        if self.qtype.nested in IN_COMMON:
            rows = IN_COMMON[self.qtype.nested] or max(1, len(scale))
            once = scale[::rows].repeat_interleave(rows, dim=0)[: len(scale)]
            common = torch.equal(once, scale) and (bool(IN_COMMON[self.qtype.nested]) or scale.shape[1] == 1)
            if not common or not stored(scale, self.storage):
                return None
            return Ladder.of(0.0, scale, torch.ones(1, device=scale.device))
        if self.qtype.nested == "dq":
            return None if given is None or not _is_nested(given) else given
        levels = torch.tensor(SCALES[self.qtype.nested], dtype=torch.float32, device=scale.device)
        if given is not None and torch.equal(given.levels, levels) and self._takes(given):
            return given
        ladder = Ladder.of(0.0, torch.ones_like(scale), levels).at(scale)
        return ladder if torch.equal(ladder.decode(), scale) else None

    def _takes(self, given: Ladder) -> bool:
        """Whether the steps of a ladder of the same rungs can be stored: one for the matrix, or only ones."""
        whole = given.steps.reshape(-1)[:1]
        alike = given.base == 0 and bool((given.steps == whole).all())
        return alike and (self.qtype.nested == "e4m3" or bool((whole == 1).all()))

    def _owners(self, maxima: Tensor) -> Tensor:
        """d of the blocks' largest magnitudes, before it is stored."""
        if self.qtype.codebook == "line8":
            return torch.where(maxima == 0, 127.0, maxima).clamp(min=127 / torch.finfo(torch.float32).max)
        most = _OWNERS_SCALES.get(self.qtype.codebook)
        if most is None:
            return maxima
        if self.qtype.nested == "e8m0up":
            raised = ((maxima / most).view(torch.int32) + 0x7FFFFF) & 0x7F800000
            return torch.where(maxima > 0, raised.view(torch.float32), 1.0)
        if self.qtype.nested == "e4m3alone":
            return (maxima / most).clamp(max=_OWNERS_SCALES["e4m3"]).to(torch.float8_e4m3fn).float()
        if self.qtype.nested == "e8m0":  # a maximum up to 7/8 of the way is clipped, not halved
            raised = (maxima.view(torch.int32) + (1 << 21)) & 0x7F800000
            return raised.view(torch.float32) / 4
        return maxima / most

    def _top(self) -> float:
        """What d is worth in units of a level."""
        return float(CODEBOOKS[self.qtype.codebook][-1]) if self.qtype.codebook in OF_127 else 1.0

    def _grid(self, scales: Tensor, block: int) -> Grid:
        unit = torch.full((1, 1), 1 / self._top(), dtype=torch.float32, device=scales.device).expand(scales.shape)
        grid = Grid(self._levels(scales.device), block, block, scales, unit, storage=self.storage, ladder=self.ladder)
        return replace(grid, d=to_storage(scales, self.storage)) if self.ladder is None else grid.with_floats(scales)

    def _levels(self, device: torch.device) -> Tensor:
        return torch.tensor(CODEBOOKS[self.qtype.codebook], dtype=torch.float32, device=device)

    def _factors(self) -> tuple[Sequence[float], Sequence[float]]:
        if self.qtype.bits == 8:
            return tuple(1.01 * 1.01**-step for step in range(_TRIES)), fine_factors(8)
        return tuple(_WIDEST * _RATIO**-step for step in range(_TRIES)), fine_factors(4)


def _is_nested(ladder: Ladder) -> bool:
    """Whether NESTED_BLOCK scales, in the order of the file, share a step, as double quantization stores them."""
    flat = ladder.steps.reshape(-1)
    shared = flat[::NESTED_BLOCK].repeat_interleave(NESTED_BLOCK)[: len(flat)]
    return len(ladder.levels) == 256 and torch.equal(shared, flat)


def _even(scaled: Tensor, table: Tensor) -> Tensor:
    """uint8: the nearest of ``table``, an even number of levels with two zeros in the middle; of two equally near the
    one of even place, counted from zero."""
    half = len(table) // 2
    magnitudes = table[half:]
    middles = (magnitudes[:-1] + magnitudes[1:]) / 2
    low = torch.bucketize(scaled.abs(), middles, out_int32=True)
    high = torch.bucketize(scaled.abs(), middles, out_int32=True, right=True)
    place = torch.where(low % 2 == 0, low, high)
    return torch.where(torch.signbit(scaled), half - 1 - place, half + place).to(torch.uint8)


def block_maxima(qtype: CodebookType, weight: Tensor) -> Tensor:
    """float32 (rows, blocks): the largest magnitude of each block, as the owner's encoder sees it (LLM.int8: float16).

    ``weight`` float32 (rows, columns).
    """
    seen = weight.to(torch.float16).to(torch.float32) if qtype.codebook == "row8" else weight
    return seen.reshape(len(weight), -1, qtype.group(weight.shape[1])).abs().amax(dim=2)


def ladder_of(qtype: CodebookType, maxima: Tensor, most: float) -> Ladder:
    """The ladder of the scales of a whole matrix. ``maxima`` float32 (rows, blocks): of its blocks; ``most``: the
    largest magnitude of all that has one scale in common.

    dq: offset the mean of the maxima; NESTED_BLOCK scales, in the order of the file, share the largest distance from
    it. e4m3: one scale, with which the largest of all is the largest code of a scale; none, where e4m3 stands alone.
    e8m0: powers of two. Scales that rows have in common: a ladder of one rung, which nothing that looks at single rows
    can leave.
    """
    if qtype.nested == "dq":
        return _nested_ladder(maxima)
    if qtype.nested in IN_COMMON:
        return _common_ladder(qtype, maxima, most)
    levels = torch.tensor(SCALES[qtype.nested], dtype=torch.float32, device=maxima.device)
    step = 1.0
    if qtype.nested == "e4m3":
        least = float(torch.finfo(torch.float32).tiny)
        whole = torch.tensor(float(levels[-1]) * _OWNERS_SCALES[qtype.codebook], dtype=torch.float32)
        step = 1 / float(torch.nan_to_num(whole / max(most, least), posinf=1.0))
    return Ladder.of(0.0, torch.full_like(maxima, step), levels)


def _common_ladder(qtype: CodebookType, maxima: Tensor, most: float) -> Ladder:
    """Of scales that rows have in common: their largest magnitude is the largest code."""
    rows = IN_COMMON[qtype.nested]
    if rows:
        tiles = (maxima[start : start + rows] for start in range(0, len(maxima), rows))
        parts = [part.amax(dim=0, keepdim=True).expand_as(part) for part in tiles]
        whole = torch.cat(parts)
    else:
        whole = torch.full_like(maxima, most)
    storage: torch.dtype = getattr(torch, qtype.scale)
    scales = to_storage(whole / _OWNERS_SCALES[qtype.codebook], storage)
    scales = torch.where(scales > 0, scales, torch.finfo(storage).tiny)
    return Ladder.of(0.0, scales, torch.ones(1, device=maxima.device))


def _nested_ladder(maxima: Tensor) -> Ladder:
    flat = maxima.reshape(-1)
    base = flat.mean()
    away = torch.nn.functional.pad((flat - base).abs(), (0, -len(flat) % NESTED_BLOCK))
    steps = away.reshape(-1, NESTED_BLOCK).amax(dim=1)
    each = steps.repeat_interleave(NESTED_BLOCK)[: len(flat)].reshape(maxima.shape)
    return Ladder.of(float(base), each, dynamic_map().to(maxima.device))


def _rows_of(ladder: Ladder, start: int, stop: int) -> Ladder:
    return ladder.mapped(lambda part: part[start:stop])


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


def best_rung(x: Tensor, w: Tensor, levels: Levels, scales: Tensor, ladder: Ladder) -> Tensor:
    """Of the rungs around each scale (N,) the one with the least error."""
    flat = ladder.mapped(lambda part: part.reshape(-1)).at(scales)
    best, least = flat.decode(), torch.full_like(scales, torch.inf)
    for step in (0, 1, -1):
        trial = flat.moved(step).decode()
        error = weighted_error(x, w, trial, levels)
        better = error < least
        best, least = torch.where(better, trial, best), torch.where(better, error, least)
    return best
