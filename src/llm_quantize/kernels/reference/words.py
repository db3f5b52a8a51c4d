"""The meaning of the loops over words, and their form for accelerators.

One word after the other, all rows at once; a product and a sum are two roundings and sums go from the first weight to
the last, as in the native twin. Numbers of one word are (8, R), what is tried for it (E, R).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from llm_quantize.kernels.feedback import TileGrid
    from llm_quantize.kernels.words import Book

__all__ = ["cost", "descend", "feedback", "search"]

WORD = 8
ROUNDS = 2
_INFINITE = float("inf")


def cost(metric: Tensor, aim: Tensor, levels: Tensor) -> Tensor:
    """v S v^T - 2 aim v^T of levels v (8, R), (R,); ``aim`` (8, R) = S t: f up to what no word changes."""
    total = torch.zeros_like(aim[0])
    for i in range(WORD):
        term = -2.0 * aim[i]
        for j in range(i):
            term = term + (2.0 * metric[i, j]) * levels[j]
        term = term + metric[i, i] * levels[i]
        total = total + levels[i] * term
    return total


def search(book: Book, metric: Tensor, aim: Tensor, signs: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Levels float32 and codes of entries int64 (8, R) of a word of small cost, found from ``signs`` float32 (8, R).

    By turns the best entry for the signs and the best signs for the entry, ROUNDS times; where an entry is for four
    weights, the first one goes by ``levels`` (8, R) of the other four.
    """
    size = len(book.entries)
    found, codes = levels.clone(), torch.zeros(levels.shape, dtype=torch.uint8, device=levels.device)
    signs = signs.clone()
    for _ in range(ROUNDS):
        for first in range(0, WORD, size):
            entry = _best_entry(book, metric, aim, signs, found, first)
            part = slice(first, first + size)
            codes[part] = book.codes[:, entry]
            found[part] = signs[part] * book.entries[:, entry]
        if book.signs is None:
            break
        pattern = _best_signs(book.signs, metric, aim, found.abs())
        signs = book.signs[:, pattern]
        found = signs * found.abs()
    return found, codes


def _best_entry(book: Book, metric: Tensor, aim: Tensor, signs: Tensor, found: Tensor, first: int) -> Tensor:
    """int64 (R,): which entry costs least in the weights from ``first`` on; of equals the first."""
    size = len(book.entries)
    inside = range(first, first + size)
    total = torch.zeros(book.entries.shape[1], aim.shape[1], device=aim.device)
    for i in inside:
        linear = aim[i]
        for j in range(WORD):
            if j not in inside:
                linear = linear - metric[i, j] * found[j]
        linear = signs[i] * (-2.0 * linear)
        term = linear.expand(total.shape)
        for j in range(first, i):
            term = term + (signs[i] * signs[j] * (2.0 * metric[i, j])) * book.entries[j - first][:, None]
        term = term + metric[i, i] * book.entries[i - first][:, None]
        total = total + book.entries[i - first][:, None] * term
    return _least(total)


def _best_signs(patterns: Tensor, metric: Tensor, aim: Tensor, magnitudes: Tensor) -> Tensor:
    """int64 (R,): which of ``patterns`` (8, P) costs least."""
    total = torch.zeros(patterns.shape[1], aim.shape[1], device=aim.device)
    for i in range(WORD):
        term = (-2.0 * aim[i] * magnitudes[i]).expand(total.shape)
        for j in range(i):
            term = term + (2.0 * metric[i, j] * magnitudes[i] * magnitudes[j]) * patterns[j][:, None]
        total = total + patterns[i][:, None] * term
    return _least(total)


def _least(values: Tensor) -> Tensor:
    return torch.where(values < _INFINITE, values, _INFINITE).argmin(0)


def feedback(
    grid: TileGrid,
    book: Book,
    coupling: Tensor,
    metrics: Tensor,
    weight: Tensor,
    target: Tensor,
    residual: Tensor,
    codes: Tensor,
    counts: Tensor,
) -> None:
    """See :func:`llm_quantize.kernels.words.feedback`."""
    for word, start in enumerate(range(0, len(weight), WORD)):
        here = slice(start, start + WORD)
        own = coupling[here, here]
        moved = target[here] - weight[here]
        for i in range(1, WORD):
            for j in range(i):
                moved[i] -= own[i, j] * moved[j]
        wanted = weight[here] + moved
        at = grid.group[start].long()
        if grid.offset is not None:
            wanted = wanted + grid.offset[at]
        x = wanted * grid.inverse[at]
        counts += ((x < grid.edges[0]) | (x > grid.edges[1])).sum(0, dtype=torch.int32)
        levels, found = search(book, metrics[word], _times(metrics[word], x), _signs_of(book, x), x)
        codes[here] = _codes(grid, book, levels, found)
        residual[here] = weight[here] - _values(grid, at, levels)
        for k in range(start + WORD, len(weight)):
            for j in range(start, start + WORD):
                target[k] += residual[j] * coupling[k, j]


def descend(
    grid: TileGrid,
    book: Book,
    hessian: Tensor,
    weight: Tensor,
    gradient: Tensor,
    residual: Tensor,
    codes: Tensor,
    sweeps: int,
) -> int:
    """See :func:`llm_quantize.kernels.words.descend`."""
    total = 0
    for _ in range(sweeps):
        moved = torch.zeros((), dtype=torch.int64, device=weight.device)
        for start in range(0, len(weight), WORD):
            here = slice(start, start + WORD)
            at = grid.group[start].long()
            metric, now = hessian[here, here], grid.levels[codes[here].long()]
            aim = _times(metric, now) + gradient[here] * grid.inverse[at]
            levels, found = search(book, metric, aim, _signs_of(book, now), now)
            better = cost(metric, aim, levels) < cost(metric, aim, now)
            after = weight[here] - _values(grid, at, levels)
            change = torch.where(better, after - residual[here], 0.0)
            residual[here] = torch.where(better, after, residual[here])
            codes[here] = torch.where(better, _codes(grid, book, levels, found), codes[here])
            moved += better.sum()
            for j in range(WORD):
                gradient += change[j] * hessian[start + j, :, None]
        total += int(moved)
        if int(moved) == 0:
            break
    return total


def _times(metric: Tensor, x: Tensor) -> Tensor:
    """S x of x (8, R)."""
    parts = []
    for i in range(WORD):
        total = torch.zeros_like(x[0])
        for j in range(WORD):
            total = total + metric[i, j] * x[j]
        parts.append(total)
    return torch.stack(parts)


def _signs_of(book: Book, x: Tensor) -> Tensor:
    return torch.ones_like(x) if book.signs is None else torch.where(x < 0, -1.0, 1.0)


def _values(grid: TileGrid, at: Tensor, levels: Tensor) -> Tensor:
    value = grid.scale[at] * levels
    return value if grid.offset is None else value - grid.offset[at]


def _codes(grid: TileGrid, book: Book, levels: Tensor, codes: Tensor) -> Tensor:
    """``codes`` of positive levels, turned round where signs are apart and the level is negative."""
    return codes if book.signs is None else torch.where(levels < 0, grid.levels.numel() - 1 - codes, codes)
