"""Number grids the slow way: one weight, one group, one superblock at a time, in numpy float32.

The same sums in the same order as ``llm_quantize.grids.search`` and ``ggml_grid_super``, so that scales, zero
points and sub-scales must be EQUAL, not near; ``nearest`` tries every code in float64.
"""

from __future__ import annotations

import numpy as np

F = np.float32
Array = np.ndarray
ZERO = F(0)


def value(grid, code: int, row: int, column: int) -> F:
    """What ``code`` stands for at (row, column): the formula of the Grid, decoder's order."""
    group, span = placed(grid, column)
    level = F(grid.levels[code].item())
    if grid.z is not None:
        level = F(level - F(grid.z[row, group].item()))
    scaled = F(F(F(grid.d[row, span].item()) * F(grid.u[row, group].item())) * level)
    if grid.m is None:
        return scaled
    return F(scaled - F(F(grid.m[row, span].item()) * F(grid.v[row, group].item())))


def placed(grid, column: int) -> tuple[int, int]:
    """(group, span) of a column."""
    group = column // grid.group if grid.index is None else int(grid.index[column])
    return group, group * grid.group // grid.span


def nearest(grid, weight: Array) -> Array:
    """Codes by trying all: the nearest value, of equally near ones the lowest code; at scale 0 the level next to 0."""
    codes = np.zeros(weight.shape, np.uint8)
    levels = grid.levels.numpy().astype(np.float64)
    for row, column in np.ndindex(weight.shape):
        group, span = placed(grid, column)
        zero = 0.0 if grid.z is None else float(grid.z[row, group])
        scale = F(grid.d[row, span].item()) * F(grid.u[row, group].item())
        if scale == 0:
            distances = np.abs(levels - zero)
        else:
            values = [value(grid, code, row, column) for code in range(len(levels))]
            distances = np.abs(np.array(values, np.float64) - np.float64(weight[row, column]))
        codes[row, column] = int(np.argmin(distances))
    return codes


def halved_sum(terms: Array) -> F:
    while len(terms) > 1:
        half = len(terms) // 2
        total = terms[:half] + terms[half : 2 * half]
        if len(terms) % 2:
            total[0] += terms[-1]
        terms = total
    return terms[0]


def inverse(scale: F) -> F:
    with np.errstate(all="ignore"):
        result = F(1) / F(scale)
    return result if np.isfinite(result) else F(0)


def level_of(levels: Array, targets: Array) -> Array:
    """The nearest level; halfway even for integers, the upper one for a table."""
    if len(levels) == levels[-1] - levels[0] + 1:
        return np.clip(np.rint(targets), levels[0], levels[-1])
    middles = (levels[:-1] + levels[1:]) / F(2)
    return levels[(targets[:, None] >= middles).sum(axis=1)]


def stored(scale: F, dtype: type) -> F:
    most = np.finfo(dtype).max
    return F(dtype(np.clip(F(scale), -F(most), F(most))))


def stored_near(scale: F) -> list[F]:
    """The float16 number nearest to ``scale`` and its two neighbours in magnitude; not zero, not infinite."""
    bits = int(np.float16(stored(scale, np.float16)).view(np.uint16))
    sign, magnitude = bits & 0x8000, bits & 0x7FFF
    near = [np.uint16(min(max(magnitude + step, 1), 0x7BFF) | sign) for step in (0, 1, -1)]
    return [F(bits.view(np.float16)) for bits in near]


def error_of(x: Array, w: Array, scale: F, levels: Array, shift: F = ZERO) -> F:
    level = level_of(levels, x * inverse(scale) + shift) - shift
    residual = level * F(scale) - x
    return halved_sum(residual * residual * w)


def refitted(x: Array, w: Array, scale: F, levels: Array, shift: F = ZERO) -> tuple[F, F]:
    level = level_of(levels, x * inverse(scale) + shift) - shift
    residual = x - level * F(scale)
    weighted = w * residual
    error, cross, square = halved_sum(residual * weighted), halved_sum(weighted * level), halved_sum(level * level * w)
    step = cross / square if square > 0 else F(0)
    return F(scale + step), F(error - step * cross)


def best_stored(x: Array, w: Array, levels: Array, trials: list[F], shift: F = ZERO) -> F:
    best, least = trials[0], F(np.inf)
    for trial in trials:
        error = error_of(x, w, trial, levels, shift)
        if error < least:
            best, least = trial, error
    return best


def better_scale(x, w, scale: F, levels, best: tuple[F, F]) -> tuple[F, F]:
    found = refitted(x, w, scale, levels)
    return found if found[1] < best[1] else best


