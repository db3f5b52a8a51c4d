"""The column loops of GPTQ: error feedback inside one block of columns, and sweeps of coordinate descent.

Legend: a tile is R rows of a weight, held with its columns first, (columns, R), so that rows lie side by side; of one
column and one row: w weight, q the value of its code, d = w - q residual. Values of the frozen grid are
scale * level - offset. On a CPU the native loops run, elsewhere ``reference/feedback.py``, which is their meaning:
equal bit for bit on the same numbers, at every SIMD level.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from llm_quantize import kernels
from llm_quantize.kernels import _native
from llm_quantize.kernels.reference import feedback as reference_feedback

__all__ = ["BLOCK", "LANES", "Array", "TileGrid", "descend", "feedback", "swept"]

Array = npt.NDArray[Any]

BLOCK = 128  # columns of a block, at most
LANES = 16  # rows of a tile are a multiple of this
_LEAST_SCALE = 1e-35  # below it 1 / scale is not a float32 one can use: such a group has one value, minus its offset


@dataclass(frozen=True)
class TileGrid:
    """The frozen grid of a tile: value = scale * level - offset.

    ``scale``, ``inverse``, ``offset`` float32 (groups, R), ``inverse`` = 1 / scale, or 0 where the scale vanishes;
    ``group`` int32 (columns,): the group of each column; ``levels`` float32 (n,), ascending; ``middles`` float32
    (n - 1,): from there on the next level is nearer; ``edges``: beyond them a value divided by its scale is clipped;
    ``uniform``: the levels are consecutive integers.
    """

    scale: Tensor
    inverse: Tensor
    offset: Tensor | None
    group: Tensor
    levels: Tensor
    middles: Tensor
    edges: tuple[float, float]
    uniform: bool

    @classmethod
    def make(
        cls, scale: Tensor, offset: Tensor | None, group: Tensor, levels: Tensor, *, uniform: bool | None = None
    ) -> TileGrid:
        """From ``scale`` and ``offset`` float32 (groups, R), contiguous, and the rest as above."""
        gaps = levels[1:] - levels[:-1]
        inverse = torch.where(scale.abs() >= _LEAST_SCALE, 1.0 / scale, 0.0)
        half_first, half_last = float(gaps[0]) / 2, float(gaps[-1]) / 2
        return cls(
            scale=scale,
            inverse=inverse,
            offset=offset,
            group=group,
            levels=levels,
            middles=levels[:-1] + gaps / 2,
            edges=(float(levels[0]) - half_first, float(levels[-1]) + half_last),
            uniform=bool((gaps == 1).all()) if uniform is None else uniform,
        )

    def numbers(self, *, by_row: bool = False) -> tuple[Array, Array, Array | None]:
        """Scale, inverse and offset as the native loops take them: (groups, R), or (R, groups)."""

        def array(part: Tensor) -> Array:
            return (part.T.contiguous() if by_row else part).numpy()

        return array(self.scale), array(self.inverse), None if self.offset is None else array(self.offset)

    def columns(self, chosen: Tensor | slice) -> TileGrid:
        """The same grid for other columns: ``chosen`` of these."""
        group = self.group[chosen]
        return TileGrid(
            self.scale, self.inverse, self.offset, group, self.levels, self.middles, self.edges, self.uniform
        )


def feedback(
    grid: TileGrid, coupling: Tensor, weight: Tensor, target: Tensor, residual: Tensor, codes: Tensor, counts: Tensor
) -> None:
    """Code after code the nearest to its target; what is left over moves the targets of the columns after it.

    For column j: q = the grid value nearest to t_j; d_j = w_j - q; t_k += d_j * coupling[k, j] for all k > j.
    ``weight``, ``target`` float32 (columns, R), columns <= 128, R a multiple of 16; ``coupling`` float32
    (columns, columns), used below the diagonal. Written: ``residual`` float32 and ``codes`` uint8 (columns, R);
    ``counts`` int32 (R,) grows by the number of columns whose target lay outside of the grid. The content of ``target``
    is lost. Releases the GIL.
    """
    if weight.device.type != "cpu":
        reference_feedback.feedback(grid, coupling, weight, target, residual, codes, counts)
        return
    _native.feedback(
        kernels.simd_level(),
        *grid.numbers(),
        grid.group.numpy(),
        grid.levels.numpy(),
        grid.middles.numpy(),
        grid.edges,
        grid.uniform,
        coupling.numpy(),
        weight.numpy(),
        target.numpy(),
        residual.numpy(),
        codes.numpy(),
        counts.numpy(),
    )


def descend(
    grid: TileGrid,
    hessian: Tensor,
    reciprocal: Tensor,
    weight: Tensor,
    gradient: Tensor,
    residual: Tensor,
    codes: Tensor,
    sweeps: int,
) -> int:
    """Up to ``sweeps`` sweeps of coordinate descent: each code moves to where the loss d H d^T of its row is least.

    For column j: q' = the grid value nearest to q_j + g_j / H_jj; g += (d'_j - d_j) * H[j]. A row stops where no code
    moved in a whole sweep. ``hessian`` float32 (n, n), symmetric; ``reciprocal`` float32 (n,) = 1 / H_jj; ``weight``
    float32 (n, R). Read and written: ``gradient`` = d H and ``residual`` float32, ``codes`` uint8, all (n, R).
    Returns how many times a code moved. The native loop keeps to one row at a time and changes a gradient only where a
    code moved, which few do after feedback; it releases the GIL.
    """
    if weight.device.type != "cpu":
        return reference_feedback.descend(grid, hessian, reciprocal, weight, gradient, residual, codes, sweeps, BLOCK)

    def sweep(weight: Array, gradient: Array, residual: Array, codes: Array, counts: Array) -> None:
        _native.descend(
            kernels.simd_level(),
            *grid.numbers(by_row=True),
            grid.group.numpy(),
            grid.levels.numpy(),
            grid.middles.numpy(),
            grid.edges,
            grid.uniform,
            hessian.numpy(),
            reciprocal.numpy(),
            weight,
            gradient,
            residual,
            codes,
            sweeps,
            counts,
        )

    return swept(weight, gradient, residual, codes, sweep)


def swept(weight: Tensor, gradient: Tensor, residual: Tensor, codes: Tensor, sweep: Callable[..., None]) -> int:
    """How many times a code moved in ``sweep`` (weight, gradient, residual, codes, counts), which is given copies
    (R, n) of these (n, R), and int32 (R,); what it changed is put back."""
    changing = (gradient, residual, codes)
    rows = [values.T.contiguous() for values in changing]
    counts = torch.zeros(weight.shape[1], dtype=torch.int32)
    sweep(weight.T.contiguous().numpy(), *(part.numpy() for part in rows), counts.numpy())
    for values, changed in zip(changing, rows, strict=True):
        values.copy_(changed.T)
    return int(counts.sum())
