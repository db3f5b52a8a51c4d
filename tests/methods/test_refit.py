"""New free floats are taken only where they gain after they are rounded as the format stores them."""

from __future__ import annotations

import torch

from llm_quantize.grids.grid import Grid
from llm_quantize.methods import refit


def test_a_row_that_rounding_would_make_worse_keeps_its_floats():
    rows, unknowns = 200, 6
    g = torch.Generator().manual_seed(1)
    root = torch.randn(rows, unknowns, unknowns, generator=g, dtype=torch.float64)
    root[:, :, 1:] = root[:, :, :1] + 0.01 * root[:, :, 1:]  # nearly the same unknown, six times
    system = root.mT @ root + 1e-6 * torch.eye(unknowns)
    right = torch.randn(rows, unknowns, generator=g, dtype=torch.float64) * 1e-3
    old = torch.randn(rows, unknowns, generator=g).to(torch.bfloat16).float()
    system[0] = torch.nan
    grid = Grid(torch.arange(4.0), 4, 4, torch.ones(1, 1), torch.ones(1, 1), storage=torch.bfloat16)
    new = refit._step(system, right, old, grid)
    assert torch.equal(new, new.to(torch.bfloat16).float())
    assert torch.equal(new[0], old[0])
    made = (new - old).double()[1:]
    change = torch.einsum("rk,rkl,rl->r", made, system[1:], made) - 2 * (right[1:] * made).sum(1)
    assert (change <= 0).all()
    kept = (new == old).all(1)
    assert 1 < int(kept.sum()) < rows
