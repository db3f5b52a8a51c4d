"""Q1_0 and Q2_0: the bytes of ggml, at every SIMD level, and its own decoding."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_quantize import kernels
from llm_quantize.qtypes import QTYPES
from llm_quantize.qtypes.ggml_types import BLOCK_SIZES, GgmlType

from ..oracles import ggml
from .legacy_cases import (
    KINDS,
    assert_equal,
    assert_same_bytes,
    assert_same_values,
    cases,
    make_importance,
    make_rows,
    quickly,
    random_packed,
)

TYPES = ("q1_0", "q2_0")


@pytest.mark.parametrize("qtype", TYPES)
def test_sizes_and_numbers_are_those_of_the_library(qtype: str) -> None:
    kind = QTYPES[qtype]
    assert ggml.described(int(kind.ggml_type)) == (qtype, kind.block_size, kind.block_bytes)


def test_the_other_types_are_those_of_gguf() -> None:
    ours = {kind.name: int(kind) for kind in GgmlType if kind is not GgmlType.Q2_0}
    assert ours == {kind.name: int(kind) for kind in gguf.GGMLQuantizationType}
    assert {kind.name: sizes for kind, sizes in BLOCK_SIZES.items() if kind is not GgmlType.Q2_0} == {
        kind.name: sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()
    }


@pytest.mark.parametrize("qtype", TYPES)
@quickly
@given(data=st.data())
def test_bytes_are_those_of_ggml(qtype: str, data: st.DataObject) -> None:
    assert_same_bytes(qtype, *data.draw(cases(QTYPES[qtype].block_size)))


@pytest.mark.parametrize("qtype", TYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_row(qtype: str, kind: str) -> None:
    assert_same_bytes(qtype, make_rows(kind, 7, (9, 7 * QTYPES[qtype].block_size)))


def test_few_levels_survive_exactly() -> None:
    rng = np.random.default_rng(5)
    ternary = (rng.integers(-1, 2, (20, 1024)) * 0.25).astype(np.float32)
    np.testing.assert_array_equal(kernels.dequantize("q2_0", assert_same_bytes("q2_0", ternary), 1024), ternary)
    signs = (rng.integers(0, 2, (20, 1024)) * 0.5 - 0.25).astype(np.float32)
    np.testing.assert_array_equal(kernels.dequantize("q1_0", assert_same_bytes("q1_0", signs), 1024), signs)


def test_one_half_rounds_away_from_zero_and_its_neighbour_below_does_not() -> None:
    half = np.float32(0.5)
    rows = np.resize(np.array([half, -half, np.nextafter(half, np.float32(0)), 1, 0.1], np.float32), (1, 64))
    assert kernels.dequantize("q2_0", assert_same_bytes("q2_0", rows), 64)[0, :5].tolist() == [1, -1, 0, 1, 0]


def test_zero_of_either_sign_is_not_below_zero() -> None:
    rows = np.resize(np.array([0.0, -0.0, 1, -1], np.float32), (1, 128))
    assert kernels.dequantize("q1_0", assert_same_bytes("q1_0", rows), 128)[0, :4].tolist() == [0.5, 0.5, 0.5, -0.5]


@pytest.mark.parametrize("qtype", TYPES)
def test_rows_are_independent_and_16_bit_rows_are_their_values(qtype: str) -> None:
    rows = make_rows("heavy", 3, (19, 512))
    whole = kernels.quantize(qtype, rows, make_importance("plain", 3, 512))
    for start, stop in ((0, 1), (1, 6), (6, 19)):
        assert_equal(kernels.quantize(qtype, rows[start:stop]), whole[start:stop], "split")
    half = rows.astype(np.float16)
    brain = (rows.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    wide = (brain.astype(np.uint32) << np.uint32(16)).view(np.float32)
    assert_equal(kernels.quantize(qtype, half), kernels.quantize(qtype, half.astype(np.float32)), "f16")
    assert_equal(kernels.quantize(qtype, brain), kernels.quantize(qtype, wide), "bf16")


@pytest.mark.parametrize("qtype", TYPES)
@quickly
@given(seed=st.integers(0, 2**32 - 1))
def test_decoding_is_that_of_ggml(qtype: str, seed: int) -> None:
    packed = random_packed(qtype, seed, 3, 512)
    assert_same_values(kernels.dequantize(qtype, packed, 512), ggml.dequantize(qtype, packed, 512))
