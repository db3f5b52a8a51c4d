"""The loops of error feedback where the codes of eight neighbouring weights are chosen together.

Legend: a *word* is the codes of WORD neighbouring weights; a *book* says which words there are: entries of a table of
magnitudes, and signs. Of one row and one word: w weights, q values of the codes, d = w - q residuals (8,), S (8, 8) the
metric, f(q) = (t - q) S (t - q)^T what a word costs that should come near to t. Everything else is as in
``feedback.py``. On a CPU the native loops run, elsewhere ``reference/words.py``, which is their meaning: equal bit for
bit on the same numbers, at every SIMD level.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llm_quantize import kernels
from llm_quantize.kernels import _native
from llm_quantize.kernels.feedback import Array, TileGrid, swept
from llm_quantize.kernels.reference import words as reference_words

__all__ = ["WORD", "Book", "descend", "feedback"]

WORD = 8  # weights of a word
_PAD = 16  # entries and patterns of signs are a multiple of this


@dataclass(frozen=True)
class Book:
    """The words of a type.

    ``entries`` float32 (size, E), size 8 or 4: the levels of each entry, positive where there are ``signs``, float32
    (8, P): the patterns of +1 and -1 that may be over a word; None: levels are as they are. ``codes`` uint8 (size, E):
    code of each level of an entry with a positive sign. With signs the levels of the grid lie evenly about 0, so the
    code of minus a level is the number of levels less one less its code. E and P are multiples of 16.
    """

    entries: Tensor
    codes: Tensor
    signs: Tensor | None

    @classmethod
    def of(cls, codes: Tensor, magnitudes: Tensor, signs: str) -> Book:
        """From ``codes`` integers (E, size) of ``magnitudes`` float32 (n,), ascending. ``signs``: "even" (an even
        number of negative ones among eight), "free", or "none"."""
        patterns = None
        if signs != "none":
            bits = torch.arange(256)[:, None] >> torch.arange(WORD) & 1
            if signs == "even":
                bits = bits[bits.sum(1) % 2 == 0]
            patterns = (1 - 2 * bits.T).to(torch.float32).contiguous()
        above = 0 if patterns is None else len(magnitudes)
        return cls(
            entries=magnitudes[codes.long()].T.to(torch.float32).contiguous(),
            codes=(codes.T + above).to(torch.uint8).contiguous(),
            signs=patterns,
        )

    def arrays(self) -> tuple[Array, Array, Array | None]:
        """Entries, codes and signs as the native loops take them."""
        return self.entries.numpy(), self.codes.numpy(), None if self.signs is None else self.signs.numpy()

    def to(self, device: torch.device | str) -> Book:
        """The same on ``device``."""
        signs = None if self.signs is None else self.signs.to(device)
        return Book(self.entries.to(device), self.codes.to(device), signs)


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
    """Word after word the one of small f; what is left over moves the targets of the columns after it.

    As ``feedback.feedback``, of whole words; ``metrics`` float32 (columns / 8, 8, 8): S of each, symmetric. What
    ``target`` says of a word's later columns does not hold the errors of its earlier ones, which are in S: t = w + y,
    y (I + C) = target - w with C ``coupling`` inside of the word, below the diagonal.
    """
    if weight.device.type != "cpu":
        reference_words.feedback(grid, book, coupling, metrics, weight, target, residual, codes, counts)
        return
    _native.feed_words(
        kernels.simd_level(),
        *grid.numbers(),
        grid.group.numpy(),
        grid.levels.numpy(),
        grid.edges,
        *book.arrays(),
        coupling.numpy(),
        metrics.numpy(),
        weight.numpy(),
        target.numpy(),
        residual.numpy(),
        codes.numpy(),
        counts.numpy(),
    )


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
    """Up to ``sweeps`` sweeps of descent: each word moves to where the loss d H d^T of its row is less.

    As ``feedback.descend``, of whole words, S = H of its columns, t = q + S^-1 (d H). Returns how many times a word
    moved.
    """
    if weight.device.type != "cpu":
        return reference_words.descend(grid, book, hessian, weight, gradient, residual, codes, sweeps)

    def sweep(weight: Array, gradient: Array, residual: Array, codes: Array, counts: Array) -> None:
        _native.descend_words(
            kernels.simd_level(),
            *grid.numbers(by_row=True),
            grid.group.numpy(),
            grid.levels.numpy(),
            grid.edges,
            *book.arrays(),
            hessian.numpy(),
            weight,
            gradient,
            residual,
            codes,
            sweeps,
            counts,
        )

    return swept(weight, gradient, residual, codes, sweep)
