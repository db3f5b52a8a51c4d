"""ggml's types as number grids: their bytes in and out, ggml's own decoder, and refinement that never loses."""

from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch

from llm_quantize import kernels
from llm_quantize.errors import UsageError
from llm_quantize.grids import ggml, grid_type, pack_ggml, unpack_ggml
from llm_quantize.grids.grid import GGML_GRIDS
from llm_quantize.grids.integer import channel_importance
from llm_quantize.kernels.reference.ternary import digits_of, packed_digits
from llm_quantize.qtypes import QTYPES
from tests.kernels.weight_cases import IMPORTANCE_KINDS, ROW_KINDS, make_importance, make_rows
from tests.oracles import ggml as oracle

TYPES = sorted(GGML_GRIDS)
OFFSETS = ("q4_1", "q5_1", "q2_k", "q4_k", "q5_k")
SIGNED = ("q2_0", "q4_0", "q5_0", "iq4_nl", "q3_k", "q6_k", "iq4_xs")


def importance_of(columns: int) -> torch.Tensor:
    return torch.exp(torch.randn(columns, generator=torch.Generator().manual_seed(3)))


def random_bytes(qtype: str, rows: int, columns: int) -> np.ndarray:
    """Any bytes at all whose float16 numbers are finite (and, for q8_0, whose levels ggml writes)."""
    row_type = QTYPES[qtype]
    packed = np.random.default_rng(8).integers(0, 256, (rows, row_type.row_bytes(columns)), dtype=np.uint8)
    blocks = packed.reshape(-1, row_type.block_bytes)
    for offset in row_type.half_offsets:
        blocks[:, offset + 1] &= 0xBF
    if qtype == "nvfp4":
        blocks[:, :4] %= 127
        for nibble in (15, 240):
            blocks[:, 4:][blocks[:, 4:] & nibble == 136 & nibble] ^= 136 & nibble
    if qtype == "mxfp4":
        blocks[:, 0] %= 250
        for nibble in (15, 240):
            blocks[:, 1:][blocks[:, 1:] & nibble == 136 & nibble] ^= 136 & nibble
    if qtype == "q8_0":
        blocks[:, 2:][blocks[:, 2:] == 128] = 129
    if qtype == "tq1_0":
        blocks[:, :52] = packed_digits(digits_of(blocks[:, :52]))
    if qtype == "tq2_0":
        low, two = blocks[:, :64], np.uint8(0b01010101)
        low ^= (low & low >> np.uint8(1) & two) * np.uint8(2)  # threes become ones
    return packed


def same_bits(ours: np.ndarray, theirs: np.ndarray) -> None:
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


def owners(qtype: str, packed: np.ndarray, columns: int) -> np.ndarray:
    """What the package gguf decodes; ggml itself, where that package lacks a type."""
    if qtype in ("q1_0", "q2_0"):
        return oracle.dequantize(qtype, packed, columns)
    found = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[qtype.upper()])
    assert found.shape[1] == columns
    return found


@pytest.mark.parametrize("qtype", TYPES)
def test_any_bytes_go_in_and_out_and_decode_as_ggml_does(qtype):
    packed = random_bytes(qtype, 40, 512)
    grid, codes = unpack_ggml(qtype, packed, 512)
    np.testing.assert_array_equal(pack_ggml(qtype, grid, codes), packed)
    values = grid.decode(codes).numpy()
    same_bits(values, kernels.dequantize(qtype, packed, 512))
    same_bits(values, owners(qtype, packed, 512))


@pytest.mark.parametrize("qtype", TYPES)
@pytest.mark.parametrize("kind", ROW_KINDS)
def test_quantized_rows_go_in_and_out(qtype, kind):
    rows = make_rows(kind, 4, (9, 256))
    for name in IMPORTANCE_KINDS:
        packed = kernels.quantize(qtype, rows, make_importance(name, 4, 256))
        grid, codes = unpack_ggml(qtype, packed, 256)
        if torch.isfinite(grid.d).all() and (grid.m is None or torch.isfinite(grid.m).all()):
            np.testing.assert_array_equal(pack_ggml(qtype, grid, codes), packed)
            same_bits(grid.decode(codes).numpy(), kernels.dequantize(qtype, packed, 256))


