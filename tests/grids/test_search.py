"""The searches of scales equal their slow twins bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llm_quantize.grids import ggml_super, grid_type
from llm_quantize.grids import search as grid_search
from llm_quantize.grids.ggml_pack import LAYOUTS
from llm_quantize.kernels.reference.iq4 import LEVELS
from tests.kernels.weight_cases import make_importance, make_rows
from tests.oracles import number_grids as slow

KINDS = ("normal", "heavy", "zero", "constant", "tiny", "positive", "negative", "sparse", "outliers", "few-values")


def lanes(kind: str, size: int, count: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """x and w float32 (size, count)."""
    rows = make_rows(kind, 11, (1, size * count * 2))[:, : size * count]
    w = make_importance("uniform", 11, size * count) + np.float32(0.05)
    return grid_search.lanes(torch.from_numpy(rows), size), grid_search.lanes(torch.from_numpy(w)[None], size)


def equal(found: torch.Tensor, wanted: list) -> None:
    np.testing.assert_array_equal(found.numpy(), np.array(wanted, np.float32))


def level_sets() -> dict[str, np.ndarray]:
    return {
        "4 bits": np.arange(-8, 8, dtype=np.float32),
        "2 bits": np.arange(-2, 2, dtype=np.float32),
        "table": LEVELS,
    }


@pytest.mark.parametrize("levels", list(level_sets()))
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_symmetric_scales_equal_the_twin(levels, signed, kind):
    table = level_sets()[levels]
    factors = (0.6, 0.8, 0.93, 1.07, 1.3), (0.97, 1.02)
    x, w = lanes(kind, 24)  # a length that does not halve evenly
    found = grid_search.symmetric_scales(
        x, w, grid_search.Levels.of(torch.from_numpy(table)), factors, torch.float16, signed=signed
    )
    columns = zip(x.numpy().T, w.numpy().T, strict=True)
    equal(found, [slow.symmetric_scale(a, b, table, factors, signed=signed) for a, b in columns])


@pytest.mark.parametrize("least_zero", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_zero_points_equal_the_twin(least_zero, kind):
    table = np.arange(16, dtype=np.float32)
    factors = (0.5, 0.75, 0.95, 1.1), (0.98, 1.03)
    x, w = lanes(kind, 32)
    levels = grid_search.Levels.of(torch.from_numpy(table))
    scale, zero = grid_search.zero_point_scales(x, w, levels, factors, torch.float16, least_zero)
    columns = zip(x.numpy().T, w.numpy().T, strict=True)
    wanted = [slow.zero_point_scale(a, b, table, factors, least_zero) for a, b in columns]
    equal(scale, [pair[0] for pair in wanted])
    equal(zero, [pair[1] for pair in wanted])
    assert zero.min() >= least_zero


@pytest.mark.parametrize("kind", KINDS)
def test_affine_scales_equal_the_twin(kind):
    table = np.arange(16, dtype=np.float32)
    x, w = lanes(kind, 32)
    low = x.amin(0).to(torch.float16).to(torch.float32)
    step = ((x.amax(0) - x.amin(0)) / 15).to(torch.float16).to(torch.float32)
    found = grid_search.affine_scales(x, w, grid_search.Levels.of(torch.from_numpy(table)), (step, low), torch.float16)
    columns = zip(x.numpy().T, w.numpy().T, step.numpy(), low.numpy(), strict=True)
    wanted = [slow.affine_scale(a, b, table, (s, o), grid_search.TRIMS) for a, b, s, o in columns]
    equal(found[0], [pair[0] for pair in wanted])
    equal(found[1], [pair[1] for pair in wanted])


@pytest.mark.parametrize("kind", ["normal", "heavy", "tiny", "positive", "sparse"])
@pytest.mark.parametrize("qtype", ["q2_k", "q3_k", "q4_k", "q6_k", "iq4_xs"])
def test_superblocks_equal_the_twin(qtype, kind, monkeypatch):
    reaches = (2, 1)
    monkeypatch.setattr(ggml_super, "REACH", reaches)
    monkeypatch.setattr(ggml_super, "FREE_REACH", reaches)
    layout, kind_of_grid = LAYOUTS[qtype], grid_type(qtype)
    x = torch.from_numpy(make_rows(kind, 12, (1, 512)))
    grid = kind_of_grid.plain(x, None)[0]
    w = torch.from_numpy(make_importance("uniform", 12, 512) + np.float32(0.05))[None]
    found = ggml_super.fit_superblocks(grid, x, w, bounds=layout.sub_scales, v_most=layout.sub_minima)
    subs = layout.span // layout.group
    for b in range(2):
        cut, part = slice(256 * b, 256 * (b + 1)), slice(subs * b, subs * (b + 1))
        v = None if grid.v is None else grid.v[0, part].numpy()
        start = slow.Superblock(
            x=x[0, cut].numpy().reshape(subs, -1),
            w=w[0, cut].numpy().reshape(subs, -1),
            levels=layout.level_values(),
            bounds=layout.sub_scales,
            v_most=layout.sub_minima,
            d=np.float32(grid.d[0, b]),
            u=grid.u[0, part].numpy(),
            m=None if grid.m is None else np.float32(grid.m[0, b]),
            v=v,
        )
        wanted = slow.fit_superblock(start, reaches, ggml_super.FREE_FACTORS)
        equal(found.d[:, b], [wanted.d])
        equal(found.u[0, part], wanted.u)
        if v is not None:
            equal(found.m[:, b], [wanted.m])
            equal(found.v[0, part], wanted.v)


def test_a_fold_is_a_sum_and_takes_odd_lengths():
    terms = torch.arange(1.0, 78.0)[:, None].repeat(1, 3)
    assert grid_search.fold(terms).tolist() == [77 * 39.0] * 3
