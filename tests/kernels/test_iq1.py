"""IQ1_S and IQ1_M: the bytes of ggml, at every SIMD level."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given, settings

from llm_quantize import kernels
from llm_quantize.errors import UsageError
from llm_quantize.kernels import iq_grids, reference
from llm_quantize.kernels.reference import iq1
from llm_quantize.qtypes import QTYPES

from ..oracles import ggml
from .codebook_cases import assert_levels_agree, importances
from .legacy_cases import (
    KINDS,
    assert_equal,
    assert_same_bytes,
    assert_same_values,
    at_level,
    make_importance,
    make_rows,
)
from .weight_cases import cases

TYPES = ("iq1_s", "iq1_m")
# ggml stops the process where errors or scales are not finite numbers any more.
STOPPING = ("huge", "overflowing squares", "mixed")
quickly = settings(max_examples=10, deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize("qtype", TYPES)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in STOPPING])
def test_every_kind_of_row(qtype: str, kind: str) -> None:
    rows = make_rows(kind, 7, (3, 768))
    for importance in importances(qtype, 768):
        assert_same_bytes(qtype, rows, importance)


@pytest.mark.parametrize("qtype", TYPES)
@pytest.mark.parametrize("kind", STOPPING)
def test_rows_at_which_ggml_may_stop(qtype: str, kind: str) -> None:
    """Its bytes where it goes on; elsewhere finite rows still give one answer."""
    rows = make_rows(kind, 7, (2, 512))
    for importance in importances(qtype, 512)[:4]:
        found = assert_levels_agree(qtype, rows, importance)
        expected = ggml.quantize_or_stop(qtype, rows, importance)
        if expected is not None:
            assert_equal(found, expected, qtype)


@pytest.mark.parametrize("qtype", TYPES)
@pytest.mark.parametrize("scale", [1e-12, 1e-7, 1e-5, 1.0, 1e4, 1e9])
def test_every_size_of_weights(qtype: str, scale: float) -> None:
    """Also around the smallest maximum of a block, 1e-12 and 1e-7, below which it is taken for zeros."""
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


@pytest.mark.parametrize("qtype", TYPES)
def test_equal_weights_keep_their_order(qtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where equal weights differ in importance, their order decides what a cut between them takes."""
    rng = np.random.default_rng(9)
    rows = rng.choice(np.array([-1, -0.5, -0.0, 0.0, 0.5, 1], np.float32), (40, 512))
    importance = (10.0 ** rng.uniform(-3, 3, 512)).astype(np.float32)
    expected = assert_same_bytes(qtype, rows, importance)

    def last_first(x: np.ndarray) -> np.ndarray:
        return x.shape[1] - 1 - x[:, ::-1].argsort(axis=1, kind="stable")

    monkeypatch.setattr(iq1, "_ascending", last_first)
    assert (reference.QUANTIZE[qtype](rows, importance) != expected).any()


@pytest.mark.parametrize("qtype", TYPES)
def test_zeros_between_other_weights(qtype: str) -> None:
    """Blocks of zeros and blocks without importance take the first entry, with the smallest step."""
    rows = make_rows("normal", 5, (6, 768)).reshape(6, -1, 16)
    rng = np.random.default_rng(8)
    rows[rng.random(rows.shape[:2]) < 0.4] = 0
    rows = rows.reshape(6, 768)
    assert ((rows.reshape(-1, 32) == 0).all(axis=1)).sum() > 10
    for importance in importances(qtype, 768):
        assert_same_bytes(qtype, rows, importance)
    some = make_importance("plain", 3, 768)
    assert some is not None
    some[32:128] = 0
    assert_same_bytes(qtype, rows, some)


@pytest.mark.parametrize("qtype", TYPES)
def test_many_blocks_and_every_way_off_the_grid(qtype: str) -> None:
    """Enough rows for several batches, and most points that are not on the grid."""
    rows, importance = make_rows("heavy", 1, (24, 2048)), make_importance("plain", 1, 2048)
    expected = ggml.quantize(qtype, rows, importance)
    for level in kernels.simd_levels():
        with at_level(level):
            assert_equal(kernels.quantize(qtype, rows, importance), expected, level)
    assert_equal(reference.QUANTIZE[qtype](rows[:4], importance), expected[:4], "reference")


def test_iq1_s_needs_importance() -> None:
    with pytest.raises(UsageError, match="needs an imatrix"):
        kernels.quantize("iq1_s", np.ones((1, 256), np.float32))


@pytest.mark.parametrize("qtype", TYPES)
def test_rows_are_independent_and_16_bit_rows_are_their_values(qtype: str) -> None:
    rows, importance = make_rows("heavy", 3, (11, 512)), make_importance("plain", 3, 512)
    half = rows.astype(np.float16)
    whole = kernels.quantize(qtype, rows, importance)
    for start, stop in ((0, 1), (1, 6), (6, 11)):
        assert_equal(kernels.quantize(qtype, rows[start:stop], importance), whole[start:stop], "split")
    assert_equal(
        kernels.quantize(qtype, half, importance), kernels.quantize(qtype, half.astype(np.float32), importance), "f16"
    )


@pytest.mark.parametrize("qtype", TYPES)
def test_decoding_is_that_of_gguf(qtype: str) -> None:
    rng = np.random.default_rng(4)
    made = kernels.quantize(qtype, make_rows("heavy", 4, (5, 512)), make_importance("plain", 4, 512))
    packed = np.concatenate([made, rng.integers(0, 256, (200, made.shape[1]), dtype=np.uint8)])
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(packed, QTYPES[qtype].ggml_type)
        found = kernels.dequantize(qtype, packed, 512)
    assert_same_values(found, expected)


def test_both_types_share_one_grid() -> None:
    codes = [iq_grids.codebook(qtype).codes for qtype in TYPES]
    np.testing.assert_array_equal(*codes)
