"""The column loops: every SIMD level equals the torch twin bit for bit; edges of grids; lengths checked."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llm_quantize import kernels
from llm_quantize.kernels import _native, feedback, reference_feedback

IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
LEVELS = {
    "q4": torch.arange(16.0),
    "q6": torch.arange(-32.0, 32.0),
    "int8": torch.arange(-128.0, 128.0),
    "two": torch.tensor([0.0, 1.0]),
    "iq4": torch.tensor(IQ4, dtype=torch.float32),
    "uneven": torch.tensor([-1.5, -0.25, 4.0]),
}


@pytest.fixture(params=_native.levels())
def level(request):
    before = kernels.simd_level()
    kernels.set_simd_level(request.param)
    yield request.param
    kernels.set_simd_level(before)


def problem(levels, columns, rows, seed, *, offset, group=32):
    g = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=g)

    groups = -(-columns // group)
    scale = random(groups, rows) * (0.5 / max(1.0, float(levels.abs().max()) / 4))
    scale[torch.rand(groups, rows, generator=g) < 0.05] = 0.0
    scale[0, 0] = 1e-40
    shift = random(groups, rows) * 0.3 if offset else None
    order = torch.randperm(columns, generator=g)
    grid = feedback.TileGrid.make(scale, shift, (order // group).to(torch.int32), levels)
    coupling = random(columns + 3, columns + 5)[:columns, :columns] * 0.2  # a slice of a larger matrix
    return grid, coupling, random(columns, rows), random(columns, rows), random(columns, rows), random(columns).exp()


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize(("columns", "rows"), [(128, 64), (1, 16), (37, 48), (8, 16), (120, 16)])
def test_native_loops_equal_their_twin_bit_for_bit(level, name, columns, rows, offset):
    grid, coupling, weight, target, _, reciprocal = problem(
        LEVELS[name], columns, rows, columns + rows, offset=offset
    )
    results = []
    for module in (feedback, reference_feedback):
        t, d = target.clone(), torch.full_like(weight, 7.0)
        codes, counts = torch.full(weight.shape, 255, dtype=torch.uint8), torch.arange(rows, dtype=torch.int32)
        module.feedback(grid, coupling, weight, t, d, codes, counts)
        g, e, moved_codes, moved = target * 0.1, d.clone(), codes.clone(), torch.zeros(rows, dtype=torch.int32)
        module.descend(grid, coupling, reciprocal, weight, g, e, moved_codes, moved)
        assert moved.sum() > 0 or columns == 1
        results.append((codes, d, counts, moved_codes, e, moved))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_codes_are_the_nearest_values_and_a_vanishing_scale_divides_nothing(level):
    for name, levels in LEVELS.items():
        grid, coupling, weight, target, residual, _ = problem(levels, 64, 32, 5, offset=True)
        codes, counts = torch.empty(64, 32, dtype=torch.uint8), torch.zeros(32, dtype=torch.int32)
        feedback.feedback(grid, coupling * 0, weight, target.clone(), residual, codes, counts)
        scale, offset = grid.scale[grid.group.long()], grid.offset[grid.group.long()]
        values = scale[..., None] * levels - offset[..., None]
        chosen = values.gather(2, codes.long()[..., None])[..., 0]
        assert torch.isfinite(residual).all(), name
        assert torch.equal(residual, weight - chosen), name
        best = (values - target[..., None]).abs().amin(2)
        assert torch.allclose((chosen - target).abs(), best, atol=1e-6), name
        beyond = (target < values.amin(2) - scale.abs()) | (target > values.amax(2) + scale.abs())
        assert counts.sum() > 0
        assert name in ("iq4", "uneven") or (counts >= (beyond & (scale.abs() > 1e-30)).sum(0)).all()


def test_a_block_that_is_at_its_optimum_stays(level):
    levels = LEVELS["q4"]
    grid, _, weight, _, residual, _ = problem(levels, 64, 16, 3, offset=True)
    codes, counts = torch.empty(64, 16, dtype=torch.uint8), torch.zeros(16, dtype=torch.int32)
    feedback.feedback(grid, torch.zeros(64, 64), weight, weight.clone(), residual, codes, counts)
    moved = torch.zeros(16, dtype=torch.int32)
    before = codes.clone()
    feedback.descend(grid, torch.eye(64), torch.ones(64), weight, residual.clone(), residual, codes, moved)
    assert torch.equal(codes, before)
    assert moved.sum() == 0


def test_infinite_and_missing_numbers_stay_inside_the_arrays(level):
    specials = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38, 0.0, 1e-45])
    for levels in (LEVELS["q4"], LEVELS["iq4"]):
        grid, coupling, weight, target, residual, _ = problem(levels, 40, 16, 4, offset=False)
        target[::3] = specials[torch.arange(16) % 6]
        codes, counts = torch.full((40, 16), 255, dtype=torch.uint8), torch.zeros(16, dtype=torch.int32)
        feedback.feedback(grid, coupling, weight, target, residual, codes, counts)
        assert int(codes.max()) < len(levels)


def arguments():
    grid, coupling, weight, target, residual, reciprocal = problem(LEVELS["iq4"], 64, 16, 1, offset=True)
    codes, counts = np.zeros((64, 16), np.uint8), np.zeros(16, np.int32)
    return {
        "level": kernels.simd_level(),
        "descent": True,
        "scale": grid.scale.numpy(),
        "inverse": grid.inverse.numpy(),
        "offset": grid.offset.numpy(),
        "group": grid.group.numpy(),
        "levels": grid.levels.numpy(),
        "middles": grid.middles.numpy(),
        "edges": grid.edges,
        "uniform": False,
        "coupling": coupling.numpy(),
        "reciprocal": reciprocal.numpy(),
        "weight": weight.numpy(),
        "target": target.numpy(),
        "residual": residual.numpy(),
        "codes": codes,
        "counts": counts,
    }


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("scale", np.ones((2, 32), np.float32), "scale has the wrong shape"),
        ("inverse", np.ones((1, 16), np.float32), "inverse has the wrong shape"),
        ("offset", np.ones((1, 16), np.float32), "offset has the wrong shape"),
        ("group", np.full(64, 2, np.int32), "no such group"),
        ("group", np.full(64, -1, np.int32), "no such group"),
        ("group", np.zeros(63, np.int32), "group has the wrong length"),
        ("levels", np.ones(1, np.float32), "2 to 256 levels"),
        ("middles", np.ones(14, np.float32), "middles has the wrong length"),
        ("coupling", np.ones((64, 63), np.float32), "coupling has the wrong shape"),
        ("coupling", np.ones((64, 64), np.float32).T, "packed"),
        ("reciprocal", np.ones(63, np.float32), "reciprocal has the wrong length"),
        ("reciprocal", None, "reciprocal has the wrong length"),
        ("weight", np.ones((64, 24), np.float32), "16, 32"),
        ("weight", np.ones((129, 16), np.float32), "at most 128"),
        ("target", np.ones((64, 32), np.float32), "target has the wrong shape"),
        ("residual", np.ones((63, 16), np.float32), "residual has the wrong shape"),
        ("codes", np.ones((64, 32), np.uint8), "codes has the wrong shape"),
        ("counts", np.ones(15, np.int32), "counts has the wrong length"),
        ("level", "mmx", "no SIMD level"),
    ],
)
def test_the_native_loop_checks_every_length(name, value, message):
    _native.column_loop(**arguments())
    with pytest.raises(ValueError, match=message):
        _native.column_loop(**{**arguments(), name: value})
