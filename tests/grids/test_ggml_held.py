"""What GGUF files store as grids of any format, and grids of any format in ggml's blocks, judged by gguf-py."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_quantize import kernels
from llm_quantize.formats.gguf.scales import decode
from llm_quantize.grids import grid_type, pack_ggml
from llm_quantize.grids.ggml_held import held, hold
from llm_quantize.grids.ggml_pack import LAYOUTS
from llm_quantize.grids.grid import Grid, Ladder
from llm_quantize.qtypes import QTYPES
from llm_quantize.qtypes.codebook import CODEBOOKS, SCALES
from tests.kernels.legacy_cases import random_packed

TYPES = (*(name for name in LAYOUTS if not name.startswith("tq")), "mxfp4", "nvfp4")
COLUMNS = 768


def judged(qtype: str, packed: np.ndarray, columns: int = COLUMNS) -> np.ndarray:
    """float32 (rows, columns), by the owner of the format; kernels are tested against it where it has no decoder."""
    try:
        values = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[qtype.upper()])
    except (KeyError, NotImplementedError):
        values = kernels.dequantize(qtype, packed, columns)
    found: np.ndarray = values.astype(np.float32).reshape(len(packed), columns)
    return found


@pytest.mark.parametrize("qtype", TYPES)
@given(seed=st.integers(0, 2**20))
def test_stored_rows_are_grids_and_come_back(qtype: str, seed: int) -> None:
    """Rows that a quantizer made, and rows of noise, where their scales are numbers."""
    with np.errstate(all="ignore"):
        packed = random_packed(qtype, seed, 2, COLUMNS)
        whole = 0
        for row in range(len(packed)):
            found = held(qtype, packed[row : row + 1], COLUMNS)
            if found is None:
                continue
            whole += 1
            grid, codes = found
            assert np.array_equal(grid.decode(codes).numpy(), judged(qtype, packed[row : row + 1]), equal_nan=True)
            again = hold(qtype, grid, codes)
            assert again is not None
            assert np.array_equal(pack_ggml(qtype, *again), packed[row : row + 1])
        assert whole >= 2, "rows that a quantizer made are grids"


def test_the_lowest_byte_of_q8_0_is_a_level() -> None:
    """ggml never writes -128; what was made of 8-bit integers holds it."""
    packed = kernels.quantize("q8_0", np.ones((1, 64), np.float32))
    packed[0, 5] = 128
    found = held("q8_0", packed, 64)
    assert found is not None
    assert np.array_equal(found[0].decode(found[1]).numpy(), judged("q8_0", packed, 64))
    assert found[0].decode(found[1])[0, 3] == -128 * found[0].d[0, 0]


@pytest.mark.parametrize(
    ("qtype", "at", "value"),
    [
        ("q4_0", 1, 0x7C),
        ("q4_1", 3, 0x7E),
        ("q6_k", 209, 0x7C),
        ("mxfp4", 0, 255),
        ("nvfp4", 2, 127),
        ("nvfp4", 0, 200),
    ],
)
def test_scales_that_are_no_numbers_are_no_grid(qtype: str, at: int, value: int) -> None:
    packed = kernels.quantize(qtype, np.ones((2, COLUMNS), np.float32))
    packed[1, at] = value
    assert held(qtype, packed[:1], COLUMNS) is not None
    assert held(qtype, packed, COLUMNS) is None


def test_types_without_a_grid_and_scales_that_have_no_place_are_none() -> None:
    rows = np.ones((1, COLUMNS), np.float32)
    assert held("iq2_s", kernels.quantize("iq2_s", rows, np.ones(COLUMNS, np.float32)), COLUMNS) is None
    assert held("q4_0", kernels.quantize("q4_0", rows), COLUMNS, np.full((1, 1), 0.5, np.float32)) is None


def test_the_scale_of_a_matrix_is_part_of_the_grid_of_nvfp4() -> None:
    packed = kernels.quantize("nvfp4", np.random.default_rng(1).standard_normal((4, COLUMNS)).astype(np.float32))
    scales = np.full((4, 1), 0.0123, np.float32)
    found = held("nvfp4", packed, COLUMNS, scales)
    assert found is not None
    assert np.array_equal(found[0].decode(found[1]).numpy(), decode("nvfp4", packed, COLUMNS, scales))
    again = hold("nvfp4", *found)
    assert again is not None
    assert np.array_equal(pack_ggml("nvfp4", *again), packed)


def integers(
    bits: int, group: int, *, symmetric: bool, scale: str = "float16", negative: bool = False, seed: int = 0
) -> tuple[Grid, torch.Tensor]:
    """Random codes and scales of an integer grid; rows of COLUMNS."""
    generator = torch.Generator().manual_seed(seed)
    rows, groups = 8, COLUMNS // group
    d = (torch.rand(rows, groups, generator=generator) * 0.02 + 0.001).to(getattr(torch, scale)).float()
    if negative:
        d[::2] *= -1
    count = 1 << bits
    codes = torch.randint(0, count, (rows, COLUMNS), generator=generator, dtype=torch.uint8)
    lowest = -(count // 2) if symmetric else 0
    zeros = None if symmetric else torch.randint(0, count, (rows, groups), generator=generator).float()
    levels = torch.arange(lowest, lowest + count, dtype=torch.float32)
    return Grid(levels, group, group, d, torch.ones_like(d), z=zeros, storage=getattr(torch, scale)), codes


@pytest.mark.parametrize("scale", ["float16", "bfloat16"])
@pytest.mark.parametrize("group", [32, 64, 128, COLUMNS])
@pytest.mark.parametrize(
    ("bits", "symmetric", "qtype"),
    [
        *((2, True, "q4_0"), (3, True, "q4_0"), (3, False, "q4_0"), (4, True, "q4_0"), (4, False, "q5_0")),
        *((5, True, "q5_0"), (5, False, "q8_0"), (6, True, "q8_0"), (7, False, "q8_0"), (8, True, "q8_0")),
    ],
)
def test_whole_numbers_are_held_exactly(bits: int, symmetric: bool, qtype: str, group: int, scale: str) -> None:
    for negative in (False, True):
        grid, codes = integers(bits, group, symmetric=symmetric, scale=scale, negative=negative)
        found = grid_type(qtype).hold(grid, codes)
        assert found is not None
        assert np.array_equal(judged(qtype, pack_ggml(qtype, *found)), grid.decode(codes).numpy())


@pytest.mark.parametrize("group", [64, 128])
def test_two_bits_are_held_under_scales_of_the_other_sign(group: int) -> None:
    grid, codes = integers(2, group, symmetric=True)
    found = grid_type("q2_0").hold(grid, codes)
    assert found is not None
    assert np.array_equal(judged("q2_0", pack_ggml("q2_0", *found)), grid.decode(codes).numpy())
    assert grid_type("q2_0").hold(*integers(2, group, symmetric=False)) is None


@pytest.mark.parametrize(
    ("bits", "symmetric", "qtype"),
    [(4, False, "q4_0"), (5, True, "q4_0"), (8, False, "q8_0"), (6, True, "q5_0"), (5, False, "q4_1")],
)
def test_numbers_beyond_the_type_are_not_held(bits: int, symmetric: bool, qtype: str) -> None:
    grid, codes = integers(bits, 32, symmetric=symmetric)
    assert hold(qtype, grid, codes) is None
    assert hold(qtype, grid, codes, exact=False) is None


def test_groups_that_are_no_whole_blocks_and_levels_that_are_no_numbers_are_not_held() -> None:
    assert hold("q4_0", *integers(4, 16, symmetric=True)) is None
    assert hold("q2_0", *integers(2, 32, symmetric=True)) is None
    levels = torch.tensor(CODEBOOKS["nf4"], dtype=torch.float32)
    d = torch.full((2, 12), 0.5)
    codes = torch.zeros((2, COLUMNS), dtype=torch.uint8)
    assert hold("q4_0", Grid(levels, 64, 64, d, torch.ones_like(d)), codes) is None
    assert hold("iq4_nl", Grid(levels, 64, 64, d, torch.ones_like(d)), codes) is None
    grid, codes = integers(4, 32, symmetric=True)
    grid.d[3, 3] = torch.inf
    assert hold("q4_0", grid, codes) is None
    assert hold("q4_0", grid, codes, exact=False) is None


def test_scales_that_float16_does_not_hold_keep_their_codes_where_that_is_asked_for() -> None:
    grid, codes = integers(4, 32, symmetric=True, scale="float32")
    assert hold("q4_0", grid, codes) is None
    found = hold("q4_0", grid, codes, exact=False)
    assert found is not None
    assert torch.equal(found[1], codes)
    values = judged("q4_0", pack_ggml("q4_0", *found))
    assert not np.array_equal(values, grid.decode(codes).numpy())
    assert np.allclose(values, grid.decode(codes).numpy(), rtol=2**-10, atol=0)


def affine(bits: int, group: int, scale: str = "float16") -> tuple[Grid, torch.Tensor]:
    """Random codes under scales and offsets, as MLX has them."""
    grid, codes = integers(bits, group, symmetric=False, scale=scale)
    m = (torch.rand(grid.d.shape, generator=torch.Generator().manual_seed(3)) - 0.5).to(getattr(torch, scale)).float()
    kept = Grid(grid.levels, group, group, grid.d, grid.u, m=m, v=torch.ones_like(m), storage=grid.storage)
    return kept, codes


@pytest.mark.parametrize("scale", ["float16", "bfloat16"])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("bits", "qtype"), [(2, "q4_1"), (3, "q4_1"), (4, "q4_1"), (5, "q5_1")])
def test_scales_with_offsets_are_held_exactly(bits: int, qtype: str, group: int, scale: str) -> None:
    grid, codes = affine(bits, group, scale)
    found = grid_type(qtype).hold(grid, codes)
    assert found is not None
    assert np.array_equal(judged(qtype, pack_ggml(qtype, *found)), grid.decode(codes).numpy())
    assert grid_type("q5_0").hold(grid, codes) is None


def test_offsets_of_whole_steps_are_zero_points() -> None:
    """What MLX has of symmetric integers: offset = -8 scale."""
    grid, codes = integers(4, 64, symmetric=True)
    kept = Grid(torch.arange(16, dtype=torch.float32), 64, 64, grid.d, grid.u, m=8 * grid.d, v=torch.ones_like(grid.d))
    found = grid_type("q4_0").hold(kept, codes)
    assert found is not None
    assert np.array_equal(judged("q4_0", pack_ggml("q4_0", *found)), kept.decode(codes).numpy())


def test_zero_points_are_offsets_where_the_product_is_a_float16() -> None:
    grid, codes = integers(4, 32, symmetric=False)
    assert hold("q4_1", grid, codes) is None  # eleven bits times four
    coarse = Grid(grid.levels, 32, 32, grid.d.to(torch.float8_e4m3fn).float().clamp(min=2**-6), grid.u, z=grid.z)
    found = hold("q4_1", coarse, codes)
    assert found is not None
    assert np.array_equal(judged("q4_1", pack_ggml("q4_1", *found)), coarse.decode(codes).numpy())


def fours(nested: str, group: int, step: float = 1.0) -> tuple[Grid, torch.Tensor]:
    """Random E2M1 with both zeros."""
    rng = np.random.default_rng(2)
    table = np.array(SCALES[nested], np.float32)
    rungs = rng.integers(0, len(table), (4, COLUMNS // group)).astype(np.uint8)
    steps = torch.full(rungs.shape, step, dtype=torch.float32)
    ladder = Ladder(0.0, steps, torch.from_numpy(table), torch.from_numpy(rungs))
    d = ladder.decode()
    codes = torch.from_numpy(rng.integers(0, 16, (4, COLUMNS)).astype(np.uint8))
    levels = torch.tensor(CODEBOOKS["e2m1"], dtype=torch.float32)
    return Grid(levels, group, group, d, torch.ones_like(d), storage=torch.float32, ladder=ladder), codes


@pytest.mark.parametrize(("qtype", "nested", "group"), [("mxfp4", "e8m0", 32), ("nvfp4", "e4m3", 16)])
def test_floats_of_four_bits_are_held_exactly(qtype: str, nested: str, group: int) -> None:
    grid, codes = fours(nested, group)
    found = hold(qtype, grid, codes)
    assert found is not None
    with np.errstate(over="ignore"):
        assert np.array_equal(judged(qtype, pack_ggml(qtype, *found)), grid.decode(codes).numpy())


def test_a_number_for_the_matrix_is_held_by_nvfp4_alone() -> None:
    grid, codes = fours("e4m3", 16, 0.01)
    found = hold("nvfp4", grid, codes)
    assert found is not None
    packed, scales = pack_ggml("nvfp4", *found), np.full((4, 1), 0.01, np.float32)
    assert np.array_equal(decode("nvfp4", packed, COLUMNS, scales), grid.decode(codes).numpy())
    assert hold("mxfp4", *fours("e8m0", 32, 0.5)) is None
    assert hold("mxfp4", grid, codes) is None
    assert hold("nvfp4", *fours("e8m0", 32)) is None


def test_blocks_of_zeros_have_codes_of_zero_where_offsets_stand_beside_them() -> None:
    """Q4_0 has the code 8 there; MLX's would be 8 steps of nothing, which verify takes for a lost scale."""
    rows = np.random.default_rng(4).standard_normal((3, 64)).astype(np.float32)
    rows[1] = 0
    found = held("q4_0", kernels.quantize("q4_0", rows), 64)
    assert found is not None
    taken = grid_type("affine4_g32", scale="float16").hold(*found)
    assert taken is not None
    assert np.array_equal(taken[0].decode(taken[1]).numpy(), found[0].decode(found[1]).numpy())
    assert bool((taken[1][1] == 0).all())
    assert bool((found[1][1] == 8).all())


def test_blocks_hold_whole_rows_only() -> None:
    for qtype in ("q4_0", "nvfp4"):
        assert QTYPES[qtype].block_size in (32, 64)
    grid, codes = fours("e4m3", 16)
    assert hold("nvfp4", grid.rows(0, 2), codes[:2]) is not None
    narrow = Grid(
        grid.levels,
        16,
        16,
        grid.d[:, :3].contiguous(),
        grid.u[:, :3].contiguous(),
        storage=torch.float32,
        ladder=None if grid.ladder is None else grid.ladder.mapped(lambda part: part[:, :3].contiguous()),
    )
    assert hold("nvfp4", narrow, codes[:, :48].contiguous()) is None
