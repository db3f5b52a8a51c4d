"""Grids of ggml's codebook types, IQ1_S to IQ3_S: levels and scales as everywhere, but only some words of codes.

value = d * u * (level - z), d float16 for 256 weights, u = first + slope * step for ``group`` weights:

    type      levels, with either sign  step   u               group  weights of an entry  signs  z
    iq2_xxs   8, 25, 43                 4 bit  1/8 + step / 4  32     8 (256 entries)      even   -
    iq2_xs    8, 25, 43                 4 bit  1/8 + step / 4  16     8 (512)              even   -
    iq2_s     8, 25, 43                 4 bit  1/8 + step / 4  16     8 (1024)             free   -
    iq3_xxs   4, 12, .. 52, 62          4 bit  1/4 + step / 2  32     4 (256)              even   -
    iq3_s     1, 3, .. 15               4 bit  1 + 2 step      32     4 (512)              free   -
    iq1_s     -1, 0, 1 (no signs)       3 bit  1 + 2 step      32     8 (2048)             -      +-1/8 for 32
    iq1_m     -1, 0, 1 (no signs)       3 bit  1 + 2 step      16     8 (2048)             -      +-1/8 for 8

"even": an even number of eight weights is negative.

Tables are ggml's (ggml/src/ggml-common.h), layouts are in ``ggml_word_bytes``; what the bytes mean is told by
kernels/reference/iq1.py, iq2.py and iq3.py. ``plain`` is ggml's quantizer, unpacked; ``fit`` starts from its grid and
lowers

    E = sum_i h_i (x_i - value_i)^2

of the best words, h the importance of the channels: turn by turn scales and shifts near those at hand, group by group,
then d by least squares. No superblock ends above the grid that it came with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm_quantize.errors import UsageError
from llm_quantize.grids.ggml_held import GgmlType
from llm_quantize.grids.ggml_word_bytes import D_WITHIN, READ, WRITE, Bytes, Integers, Parts
from llm_quantize.grids.grid import Grid, row_tiles
from llm_quantize.grids.integer import channel_importance
from llm_quantize.kernels.iq_grids import grid_codes
from llm_quantize.kernels.reference.floats import half_bits, half_values
from llm_quantize.kernels.words import WORD, Book
from llm_quantize.qtypes import QTYPES

__all__ = ["WORDS", "WordGridType", "pack", "unpack"]

Float32 = npt.NDArray[np.float32]

SPAN = 256
SHIFT = 0.125
TILE = 1 << 18  # weights searched at once
SHARES = (0.86, 0.93)  # of ggml's d, which is chosen for its own search
TURNS = ((-1, 1, 2), (-1, 1))  # how far steps move in each turn


@dataclass(frozen=True)
class WordType:
    """The numbers of a type; see the top of the file. ``group`` as in Grid, ``same`` groups in a row share their u."""

    magnitudes: tuple[float, ...]
    signs: str
    first: float
    slope: float
    steps: int
    group: int
    same: int = 1
    shifted: bool = False

    @property
    def last(self) -> float:
        """The largest u."""
        return self.first + self.slope * (self.steps - 1)

    def levels(self) -> Tensor:
        """float32 (n,), ascending."""
        found = torch.tensor(self.magnitudes, dtype=torch.float32)
        return found if self.signs == "none" else torch.cat([-found.flip(0), found])


_IQ2 = (8.0, 25.0, 43.0)
_IQ3 = (4.0, 12.0, 20.0, 28.0, 36.0, 44.0, 52.0, 62.0)
_TERNARY = (-1.0, 0.0, 1.0)
WORDS: Mapping[str, WordType] = {
    "iq2_xxs": WordType(_IQ2, "even", 0.125, 0.25, 16, 32),
    "iq2_xs": WordType(_IQ2, "even", 0.125, 0.25, 16, 16),
    "iq2_s": WordType(_IQ2, "free", 0.125, 0.25, 16, 16),
    "iq3_xxs": WordType(_IQ3, "even", 0.25, 0.5, 16, 32),
    "iq3_s": WordType(tuple(float(2 * i + 1) for i in range(8)), "free", 1.0, 2.0, 16, 32),
    "iq1_s": WordType(_TERNARY, "none", 1.0, 2.0, 8, 32, shifted=True),
    "iq1_m": WordType(_TERNARY, "none", 1.0, 2.0, 8, 8, same=2, shifted=True),
}


@cache
def _entries(qtype: str) -> tuple[Integers, Integers]:
    """(codes (E, size), number of the entry of each point, -1 where there is none)."""
    codes, levels = grid_codes("iq1_s" if qtype == "iq1_m" else qtype)
    index = np.full(levels ** codes.shape[1], -1)
    index[(codes * levels ** np.arange(codes.shape[1])).sum(axis=1)] = np.arange(len(codes))
    return codes, index


@cache
def book_of(qtype: str) -> Book:
    """The words of ``qtype``."""
    kind = WORDS[qtype]
    return Book.of(torch.from_numpy(_entries(qtype)[0]), torch.tensor(kind.magnitudes), kind.signs)


def unpack(qtype: str, packed: Bytes, columns: int) -> tuple[Grid, Tensor]:
    """Grid and codes uint8 (rows, ``columns``) of ``packed`` uint8 (rows, row_bytes), on the CPU.

    UsageError for a wrong shape.
    """
    rows, size, kind = len(packed), QTYPES[qtype].row_bytes(columns), WORDS[qtype]
    if packed.ndim != 2 or packed.dtype != np.uint8 or packed.shape[1] != size:
        expected = f"(rows, {size}), uint8"
        raise UsageError("Packed rows have the wrong form", expected=expected, found=(packed.shape, packed.dtype))
    parts = READ[qtype](packed)
    codes = _entries(qtype)[0][parts.entries].reshape(-1, SPAN)
    if parts.signs is not None:
        negative = (parts.signs[:, :, None] >> np.arange(WORD) & 1).reshape(-1, SPAN)
        most = len(kind.magnitudes)
        codes = np.where(negative == 1, most - 1 - codes, most + codes)
    u = (kind.first + kind.slope * parts.steps).astype(np.float32).repeat(kind.same, axis=1).reshape(rows, -1)
    z = None
    if parts.minus is not None:
        z = torch.from_numpy(np.where(parts.minus == 1, SHIFT, -SHIFT).astype(np.float32).reshape(rows, -1))
    d = torch.from_numpy(half_values(parts.d).reshape(rows, -1))
    grid = Grid(kind.levels(), kind.group, SPAN, d, torch.from_numpy(u), z, book=book_of(qtype))
    return grid, torch.from_numpy(codes.astype(np.uint8).reshape(rows, columns))


def pack(qtype: str, grid: Grid, codes: Tensor) -> Bytes:
    """Bytes uint8 (rows, row_bytes) of ``codes`` uint8 (rows, columns) on ``grid``; undoes :func:`unpack`.

    UsageError where the grid is not one of ``qtype``, or codes make a word that it does not have.
    """
    kind = WORDS[qtype]
    same = (grid.group, grid.span) == (kind.group, SPAN) and torch.equal(grid.levels.cpu(), kind.levels())
    if not same or grid.m is not None or (grid.z is None) == kind.shifted:
        expected = f"groups of {kind.group} and the levels of {qtype}"
        raise UsageError(f"This number grid is not one of {qtype}", expected=expected, found=f"groups of {grid.group}")
    if codes.shape != grid.shape:
        raise UsageError("A matrix does not fit its number grid", expected=grid.shape, found=tuple(codes.shape))
    stored = np.ascontiguousarray(codes.detach().cpu().numpy()).astype(np.int64).reshape(-1, SPAN)
    signs = None
    if kind.signs != "none":
        most = len(kind.magnitudes)
        negative = stored < most
        stored = np.where(negative, most - 1 - stored, stored - most)
        signs = (negative.reshape(len(stored), -1, WORD) << np.arange(WORD)).sum(axis=2)
        odd = bool(((negative.reshape(len(stored), -1, WORD)).sum(axis=2) % 2).any())
        if kind.signs == "even" and odd:
            raise UsageError(f"Codes make a word that {qtype} does not have", found="an odd number of negative weights")
    entries = _numbers(qtype, stored)
    u = _array(grid.u).reshape(len(stored), -1)[:, :: kind.same]
    steps = np.rint((u - kind.first) / kind.slope).astype(np.int64)
    back = (kind.first + kind.slope * steps).repeat(kind.same, axis=1)
    if ((steps < 0) | (steps >= kind.steps)).any() or (back != _array(grid.u).reshape(len(stored), -1)).any():
        raise UsageError(f"u of a {qtype} grid is out of range", expected=f"{kind.steps} steps from {kind.first}")
    flat = _array(grid.d).reshape(-1)
    d = half_bits(flat)
    if not np.array_equal(half_values(d), flat, equal_nan=True):
        raise UsageError(f"d of a {qtype} grid is not what float16 holds", remedy="round it to float16 first")
    minus = None if grid.z is None else (_array(grid.z).reshape(len(stored), -1) > 0).astype(np.int64)
    parts = Parts(d, steps, entries)
    more = signs if minus is None else minus
    blocks = [] if qtype in D_WITHIN else [d.astype("<u2").view(np.uint8).reshape(-1, 2)]
    blocks += WRITE[qtype](parts, np.zeros_like(entries) if more is None else more)
    return np.ascontiguousarray(np.concatenate(blocks, axis=1).reshape(codes.shape[0], -1))


def _numbers(qtype: str, codes: Integers) -> Integers:
    """Entries (B, 256 / size) of codes of magnitudes (B, 256)."""
    table, index = _entries(qtype)
    size, levels = table.shape[1], len(WORDS[qtype].magnitudes)
    if codes.size and (codes.min() < 0 or codes.max() >= levels):
        raise UsageError(f"codes of a {qtype} grid are out of range", expected=f"{levels} magnitudes")
    points = (codes.reshape(len(codes), -1, size) * levels ** np.arange(size)).sum(axis=2)
    found: Integers = index[points]
    if (found < 0).any():
        raise UsageError(f"Codes make a word that {qtype} does not have", found="codes that are no entry of its table")
    return found


def _array(values: Tensor) -> Float32:
    return np.ascontiguousarray(values.detach().to("cpu", torch.float32).numpy())


@dataclass(frozen=True)
class WordGridType(GgmlType):
    """The grids of one type of WORDS."""

    @property
    def joint(self) -> int:
        """Neighbouring columns whose codes are chosen together."""
        return WORD

    def plain(self, weight: Tensor, importance: Tensor | None) -> tuple[Grid, Tensor]:
        """Grid and codes uint8 (rows, columns) of the bytes that ggml's quantizer writes; where it needs an importance
        and has none, all channels weigh the same."""
        grid, codes = unpack(self.name, self.encoded(weight, importance), weight.shape[1])
        return grid.to(weight.device), codes.to(weight.device)

    def fit(self, weight: Tensor, importance: Tensor | None, *, refine: bool = True) -> Grid:
        """The plain grid, and with ``refine`` the best one found near it: no superblock's weighted error is larger.

        Any subset of the rows gives the same numbers as the whole.
        """
        grid = self.plain(weight, importance)[0]
        if not refine or weight.shape[0] == 0:
            return grid
        grid = grid.with_floats(grid.d.nan_to_num(0))
        h = channel_importance(importance, weight)
        tiles = row_tiles(weight.shape[0], weight.shape[1], TILE)
        return Grid.stack([_Search(WORDS[self.name], weight[a:b], h).refined(grid.rows(a, b)) for a, b in tiles])


@dataclass(frozen=True)
class _Tried:
    """A grid for some rows, sum h e^2 of every group (rows, groups) of the best words on it, and u (level - z) of each
    weight (rows, columns)."""

    grid: Grid
    errors: Tensor
    units: Tensor

    def chosen(self, other: _Tried, size: int) -> _Tried:
        """In every ``size`` groups ``other`` where its error is lower."""
        rows, groups = self.errors.shape
        error, rival = (one.errors.reshape(rows, -1, size).sum(2) for one in (self, other))
        better = rival < error
        of_group = better.repeat_interleave(size, dim=1)
        one, two, spans = self.grid, other.grid, groups // self.grid.d.shape[1]
        grid = replace(
            one,
            # Tries that move a part of a superblock leave its d alone.
            d=torch.where(better, two.d, one.d) if size == spans else one.d,
            u=torch.where(of_group, two.u, one.u),
            z=None if one.z is None or two.z is None else torch.where(of_group, two.z, one.z),
        )
        columns = of_group.repeat_interleave(one.group, dim=1)
        return _Tried(
            grid, torch.where(of_group, other.errors, self.errors), torch.where(columns, other.units, self.units)
        )


@dataclass(frozen=True)
class _Search:
    """A better grid for ``weight`` float32 (rows, columns), weighted by ``importance`` float32 (columns,)."""

    kind: WordType
    weight: Tensor
    importance: Tensor

    def tried(self, grid: Grid) -> _Tried:
        """``grid`` with its best words."""
        rows = len(self.weight)
        codes = grid.nearest(self.weight, self.importance)
        error = (grid.decode(codes) - self.weight).square_().mul_(self.importance)
        level = grid.levels[codes.long()].reshape(rows, -1, grid.group)
        if grid.z is not None:
            level = level - grid.z[:, :, None]
        return _Tried(grid, error.reshape(level.shape).sum(2), (level * grid.u[:, :, None]).flatten(1))

    def refined(self, grid: Grid) -> Grid:
        """See ``WordGridType.fit``."""
        spans = grid.span // grid.group
        best = first = self.tried(grid)
        for share in SHARES:
            best = best.chosen(self.tried(grid.with_floats(first.grid.d * share)), spans)
        for reach in TURNS:
            start = best.grid
            for step in reach:
                u = (start.u + self.kind.slope * step).clamp_(self.kind.first, self.kind.last)
                best = best.chosen(self.tried(replace(best.grid, u=u)), self.kind.same)
            if best.grid.z is not None:
                best = best.chosen(self.tried(replace(best.grid, z=-best.grid.z)), 1)
            best = best.chosen(self.tried(best.grid.with_floats(self.solved(best))), spans)
        return best.grid

    def solved(self, tried: _Tried) -> Tensor:
        """d (rows, spans) by weighted least squares for the words at hand."""
        rows, span = len(self.weight), tried.grid.span
        weighted = tried.units * self.importance
        cross, square = ((weighted * part).reshape(rows, -1, span).sum(2) for part in (self.weight, tried.units))
        return torch.where(square > 0, cross / torch.where(square > 0, square, 1.0), tried.grid.d)
