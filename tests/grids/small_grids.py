"""Problems and grid types small enough to check by eye; fits that know nothing of importance."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llm_quantize.grids.grid import Grid

IQ4 = (-127.0, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class SmallType:
    """One scale per group, and an offset where ``offset``; ``per_span`` groups share the free float."""

    levels: tuple[float, ...] = tuple(float(i) for i in range(-4, 4))
    group: int = 20
    per_span: int = 1
    offset: bool = False
    zero: bool = False
    storage: torch.dtype = torch.float16
    name: str = "small"
    joint: int = 1

    @property
    def block(self):
        return self.group * self.per_span

    def fit(self, weight, importance, *, refine=True):
        rows = len(weight)
        parts = weight.reshape(rows, -1, self.group)
        levels = torch.tensor(self.levels)
        low = parts.amin(2) if self.offset or self.zero else -parts.abs().amax(2)
        high = parts.amax(2) if self.offset or self.zero else -low
        scale = (high - low) / (levels[-1] - levels[0])
        span = self.group * self.per_span
        d = scale.reshape(rows, -1, self.per_span).amax(2) / 8
        d = d.to(self.storage).float()
        wide = d.repeat_interleave(self.per_span, 1)
        u = torch.where(wide > 0, scale / wide, 0.0).round()
        z = m = v = None
        if self.zero:
            z = (levels[0] - low / torch.where(u > 0, wide * u, 1.0)).round()
        if self.offset:
            least = wide * u * levels[0] - low
            m = (least.abs().reshape(rows, -1, self.per_span).amax(2) / 8).to(self.storage).float()
            v = (least / m.repeat_interleave(self.per_span, 1).clamp(min=1e-9)).round()
        return Grid(levels, self.group, span, d, u, z, m, v, self.storage)

    def plain(self, weight, importance):
        grid = self.fit(weight, None)
        return grid, grid.nearest(weight)


def inputs(columns, tokens, seed, *, spread=0.7):
    """Correlated inputs float32 (tokens, columns) of uneven channels."""
    g = torch.Generator().manual_seed(seed)
    basis = torch.randn(columns, columns, generator=g) / torch.arange(1, columns + 1).sqrt()[:, None]
    scale = (torch.randn(columns, generator=g) * spread).exp()
    return (torch.randn(tokens, columns, generator=g) @ basis) * scale


def weights(rows, columns, seed):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1


def value_table(grid):
    """float64 (rows, columns, levels): what each code of each weight is worth."""
    scale = grid.scale().double().repeat_interleave(grid.group, 1)
    offset = grid.offset().double().repeat_interleave(grid.group, 1)
    return (scale[:, :, None] * grid.levels.double() - offset[:, :, None]).numpy()
