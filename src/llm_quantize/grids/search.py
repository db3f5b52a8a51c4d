"""Weighted least-squares search of one scale (and offset) for each group of weights.

For each group, with weights x_i, importances w_i and levels l (a step of the search: Gholami et al. 2021, "A Survey
of Quantization Methods", section III; the closed forms are ordinary weighted least squares):

    codes   l_i = nearest level to x_i / s              error  E = sum w_i (x_i - s l_i)^2
    refit   s + sum w e l / sum w l^2, e = x - s l      error  E - (sum w e l)^2 / sum w l^2

Residuals are used instead of plain moments, so that float32 is enough at 8 bits. Arrays have lanes last: x and w are
(n, N) for N groups of n weights, scales are (N,). Sums over the n weights are halved again and again, elementwise:
a group gives the same bits whatever groups come along, on every device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_quantize.grids.grid import to_storage
from llm_quantize.kernels import scales as native

__all__ = [
    "Levels",
    "affine_scales",
    "fold",
    "from_lanes",
    "lanes",
    "symmetric_scales",
    "weighted_error",
    "zero_point_scales",
]

LEAST_SCALE = 2.0**-14  # of a group that is all zero, so that no decoder meets a zero or subnormal scale
FINE = 512  # cells of the table that finds iq4's nearest level: its middles are multiples of 1/2


def fold(terms: Tensor) -> Tensor:
    """Sum over the first axis by halves; ``terms`` stays as it is."""
    count, owned = terms.shape[0], False
    while count > 1:
        half = count // 2
        upper, last = terms[half : 2 * half], terms[count - 1] if count % 2 else None
        terms = terms[:half].add_(upper) if owned else terms[:half] + upper
        if last is not None:
            terms[0] += last
        count, owned = half, True
    return terms[0]


def lanes(values: Tensor, group: int) -> Tensor:
    """(rows, columns) as (group, rows * columns / group), contiguous."""
    return values.reshape(-1, group).t().contiguous()


def from_lanes(values: Tensor, rows: int) -> Tensor:
    """(rows * groups,) as (rows, groups)."""
    return values.reshape(rows, -1)


def divided(values: Tensor, by: float) -> Tensor:
    """values / by, rounded once on every device (some multiply by a rounded reciprocal when ``by`` is a number)."""
    return values / torch.full((), by, dtype=values.dtype, device=values.device)


@dataclass(frozen=True)
class Levels:
    """The levels of a grid: consecutive integers ``lowest`` .. ``highest``, or those of ``values``: a table of cells
    (iq4), or, with ``middles``, the levels themselves."""

    lowest: float
    highest: float
    values: Tensor | None = None
    middles: Tensor | None = None

    @classmethod
    def of(cls, levels: Tensor) -> Levels:
        """``levels`` float32 (n,), ascending: consecutive integers, integers whose middles lie within 128, or any."""
        lowest, highest = float(levels[0]), float(levels[-1])
        if highest - lowest == levels.numel() - 1:
            return cls(lowest, highest)
        if bool((levels != levels.round()).any()):
            return cls(lowest, highest, levels, (levels[:-1] + levels[1:]) / 2)
        cells = (torch.arange(FINE, dtype=torch.float32, device=levels.device) + 0.5 - FINE // 2) / 2
        nearest = torch.bucketize(cells, (levels[:-1] + levels[1:]) / 2)
        return cls(lowest, highest, levels[nearest])

    def nearest_(self, targets: Tensor) -> Tensor:
        """The level nearest to each target; ``targets`` may be overwritten."""
        if self.values is None:
            return targets.round_().clamp_(self.lowest, self.highest)
        if self.middles is not None:
            index = torch.bucketize(targets, self.middles, out_int32=True)
            return self.values.index_select(0, index.reshape(-1)).reshape(targets.shape)
        cell = targets.mul_(2).add_(FINE // 2).floor_().clamp_(0, FINE - 1).to(torch.int32)
        return self.values.index_select(0, cell.reshape(-1)).reshape(targets.shape)


def reciprocal(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where that is not finite: the nearest level is then the one next to zero."""
    inverse = 1 / scale
    return torch.where(torch.isfinite(inverse), inverse, torch.zeros_like(inverse))


