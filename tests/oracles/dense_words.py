"""Error feedback where eight codes are chosen together, written out: float64, one row and one word after the other.

The twin of ``llm_quantize.kernels.words`` and of what ``llm_quantize.methods`` does with it, with no line in common.
A book is ``entries`` (E, 8 or 4) levels and ``signs`` (P, 8) of +1 and -1, or None. Beside codes there are margins: how
close, as a share of what the word costs in all, the closest choice was.
"""

from __future__ import annotations

import itertools

import numpy as np


def costs(metric, target, words):
    """(t - v) S (t - v)^T of every one of ``words`` (k, 8)."""
    off = target - words
    return np.einsum("ki,ij,kj->k", off, metric, off)


def least(found):
    """(index, margin) of the least of ``found`` (k,)."""
    order = np.argsort(found, kind="stable")
    return int(order[0]), float((found[order[1]] - found[order[0]]) / max(np.abs(found).max(), 1e-300))


def word_of(metric, target, entries, signs, start):
    """(levels (8,), margin): by turns the best entry for the signs and the best signs for the entry, twice."""
    size, margins = entries.shape[1], []
    turned = np.ones(8) if signs is None else np.where(start < 0, -1.0, 1.0)
    word = start.copy()
    for _ in range(2):
        for first in range(0, 8, size):
            tried = np.repeat(word[None], len(entries), axis=0)
            tried[:, first : first + size] = turned[first : first + size] * entries
            index, margin = least(costs(metric, target, tried))
            word, margins = tried[index], [*margins, margin]
        if signs is None:
            break
        tried = signs * np.abs(word)
        index, margin = least(costs(metric, target, tried))
        word, turned, margins = tried[index], signs[index], [*margins, margin]
    return word, min(margins)


def cheapest(metric, target, entries, signs):
    """What the best of all words costs, each tried."""
    size = entries.shape[1]
    if size == 4:
        entries = np.array([np.concatenate(pair) for pair in itertools.product(entries, repeat=2)])
    patterns = np.ones((1, 8)) if signs is None else signs
    return min(costs(metric, target, entries * pattern).min() for pattern in patterns)


def feed_back(target, hessian, order, scale, shift, entries, signs):
    """Optimal brain quantization of whole words in a fixed ``order`` (n,): (values (rows, n), margins (rows,)).

    ``scale``, ``shift`` (rows, n): value = scale * level - shift. What later columns make up for is taken from the
    inverse: with B the word, S = (H^-1_BB)^-1.
    """
    rows, n = target.shape
    values, margins = np.zeros((rows, n)), np.full(rows, np.inf)
    for row in range(rows):
        weight, inverse, left = np.asarray(target[row], np.float64).copy(), np.linalg.inv(hessian), np.ones(n, bool)
        for word in np.asarray(order).reshape(-1, 8):
            metric = np.linalg.inv(inverse[np.ix_(word, word)])
            wanted = (weight[word] + shift[row, word]) / scale[row, word]
            levels, margin = word_of(metric, wanted, entries, signs, wanted)
            margins[row] = min(margins[row], margin)
            values[row, word] = scale[row, word] * levels - shift[row, word]
            left[word] = False
            error = metric @ (weight[word] - values[row, word])
            weight[left] -= error @ inverse[np.ix_(word, left)]
            inverse -= inverse[:, word] @ metric @ inverse[word]
    return values, margins


def descend(target, hessian, values, scale, shift, entries, signs, sweeps):
    """Word after word to where its row loses less, all others fixed: (values (rows, n), margins (rows,))."""
    rows, n = target.shape
    values, margins = values.copy(), np.full(rows, np.inf)
    for row, _, first in itertools.product(range(rows), range(sweeps), range(0, n, 8)):
        word = np.arange(first, first + 8)
        metric = hessian[np.ix_(word, word)]
        now = (values[row, word] + shift[row, word]) / scale[row, word]
        pull = hessian[word] @ (np.asarray(target[row], np.float64) - values[row])
        wanted = now + np.linalg.solve(metric, pull) / scale[row, word]
        levels, margin = word_of(metric, wanted, entries, signs, now)
        old, new = costs(metric, wanted, np.stack([now, levels]))
        if not np.allclose(levels, now):
            margins[row] = min(margins[row], margin, abs(old - new) / max(old, new))
        else:
            margins[row] = min(margins[row], margin)
        if new < old:
            values[row, word] = scale[row, word] * levels - shift[row, word]
    return values, margins
