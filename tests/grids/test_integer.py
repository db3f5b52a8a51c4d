"""Integer grids: the reference tools' rule, and scales of smaller weighted error as the format stores them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from llm_quantize.errors import UsageError
from llm_quantize.grids import grid_type, integer
from llm_quantize.grids.integer import channel_importance
from tests.kernels.weight_cases import ROW_KINDS, make_rows

TYPES = ("int2_g64", "int3_g128", "int4_g128", "int8", "int4_g32_asym", "int2_g64_asym", "int3_asym", "int8_g128_asym")


def weight_of(kind: str, rows: int = 24, columns: int = 256) -> torch.Tensor:
    return torch.from_numpy(make_rows(kind, 3, (rows, columns)))


def importance_of(columns: int = 256) -> torch.Tensor:
    return torch.exp(torch.randn(columns, generator=torch.Generator().manual_seed(3)))


def loss(grid, weight, importance, codes=None) -> torch.Tensor:
    """Weighted error of each group, float64."""
    codes = grid.nearest(weight) if codes is None else codes
    error = importance.double() * (grid.decode(codes).double() - weight.double()).square()
    return error.reshape(len(weight), -1, grid.group).sum(2)


def test_plain_is_the_reference_tools_rule():
    weight = weight_of("normal")
    grid, codes = grid_type("int4_g128").plain(weight, importance_of())
    groups = weight.numpy().reshape(24, 2, 128)
    scale = (np.abs(groups).max(axis=2) * np.float32(2 / 15)).astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(grid.d.numpy(), scale)
    np.testing.assert_array_equal(
        codes.numpy().reshape(groups.shape), np.clip(np.rint(groups / scale[:, :, None]) + 8, 0, 15)
    )
    grid, codes = grid_type("int4_g128_asym").plain(weight, None)
    low, high = groups.min(axis=2), groups.max(axis=2)
    scale = ((high - low) / np.float32(15)).astype(np.float16).astype(np.float32)
    zero = np.rint(-low / scale)
    np.testing.assert_array_equal(grid.d.numpy(), scale)
    np.testing.assert_array_equal(grid.z.numpy(), zero)
    wanted = np.clip(np.rint(groups / scale[:, :, None] + zero[:, :, None]), 0, 15)
    assert (codes.numpy().reshape(groups.shape) == wanted).mean() > 0.999  # a float32 quotient may round past a half
    assert torch.equal(grid_type("int4_g128_asym").fit(weight, None, refine=False).d, grid.d)


@pytest.mark.parametrize("name", ["int2_g64", "int8", "int4_g32_asym", "int3_asym"])
@pytest.mark.parametrize("kind", ROW_KINDS)
@pytest.mark.parametrize("scale", ["float16", "bfloat16"])
def test_scales_are_stored_numbers_and_never_zero(name, kind, scale):
    weight = weight_of(kind, rows=6)
    for grid in (
        grid_type(name, scale=scale).fit(weight, importance_of()),
        grid_type(name, scale=scale).plain(weight, None)[0],
    ):
        assert torch.isfinite(grid.d).all()
        assert (grid.d > 0).all()
        assert torch.equal(grid.d, grid.d.to(getattr(torch, scale)).float())
        if grid.z is not None:
            assert torch.equal(grid.z, grid.z.round().clamp(0, len(grid.levels) - 1))
        values = grid.decode(grid.nearest(weight))
        assert torch.isfinite(values).all()
        empty = (weight.reshape(6, -1, grid.group) == 0).all(2)
        assert (values.reshape(6, -1, grid.group)[empty] == 0).all()


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("kind", ["normal", "heavy", "outliers", "few-values"])
def test_fit_loses_less_than_the_plain_rule(name, kind):
    weight, importance = weight_of(kind), importance_of()
    maker = grid_type(name)
    grid, codes = maker.plain(weight, None)
    h = channel_importance(importance, weight)
    plain, fitted = loss(grid, weight, h, codes), loss(maker.fit(weight, importance), weight, h)
    assert fitted.sum() < plain.sum() * 0.97
    assert (fitted <= plain * 1.05 + 1e-30).float().mean() > 0.98


@pytest.mark.parametrize("name", ["int2_g64", "int3_g128", "int4_g128"])
def test_fit_is_near_the_best_of_a_thousand_scales(name):
    weight, importance = weight_of("heavy", rows=8), importance_of()
    h = channel_importance(importance, weight)
    grid = grid_type(name).fit(weight, importance)
    widest = weight.abs().reshape(8, -1, grid.group).amax(2) * (2 / (len(grid.levels) - 1))
    best = torch.stack([loss(grid.with_floats(widest * f), weight, h) for f in np.linspace(0.05, 2, 1000)]).amin(0)
    found = loss(grid, weight, h)
    assert found.sum() < best.sum() * 1.02
    signed = loss(grid_type(name, signed=True).fit(weight, importance), weight, h)
    assert signed.sum() < found.sum() * 0.98  # the extra level on the better side


@pytest.mark.parametrize("name", ["int2_g64_asym", "int4_g32_asym"])
def test_zero_points_are_near_the_best_of_all(name):
    weight, importance = weight_of("normal", rows=8) + 0.01, importance_of()
    h = channel_importance(importance, weight)
    grid = grid_type(name).fit(weight, importance)
    reach = weight.reshape(8, -1, grid.group)
    reach = (reach.amax(2) - reach.amin(2)) / (len(grid.levels) - 1)
    trials = [
        loss(replace(grid.with_floats(reach * f), z=torch.full_like(grid.d, float(zero))), weight, h)
        for f in np.linspace(0.2, 1.5, 100)
        for zero in range(len(grid.levels))
    ]
    assert loss(grid, weight, h).sum() < torch.stack(trials).amin(0).sum() * 1.04


def test_the_least_zero_point_is_kept():
    weight = weight_of("positive")
    assert (grid_type("int4_g128_asym").fit(weight, None).z == 0).any()
    for grid in (
        grid_type("int4_g128_asym", least_zero=1).fit(weight, None),
        grid_type("int4_g128_asym", least_zero=1).plain(weight, None)[0],
    ):
        assert (grid.z >= 1).all()
    with pytest.raises(UsageError, match="smallest zero point"):
        grid_type("int4_g128_asym", least_zero=16)


@pytest.mark.parametrize("name", TYPES)
def test_any_rows_give_the_grid_of_the_whole(name, monkeypatch):
    weight, importance = weight_of("heavy", rows=21), importance_of()
    maker = grid_type(name, spread=1.0)
    whole = maker.fit(weight, importance)
    for start, stop in ((0, 1), (1, 6), (6, 21)):
        part = maker.fit(weight[start:stop], importance)
        assert torch.equal(part.d, whole.d[start:stop])
        assert part.z is None or torch.equal(part.z, whole.z[start:stop])
    monkeypatch.setattr(integer, "TILE", 700)
    monkeypatch.setattr(integer, "LEAST_ROWS", 1)
    assert torch.equal(maker.fit(weight, importance).d, whole.d)


def test_importance_and_spread_move_the_scales():
    weight, importance = weight_of("heavy"), importance_of()
    even = grid_type("int3_g128").fit(weight, None)
    assert torch.equal(grid_type("int3_g128").fit(weight, torch.zeros(256)).d, even.d)
    assert torch.equal(grid_type("int3_g128").fit(weight, torch.full((256,), 7.0)).d, even.d)
    assert not torch.equal(grid_type("int3_g128").fit(weight, importance).d, even.d)
    assert not torch.equal(grid_type("int3_g128", spread=1.0).fit(weight, None).d, even.d)
    for wrong in (torch.ones(255), torch.full((256,), -1.0), torch.full((256,), float("nan"))):
        with pytest.raises(UsageError, match="importance"):
            grid_type("int3_g128").fit(weight, wrong)


def test_rows_that_are_not_whole_groups_are_refused():
    with pytest.raises(UsageError, match="multiple of 128"):
        grid_type("int4_g128").fit(torch.zeros(2, 200), None)


def test_channels_never_seen_still_count():
    importance = torch.zeros(256)
    importance[:128] = 1
    assert (channel_importance(importance, torch.zeros(1, 256))[128:] > 0).all()
    weight = weight_of("normal")
    dead = loss(grid_type("int4_g128").fit(weight, importance), weight, torch.ones(256))[:, 1]
    assert dead.sum() <= loss(grid_type("int4_g128").plain(weight, None)[0], weight, torch.ones(256))[:, 1].sum() * 0.95
