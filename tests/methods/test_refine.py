"""Places between codes, their gradients, and how they settle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llm_quantize.grids import grid_type
from llm_quantize.grids.grid import Grid
from llm_quantize.methods.refine import Moving

from ..oracles import dense_refinement as dense

TYPES = [
    "int2_g32",
    "int2_g32_asym",
    "int4_g32",
    "q2_k",
    "q3_k",
    "q4_0",
    "q4_1",
    "iq4_nl",
    "affine2_g32",
    "nvfp4",
    "nf4_b64",
]


def matrix(qtype: str, rows: int = 3, seed: int = 1) -> tuple[Grid, torch.Tensor]:
    weight = torch.randn(rows, 256, generator=torch.Generator().manual_seed(seed))
    grid = grid_type(qtype).fit(weight, None)
    return grid, grid.nearest(weight)


def between(moving: Moving, seed: int = 2) -> None:
    """Puts places between codes."""
    shift = 0.1 + 0.8 * torch.rand(moving.places.shape, generator=torch.Generator().manual_seed(seed))
    moving.places = moving.places.clamp(max=len(moving.grid.levels) - 2) + shift


@pytest.mark.parametrize("qtype", TYPES)
def test_it_begins_at_the_codes_that_it_is_given(qtype: str) -> None:
    grid, codes = matrix(qtype)
    moving = Moving(grid, codes, 10)
    torch.testing.assert_close(moving.values(), grid.decode(codes), rtol=1e-6, atol=1e-7)
    found, same = moving.hardened()
    assert torch.equal(same, codes)
    assert torch.equal(found.d, grid.d)


@pytest.mark.parametrize("qtype", TYPES)
def test_values_and_gradients_are_those_of_the_dense_twin(qtype: str) -> None:
    grid, codes = matrix(qtype)
    moving = Moving(grid, codes, 10)
    between(moving)
    places, d = moving.places.double().numpy(), grid.d.double().numpy()
    m = None if grid.m is None else grid.m.double().numpy()
    np.testing.assert_allclose(moving.values().numpy(), dense.values(grid, places, d, m), rtol=1e-4, atol=1e-6)
    direction = torch.randn(codes.shape, generator=torch.Generator().manual_seed(3))
    wide = direction.double().numpy()
    by_place, by_float = moving.gradients(direction)

    def total(p: np.ndarray, dd: np.ndarray, mm: np.ndarray | None) -> float:
        return float((dense.values(grid, p, dd, mm) * wide).sum())

    for row, column in ((0, 0), (1, 77), (2, 255)):
        hot = np.zeros_like(places)
        hot[row, column] = 1.0
        expected = dense.slope(lambda by, hot=hot: total(places + by * hot, d, m), 1e-3)
        assert float(by_place[row, column]) == pytest.approx(expected, rel=1e-3, abs=1e-6)
        hot = np.zeros_like(d)
        hot[row, column // grid.span] = 1.0
        expected = dense.slope(lambda by, hot=hot: total(places, d + by * hot, m), 1e-3)
        assert float(by_float[0][row, column // grid.span]) == pytest.approx(expected, rel=1e-3, abs=1e-4)
        if m is not None:
            expected = dense.slope(lambda by, hot=hot: total(places, d, m + by * hot), 1e-3)
            assert float(by_float[1][row, column // grid.span]) == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("qtype", TYPES)
def test_it_moves_towards_a_target_settles_on_neighbours_and_stores_what_it_says(qtype: str) -> None:
    """The loss is the distance to other weights; what is left at the end is codes of the grid, one step away."""
    grid, codes = matrix(qtype)
    above = grid.decode((codes + 1).clamp(max=len(grid.levels) - 1))
    other = torch.lerp(grid.decode(codes), above, 0.7)
    moving = Moving(grid, codes, 96)
    before = float((grid.decode(codes) - other).square().mean())
    for _ in range(96):
        moving.step(2 * (moving.values() - other))
    found, moved = moving.hardened()
    torch.testing.assert_close(moving.values(), found.decode(moved), rtol=1e-6, atol=1e-7)
    assert torch.equal(found.d, found.stored(found.d))
    assert int((moved.int() - codes.int()).abs().max()) == 1
    assert float((found.decode(moved) - other).square().mean()) < 0.8 * before


def test_what_has_no_gradient_stays() -> None:
    grid, codes = matrix("q2_k")
    moving = Moving(grid, codes, 70)
    gradient = torch.zeros(codes.shape)
    gradient[0, :16] = 1.0
    for _ in range(70):
        moving.step(gradient)
    found, moved = moving.hardened()
    assert torch.equal(moved[1:], codes[1:])
    assert torch.equal(moved[0, 16:], codes[0, 16:])
    assert torch.equal(found.d[1:], grid.d[1:])
    assert not torch.equal(moved[0], codes[0])


def test_words_keep_their_codes_and_move_their_scales() -> None:
    grid, codes = matrix("iq2_xs")
    moving = Moving(grid, codes, 8)
    for _ in range(8):
        moving.step(grid.decode(codes))
    found, moved = moving.hardened()
    assert torch.equal(moved, codes)
    assert bool((found.d.abs() < grid.d.abs()).all())
