"""GPTQ on any number grid: the grid fitted first and frozen, then codes chosen by what the layer loses.

GPTQ: Frantar et al. 2022 (arXiv 2210.17323), here as LDLQ (Chee et al. 2023, arXiv 2307.13304) with columns in falling
order of their mean square; coordinate descent: CDQuant (Nair and Suggala 2024, arXiv 2406.17542).

    W (rows, n)  weights; W' = W + W P the target (P: hessian.py); Q (rows, n) the values of the codes
    H (n, n)     conditioned mean of x x^T; loss of a row: (w' - q) H (w' - q)^T

Stages, each a switch of GptqOptions: correction of the target; a grid that weighs channels by their mean square;
feedback on that grid; sweeps of coordinate descent; the free floats refitted and swept again; and row by row the format
owner's own codes where those lose less. Dense twin: tests/oracles/dense_gptq.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llm_quantize.errors import NumericPolicyError, UsageError
from llm_quantize.grids.grid import Grid, GridType
from llm_quantize.methods.gptq_options import GptqOptions
from llm_quantize.methods.hessian import Factor, factorize, mix
from llm_quantize.methods.refit import refit
from llm_quantize.methods.sizes import TILE_ROWS
from llm_quantize.methods.tile import Tile, padded_rows, weighted_squares

__all__ = ["Factor", "GptqOptions", "Solution", "factorize", "mix", "solve"]

_ACCELERATOR_ROWS = 8192


@dataclass(frozen=True)
class Solution:
    """``codes`` uint8 (rows, n) on ``grid``; ``loss`` and ``plain_loss`` float64 (rows,): of these and of the format
    owner's own codes, per token, under the conditioned Hessian against the corrected target (``plain_loss`` is NaN
    where it was not asked for); ``plain_rows``: rows that kept the owner's codes; ``clipped``: share of the weights
    that lay outside of the grid when their code was chosen.
    """

    codes: Tensor
    grid: Grid
    loss: Tensor
    plain_loss: Tensor
    plain_rows: int
    clipped: float


def solve(weight: Tensor, grid_type: GridType, factor: Factor, options: GptqOptions) -> Solution:
    """Codes and grid for ``weight`` float (rows, n), by the stages of ``options``.

    Rows do not depend on each other: any pieces of a matrix give the codes of the whole (with one thread per call and
    a BLAS whose sums do not depend on the width of a product; at multiples of TILE_ROWS with every BLAS). Raises
    UsageError where the shapes do not fit, NumericPolicyError for NaN or infinity in ``weight``.
    """
    n = len(factor.order)
    if weight.ndim != 2 or weight.shape[1] != n or n % grid_type.block:
        raise UsageError(
            "A weight does not fit its Hessian or its number grid",
            expected=f"(rows, {n}), a multiple of {grid_type.block} columns",
            found=tuple(weight.shape),
        )
    reciprocal = 1.0 / factor.hessian.diagonal()
    size = TILE_ROWS if weight.device.type == "cpu" else _ACCELERATOR_ROWS
    parts = []
    for start in range(0, len(weight), size):
        rows = weight[start : start + size].to(torch.float32)
        if not bool(torch.isfinite(rows).all()):
            raise NumericPolicyError("A weight holds NaN or infinity", expected="finite weights")
        parts.append(_solve_tile(rows, grid_type, factor, reciprocal, options))
    if not parts:
        raise UsageError("There is no row to quantize", expected="at least one row", found=0)
    return _join(parts)


def losses(weight: Tensor, grid: Grid, codes: Tensor, factor: Factor) -> Tensor:
    """``Solution.loss`` told anew from ``codes`` uint8 (rows, n) on ``grid``: float64 (rows,)."""
    target = _target(weight.to(torch.float32), factor)
    residual = target - padded_rows(grid.decode(codes))
    return weighted_squares(residual, factor.hessian @ residual)[: len(codes)]


def _target(weight: Tensor, factor: Factor) -> Tensor:
    """W' of float32 rows, as ``padded_rows``."""
    target = padded_rows(weight)
    if factor.correction is not None:
        target += factor.correction.T @ target
    return target


def _solve_tile(
    weight: Tensor, grid_type: GridType, factor: Factor, reciprocal: Tensor, options: GptqOptions
) -> Solution:
    target = _target(weight, factor)
    rows = len(weight)
    grid = grid_type.fit(target[:, :rows].T.contiguous(), factor.importance, refine=options.refine)
    tile = Tile.make(target, grid)
    if options.feedback:
        tile.feed_back(factor)
    else:
        tile.round_plainly(factor)
    tile.descend(factor, reciprocal, options.sweeps)
    for _ in range(options.alternations if options.refit else 0):
        if not refit(tile, factor):
            break
        tile.descend(factor, reciprocal, options.sweeps)
    codes, loss = tile.row_codes(), tile.losses(factor)
    found = Solution(
        codes=codes,
        grid=tile.grid,
        loss=loss,
        plain_loss=torch.full_like(loss, float("nan")),
        plain_rows=0,
        clipped=tile.clipped / max(1, codes.numel()),
    )
    return _compare(found, weight, target, grid_type, factor) if options.compare else found


def _compare(found: Solution, weight: Tensor, target: Tensor, grid_type: GridType, factor: Factor) -> Solution:
    """``found``, with the format owner's own codes in the rows where those lose less."""
    grid, codes = grid_type.plain(weight, factor.importance)
    residual = target - padded_rows(grid.decode(codes))
    plain_loss = weighted_squares(residual, factor.hessian @ residual)[: len(codes)]
    plain = (plain_loss < found.loss) | ~torch.isfinite(found.loss)
    count = int(plain.sum())
    if count == 0:
        return replace(found, plain_loss=plain_loss)
    return Solution(
        codes=torch.where(plain[:, None], codes, found.codes),
        grid=_choose(plain, grid, found.grid),
        loss=torch.where(plain, plain_loss, found.loss),
        plain_loss=plain_loss,
        plain_rows=count,
        clipped=found.clipped,
    )


def _choose(first: Tensor, one: Grid, other: Grid) -> Grid:
    """Row by row ``one`` where ``first`` bool (rows,) says so, else ``other``; both of one type."""
    if not torch.equal(one.levels, other.levels) or (one.group, one.span) != (other.group, other.span):
        raise UsageError("Grids of different types cannot share a matrix", expected="the same levels and groups")
    chosen: dict[str, Tensor | None] = {}
    for name in ("d", "u", "z", "m", "v"):
        a, b = getattr(one, name), getattr(other, name)
        if a is None and b is None:
            chosen[name] = None
            continue
        empty = torch.zeros_like(b if a is None else a)
        chosen[name] = torch.where(first[:, None], empty if a is None else a, empty if b is None else b)
    found = replace(other, **chosen)  # type: ignore[arg-type]
    if one.ladder is None or other.ladder is None:
        return found
    codes = torch.where(first[:, None], one.ladder.codes, other.ladder.codes)
    return replace(found, ladder=replace(other.ladder, codes=codes))


def _join(parts: list[Solution]) -> Solution:
    if len(parts) == 1:
        return parts[0]
    codes = torch.cat([part.codes for part in parts])
    return Solution(
        codes=codes,
        grid=Grid.stack([part.grid for part in parts]),
        loss=torch.cat([part.loss for part in parts]),
        plain_loss=torch.cat([part.plain_loss for part in parts]),
        plain_rows=sum(part.plain_rows for part in parts),
        clipped=sum(part.clipped * part.codes.numel() for part in parts) / codes.numel(),
    )
