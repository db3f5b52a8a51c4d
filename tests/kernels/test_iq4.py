"""IQ4_NL and IQ4_XS: the bytes of ggml, at every SIMD level."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_quantize import kernels
from llm_quantize.kernels.reference import iq4

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


@quickly
@given(case=cases(32))
def test_iq4_nl_has_the_bytes_of_ggml(case: tuple[np.ndarray, np.ndarray | None]) -> None:
    assert_same_bytes("iq4_nl", *case)


@quickly
@given(case=cases(256))
def test_iq4_xs_has_the_bytes_of_ggml(case: tuple[np.ndarray, np.ndarray | None]) -> None:
    assert_same_bytes("iq4_xs", *case)


@pytest.mark.parametrize("qtype", ["iq4_nl", "iq4_xs"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_row(qtype: str, kind: str) -> None:
    rows = make_rows(kind, 7, (3, 768))
    for importance in IMPORTANCE:
        assert_same_bytes(qtype, rows, make_importance(importance, 11, 768))


def test_values_on_and_beside_the_middle_of_two_levels() -> None:
    """Both outer levels are in the block and no other weight counts: the scale is 1, and codes fall on the middles."""
    levels = iq4.LEVELS
    middles = (levels[:-1] + levels[1:]) / 2
    near = np.concatenate([np.nextafter(middles, -np.inf), middles, np.nextafter(middles, np.inf), levels])
    rows = np.zeros((4, 32), np.float32)
    rows[:, 2:] = np.resize(near, (4, 30))
    rows[:, :2] = levels[0], levels[-1]
    importance = np.zeros(32, np.float32)
    importance[:2] = 1
    assert_same_bytes("iq4_nl", rows)
    packed = assert_same_bytes("iq4_nl", rows, importance)
    assert np.ascontiguousarray(packed[:, :2]).view(np.float16).tolist() == [[1.0]] * 4
    codes = np.concatenate([packed[:, 2:] & 15, packed[:, 2:] >> 4], axis=1)
    assert (np.abs(rows - levels[codes]) <= np.abs(rows[:, :, None] - levels).min(axis=2)).all()
    assert codes[0, 2 + 15 : 2 + 30].tolist() == list(range(1, 16))  # on a middle: the upper level


@pytest.mark.parametrize("qtype", ["iq4_nl", "iq4_xs"])
def test_rows_are_independent_and_16_bit_rows_are_their_values(qtype: str) -> None:
    rows, importance = make_rows("heavy", 3, (11, 512)), make_importance("plain", 3, 512)
    half = rows.astype(np.float16)
    brain = (rows.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    wide = (brain.astype(np.uint32) << np.uint32(16)).view(np.float32)
    for weights in (importance, None):
        whole = kernels.quantize(qtype, rows, weights)
        for start, stop in ((0, 1), (1, 6), (6, 11)):
            assert_equal(kernels.quantize(qtype, rows[start:stop], weights), whole[start:stop], "split")
        assert_equal(
            kernels.quantize(qtype, half, weights), kernels.quantize(qtype, half.astype(np.float32), weights), "f16"
        )
        assert_equal(kernels.quantize(qtype, brain, weights), kernels.quantize(qtype, wide, weights), "bf16")


@pytest.mark.parametrize("qtype", ["iq4_nl", "iq4_xs"])
@quickly
@given(seed=st.integers(0, 2**32 - 1))
def test_decoding_is_that_of_gguf(qtype: str, seed: int) -> None:
    packed = random_packed(qtype, seed, 3, 512)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[qtype.upper()])
        found = kernels.dequantize(qtype, packed, 512)
    assert_same_values(found, expected)
