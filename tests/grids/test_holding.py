"""Grids held by grids of other types: the same values, or nothing at all."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from llm_quantize.grids import grid_type
from llm_quantize.grids.grid import Grid, to_storage


def integers(bits: int, group: int, *, lowest: int = 0, zeros: bool = False, seed: int = 0) -> tuple[Grid, Tensor]:
    """A matrix (6, 64) of codes of ``bits`` bits with float16 scales, some negative."""
    generator = torch.Generator().manual_seed(seed)
    shape = (6, 64 // group)
    scale = to_storage(torch.randn(shape, generator=generator), torch.float16)
    zero = torch.randint(0, 1 << bits, shape, generator=generator).float() if zeros else None
    levels = torch.arange(lowest, lowest + (1 << bits), dtype=torch.float32)
    codes = torch.randint(0, 1 << bits, (6, 64), generator=generator).to(torch.uint8)
    return Grid(levels, group, group, scale, torch.ones((1, 1)).expand(shape), z=zero), codes


def same(one: Tensor, other: Tensor) -> bool:
    """Value for value; s q + o of a negative scale has another zero than s (q - z)."""
    return torch.equal(one, other)


@pytest.mark.parametrize(
    ("source", "target", "held"),
    [
        ({"bits": 4, "group": 32, "lowest": -8}, "int4_g32", True),
        ({"bits": 4, "group": 32, "lowest": -8}, "int4_g16", True),
        ({"bits": 4, "group": 32, "lowest": -8}, "int4_g64", False),
        ({"bits": 4, "group": 32, "lowest": -8}, "int4_g32_asym", True),
        ({"bits": 4, "group": 32, "lowest": -8}, "int8_g32", True),
        ({"bits": 4, "group": 32, "lowest": -8}, "int3_g32", False),
        ({"bits": 4, "group": 32, "zeros": True}, "int4_g32_asym", True),
        ({"bits": 4, "group": 32, "zeros": True}, "int5_g32_asym", True),
        ({"bits": 4, "group": 32, "zeros": True}, "int4_g32", False),
        ({"bits": 4, "group": 32, "zeros": True}, "int5_g32", True),
        ({"bits": 4, "group": 64, "lowest": -8}, "int4", True),
        ({"bits": 4, "group": 32, "lowest": -8}, "affine4_g32", True),
        ({"bits": 2, "group": 64, "lowest": -2}, "affine4_g32", True),
        ({"bits": 4, "group": 32, "lowest": -8}, "nf4_b32", False),
    ],
)
def test_integers(source: dict[str, int], target: str, held: bool) -> None:
    grid, codes = integers(**source)  # type: ignore[arg-type]
    found = grid_type(target, scale="float16", signed=True).hold(grid, codes)
    assert (found is not None) == held
    if found is not None:
        assert same(found[0].decode(found[1]), grid.decode(codes))


@pytest.mark.parametrize("target", ["int4_g32", "int4_g32_asym", "int8_g16", "affine4_g32", "nf4_b32", "q4_0", "q4_1"])
def test_groups_that_do_not_stand_side_by_side_are_held_by_nobody_who_does_not_ask(target: str) -> None:
    grid, codes = integers(4, 32, lowest=-8)
    kind = grid_type(target, scale="float16", signed=True)
    spread = replace(grid, index=torch.arange(64) % 2)
    assert target == "nf4_b32" or kind.near(grid, codes) is not None
    assert kind.hold(spread, codes) is kind.near(spread, codes) is None


def test_offsets_of_products_that_are_not_exact_are_not_held() -> None:
    """3 bits of a scale of eleven and a zero point of two do not all fit eleven."""
    grid, codes = integers(4, 32, zeros=True)
    assert grid_type("affine4_g32", scale="float16").hold(grid, codes) is None
    near = grid_type("affine4_g32", scale="float16").near(grid, codes)
    assert near is not None
    assert torch.equal(near[1], codes)
    wanted = grid.decode(codes)
    assert 0 < float((near[0].decode(near[1]) - wanted).norm() / wanted.norm()) < 2**-11
    even = Grid(grid.levels, 32, 32, grid.d, grid.u, z=torch.full_like(grid.d, 8))
    found = grid_type("affine4_g32", scale="float16").hold(even, codes)
    assert found is not None
    back = grid_type("int4_g32", scale="float16").hold(*found)
    assert back is not None
    assert torch.equal(back[0].d, grid.d)
    assert same(back[0].decode(back[1]), even.decode(codes))


def test_scales_are_not_rounded() -> None:
    grid, codes = integers(4, 32, lowest=-8)
    assert grid_type("int4_g32", scale="bfloat16").hold(grid, codes) is None
    near = grid_type("int4_g32", scale="bfloat16").near(grid, codes)
    assert near is not None
    assert torch.equal(near[0].d, grid.d.to(torch.bfloat16).float())
    assert grid_type("int4_g32", scale="float32").hold(grid, codes) is not None


def test_groups_with_all_numbers_in_common_are_one() -> None:
    grid, codes = integers(4, 32, lowest=-8)
    alike = Grid(grid.levels, 32, 32, grid.d[:, :1].repeat(1, 2), grid.u)
    found = grid_type("int4_g64").hold(alike, codes)
    assert found is not None
    assert found[0].d.shape == (6, 1)
    assert same(found[0].decode(found[1]), alike.decode(codes))


def test_a_zero_point_beyond_the_codes_of_the_first_gptq_format() -> None:
    """It holds 1 to 16, the second format and compressed-tensors 0 to 15."""
    grid, codes = integers(4, 32)
    for zero, first, others in ((0.0, False, True), (1.0, True, True), (15.0, True, True), (16.0, True, False)):
        one = Grid(grid.levels, 32, 32, grid.d, grid.u, z=torch.full_like(grid.d, zero))
        assert (grid_type("int4_g32_asym", least_zero=1).hold(one, codes) is not None) == first
        assert (grid_type("int4_g32_asym").hold(one, codes) is not None) == others


FLOATS = ("e2m1_b16_e4m3", "e2m1_b16_e4m3alone", "e2m1_b32_e8m0", "e2m1_b32_e8m0up", "e4m3_b32_e8m0up", "e4m3")
HOLDS = {
    ("e2m1_b32_e8m0", "e2m1_b32_e8m0up"),
    ("e2m1_b32_e8m0up", "e2m1_b32_e8m0"),
    ("e2m1_b16_e4m3alone", "e2m1_b16_e4m3"),
    *product(("e2m1_b32_e8m0", "e2m1_b32_e8m0up"), ("e2m1_b16_e4m3", "e2m1_b16_e4m3alone")),  # small powers of two
}


@pytest.mark.parametrize(("source", "target"), list(product(FLOATS, FLOATS)))
def test_floats(source: str, target: str) -> None:
    from llm_quantize.grids.codebook import CodebookGridType, block_maxima, ladder_of

    kinds = []
    weight = torch.randn((32, 64), generator=torch.Generator().manual_seed(3)) / 7
    for name in (source, target):
        kind = grid_type(name, scale="float32")
        assert isinstance(kind, CodebookGridType)
        if kind.qtype.nested:
            maxima = block_maxima(kind.qtype, weight)
            kind = CodebookGridType(kind.qtype, ladder_of(kind.qtype, maxima, float(maxima.amax())))
        kinds.append(kind)
    grid, codes = kinds[0].plain(weight, None)
    found = CodebookGridType(kinds[1].qtype).hold(grid, codes)
    assert (found is not None) == (source == target or (source, target) in HOLDS)
    if found is not None:
        assert same(found[0].decode(found[1]), grid.decode(codes))


def test_rows_that_share_scales_share_them() -> None:
    kind, whole = grid_type("e4m3_b128_rows128", scale="float32"), grid_type("e4m3_whole", scale="float32")
    rows = grid_type("e4m3", scale="float32")
    grid, codes = rows.plain(torch.randn((256, 256), generator=torch.Generator().manual_seed(0)), None)
    assert kind.hold(grid, codes) is None
    one = Grid(grid.levels, 256, 256, torch.full_like(grid.d, 0.25), grid.u, storage=torch.float32)
    for taking in (kind, whole, rows):
        found = taking.hold(one, codes)
        assert found is not None
        assert same(found[0].decode(found[1]), one.decode(codes))


def of_127(seed: int = 0) -> tuple[Grid, Tensor]:
    """LLM.int8: codes from -127, a float32 scale for each row, in units of 1/127; one row is all zeros."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 255, (6, 64), generator=generator).to(torch.uint8)
    scale = torch.rand((6, 1), generator=generator) + 0.01
    scale[2], codes[2] = 0, 127
    levels, unit = torch.arange(-127, 128, dtype=torch.float32), torch.tensor([[1 / 127]])
    return Grid(levels, 64, 64, scale, unit.expand(6, 1), storage=torch.float32), codes


