"""Q8_0, Q4_0, Q4_1, Q5_0, Q5_1: the bytes of ggml, at every SIMD level."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_quantize import kernels

from .legacy_cases import (
    IMPORTANCE,
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

TYPES = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1")


@pytest.mark.parametrize("qtype", TYPES)
@quickly
@given(case=cases(32))
def test_bytes_are_those_of_ggml(qtype: str, case: tuple[np.ndarray, np.ndarray | None]) -> None:
    assert_same_bytes(qtype, *case)


@pytest.mark.parametrize("qtype", TYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_row(qtype: str, kind: str) -> None:
    rows = make_rows(kind, 7, (5, 224))
    for importance in IMPORTANCE:
        assert_same_bytes(qtype, rows, make_importance(importance, 11, 224))


@pytest.mark.parametrize("qtype", ["q4_0", "q5_0"])
def test_of_two_equal_magnitudes_the_first_gives_the_sign(qtype: str) -> None:
    rows = np.zeros((32, 32), np.float32)
    for i in range(31):
        rows[i, i], rows[i, i + 1] = (1, -1) if i % 2 else (-1, 1)
    packed = assert_same_bytes(qtype, rows)
    scales = np.ascontiguousarray(packed[:31, :2]).view(np.float16)[:, 0]
    assert (np.sign(scales) == np.where(np.arange(31) % 2, -1, 1)).all()


@pytest.mark.parametrize("qtype", ["q4_1", "q5_1"])
def test_of_two_zeros_the_first_is_the_minimum(qtype: str) -> None:
    rows = np.zeros((4, 32), np.float32)
    rows[0, 3:], rows[1, 0], rows[2, :] = -0.0, -0.0, -0.0
    rows[3, ::2] = 0.5
    packed = assert_same_bytes(qtype, rows)
    assert packed[:, 3].tolist() == [0, 128, 128, 0]  # the sign of the stored minimum


def test_halves_round_away_from_zero_in_q8_0_and_their_neighbours_below_do_not() -> None:
    halves = (np.arange(-127, 129, dtype=np.float32).reshape(8, 32) + np.float32(0.5)).clip(-126.5, 126.5)
    below = np.nextafter(halves, np.float32(0))
    for rows in (halves, below):
        rows[:, 0] = 127  # the scale is 1
    codes = assert_same_bytes("q8_0", np.concatenate([halves, below]))[:, 2:].view(np.int8)
    assert (codes[:8, 1:] == np.trunc(halves + np.copysign(np.float32(0.5), halves))[:, 1:]).all()
    assert (codes[8:, 1:] == np.trunc(halves)[:, 1:]).all()


@pytest.mark.parametrize("qtype", TYPES)
def test_rows_are_independent_and_out_is_filled(qtype: str) -> None:
    rows, importance = make_rows("heavy", 3, (23, 96)), make_importance("plain", 3, 96)
    whole = kernels.quantize(qtype, rows, importance)
    for start, stop in ((0, 1), (1, 7), (7, 23)):
        out = np.full_like(whole[start:stop], 0xA5)
        assert kernels.quantize(qtype, rows[start:stop], importance, out=out) is out
        assert_equal(out, whole[start:stop], f"rows {start} to {stop}")


@pytest.mark.parametrize("qtype", TYPES)
@quickly
@given(seed=st.integers(0, 2**32 - 1), importance=st.sampled_from(["none", "plain"]))
def test_16_bit_rows_are_their_float32_values(qtype: str, seed: int, importance: str) -> None:
    rows = make_rows("heavy", seed, (3, 160))
    weights = make_importance(importance, seed, 160)
    half = rows.astype(np.float16)
    brain = (rows.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    wide = (brain.astype(np.uint32) << np.uint32(16)).view(np.float32)
    assert_equal(kernels.quantize(qtype, half, weights), kernels.quantize(qtype, half.astype(np.float32), weights), "")
    assert_equal(kernels.quantize(qtype, brain, weights), kernels.quantize(qtype, wide, weights), "")


@pytest.mark.parametrize("qtype", TYPES)
@quickly
@given(seed=st.integers(0, 2**32 - 1))
def test_decoding_is_that_of_gguf(qtype: str, seed: int) -> None:
    packed = random_packed(qtype, seed, 3, 96)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[qtype.upper()])
        found = kernels.dequantize(qtype, packed, 96)
    assert_same_values(found, expected)