def symmetric_scale(x, w, levels, factors, *, signed, start=None, half=True) -> F:
    """One group of :func:`llm_quantize.grids.search.symmetric_scales`."""
    extreme = np.abs(x).max()
    base = F(extreme / -levels[0])
    best, least = base, F(np.inf)
    for factor in [f * sign for f in factors[0] for sign in ((1, -1) if signed else (1,))]:
        best, least = better_scale(x, w, F(base * F(factor)), levels, (best, least))
    base = best
    for factor in factors[1]:
        best, least = better_scale(x, w, F(base * F(factor)), levels, (best, least))
    again, _ = refitted(x, w, best, levels)
    trials = [*stored_near(best), *stored_near(again)] if half else [best, again]
    if start is not None:
        return best_stored(x, w, levels, [start, *trials])
    return best_stored(x, w, levels, trials) if extreme > 0 else F(2.0**-14)


def zero_point_scale(x, w, levels, factors, least_zero: int) -> tuple[F, F]:
    """One group of :func:`llm_quantize.grids.search.zero_point_scales`."""
    most = levels[-1]
    low, high = min(x.min(), F(0)), max(x.max(), F(0))
    base = F((high - low) / most)
    best, zero, least = base, F(0), F(np.inf)

    def attempt(scale: F, shift: F) -> None:
        nonlocal best, zero, least
        shift = F(np.clip(shift, least_zero, most))
        fitted, error = refitted(x, w, scale, levels, shift)
        if error < least and fitted > 0:
            best, zero, least = fitted, shift, error

    position = F(-low * inverse(base))
    attempt(base, np.rint(position))
    for factor in factors[0]:
        exact = F(F(position / F(factor)) + F((float(most) / 2) * (1 - 1 / factor)))
        attempt(F(base * F(factor)), np.floor(exact))
        attempt(F(base * F(factor)), np.ceil(exact))
    for trials in (factors[1], (1.0,)):
        attempt(best, zero + 1)
        attempt(best, zero - 1)
        centre = best
        for factor in trials:
            attempt(F(centre * F(factor)), zero)
    zero = F(np.clip(zero, least_zero, most))
    return (best_stored(x, w, levels, stored_near(best), zero) if high > low else F(2.0**-14)), zero


def solve_pair(aa: F, ab: F, bb: F, a: F, b: F) -> tuple[F, F]:
    determinant = F(aa * bb) - F(ab * ab)
    if determinant > F(F(1e-5) * aa) * bb:
        return F((bb * a - ab * b) / determinant), F((aa * b - ab * a) / determinant)
    if bb > 0:
        return F(0), F(b / bb)
    return (F(a / aa) if aa > 0 else F(0)), F(0)


def affine_error(x, w, scale: F, offset: F, levels: Array) -> F:
    level = level_of(levels, (x - offset) * inverse(scale))
    residual = level * scale + offset - x
    return halved_sum(residual * residual * w)


def affine_refitted(x, w, scale: F, offset: F, levels: Array) -> tuple[F, F, F]:
    level = level_of(levels, (x - offset) * inverse(scale))
    residual = x - (level * scale + offset)
    weighted = w * residual
    error, plain, cross = halved_sum(residual * weighted), halved_sum(weighted), halved_sum(weighted * level)
    weighted = w * level
    pair = solve_pair(halved_sum(level * weighted), halved_sum(weighted), halved_sum(w), cross, plain)
    return F(scale + pair[0]), F(offset + pair[1]), F(error - pair[0] * cross - pair[1] * plain)


def affine_scale(x, w, levels, start: tuple[F, F], trims) -> tuple[F, F]:
    """One group of :func:`llm_quantize.grids.search.affine_scales`."""
    low, reach = x.min(), F(x.max() - x.min())
    best, least = start, F(np.inf)
    for below in trims:
        for above in trims:
            scale = F(reach * F((1 - below - above) / float(levels[-1])))
            found = affine_refitted(x, w, scale, F(low + F(F(below) * reach)), levels)
            if found[2] < least:
                best, least = found[:2], found[2]
    again = affine_refitted(x, w, *best, levels)
    kept, least = start, affine_error(x, w, *start, levels)
    for scale, offset in (best, again[:2]):
        for trial in stored_near(scale):
            moved = affine_refitted(x, w, trial, offset, levels)
            for candidate in (offset, F(moved[1] + F(F(moved[0] - trial) * levels[-1]) / F(2))):
                held = stored(candidate, np.float16)
                error = affine_error(x, w, trial, held, levels)
                if error < least:
                    kept, least = (trial, held), error
    return kept


