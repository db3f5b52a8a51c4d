"""ggml's codebook types as grids of words: bytes in and out, the owner's decoder, fits that never lose."""

from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch

from llm_quantize import kernels
from llm_quantize.errors import UsageError
from llm_quantize.grids import grid_type, pack_ggml, unpack_ggml
from llm_quantize.grids.ggml_words import WORDS
from llm_quantize.grids.integer import channel_importance
from llm_quantize.qtypes import QTYPES
from llm_quantize.qtypes.rates import WORD_SECONDS
from tests.grids.small_grids import weights
from tests.grids.test_ggml import importance_of, random_bytes, same_bits
from tests.kernels.weight_cases import ROW_KINDS, make_importance, make_rows

SIGNED = [name for name, kind in WORDS.items() if kind.signs != "none"]


def any_bytes(qtype: str, rows: int, columns: int) -> np.ndarray:
    packed = random_bytes(qtype, rows, columns)
    if qtype == "iq1_m":  # the highest bit of the exponent of d, which is spread over four words
        packed.reshape(-1, QTYPES[qtype].block_bytes)[:, -1] &= 0xBF
    return packed


def test_every_type_of_words_has_an_estimate():
    assert set(WORD_SECONDS) == set(WORDS)


@pytest.mark.parametrize("qtype", WORDS)
def test_any_bytes_go_in_and_out_and_decode_as_the_owner_does(qtype):
    packed = any_bytes(qtype, 40, 512)
    grid, codes = unpack_ggml(qtype, packed, 512)
    np.testing.assert_array_equal(pack_ggml(qtype, grid, codes), packed)
    values = grid.decode(codes).numpy()
    np.testing.assert_array_equal(values, kernels.dequantize(qtype, packed, 512))
    np.testing.assert_array_equal(values, gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[qtype.upper()]))


@pytest.mark.parametrize("qtype", WORDS)
@pytest.mark.parametrize("kind", ROW_KINDS)
def test_quantized_rows_go_in_and_out(qtype, kind):
    rows = make_rows(kind, 4, (9, 256))
    packed = kernels.quantize(qtype, rows, make_importance("uniform", 4, 256))
    grid, codes = unpack_ggml(qtype, packed, 256)
    if torch.isfinite(grid.d).all():
        np.testing.assert_array_equal(pack_ggml(qtype, grid, codes), packed)


@pytest.mark.parametrize("qtype", WORDS)
def test_plain_is_ggmls_own_bytes(qtype):
    weight, importance = weights(5, 512, 5), importance_of(512)
    packed = kernels.quantize(qtype, weight.numpy(), importance.numpy())
    grid, codes = grid_type(qtype).plain(weight, importance)
    np.testing.assert_array_equal(pack_ggml(qtype, grid, codes), packed)
    kept = grid_type(qtype).fit(weight, importance, refine=False)
    assert torch.equal(kept.scale(), grid.scale())
    even = grid_type(qtype).plain(weight, None)  # types that need an importance have one then
    ones = kernels.quantize(qtype, weight.numpy(), np.ones(512, np.float32))
    if QTYPES[qtype].needs_importance:
        np.testing.assert_array_equal(pack_ggml(qtype, *even), ones)


def weighted(grid, codes, weight, h):
    error = h.double() * (grid.decode(codes).double() - weight.double()).square()
    return error.reshape(len(weight), -1, 256).sum(2)


@pytest.mark.parametrize("qtype", WORDS)
def test_no_superblock_fits_worse_than_ggmls(qtype):
    weight, importance = weights(24, 512, 6), importance_of(512)
    h = channel_importance(importance, weight)
    kind = grid_type(qtype)
    plain, fitted = kind.plain(weight, importance)[0], kind.fit(weight, importance)
    before, after = (weighted(grid, grid.nearest(weight, h), weight, h) for grid in (plain, fitted))
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.97 * before.sum()
    own = weighted(plain, kind.plain(weight, importance)[1], weight, h)
    assert after.sum() < 0.95 * own.sum()
    part = kind.fit(weight[5:9], importance)
    assert torch.equal(part.scale(), fitted.scale()[5:9])
    assert (part.z is None) or torch.equal(part.z, fitted.z[5:9])


