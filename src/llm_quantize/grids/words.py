"""Tiles of rows with the columns first, as the loops of feedback take them; nearest words of a grid."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llm_quantize.kernels import feedback as loops
from llm_quantize.kernels import words as word_loops
from llm_quantize.kernels.words import WORD, Book

if TYPE_CHECKING:
    from llm_quantize.grids.grid import Grid

__all__ = ["blocks", "nearest_words", "padded_rows", "round_words", "tile_grid"]


def padded_rows(values: Tensor) -> Tensor:
    """float32 (rows, n) as (n, R), contiguous, R the next multiple of the vector length."""
    rows, n = values.shape
    whole = -(-rows // loops.LANES) * loops.LANES
    out = torch.zeros(n, whole, dtype=torch.float32, device=values.device)
    out[:, :rows] = values.T
    return out


def blocks(columns: int) -> list[slice]:
    """The columns, as many at a time as the loops take."""
    return [slice(start, min(columns, start + loops.BLOCK)) for start in range(0, columns, loops.BLOCK)]


def tile_grid(grid: Grid, width: int) -> loops.TileGrid:
    """The grid of ``grid``'s rows, the columns of the tile beyond them having no scale."""
    columns = grid.shape[1]
    group = torch.arange(columns, dtype=torch.int32, device=grid.u.device) // grid.group
    offset = None if grid.z is None and grid.m is None else padded_rows(grid.offset())
    scale = padded_rows(grid.scale())
    if scale.shape[1] != width:
        raise ValueError("a grid and its tile differ in rows")
    return loops.TileGrid.make(scale, offset, group, grid.levels, uniform=grid.uniform)


def nearest_words(grid: Grid, book: Book, weight: Tensor, importance: Tensor | None = None) -> Tensor:
    """Codes uint8 (rows, columns) of the words of ``book`` nearest to ``weight`` float32 (rows, columns), each word
    for itself; ``importance`` float32 (columns,) weighs the columns."""
    target = padded_rows(weight)
    return round_words(tile_grid(grid, target.shape[1]), book, target, importance)[1][:, : len(weight)].T.contiguous()


def round_words(
    numbers: loops.TileGrid, book: Book, target: Tensor, importance: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``nearest_words`` of a tile (n, R): residuals float32 and codes uint8 (n, R), and int32 (R,) how many weights lay
    outside of the grid."""
    n, width = target.shape
    shares = torch.ones(n, device=target.device) if importance is None else importance
    metrics = torch.diag_embed(shares.reshape(-1, WORD))
    residual, codes = torch.empty_like(target), torch.empty(n, width, dtype=torch.uint8, device=target.device)
    counts = torch.zeros(width, dtype=torch.int32, device=target.device)
    for block in blocks(n):
        size = block.stop - block.start
        word_loops.feedback(
            numbers.columns(block),
            book,
            torch.zeros(size, size, device=target.device),
            metrics[block.start // WORD : block.stop // WORD],
            target[block],
            target[block].clone(),
            residual[block],
            codes[block],
            counts,
        )
    return residual, codes, counts
