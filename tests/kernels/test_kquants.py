"""K-quants: native = reference = ggml, bit for bit; the decoder = gguf's own."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given, settings

from llm_quantize import kernels
from llm_quantize.kernels import reference
from llm_quantize.qtypes import QTYPES

from ..oracles import ggml
from .weight_cases import IMPORTANCE_KINDS, ROW_KINDS, cases, make_importance, make_rows

K_QUANTS = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")


def different_blocks(qtype: str, ours: np.ndarray, theirs: np.ndarray) -> list[int]:
    size = QTYPES[qtype].block_bytes
    return np.flatnonzero((ours.reshape(-1, size) != theirs.reshape(-1, size)).any(axis=1)).tolist()


@pytest.mark.parametrize("qtype", K_QUANTS)
@given(case=cases(most_rows=40))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_native_gives_ggml_bytes(qtype, case):
    rows, importance = case
    assert different_blocks(qtype, kernels.quantize(qtype, rows, importance), ggml.quantize(qtype, *case)) == []


@pytest.mark.parametrize("row_kind", ROW_KINDS)
@pytest.mark.parametrize("qtype", K_QUANTS)
def test_native_gives_ggml_bytes_for_each_kind(qtype, row_kind):
    rows = make_rows(row_kind, 7, (37, 768))
    for kind in IMPORTANCE_KINDS:
        importance = make_importance(kind, 7, 768)
        ours = kernels.quantize(qtype, rows, importance)
        assert different_blocks(qtype, ours, ggml.quantize(qtype, rows, importance)) == [], kind


@pytest.mark.parametrize("qtype", K_QUANTS)
@given(case=cases(most_rows=3, most_superblocks=2))
@settings(max_examples=12, deadline=None, derandomize=True)
def test_reference_gives_native_bytes(qtype, case):
    rows, importance = case
    native = kernels.quantize(qtype, rows, importance)
    assert different_blocks(qtype, reference.QUANTIZE[qtype](rows, importance), native) == []


@pytest.mark.parametrize("qtype", K_QUANTS)
@pytest.mark.parametrize("kind", ["extreme", "mostly-zero", "zero"])
def test_reference_gives_native_bytes_where_inverse_scales_overflow(qtype, kind):
    rows = make_rows("negative", 6, (24, 256))
    importance = make_importance(kind, 6, 256)
    native = kernels.quantize(qtype, rows, importance)
    assert different_blocks(qtype, reference.QUANTIZE[qtype](rows, importance), native) == []


@pytest.mark.parametrize("qtype", K_QUANTS)
def test_decoder_is_ggufs(qtype):
    columns = 1024
    rng = np.random.default_rng(3)
    shape = (50, QTYPES[qtype].row_bytes(columns))
    packed = rng.integers(0, 256, shape, dtype=np.uint8)  # any bytes at all, NaN and infinite scales too
    with np.errstate(all="ignore"):
        ours = kernels.dequantize(qtype, packed, columns)
        theirs = gguf.quants.dequantize(packed, QTYPES[qtype].ggml_type)
    assert ours.shape == (50, columns)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, theirs)
    finite = np.isfinite(theirs)
    np.testing.assert_array_equal(ours[finite].view(np.uint32), theirs[finite].view(np.uint32))


@pytest.mark.parametrize(
    ("qtype", "worst"), [("q2_k", 0.3), ("q3_k", 0.2), ("q4_k", 0.09), ("q5_k", 0.045), ("q6_k", 0.02)]
)
def test_decoded_weights_are_near(qtype, worst):
    rows = make_rows("normal", 1, (16, 2048))
    for importance in (None, make_importance("uniform", 1, 2048)):
        decoded = kernels.dequantize(qtype, kernels.quantize(qtype, rows, importance), 2048)
        assert np.linalg.norm(decoded - rows) < worst * np.linalg.norm(rows)


@pytest.mark.parametrize("qtype", K_QUANTS)
def test_an_imatrix_lowers_the_weighted_error(qtype):
    rows = make_rows("heavy", 2, (64, 1024))
    importance = make_importance("heavy", 2, 1024)

    def error(packed: np.ndarray) -> float:
        off = kernels.dequantize(qtype, packed, 1024) - rows
        return float((importance * off * off).sum())

    assert error(kernels.quantize(qtype, rows, importance)) < error(kernels.quantize(qtype, rows))