@pytest.mark.parametrize("qtype", TYPES)
def test_plain_is_ggmls_own_bytes(qtype):
    rows = make_rows("normal", 5, (5, 512))
    for importance in (None, make_importance("uniform", 5, 512)):
        channel = None if importance is None else torch.from_numpy(importance)
        grid, codes = grid_type(qtype).plain(torch.from_numpy(rows), channel)
        np.testing.assert_array_equal(pack_ggml(qtype, grid, codes), kernels.quantize(qtype, rows, importance))
        kept = grid_type(qtype).fit(torch.from_numpy(rows), channel, refine=False)
        assert torch.equal(kept.d, grid.d)
        assert torch.equal(kept.u, grid.u)


def losses(qtype: str, weight: torch.Tensor, importance: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted errors of each block, float64: ggml's codes, and nearest codes on the refined grid."""
    maker = grid_type(qtype)
    w = maker.weights(weight, channel_importance(importance, weight)).double()
    plain, codes = maker.plain(weight, importance)
    refined = maker.fit(weight, importance)
    both = []
    for grid, chosen in ((plain, codes), (refined, refined.nearest(weight))):
        error = w * (grid.decode(chosen).double() - weight.double()).square()
        both.append(error.reshape(len(weight), -1, maker.block).sum(2))
    return both[0], both[1]


TAME = (
    "normal",
    "heavy",
    "constant",
    "zero",
    "tiny",
    "few-values",
    "sparse",
    "positive",
    "negative",
    "near-constant",
    "outliers",
    "denormal",
)


@pytest.mark.parametrize("qtype", TYPES)
@pytest.mark.parametrize("kind", TAME)
def test_no_block_is_worse_after_refinement(qtype, kind):
    weight = torch.from_numpy(make_rows(kind, 6, (6, 512)))
    for importance in (None, importance_of(512)):
        plain, refined = losses(qtype, weight, importance)
        # The search adds in float32: equal errors may differ in their last bits.
        assert (refined <= plain * (1 + 1e-5) + 1e-36).all()


@pytest.mark.parametrize(
    ("qtype", "most"),
    [
        *(("q4_0", 0.998), ("q4_1", 0.995), ("q5_0", 0.997), ("q5_1", 0.99), ("q8_0", 0.87), ("iq4_nl", 0.96)),
        *(("nvfp4", 0.99), ("q1_0", 0.99), ("q2_0", 0.4)),
        *(("q2_k", 0.98), ("q3_k", 0.998), ("q4_k", 0.98), ("q5_k", 0.94), ("q6_k", 0.95), ("iq4_xs", 0.95)),
    ],
)
def test_refinement_lowers_the_error(qtype, most):
    weight = torch.from_numpy(make_rows("normal", 7, (32, 1024)))
    plain, refined = losses(qtype, weight, importance_of(1024))
    assert refined.sum() < most * plain.sum()


@pytest.mark.parametrize("qtype", TYPES)
@pytest.mark.parametrize("kind", ["normal", "heavy", "tiny", "constant", "zero"])
def test_refined_grids_are_storable_and_read_by_gguf(qtype, kind):
    weight = torch.from_numpy(make_rows(kind, 8, (6, 512)))
    grid = grid_type(qtype).fit(weight, importance_of(512))
    codes = grid.nearest(weight)
    packed = pack_ggml(qtype, grid, codes)
    same_bits(grid.decode(codes).numpy(), owners(qtype, packed, 512))
    again, codes_again = unpack_ggml(qtype, packed, 512)
    assert torch.equal(codes_again, codes)
    np.testing.assert_array_equal(pack_ggml(qtype, again, codes_again), packed)


@pytest.mark.parametrize("qtype", TYPES)
@pytest.mark.parametrize("kind", ["huge", "every-magnitude", "mixed-blocks"])
def test_weights_beyond_float16_give_finite_grids(qtype, kind):
    weight = torch.from_numpy(make_rows(kind, 8, (6, 512)))
    grid = grid_type(qtype).fit(weight, importance_of(512))
    codes = grid.nearest(weight)
    assert torch.isfinite(grid.decode(codes)).all()
    assert pack_ggml(qtype, grid, codes).shape == (6, QTYPES[qtype].row_bytes(512))


@pytest.mark.parametrize("qtype", TYPES)
def test_any_rows_give_the_grid_of_the_whole(qtype, monkeypatch):
    weight, importance = torch.from_numpy(make_rows("heavy", 9, (13, 768))), importance_of(768)
    whole = grid_type(qtype).fit(weight, importance)
    monkeypatch.setattr(ggml, "TILE", 768 * 3)
    for start, stop in ((0, 13), (0, 1), (1, 6), (6, 13)):
        part = grid_type(qtype).fit(weight[start:stop], importance)
        for name in ("d", "u", "m", "v"):
            ours, theirs = getattr(part, name), getattr(whole.rows(start, stop), name)
            assert (ours is None and theirs is None) or torch.equal(ours, theirs), name


@pytest.mark.parametrize("qtype", SIGNED)
def test_scales_of_both_signs_are_tried(qtype):
    weight = torch.from_numpy(make_rows("heavy", 10, (16, 512)))
    scale = grid_type(qtype).fit(weight, None).scale()
    assert (scale > 0).any()
    assert (scale < 0).any()


def test_weights_are_ggmls():
    weight, importance = torch.from_numpy(make_rows("normal", 2, (3, 512))), importance_of(512)
    for qtype, factor, size in (("q2_k", 1, 256), ("q4_k", 2, 256), ("q4_0", 1, 512), ("iq4_nl", 2, 32)):
        square = weight.reshape(3, -1, size).double().square()
        mean = square.mean(2, keepdim=True)
        wanted = importance.double() * ((square + factor * mean).sqrt() / mean.sqrt()).reshape(3, 512)
        torch.testing.assert_close(grid_type(qtype).weights(weight, importance).double(), wanted, rtol=1e-5, atol=1e-7)
    assert torch.equal(grid_type("q6_k").weights(weight, importance), importance.expand(3, 512))


@pytest.mark.parametrize("qtype", ["q4_k", "q3_k", "q5_1"])
def test_what_the_format_cannot_hold_is_refused(qtype):
    grid, codes = unpack_ggml(qtype, random_bytes(qtype, 2, 256), 256)
    with pytest.raises(UsageError, match="float16"):
        pack_ggml(qtype, replace(grid, d=grid.d * (1 + 2**-15) + 1), codes)
    with pytest.raises(UsageError, match="out of range"):
        pack_ggml(qtype, replace(grid, u=grid.u + 64), codes)
    with pytest.raises(UsageError, match="out of range"):
        pack_ggml(qtype, grid, codes + 32)
    with pytest.raises(UsageError, match="not one of q6_k"):
        pack_ggml("q6_k", grid, codes)
    with pytest.raises(UsageError, match="does not fit"):
        pack_ggml(qtype, grid, codes[:1])
    if qtype in OFFSETS:
        with pytest.raises(UsageError, match="other offsets"):
            pack_ggml(qtype, replace(grid, m=None, v=None), codes)


def test_wrong_bytes_are_refused():
    with pytest.raises(UsageError, match="wrong form"):
        unpack_ggml("q4_k", np.zeros((2, 143), np.uint8), 256)
    with pytest.raises(UsageError, match="no number grid"):
        unpack_ggml("f16", np.zeros((2, 512), np.uint8), 256)
    with pytest.raises(UsageError, match="-128"):
        unpack_ggml("q8_0", np.full((1, 34), 128, np.uint8), 32)
    with pytest.raises(UsageError, match="level 2"):
        unpack_ggml("tq2_0", np.full((1, 66), 255, np.uint8), 256)