def weighted_error(x: Tensor, w: Tensor, scale: Tensor, levels: Levels, shift: Tensor | None = None) -> Tensor:
    """sum w (x - scale (level - shift))^2 of nearest levels, (N,); ``shift`` are zero points."""
    level = x * reciprocal(scale)
    level = levels.nearest_(level) if shift is None else levels.nearest_(level.add_(shift)).sub_(shift)
    residual = level.mul_(scale).sub_(x)
    return fold(residual.square_().mul_(w))


def _refitted(
    x: Tensor, w: Tensor, scale: Tensor, levels: Levels, shift: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The least-squares scale for the codes of ``scale``, and its error with those codes: (N,) each."""
    level = x * reciprocal(scale)
    level = levels.nearest_(level) if shift is None else levels.nearest_(level.add_(shift)).sub_(shift)
    residual = x - level * scale
    weighted = w * residual
    error = fold(residual.mul_(weighted))
    cross = fold(weighted.mul_(level))
    square = fold(level.square_().mul_(w))
    step = torch.where(square > 0, cross / square, torch.zeros_like(square))
    return scale + step, error - step * cross


def fine_factors(bits: int, steps: int = 5) -> tuple[float, ...]:
    """Factors around 1 for a second look at the best scale: the more levels, the closer."""
    step = 0.3 / (1 << bits)
    return tuple(1 + sign * count * step for count in range(1, steps + 1) for sign in (1, -1))


def _tried(x: Tensor, w: Tensor, scales: Tensor, levels: Levels, shifts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``_refitted`` of each of ``scales`` (tries, N), and of ``shifts`` as many: (tries, N) each."""
    if levels.values is None and x.device.type == "cpu":
        return native.refitted(x, w, scales, shifts, levels.lowest, levels.highest)
    shift = [None] * len(scales) if shifts is None else list(shifts)
    pairs = [_refitted(x, w, scale, levels, one) for scale, one in zip(scales, shift, strict=True)]
    return torch.stack([scale for scale, _ in pairs]), torch.stack([error for _, error in pairs])


def _products(scale: Tensor, factors: Sequence[float]) -> Tensor:
    """``scale`` (N,) times each of ``factors``: (factors, N)."""
    return torch.stack([scale * factor for factor in factors])


def symmetric_scales(
    x: Tensor,
    w: Tensor,
    levels: Levels,
    factors: tuple[Sequence[float], Sequence[float]],
    storage: torch.dtype,
    *,
    signed: bool,
    start: Tensor | None = None,
) -> Tensor:
    """Scales (N,), as ``storage`` holds them, of small weighted error: value = scale * level.

    x, w float32 (n, N). Tries ``factors[0]`` times the scale that maps the largest magnitude to the lowest level, and
    its negative if ``signed``, then ``factors[1]`` times the best, and the best itself; each is refitted by least
    squares, which keeps its sign. ``start`` (N,) scales that the answer is not worse than. Groups of zeros keep that,
    or get a scale that is not zero.
    """
    extreme = x.abs().amax(dim=0)
    base = divided(extreme, -levels.lowest)
    best, least = base, torch.full_like(base, torch.inf)
    signs = (1.0, -1.0) if signed else (1.0,)
    for trials, stage in zip(factors, (signs, (1.0,)), strict=True):
        factors_here = [sign * factor for factor in trials for sign in stage]
        if not factors_here:
            continue
        for scale, error in zip(*_tried(x, w, _products(base, factors_here), levels), strict=True):
            better = error < least
            best, least = torch.where(better, scale, best), torch.where(better, error, least)
        base = best
    again = _tried(x, w, best[None], levels)[0][0]
    found = [*_stored_near(best, storage), *_stored_near(again, storage)]
    if start is None:
        return torch.where(extreme > 0, _best_stored(x, w, levels, found), torch.full_like(best, LEAST_SCALE))
    return _best_stored(x, w, levels, [start, *found])


def _stored_near(scale: Tensor, storage: torch.dtype) -> list[Tensor]:
    """``scale`` as stored, and the two numbers next to it; none is zero or infinite."""
    stored = to_storage(scale, storage)
    if storage == torch.float32:
        return [stored]
    bits = stored.to(storage).view(torch.int16)
    most = torch.tensor(torch.finfo(storage).max, dtype=storage).view(torch.int16).item()
    magnitude = bits & 0x7FFF
    near = [(magnitude + step).clamp(1, most) | (bits & -0x8000) for step in (0, 1, -1)]
    return [trial.view(storage).to(torch.float32) for trial in near]


def _best_stored(x: Tensor, w: Tensor, levels: Levels, trials: list[Tensor], shift: Tensor | None = None) -> Tensor:
    """Of several scales the first with the least error, group by group; one that is not finite loses."""
    best, least = trials[0], torch.full_like(trials[0], torch.inf)
    for trial, error in zip(trials, _errors(x, w, trials, levels, shift), strict=True):
        better = error < least
        best, least = torch.where(better, trial, best), torch.where(better, error, least)
    return best


def _errors(x: Tensor, w: Tensor, trials: list[Tensor], levels: Levels, shift: Tensor | None) -> Iterable[Tensor]:
    """``weighted_error`` of each."""
    if levels.values is None and x.device.type == "cpu":
        shifts = None if shift is None else shift.expand(len(trials), -1).contiguous()
        return native.errors(x, w, torch.stack(trials), shifts, levels.lowest, levels.highest)
    return (weighted_error(x, w, trial, levels, shift) for trial in trials)


def zero_point_scales(
    x: Tensor,
    w: Tensor,
    levels: Levels,
    factors: tuple[Sequence[float], Sequence[float]],
    storage: torch.dtype,
    least_zero: int,
) -> tuple[Tensor, Tensor]:
    """Scales and zero points (N,) of small weighted error: value = scale * (level - zero), zero a level.

    Tries ``factors[0]`` times the range of the group (zero included) with the integers on both sides of the zero point
    that fits, each refitted by least squares; then in turn the neighbours of the best zero point and ``factors[1]``
    times the best scale.
    """
    low, high = x.amin(dim=0).clamp(max=0), x.amax(dim=0).clamp(min=0)
    base = divided(high - low, levels.highest)
    best, zero, least = base, torch.zeros_like(base), torch.full_like(base, torch.inf)

    def attempt(scales: Sequence[Tensor], shifts: Sequence[Tensor]) -> None:
        nonlocal best, zero, least
        clamped = torch.stack(list(shifts)).clamp_(least_zero, levels.highest)
        for shift, fitted, error in zip(
            clamped, *_tried(x, w, torch.stack(list(scales)), levels, clamped), strict=True
        ):
            usable = (error < least) & (fitted > 0)
            best, least = torch.where(usable, fitted, best), torch.where(usable, error, least)
            zero = torch.where(usable, shift, zero)

    position = -low * reciprocal(base)
    # A shorter range loses as much at one end as at the other: its middle stays where it is.
    exact = [divided(position, factor) + (levels.highest / 2) * (1 - 1 / factor) for factor in factors[0]]
    around = [side for middle in exact for side in (middle.floor(), middle.ceil())]
    attempt([base, *(base * factor for factor in factors[0] for _ in range(2))], [position.round(), *around])
    for trials in (factors[1], (1.0,)):
        attempt([best], [zero + 1])
        attempt([best], [zero - 1])
        attempt([best * factor for factor in trials], [zero] * len(trials))
    zero = zero.clamp(least_zero, levels.highest)
    found = _best_stored(x, w, levels, _stored_near(best, storage), zero)
    return torch.where(high > low, found, torch.full_like(found, LEAST_SCALE)), zero


def affine_error(x: Tensor, w: Tensor, scale: Tensor, offset: Tensor, levels: Levels) -> Tensor:
    """sum w (x - scale level - offset)^2 of nearest levels, (N,)."""
    level = levels.nearest_((x - offset).mul_(reciprocal(scale)))
    return fold(level.mul_(scale).add_(offset).sub_(x).square_().mul_(w))


def _affine_refitted(
    x: Tensor, w: Tensor, scale: Tensor, offset: Tensor, levels: Levels
) -> tuple[Tensor, Tensor, Tensor]:
    """The least-squares scale and offset for the codes of ``scale`` and ``offset``, and their error: (N,) each."""
    level = levels.nearest_((x - offset).mul_(reciprocal(scale)))
    residual = x - (level * scale).add_(offset)
    weighted = w * residual
    error, plain = fold(residual.mul_(weighted)), fold(weighted)
    cross = fold(weighted.mul_(level))
    weighted = w * level
    linear, square, total = fold(weighted), fold(level.mul_(weighted)), fold(w)
    scale_step, offset_step = solve_pair(square, linear, total, cross, plain)
    return scale + scale_step, offset + offset_step, error - scale_step * cross - offset_step * plain


def solve_pair(aa: Tensor, ab: Tensor, bb: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The solution of [[aa, ab], [ab, bb]] y = [a, b], lane by lane; of a singular one with one of y zero."""
    determinant = aa * bb - ab * ab
    regular = determinant > 1e-5 * aa * bb
    divisor = torch.where(regular, determinant, 1.0)
    second = torch.where(bb > 0, b / torch.where(bb > 0, bb, 1.0), 0.0)
    first = torch.where((bb > 0) | (aa <= 0), 0.0, a / torch.where(aa > 0, aa, 1.0))
    first = torch.where(regular, (bb * a - ab * b) / divisor, first)
    return first, torch.where(regular, (aa * b - ab * a) / divisor, second)


TRIMS = (-0.02, 0.03, 0.08, 0.14)  # parts of the range that are cut off at an end


def affine_scales(
    x: Tensor,
    w: Tensor,
    levels: Levels,
    start: tuple[Tensor, Tensor],
    storage: torch.dtype,
    trims: Sequence[float] = TRIMS,
) -> tuple[Tensor, Tensor]:
    """Scales and offsets (N,), as ``storage`` holds them: value = scale * level + offset, levels from 0 up.

    x, w float32 (n, N). Tries the range of the group with both ends moved by ``trims``, each refitted by least squares;
    the answer is not worse than ``start``.
    """
    low, high = x.amin(dim=0), x.amax(dim=0)
    reach = high - low
    best, least = start, torch.full_like(low, torch.inf)
    for below in trims:
        for above in trims:
            scale = reach * ((1 - below - above) / levels.highest)
            scale, offset, error = _affine_refitted(x, w, scale, low + below * reach, levels)
            better = error < least
            best = torch.where(better, scale, best[0]), torch.where(better, offset, best[1])
            least = torch.where(better, error, least)
    again = _affine_refitted(x, w, *best, levels)
    stored, least = start, affine_error(x, w, *start, levels).nan_to_num(torch.inf, torch.inf)
    for scale, offset in (best, again[:2]):
        for trial in _stored_near(scale, storage):
            moved = _affine_refitted(x, w, trial, offset, levels)
            for candidate in (offset, moved[1] + (moved[0] - trial) * levels.highest / 2):
                held = to_storage(candidate, storage)
                error = affine_error(x, w, trial, held, levels)
                better = error < least
                stored = torch.where(better, trial, stored[0]), torch.where(better, held, stored[1])
                least = torch.where(better, error, least)
    return stored
