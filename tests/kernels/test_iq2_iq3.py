"""IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS and IQ3_S: the bytes of ggml, at every SIMD level."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_quantize import kernels
from llm_quantize.qtypes import QTYPES

from ..oracles import ggml
from . import legacy_cases
from .codebook_cases import assert_levels_agree, importances
from .legacy_cases import (
    KINDS,
    assert_equal,
    assert_same_values,
    make_importance,
    make_rows,
)
from .weight_cases import cases

TYPES = ("iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s")
# ggml stops the process where errors or scales are not finite numbers any more.
STOPPING = ("huge", "overflowing squares", "mixed")
quickly = settings(max_examples=10, deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize("qtype", TYPES)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in STOPPING])
def test_every_kind_of_row(qtype: str, kind: str) -> None:
    rows = make_rows(kind, 7, (2, 512))
    for importance in importances(qtype, 512):
        assert_same_bytes(qtype, rows, importance)


@pytest.mark.parametrize("qtype", TYPES)
@pytest.mark.parametrize("kind", STOPPING)
def test_rows_at_which_ggml_may_stop(qtype: str, kind: str) -> None:
    """Its bytes where it goes on; elsewhere finite rows still give one answer, and decode to no NaN."""
    rows = make_rows(kind, 7, (2, 512))
    for importance in importances(qtype, 512)[:4]:
        found = assert_levels_agree(qtype, rows, importance)
        expected = ggml.quantize_or_stop(qtype, rows, importance)
        if expected is not None:
            assert_equal(found, expected, qtype)


@pytest.mark.parametrize("qtype", TYPES)
@pytest.mark.parametrize("scale", [1e-9, 3e-8, 1e-5, 1.0, 1e4, 1e8])
def test_every_size_of_weights(qtype: str, scale: float) -> None:
    rng = np.random.default_rng(3)
    rows = (rng.standard_t(4, (4, 768)) * scale * 10.0 ** rng.uniform(-2, 0, (4, 1))).astype(np.float32)
    assert_same_bytes(qtype, rows, make_importance("plain", 5, 768))
    if not QTYPES[qtype].needs_importance:
        assert_same_bytes(qtype, rows)


@pytest.mark.parametrize("qtype", TYPES)
@quickly
@given(case=cases(most_rows=6, most_superblocks=3))
def test_reference_and_levels_agree(qtype: str, case: tuple[np.ndarray, np.ndarray | None]) -> None:
    rows, importance = case
    if importance is None and QTYPES[qtype].needs_importance:
        importance = np.ones(rows.shape[1], np.float32)
    assert_levels_agree(qtype, rows, importance)


def assert_same_bytes(qtype: str, rows: np.ndarray, importance: np.ndarray | None = None) -> None:
    """ggml's bytes; of iq3_s, where ggml moves what follows a sub-block of zeros, less error than ggml instead."""
    zeros = (rows.reshape(-1, 8, 32) == 0).all(axis=2)
    moved = (zeros.any(axis=1) & ~zeros.all(axis=1)).reshape(len(rows), -1)
    if qtype != "iq3_s" or not moved.any():
        legacy_cases.assert_same_bytes(qtype, rows, importance)
        return
    found = assert_levels_agree(qtype, rows, importance)
    expected = ggml.quantize(qtype, rows, importance)
    shape = (len(rows), moved.shape[1], -1)
    np.testing.assert_array_equal(found.reshape(shape)[~moved], expected.reshape(shape)[~moved])
    ours, theirs = (
        (np.square(kernels.dequantize(qtype, packed, rows.shape[1]) - rows))
        .reshape(*moved.shape, 256)
        .sum(axis=2)[moved]
        for packed in (found, expected)
    )
    assert (ours <= theirs * 1.000001).all()
    assert ours.sum() < theirs.sum()


@pytest.mark.parametrize("qtype", TYPES)
def test_zeros_between_other_weights(qtype: str) -> None:
    """Sub-blocks of zeros, and weights just below the smallest maximum."""
    rows = make_rows("normal", 5, (6, 768)).reshape(6, -1, 16)
    rng = np.random.default_rng(8)
    rows[rng.random(rows.shape[:2]) < 0.4] = 0
    rows[5] *= np.float32(1e-7)
    rows[5, ::3] *= np.float32(1e-8)
    rows = rows.reshape(6, 768)
    assert ((rows.reshape(-1, 32) == 0).all(axis=1)).sum() > 10
    for importance in importances(qtype, 768):
        assert_same_bytes(qtype, rows, importance)


@pytest.mark.parametrize("qtype", TYPES)
def test_decoding_is_that_of_gguf(qtype: str) -> None:
    rng = np.random.default_rng(4)
    made = kernels.quantize(qtype, make_rows("heavy", 4, (5, 512)), make_importance("plain", 4, 512))
    packed = np.concatenate([made, rng.integers(0, 256, (200, made.shape[1]), dtype=np.uint8)])
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(packed, QTYPES[qtype].ggml_type)
        found = kernels.dequantize(qtype, packed, 512)
    assert_same_values(found, expected)


@pytest.mark.parametrize("qtype", TYPES)
@quickly
@given(seed=st.integers(0, 2**32 - 1))
def test_what_is_on_the_grid_stays(qtype: str, seed: int) -> None:
    """Decoded weights quantized again are nearly themselves: signs, entries and scales find their places again."""
    rng = np.random.default_rng(seed)
    importance = np.ones(512, np.float32)
    rows = kernels.dequantize(
        qtype, kernels.quantize(qtype, rng.standard_normal((4, 512)).astype(np.float32), importance), 512
    )
    again = kernels.dequantize(qtype, kernels.quantize(qtype, rows, importance), 512)
    error = ((again - rows) ** 2).sum() / (rows**2).sum()
    assert error < 0.02
