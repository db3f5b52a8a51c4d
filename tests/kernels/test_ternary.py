"""TQ1_0 and TQ2_0: the bytes of ggml, at every SIMD level."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_quantize import kernels

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

TYPES = ("tq1_0", "tq2_0")


@pytest.mark.parametrize("qtype", TYPES)
@quickly
@given(case=cases(256))
def test_bytes_are_those_of_ggml(qtype: str, case: tuple[np.ndarray, np.ndarray | None]) -> None:
    assert_same_bytes(qtype, *case)


@pytest.mark.parametrize("qtype", TYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_row(qtype: str, kind: str) -> None:
    assert_same_bytes(qtype, make_rows(kind, 7, (9, 768)))


@pytest.mark.parametrize("qtype", TYPES)
def test_ternary_weights_survive_exactly(qtype: str) -> None:
    rng = np.random.default_rng(5)
    rows = (rng.integers(-1, 2, (20, 1024)) * 0.25).astype(np.float32)
    packed = assert_same_bytes(qtype, rows)
    np.testing.assert_array_equal(kernels.dequantize(qtype, packed, 1024), rows)


@pytest.mark.parametrize("qtype", TYPES)
def test_one_half_rounds_away_from_zero_and_its_neighbour_below_does_not(qtype: str) -> None:
    half = np.float32(0.5)
    rows = np.resize(np.array([half, -half, np.nextafter(half, np.float32(0)), 1, 0.1], np.float32), (1, 256))
    packed = assert_same_bytes(qtype, rows)
    assert kernels.dequantize(qtype, packed, 256)[0, :5].tolist() == [1, -1, 0, 1, 0]


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
def test_decoding_is_that_of_gguf(qtype: str, seed: int) -> None:
    packed = random_packed(qtype, seed, 3, 512)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[qtype.upper()])
        found = kernels.dequantize(qtype, packed, 512)
    assert_same_values(found, expected)
