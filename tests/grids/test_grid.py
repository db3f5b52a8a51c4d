"""The frozen grid: what codes stand for, and which is nearest, against a search through all codes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from llm_quantize.errors import UsageError
from llm_quantize.grids import grid_type, has_grid
from llm_quantize.grids.ggml_words import WORDS
from llm_quantize.grids.grid import GGML_GRIDS, Grid, row_tiles, to_storage
from llm_quantize.kernels.reference.iq4 import LEVELS
from llm_quantize.qtypes import QTYPES
from tests.oracles import number_grids

ROWS, COLUMNS, GROUP, SPAN = 6, 96, 8, 24


def make_grid(kind: str) -> Grid:
    """A grid with scales of both signs and of zero, and what ``kind`` adds."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def integers(most: int) -> torch.Tensor:
        return torch.randint(0, most, (ROWS, COLUMNS // GROUP), generator=generator).float()

    d, m = (to_storage(normal(ROWS, COLUMNS // SPAN) * 0.05, torch.float16) for _ in range(2))
    u = integers(9) - 3
    levels = torch.arange(16.0)
    if kind == "symmetric":
        return Grid(levels - 8, GROUP, SPAN, d, u)
    if kind == "offsets":
        return Grid(levels, GROUP, SPAN, d, u, m=m, v=integers(16))
    if kind == "far offsets":  # the steps vanish in the rounding of the offset
        return Grid(levels, GROUP, SPAN, d * 1e-6, u, m=m * 50, v=integers(16))
    if kind == "zero points":
        return Grid(levels, GROUP, SPAN, d, u, z=integers(16))
    if kind == "act-order":
        index = (torch.arange(COLUMNS) // GROUP)[torch.randperm(COLUMNS, generator=generator)]
        return Grid(levels, GROUP, SPAN, d, u, z=integers(16), index=index)
    return Grid(torch.from_numpy(LEVELS.copy()), GROUP, SPAN, d / 16, u)


KINDS = ("symmetric", "offsets", "far offsets", "zero points", "table")


@pytest.mark.parametrize("kind", [*KINDS, "act-order"])
def test_decode_is_the_formula(kind):
    grid = make_grid(kind)
    codes = torch.randint(0, 16, (ROWS, COLUMNS), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    wanted = [number_grids.value(grid, int(codes[place]), *place) for place in np.ndindex(ROWS, COLUMNS)]
    np.testing.assert_array_equal(grid.decode(codes).numpy().ravel(), np.array(wanted))


@pytest.mark.parametrize("kind", [*KINDS, "act-order"])
@pytest.mark.parametrize("spread", [0.001, 0.3, 30.0])
def test_nearest_is_the_best_of_all_codes(kind, spread):
    grid = make_grid(kind)
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(2)) * spread
    weight[:, ::7] = 0
    codes, wanted = grid.nearest(weight), number_grids.nearest(grid, weight.numpy())
    if kind == "far offsets":  # many codes are one value there: any of them is right
        distance = (grid.decode(codes).double() - weight).abs()
        best = (grid.decode(torch.from_numpy(wanted)).double() - weight).abs()
        assert torch.equal(distance, best)
    else:
        np.testing.assert_array_equal(codes.numpy(), wanted)


@pytest.mark.parametrize("kind", ["symmetric", "offsets", "zero points", "table"])
def test_halfway_goes_to_the_lower_code_and_values_keep_theirs(kind):
    grid = make_grid(kind)
    codes = torch.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS).remainder(15).to(torch.uint8)
    value, above = grid.decode(codes).double(), grid.decode(codes + 1).double()
    lives = (value != above).numpy()
    assert lives.mean() > 0.5
    np.testing.assert_array_equal(grid.nearest(value.float()).numpy()[lives], codes.numpy()[lives])
    middle = ((value + above) / 2).float()
    exact = lives & (middle.double() == (value + above) / 2).numpy()
    assert exact.mean() > 0.3
    np.testing.assert_array_equal(grid.nearest(middle).numpy()[exact], codes.numpy()[exact])


@pytest.mark.parametrize("kind", KINDS)
def test_scale_and_offset_give_the_values(kind):
    grid = make_grid(kind)
    codes = torch.full((ROWS, COLUMNS), 3, dtype=torch.uint8)
    value = grid.scale() * grid.levels[3] - grid.offset()
    torch.testing.assert_close(grid.decode(codes)[:, ::GROUP], value, rtol=1e-5, atol=1e-6)
    assert grid.uniform == (kind != "table")


def test_rows_stack_and_tiles_change_nothing(monkeypatch):
    grid = make_grid("offsets")
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3))
    codes = grid.nearest(weight)
    pieces = [grid.rows(0, 1), grid.rows(1, 4), grid.rows(4, ROWS)]
    assert torch.equal(
        torch.cat([part.nearest(weight[a:b]) for part, a, b in zip(pieces, (0, 1, 4), (1, 4, 6), strict=True)]), codes
    )
    again = Grid.stack(pieces)
    assert torch.equal(again.decode(codes), grid.decode(codes))
    assert list(row_tiles(7, 10, 30)) == [(0, 3), (3, 6), (6, 7)]
    assert list(row_tiles(2, 100, 30)) == [(0, 1), (1, 2)]
    with pytest.raises(UsageError, match="without rows"):
        Grid.stack([])


def test_new_floats_are_rounded_to_storage_and_finite():
    grid = make_grid("offsets")
    d = grid.d + 1e-6
    d[0, 0] = 1e9
    found = grid.with_floats(d)
    assert found.d[0, 0] == 65504
    assert torch.equal(found.d, found.d.half().float())
    assert torch.equal(found.m, grid.m)
    assert torch.equal(grid.with_floats(grid.d, grid.m * 2).m, grid.m * 2)


def test_parts_that_do_not_fit_are_refused():
    grid = make_grid("offsets")
    with pytest.raises(UsageError, match="do not fit together"):
        Grid(grid.levels, GROUP, SPAN, grid.d[:, :2], grid.u)
    with pytest.raises(UsageError, match="do not fit together"):
        Grid(grid.levels, GROUP, SPAN, grid.d, grid.u, m=grid.m)
    with pytest.raises(UsageError, match="do not fit together"):
        Grid(grid.levels, GROUP, GROUP + 1, grid.d, grid.u)
    with pytest.raises(UsageError, match="does not fit its number grid"):
        grid.decode(torch.zeros(ROWS, COLUMNS - 1, dtype=torch.uint8))
    with pytest.raises(UsageError, match="does not fit its number grid"):
        grid.nearest(torch.zeros(ROWS + 1, COLUMNS))


def test_columns_in_the_order_of_their_groups_and_back():
    grid = make_grid("act-order")
    codes = torch.randint(0, 16, (ROWS, COLUMNS), generator=torch.Generator().manual_seed(4)).to(torch.uint8)
    plain, order = grid.in_order()
    assert plain.index is None
    assert grid.index[order].tolist() == [column // GROUP for column in range(COLUMNS)]
    assert torch.equal(plain.decode(codes[:, order]), grid.decode(codes)[:, order])
    assert torch.equal(plain.spread(order).index, grid.index)
    again, same = plain.in_order()
    assert again is plain
    assert same.tolist() == list(range(COLUMNS))
    assert torch.equal(grid.rows(2, 5).decode(codes[2:5]), grid.decode(codes)[2:5])
    assert torch.equal(Grid.stack([grid.rows(0, 2), grid.rows(2, ROWS)]).decode(codes), grid.decode(codes))
    assert torch.equal(grid.to("cpu").index, grid.index)


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index[:-1],
        lambda index: index.float(),
        lambda index: index - 1,
        lambda index: index + 1,
        lambda index: torch.where(index == 3, 4, index),
        lambda index: index[None],
    ],
    ids=["short", "floats", "negative", "too far", "uneven", "matrix"],
)
def test_an_index_that_does_not_fill_the_groups_is_refused(change):
    grid = make_grid("act-order")
    with pytest.raises(UsageError, match="do not fill its groups"):
        replace(grid, index=change(grid.index))


def test_which_types_have_a_grid():
    rounded_plainly = {"f32", "f16", "bf16"}
    assert {name for name in QTYPES if not has_grid(name)} == rounded_plainly
    assert has_grid("int4_g128")
    assert has_grid("int8_asym")
    assert not has_grid("int9")
    for name in (*GGML_GRIDS, *WORDS, "int4_g128", "int8"):
        assert grid_type(name).name == name
        assert grid_type(name).joint == (8 if name in WORDS else 1)
    assert [grid_type(name).block for name in ("q4_k", "q4_0", "int4_g64")] == [256, 32, 64]
    with pytest.raises(UsageError, match="no number grid"):
        grid_type("f16")
