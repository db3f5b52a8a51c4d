"""Tries of scales: every SIMD level equals the search's own torch bit for bit, and the exact sums within rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llm_quantize.grids import search
from llm_quantize.kernels import scales

INF = float("inf")


def problem(count: int, groups: int, tries: int, *, zeros: bool):
    g = torch.Generator().manual_seed(count * groups)
    x, w = torch.randn(count, groups, generator=g), torch.rand(count, groups, generator=g) + 0.01
    x[:, 0] = 0.0
    x[0, 1] = 1e30
    tried = torch.rand(tries, groups, generator=g) * 0.5 + 0.05
    tried[0, :4] = torch.tensor([0.0, -0.2, 1e-42, INF])
    shifts = torch.randint(0, 16, (tries, groups), generator=g).float() if zeros else None
    return x, w, tried, shifts, (search.Levels(0.0, 15.0) if zeros else search.Levels(-8.0, 7.0))


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("count", "groups", "tries"), [(64, 48, 3), (1, 16, 1), (37, 21, 2), (128, 5, 4)])
def test_tries_equal_torch_bit_for_bit(level, count, groups, tries, zeros):
    x, w, tried, shifts, levels = problem(count, groups, tries, zeros=zeros)
    found, least = scales.refitted(x, w, tried, shifts, levels.lowest, levels.highest)
    errors = scales.errors(x, w, tried, shifts, levels.lowest, levels.highest)
    for index in range(tries):
        shift = None if shifts is None else shifts[index]
        scale, error = search._refitted(x, w, tried[index], levels, shift)
        plain = search.weighted_error(x, w, tried[index], levels, shift)
        for ours, theirs in ((found[index], scale), (least[index], error), (errors[index], plain)):
            np.testing.assert_array_equal(ours.numpy(), theirs.numpy())


def test_it_is_least_squares():
    x, w, tried, _, levels = problem(64, 48, 1, zeros=False)
    found, least = scales.refitted(x, w, tried, None, levels.lowest, levels.highest)
    for group in range(4, 48):
        column, weight, scale = (v.double().numpy() for v in (x[:, group], w[:, group], tried[0, group]))
        codes = np.clip(np.round(column / scale), -8, 7)
        best = (weight * column * codes).sum() / (weight * codes**2).sum()
        assert float(found[0, group]) == pytest.approx(best, rel=1e-4)
        assert float(least[0, group]) == pytest.approx((weight * (column - best * codes) ** 2).sum(), rel=1e-3)


def test_shapes_are_checked():
    x = torch.zeros(4, 3)
    with pytest.raises(ValueError, match="importance has the wrong shape"):
        scales.errors(x, torch.zeros(4, 2), torch.ones(1, 3), None, -8.0, 7.0)
    with pytest.raises(ValueError, match="scale has the wrong shape"):
        scales.errors(x, x, torch.ones(1, 2), None, -8.0, 7.0)
    with pytest.raises(ValueError, match="zero has the wrong shape"):
        scales.errors(x, x, torch.ones(2, 3), torch.ones(1, 3), -8.0, 7.0)
