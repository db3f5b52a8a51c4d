"""One tile of rows on its way through the stages, held with the columns first: (n, R), rows side by side.

Legend: w (n,) one row of the target, q the values of its codes, d = w - q; all stages lower d H d^T with H the
conditioned Hessian. Rows never touch each other, and R is padded to whole vectors with rows of zeros, so a row's codes
do not depend on its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llm_quantize.errors import UsageError
from llm_quantize.grids.grid import Grid
from llm_quantize.grids.words import blocks, padded_rows, round_words, tile_grid
from llm_quantize.kernels import feedback as loops
from llm_quantize.kernels import words as word_loops
from llm_quantize.kernels.reference.feedback import nearest
from llm_quantize.kernels.words import WORD
from llm_quantize.methods.hessian import Factor

__all__ = ["Tile", "padded_rows", "weighted_squares", "word_metrics"]


@dataclass
class Tile:
    """``rows`` rows of a matrix. ``target``, ``residual`` float32 (n, R), ``codes`` uint8 (n, R), R >= rows;
    ``gradient`` = H d float32 (n, R), None where it is not known."""

    rows: int
    target: Tensor
    residual: Tensor
    codes: Tensor
    grid: Grid
    numbers: loops.TileGrid
    clipped: int = 0
    gradient: Tensor | None = None

    @classmethod
    def make(cls, target: Tensor, grid: Grid) -> Tile:
        """``target`` float32 (n, R), contiguous, columns from the grid's rows on being padding; no codes as yet."""
        rows = grid.shape[0]
        return cls(
            rows=rows,
            target=target,
            residual=target.clone(),
            codes=torch.zeros(target.shape, dtype=torch.uint8, device=target.device),
            grid=grid,
            numbers=tile_grid(grid, target.shape[1]),
        )

    def round_plainly(self, factor: Factor) -> None:
        """Each weight gets the nearest code, each word the nearest of its book by the diagonal of H."""
        if self.grid.book is not None:
            found = round_words(self.numbers, self.grid.book, self.target, factor.hessian.diagonal().contiguous())
            self.residual, self.codes, self.gradient = found[0], found[1], None
            self.clipped = int(found[2][: self.rows].sum())
            return
        value, self.codes, outside = nearest(self.numbers, slice(None), self.target)
        self.residual, self.gradient = self.target - value, None
        self.clipped = int(outside[:, : self.rows].sum())

    def feed_back(self, factor: Factor) -> None:
        """Column after column in the factor's order the nearest code, its error handed on to the later ones; word
        after word where codes are chosen together."""
        order, book = factor.order, self.grid.book
        numbers = self.numbers.columns(order)
        weight = self.target[order]
        residual, codes = torch.empty_like(weight), torch.empty_like(self.codes)
        counts = torch.zeros(weight.shape[1], dtype=torch.int32, device=weight.device)
        metrics = word_metrics(factor) if book is not None else weight
        for block in blocks(len(weight)):
            target = weight[block].clone()
            if block.start:
                target.addmm_(factor.lower[block, : block.start], residual[: block.start])
            here, coupling = numbers.columns(block), factor.lower[block, block]
            state = weight[block], target, residual[block], codes[block], counts
            if book is None:
                loops.feedback(here, coupling, *state)
            else:
                words = slice(block.start // WORD, block.stop // WORD)
                word_loops.feedback(here, book, coupling, metrics[words], *state)
        self.residual[order], self.gradient = residual, None
        self.codes[order] = codes
        self.clipped = int(counts[: self.rows].sum())

    def descend(self, factor: Factor, reciprocal: Tensor, sweeps: int) -> None:
        """Up to ``sweeps`` sweeps of coordinate descent; ``reciprocal`` float32 (n,) = 1 / H_jj."""
        if sweeps:
            state = self.target, self.current_gradient(factor), self.residual, self.codes, sweeps
            if self.grid.book is None:
                loops.descend(self.numbers, factor.hessian, reciprocal, *state)
            else:
                word_loops.descend(self.numbers, self.grid.book, factor.hessian, *state)

    def current_gradient(self, factor: Factor) -> Tensor:
        """H d, float32 (n, R): one product after each step that changes all residuals; descent keeps it current."""
        if self.gradient is None:
            self.gradient = factor.hessian @ self.residual
        return self.gradient

    def losses(self, factor: Factor) -> Tensor:
        """d H d^T, float64 (rows,)."""
        return weighted_squares(self.residual, self.current_gradient(factor))[: self.rows]

    def move_to(self, grid: Grid) -> None:
        """The same codes on another grid."""
        self.grid = grid
        self.numbers = tile_grid(grid, self.target.shape[1])
        at = self.numbers.group.long()
        value = self.numbers.scale[at] * self.numbers.levels[self.codes.long()]
        if self.numbers.offset is not None:
            value -= self.numbers.offset[at]
        self.residual, self.gradient = self.target - value, None

    def row_codes(self) -> Tensor:
        """uint8 (rows, n)."""
        return self.codes[:, : self.rows].T.contiguous()


def word_metrics(factor: Factor) -> Tensor:
    """S float32 (n / 8, 8, 8) of every word in the factor's order: what it costs beyond what later columns make up for.

    With I + C the diagonal block of ``lower`` with its ones, and p the pivots: (I + C)^T diag(p) (I + C). Raises
    UsageError where the order does not keep words together.
    """
    n = len(factor.order)
    words = factor.order.reshape(-1, WORD) if n % WORD == 0 else factor.order[:, None]
    first = words[:, :1]
    if n % WORD or bool((first % WORD != 0).any()) or bool((words != first + torch.arange(WORD).to(first)).any()):
        raise UsageError(
            "The columns of this Hessian were not factored in whole words", remedy=f"factorize with joint={WORD}"
        )
    parts = factor.lower.reshape(n // WORD, WORD, n // WORD, WORD).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    unit = parts.to(torch.float64) + torch.eye(WORD, dtype=torch.float64, device=parts.device)
    pivots = factor.pivots.to(torch.float64).reshape(-1, WORD, 1)
    metrics = unit.transpose(1, 2) @ (unit * pivots)
    return ((metrics + metrics.transpose(1, 2)) / 2).to(torch.float32)


def weighted_squares(residual: Tensor, gradient: Tensor) -> Tensor:
    """Sum over columns of d * (H d), both float32 (n, R): float64 (R,)."""
    losses = torch.zeros(residual.shape[1], dtype=torch.float64, device=residual.device)
    for block in blocks(len(residual)):
        losses += (gradient[block].to(torch.float64) * residual[block]).sum(0)
    return losses