@pytest.mark.parametrize(("target", "held"), [("int8", True), ("int8_g32", True), ("int8_g32_asym", True)])
def test_whole_numbers_with_a_scale_for_each_row(target: str, held: bool) -> None:
    """Float32 holds the scales of integers, 16 bits hold the codes."""
    grid, codes = of_127()
    found = grid_type(target, scale="float32").hold(grid, codes)
    assert (found is not None) == held
    if found is not None:
        assert same(found[0].decode(found[1]), grid.decode(codes))
    assert grid_type(target, scale="float16").hold(grid, codes) is None
    near = grid_type(target, scale="float16").near(grid, codes)
    assert near is not None
    assert len({int(a) - int(b) for a, b in zip(near[1].reshape(-1), codes.reshape(-1), strict=True)}) == 1
    wanted = grid.decode(codes)
    assert 0 < float((near[0].decode(near[1]) - wanted).norm() / wanted.norm()) < 2**-11


def test_offsets_of_whole_numbers_are_a_power_of_two_of_scales() -> None:
    """128 scales are as exact as a scale; 127 of them would be off by a quarter of a step in bfloat16."""
    grid, codes = of_127()
    near = grid_type("affine8_g32", scale="bfloat16").near(grid, codes)
    assert near is not None
    moved = near[1].short() - codes
    assert bool((moved[[0, 1, 3, 4, 5]] == 1).all())
    factor = grid.scale().bfloat16().float()
    assert torch.equal(near[0].decode(near[1]), factor * (codes.float() - 127))
