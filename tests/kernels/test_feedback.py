"""The column loops: every SIMD level equals the torch twin bit for bit; edges of grids; lengths checked."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llm_quantize import kernels
from llm_quantize.kernels import _native, feedback
from llm_quantize.kernels.reference import feedback as reference_feedback

IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
LEVELS = {
    "q4": torch.arange(16.0),
    "q6": torch.arange(-32.0, 32.0),
    "int8": torch.arange(-128.0, 128.0),
    "two": torch.tensor([0.0, 1.0]),
    "iq4": torch.tensor(IQ4, dtype=torch.float32),
    "uneven": torch.tensor([-1.5, -0.25, 4.0]),
}


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
@pytest.mark.parametrize(("columns", "rows"), [(128, 64), (1, 16), (37, 48)])
def test_native_feedback_equals_its_twin_bit_for_bit(level, name, columns, rows, offset):
    grid, coupling, weight, target, _, _ = problem(LEVELS[name], columns, rows, columns + rows, offset=offset)
    results = []
    for module in (feedback, reference_feedback):
        t, d = target.clone(), torch.full_like(weight, 7.0)
        codes, counts = torch.full(weight.shape, 255, dtype=torch.uint8), torch.arange(rows, dtype=torch.int32)
        module.feedback(grid, coupling, weight, t, d, codes, counts)
        results.append((codes, d, counts))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def descent(levels, columns, rows, seed, *, offset):
    """(grid, H, 1 / diag H, weight, H d, d, codes), the codes being the nearest ones."""
    grid, root, weight, _, residual, _ = problem(levels, columns, rows, seed, offset=offset, group=20)
    grid = grid.columns(torch.argsort(grid.group, stable=True))  # as a row has them
    hessian = root @ root.T + 0.1 * torch.eye(columns)
    hessian = (hessian + hessian.T) / 2
    value, codes, _ = reference_feedback.nearest(grid, slice(None), weight)
    residual = weight - value
    return grid, hessian, 1 / hessian.diagonal(), weight, hessian @ residual, residual, codes


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize(("columns", "rows"), [(160, 32), (1, 16), (37, 3)])
def test_native_descent_equals_its_twin_bit_for_bit(level, name, columns, rows, offset):
    case = descent(LEVELS[name], columns, rows, columns + rows, offset=offset)
    results = []
    for module in (feedback, reference_feedback):
        grid, hessian, reciprocal, weight, *state = case
        state = [values.clone() for values in state]
        results.append([*state, module.descend(grid, hessian, reciprocal, weight, *state, 3)])
    ours, theirs = results
    assert ours.pop() == theirs.pop()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    if columns > 30:
        before = (case[4].double() * case[5]).sum(0)
        after = (ours[0].double() * ours[1]).sum(0)
        assert (after <= before * (1 + 1e-5)).all()
        assert after.sum() < before.sum()


def test_descent_by_blocks_finds_the_same_codes():
    grid, hessian, reciprocal, weight, *state = descent(LEVELS["q4"], 300, 32, 5, offset=True)
    by_blocks = [values.clone() for values in state]
    whole = reference_feedback.descend(grid, hessian, reciprocal, weight, *state, 2)
    assert reference_feedback.descend(grid, hessian, reciprocal, weight, *by_blocks, 2, 64) == whole
    assert torch.equal(state[2], by_blocks[2])
    assert torch.allclose(state[0], by_blocks[0], atol=1e-4)


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


def test_codes_at_their_optimum_stay(level):
    grid, hessian, reciprocal, weight, *state = descent(LEVELS["q4"], 64, 16, 3, offset=True)
    feedback.descend(grid, hessian, reciprocal, weight, *state, 100)
    before = [values.clone() for values in state]
    assert feedback.descend(grid, hessian, reciprocal, weight, *state, 1) == 0
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))


def test_infinite_and_missing_numbers_stay_inside_the_arrays(level):
    specials = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38, 0.0, 1e-45])
    for levels in (LEVELS["q4"], LEVELS["iq4"]):
        grid, coupling, weight, target, residual, _ = problem(levels, 40, 16, 4, offset=False)
        target[::3] = specials[torch.arange(16) % 6]
        codes, counts = torch.full((40, 16), 255, dtype=torch.uint8), torch.zeros(16, dtype=torch.int32)
        feedback.feedback(grid, coupling, weight, target, residual, codes, counts)
        assert int(codes.max()) < len(levels)

        grid = grid.columns(torch.argsort(grid.group, stable=True))
        state = [torch.full((40, 16), float("nan")), weight.clone(), torch.zeros((40, 16), dtype=torch.uint8)]
        feedback.descend(grid, torch.eye(40), torch.ones(40), weight, *state, 2)
        assert int(state[2].max()) < len(levels)


def arguments(loop):
    """What the native ``loop`` takes."""
    grid, hessian, reciprocal, weight, gradient, residual, codes = descent(LEVELS["iq4"], 64, 16, 1, offset=True)
    down = loop == "descend"
    scale, inverse, offset = (part.T if down else part for part in (grid.scale, grid.inverse, grid.offset))
    common = {
        "level": kernels.simd_level(),
        "scale": scale.contiguous().numpy(),
        "inverse": inverse.contiguous().numpy(),
        "offset": offset.contiguous().numpy(),
        "group": grid.group.numpy(),
        "levels": grid.levels.numpy(),
        "middles": grid.middles.numpy(),
        "edges": grid.edges,
        "uniform": False,
        "counts": np.zeros(16, np.int32),
    }
    arrays = {"weight": weight, "residual": residual, "codes": codes, "gradient" if down else "target": gradient}
    arrays = {name: (part.T if down else part).contiguous().numpy() for name, part in arrays.items()}
    if down:
        return {**common, **arrays, "hessian": hessian.numpy(), "reciprocal": reciprocal.numpy(), "sweeps": 1}
    return {**common, **arrays, "coupling": hessian.numpy()}


@pytest.mark.parametrize(
    ("loop", "name", "value", "message"),
    [
        ("feedback", "scale", np.ones((2, 32), np.float32), "scale has the wrong shape"),
        ("feedback", "inverse", np.ones((1, 16), np.float32), "inverse has the wrong shape"),
        ("feedback", "offset", np.ones((1, 16), np.float32), "offset has the wrong shape"),
        ("feedback", "group", np.full(64, 4, np.int32), "no such group"),
        ("feedback", "group", np.full(64, -1, np.int32), "no such group"),
        ("feedback", "group", np.zeros(63, np.int32), "group has the wrong length"),
        ("feedback", "levels", np.ones(1, np.float32), "2 to 256 levels"),
        ("feedback", "middles", np.ones(14, np.float32), "middles has the wrong length"),
        ("feedback", "coupling", np.ones((64, 63), np.float32), "coupling has the wrong shape"),
        ("feedback", "coupling", np.ones((64, 64), np.float32).T, "packed"),
        ("feedback", "weight", np.ones((64, 24), np.float32), "16, 32"),
        ("feedback", "weight", np.ones((129, 16), np.float32), "at most 128"),
        ("feedback", "target", np.ones((64, 32), np.float32), "target has the wrong shape"),
        ("feedback", "residual", np.ones((63, 16), np.float32), "residual has the wrong shape"),
        ("feedback", "codes", np.ones((64, 32), np.uint8), "codes has the wrong shape"),
        ("feedback", "counts", np.ones(15, np.int32), "counts has the wrong length"),
        ("feedback", "level", "mmx", "no SIMD level"),
        ("descend", "scale", np.ones((15, 2), np.float32), "scale has the wrong shape"),
        ("descend", "inverse", np.ones((16, 1), np.float32), "inverse has the wrong shape"),
        ("descend", "group", np.full(64, 4, np.int32), "no such group"),
        ("descend", "group", np.arange(64, dtype=np.int32)[::-1].copy() // 32, "must not descend"),
        ("descend", "hessian", np.ones((64, 63), np.float32), "hessian has the wrong shape"),
        ("descend", "reciprocal", np.ones(63, np.float32), "reciprocal has the wrong length"),
        ("descend", "gradient", np.ones((16, 63), np.float32), "gradient has the wrong shape"),
        ("descend", "residual", np.ones((15, 64), np.float32), "residual has the wrong shape"),
        ("descend", "codes", np.ones((16, 65), np.uint8), "codes has the wrong shape"),
        ("descend", "counts", np.ones(15, np.int32), "counts has the wrong length"),
    ],
)
def test_the_native_loops_check_every_length(loop, name, value, message):
    run = getattr(_native, loop)
    run(**arguments(loop))
    with pytest.raises(ValueError, match=message):
        run(**{**arguments(loop), name: value})
