"""Whether a grid can hold what another grid stores, value for value: the arithmetic of ``GridType.hold``.

Scales stay the numbers that they are, or the product of two that is exact; codes move with zero points; a group is cut
in equal parts, or made of parts that have all numbers in common. Whatever would have to be rounded is not held. Two
grids of the same real values may still decode to other floats (s q + o for s (q - z)): who keeps codes proves it by
decoding both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llm_quantize.grids.grid import Grid, Ladder, to_storage

__all__ = ["Floats", "Groups", "as_affine", "as_integers", "as_levels", "grouped", "stored"]

Held = tuple[Grid, Tensor]


@dataclass(frozen=True)
class Groups:
    """The numbers of each group of ``size`` columns: value = scale * (level - zero) - offset, all float32 (rows,
    groups); ``zero`` and ``offset`` None: all zero. ``ladder``: of scales that are codes."""

    size: int
    scale: Tensor
    zero: Tensor | None
    offset: Tensor | None
    ladder: Ladder | None


def grouped(grid: Grid, size: int) -> Groups | None:
    """The numbers of ``grid`` in groups of ``size`` columns; None where its own are neither whole multiples of that,
    nor parts of it with the same numbers, or do not stand side by side (``Grid.in_order``). Scales beyond what is
    finite are not held."""
    if grid.index is not None:
        return None
    scale = grid.scale()
    offset = None if grid.m is None else grid.offset() if grid.z is None else None
    if (grid.m is not None and grid.z is not None) or not bool(torch.isfinite(scale).all()):
        return None
    ladder = grid.ladder if grid.span == grid.group else None
    found = Groups(grid.group, scale, grid.z, offset, ladder)
    if size == grid.group:
        return found
    if grid.group % size == 0:
        return _cut(found, size)
    return _merged(found, size) if size % grid.group == 0 else None


def _cut(found: Groups, size: int) -> Groups:
    times = found.size // size

    def each(part: Tensor) -> Tensor:
        return part.repeat_interleave(times, dim=1)

    return Groups(
        size,
        each(found.scale),
        None if found.zero is None else each(found.zero),
        None if found.offset is None else each(found.offset),
        None if found.ladder is None else found.ladder.mapped(each),
    )


def _merged(found: Groups, size: int) -> Groups | None:
    times = size // found.size
    if found.scale.shape[1] % times:
        return None
    parts: list[Tensor | None] = []
    for part in (found.scale, found.zero, found.offset):
        if part is None:
            parts.append(None)
            continue
        together = part.reshape(len(part), -1, times)
        if not torch.equal(together, together[:, :, :1].expand_as(together)):
            return None
        parts.append(together[:, :, 0].contiguous())
    scale = parts[0]
    return None if scale is None else Groups(size, scale, parts[1], parts[2], None)


def stored(values: Tensor, storage: torch.dtype) -> bool:
    """Whether ``values`` float32 are as they are after having been stored as ``storage``."""
    return torch.equal(to_storage(values, storage), values)


@dataclass(frozen=True)
class Floats:
    """How a grid stores its floats; ``exact``: what does not fit is not held, else it is rounded."""

    storage: torch.dtype
    exact: bool = True

    def kept(self, values: Tensor) -> Tensor | None:
        """``values`` float32 as they are stored; None where they do not fit and must."""
        found = to_storage(values, self.storage)
        return None if self.exact and not torch.equal(found, values) else found


def as_integers(
    grid: Grid, codes: Tensor, *, bits: int, size: int, symmetric: bool, zeros: tuple[int, int], floats: Floats
) -> Held | None:
    """``codes`` on ``grid`` as integers of ``bits`` bits in groups of ``size``: from -2^(bits-1) where ``symmetric``,
    else from 0 with zero points of ``zeros`` (least, most). None where they are not that."""
    found = grouped(grid, size)
    scale = None if found is None else floats.kept(found.scale)
    if found is None or scale is None or not grid.uniform:
        return None
    lowest, zero = int(grid.levels[0]), found.zero
    if found.offset is not None:
        zero = _zero_of(found.scale, found.offset, zero)
        if zero is None:
            return None
    if zero is not None and not torch.equal(zero, zero.round()):
        return None
    count = 1 << bits
    if symmetric:
        moved = _moved(codes, None if zero is None else lowest + count // 2 - zero, lowest + count // 2, count, size)
        levels = torch.arange(count, dtype=torch.float32) - count // 2
        return None if moved is None else (_grid(levels, size, scale, None, floats.storage), moved)
    point = torch.full_like(found.scale, -lowest) if zero is None else zero - lowest
    moved = _moved(codes, None, 0, count, size)
    if moved is None or bool((point < zeros[0]).any()) or bool((point > zeros[1]).any()):
        return None
    return _grid(torch.arange(count, dtype=torch.float32), size, scale, point, floats.storage), moved


def _zero_of(scale: Tensor, offset: Tensor, zero: Tensor | None) -> Tensor | None:
    """The whole numbers z for which scale * z is ``offset`` exactly; None where there are none."""
    if zero is not None:
        return None
    point = torch.where(scale == 0, 0.0, (offset.double() / scale.double()).round()).float()
    return point if torch.equal(scale.double() * point.double(), offset.double()) else None


def _moved(codes: Tensor, by: Tensor | None, alike: int, count: int, size: int) -> Tensor | None:
    """Codes moved by whole numbers (rows, groups), or by ``alike`` where all are moved so; None where one leaves 0 to
    ``count`` - 1."""
    if by is not None and by.numel() and bool((by == by.reshape(-1)[0]).all()):
        alike, by = int(by.reshape(-1)[0]), None
    if by is None:
        low, high = (int(codes.min()), int(codes.max())) if codes.numel() else (0, 0)
        if low + alike < 0 or high + alike >= count:
            return None
        return codes if alike == 0 else (codes.to(torch.int16) + alike).to(torch.uint8)
    wide = codes.reshape(len(codes), -1, size).to(torch.int16) + by.to(torch.int16)[:, :, None]
    if int(wide.min()) < 0 or int(wide.max()) >= count:
        return None
    return wide.to(torch.uint8).reshape(codes.shape)


def _grid(levels: Tensor, size: int, scale: Tensor, zero: Tensor | None, storage: torch.dtype) -> Grid:
    return Grid(levels, size, size, scale, _ones(scale), z=zero, storage=storage)


def _ones(scale: Tensor) -> Tensor:
    return torch.ones((1, 1)).expand(scale.shape)


def as_affine(grid: Grid, codes: Tensor, *, bits: int, size: int, floats: Floats) -> Held | None:
    """``codes`` on ``grid`` as integers from 0 with a scale and an offset, both stored as ``floats`` say, in groups of
    ``size``. None where the offset is no product that they hold. Of levels from -127 the offset is 128 scales: a power
    of two times what is stored, so that it is as exact as the scale."""
    found = grouped(grid, size)
    if found is None or not grid.uniform or int(codes.max()) >> bits:
        return None
    scale, offset, half = floats.kept(found.scale), found.offset, 1 << (bits - 1)
    if scale is None:
        return None
    if found.zero is None and offset is None and grid.levels[0] == 1 - half and int(codes.max()) + 1 < 2 * half:
        codes, offset = codes + 1, scale * half
        if not stored(offset, floats.storage):
            return None
    elif offset is None or grid.levels[0] != 0:
        zero = 0.0 if found.zero is None else found.zero.double()
        wide = found.scale.double() * (zero - float(grid.levels[0]))
        wide = wide if found.offset is None else wide + found.offset.double()
        offset = wide.float()
        if floats.exact and not torch.equal(offset.double(), wide):
            return None
    kept = floats.kept(offset)
    if kept is None:
        return None
    levels = torch.arange(1 << bits, dtype=torch.float32)
    ones, empty = _ones(scale), scale == 0
    if bool(empty.any()):  # all codes are one value there: that which verify takes for sound is 0
        codes = codes.masked_fill(empty.repeat_interleave(size, dim=1), 0)
    return Grid(levels, size, size, scale, ones, m=kept, v=ones, storage=floats.storage), codes


def as_levels(grid: Grid, codes: Tensor, *, levels: Tensor, size: int) -> tuple[Groups, Tensor] | None:
    """``codes`` on ``grid`` as places in the table ``levels`` float32, ascending, in groups of ``size``: the numbers of
    the groups, and codes. None where levels are not all in the table, at one factor that scales make up for."""
    found = grouped(grid, size)
    if found is None or found.zero is not None or found.offset is not None:
        return None
    if torch.equal(levels, grid.levels):
        return found, codes
    ours, theirs = levels.double(), grid.levels.double()
    factor = float(ours[-1] / theirs[-1]) if float(theirs[-1]) > 0 else 0.0
    if not factor:
        return None
    wanted = theirs * factor
    below = torch.signbit(theirs)  # of two zeros the first is the negative one
    place = torch.where(below, torch.searchsorted(ours, wanted), torch.searchsorted(ours, wanted, right=True) - 1)
    place = place.clamp_(0, len(ours) - 1)
    if not torch.equal(ours[place], wanted):
        return None
    scale = (found.scale.double() / factor).float()
    if not torch.equal(scale.double() * factor, found.scale.double()):
        return None
    table = place.to(torch.uint8)
    moved = table.index_select(0, codes.reshape(-1).to(torch.int32)).reshape(codes.shape)
    ladder = found.ladder
    if ladder is not None and factor != 1:
        ladder = replace(ladder, levels=ladder.levels / factor) if ladder.base == 0 else None
    return Groups(size, scale, None, None, ladder), moved