class Superblock:
    """One superblock: x, w (S, n); d, m numbers; u, v (S,) or None."""

    def __init__(self, x, w, levels, bounds, v_most, d, u, m=None, v=None) -> None:
        self.x, self.w, self.levels, self.bounds, self.v_most = x, w, levels, bounds, v_most
        self.d, self.u, self.m, self.v = d, u, m, v

    def changed(self, **parts) -> Superblock:
        return Superblock(**{**self.__dict__, **parts})

    def coded(self, s: int, u: F, v: F | None) -> tuple[Array, Array]:
        scale = F(self.d * u)
        target = self.x[s] if v is None else self.x[s] + F(self.m * v)
        level = level_of(self.levels, target * inverse(scale))
        return level, target - level * scale

    def sub_error(self, s: int, u: F, v: F | None) -> F:
        residual = self.coded(s, u, v)[1]
        return halved_sum(residual * residual * self.w[s])

    def v_of(self, s: int) -> F | None:
        return None if self.v is None else self.v[s]

    def error(self) -> F:
        # Sums first over the places in a sub-block, then over the sub-blocks.
        return halved_sum(np.array([self.sub_error(s, self.u[s], self.v_of(s)) for s in range(len(self.x))], F))


def searched(block: Superblock, reach: int) -> Superblock:
    u, v = block.u.copy(), None if block.v is None else block.v.copy()
    for s in range(len(u)):
        least = block.sub_error(s, block.u[s], block.v_of(s))
        for down in range(-reach, reach + 1) if v is not None else (0,):
            trial_v = None if v is None else F(np.clip(block.v[s] + down, 0, block.v_most))
            for step in range(-reach, reach + 1):
                trial_u = F(np.clip(block.u[s] + step, *block.bounds))
                error = block.sub_error(s, trial_u, trial_v)
                if error < least:
                    least, u[s] = error, trial_u
                    if v is not None:
                        v[s] = trial_v
    return block.changed(u=u, v=v)


def refitted_floats(block: Superblock) -> Superblock:
    sums: dict[str, list[F]] = {"plain": [], "cross": [], "square": [], "linear": [], "total": []}
    for s in range(len(block.u)):
        level, residual = block.coded(s, block.u[s], block.v_of(s))
        weighted = block.w[s] * residual
        sums["plain"].append(halved_sum(weighted))
        sums["cross"].append(halved_sum(weighted * level))
        weighted = block.w[s] * level
        sums["square"].append(halved_sum(level * weighted))
        sums["linear"].append(halved_sum(weighted))
        sums["total"].append(halved_sum(block.w[s]))
    plain, cross, square, linear, total = (np.array(terms, F) for terms in sums.values())
    u, v = block.u, block.v
    a, aa = halved_sum(u * cross), halved_sum(u * u * square)
    if v is None:
        return block.changed(d=stored(F(block.d + (F(a / aa) if aa > 0 else F(0))), np.float16))
    pair = solve_pair(aa, -halved_sum(u * v * linear), halved_sum(v * v * total), a, -halved_sum(v * plain))
    d, m = max(F(block.d + pair[0]), F(0)), max(F(block.m + pair[1]), F(0))
    return block.changed(d=stored(d, np.float16), m=stored(m, np.float16))


def afresh(block: Superblock, factors) -> Superblock:
    found = []
    for x, w in zip(block.x, block.w, strict=True):
        scale = symmetric_scale(x, w, block.levels, (factors, ()), signed=True, half=False)
        found.append(scale if np.abs(x).max() > 0 else F(0))
    d = stored(F(found[int(np.argmax(np.abs(found)))] / F(block.bounds[0])), np.float16)
    u = np.clip(np.rint(np.array(found, F) * inverse(d)), *block.bounds).astype(F)
    return block.changed(d=d, u=u)


def fit_superblock(block: Superblock, reaches, factors) -> Superblock:
    """One superblock of :func:`llm_quantize.grids.ggml_super.fit_superblocks`."""
    best, least = block, block.error()
    for start in [block, afresh(block, factors)] if block.bounds[0] < 0 else [block]:
        refined, lowest = start, start.error()
        for reach in reaches:
            for step in (lambda old, reach=reach: searched(old, reach), refitted_floats):
                trial = step(refined)
                if trial.error() < lowest:
                    refined, lowest = trial, trial.error()
        if lowest < least:
            best, least = refined, lowest
    return best