@pytest.mark.parametrize("qtype", WORDS)
def test_nearest_words_are_nearest_of_all_that_there_are(qtype):
    grid, _ = grid_type(qtype).plain(weights(3, 256, 7), importance_of(256))
    weight = weights(3, 256, 8)
    codes = grid.nearest(weight)
    error = (grid.decode(codes) - weight).square().reshape(-1, 8).sum(1)
    entries, patterns = grid.book.entries, grid.book.signs
    scale = grid.scale().repeat_interleave(grid.group, 1).reshape(-1, 8)
    shift = grid.offset().repeat_interleave(grid.group, 1).reshape(-1, 8)
    target = (weight.reshape(-1, 8) + shift) / scale
    for word in range(0, len(target), 5):
        signs = torch.ones(8, 1) if patterns is None else patterns
        size = len(entries)
        # With signs, the best entry for a pattern is that for the target so turned; halves are apart.
        turned = target[word][:, None] * signs
        halves = [
            (turned[a : a + size, None, :] - entries[:, :, None]).square().sum(0).amin(0) for a in range(0, 8, size)
        ]
        least = float(sum(halves).amin()) * float(scale[word, 0]) ** 2
        assert float(error[word]) <= least * (1.02 if patterns is not None else 1.0001) + 1e-9


@pytest.mark.parametrize("qtype", ["iq2_xs", "iq3_s", "iq1_m"])
def test_zeros_and_huge_weights_give_grids_that_hold(qtype):
    weight = torch.zeros(3, 256)
    weight[1], weight[2] = 3e38, torch.linspace(-1, 1, 256) * 1e-30
    grid = grid_type(qtype).fit(weight, None)
    assert torch.isfinite(grid.decode(grid.nearest(weight))).all()
    assert pack_ggml(qtype, grid, grid.nearest(weight)).shape == (3, QTYPES[qtype].row_bytes(256))


@pytest.mark.parametrize("qtype", WORDS)
def test_what_is_no_grid_of_the_type_is_refused(qtype):
    grid, codes = grid_type(qtype).plain(weights(2, 256, 1), importance_of(256))
    with pytest.raises(UsageError, match="does not fit its number grid"):
        pack_ggml(qtype, grid, codes[:1])
    with pytest.raises(UsageError, match="out of range"):
        pack_ggml(qtype, replace(grid, u=grid.u + 0.01), codes)
    with pytest.raises(UsageError, match="float16"):
        pack_ggml(qtype, replace(grid, d=grid.d + 1e-7), codes)
    other = "iq1_s" if qtype != "iq1_s" else "iq3_s"
    with pytest.raises(UsageError, match="is not one of"):
        pack_ggml(other, grid, codes)
    with pytest.raises(UsageError, match="wrong form"):
        unpack_ggml(qtype, np.zeros((2, 3), np.uint8), 256)


@pytest.mark.parametrize("qtype", WORDS)
def test_codes_that_are_no_word_are_refused(qtype):
    grid, codes = grid_type(qtype).plain(weights(4, 256, 1), importance_of(256))
    wild = torch.randint(0, len(grid.levels), codes.shape, generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    with pytest.raises(UsageError, match="does not have"):
        pack_ggml(qtype, grid, wild)
    if WORDS[qtype].signs == "even":
        odd = codes.clone()
        odd[0, 0] = len(grid.levels) - 1 - odd[0, 0]
        with pytest.raises(UsageError, match="odd number"):
            pack_ggml(qtype, grid, odd)
    with pytest.raises(UsageError, match="out of range"):
        pack_ggml(qtype, grid, torch.full_like(codes, 200))


def test_decoding_has_the_bits_of_the_reference_but_for_the_sign_of_zero():
    for qtype in SIGNED:
        packed = any_bytes(qtype, 4, 256)
        same_bits(unpack_values(qtype, packed), kernels.dequantize(qtype, packed, 256))


def unpack_values(qtype, packed):
    grid, codes = unpack_ggml(qtype, packed, 256)
    return grid.decode(codes).numpy()
