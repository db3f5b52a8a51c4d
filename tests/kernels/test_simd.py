"""The native module around the kernels: levels, 16-bit input, splits and threads, bounds, refusals."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings

from llm_quantize import kernels
from llm_quantize.errors import UsageError
from llm_quantize.kernels import _native, iq_grids, reference
from llm_quantize.qtypes import QTYPES

from .weight_cases import cases, make_importance, make_rows

EVERY_TYPE = sorted(QTYPES)


def importances(qtype, importance):
    """None and ``importance``, those of the two that the type takes."""
    row = QTYPES[qtype]
    return [None] * (not row.needs_importance) + [importance] * row.uses_importance


@pytest.fixture
def level():
    """Restores the level that a test changes."""
    before = kernels.simd_level()
    yield before
    kernels.set_simd_level(before)


def test_native_and_table_agree_on_every_type():
    expected = {(q.name, q.block_size, q.block_bytes) for q in QTYPES.values()}
    assert set(_native.qtypes()) == expected
    assert set(reference.QUANTIZE) == set(reference.DEQUANTIZE) == set(QTYPES)


@pytest.mark.parametrize("qtype", EVERY_TYPE)
@given(case=cases(most_rows=40))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_every_level_gives_the_same_bytes(qtype, case):
    rows, importance = case
    if importance is None and QTYPES[qtype].needs_importance:
        importance = np.ones(rows.shape[1], np.float32)
    used = importance if QTYPES[qtype].uses_importance else None
    results = []
    for name in kernels.simd_levels():
        out = np.zeros((len(rows), QTYPES[qtype].row_bytes(rows.shape[1])), np.uint8)
        _native.quantize(name, qtype, rows, used, out, iq_grids.native_codebook(qtype))
        results.append(out.tobytes())
    assert len(set(results)) == 1


@pytest.mark.parametrize("qtype", EVERY_TYPE)
def test_sixteen_bit_rows_are_their_float32_values(qtype):
    rows = make_rows("every-magnitude", 11, (150, 512))
    importance = make_importance("uniform", 11, 512)
    with np.errstate(over="ignore"):
        half = rows.astype(np.float16)
    half[~np.isfinite(half)] = 65504
    bfloat = (rows.view(np.uint32) >> 16).astype(np.uint16)
    for narrow, wide in (
        (half, half.astype(np.float32)),
        (bfloat, (bfloat.astype(np.uint32) << 16).view(np.float32)),
    ):
        np.testing.assert_array_equal(
            kernels.quantize(qtype, narrow, importance), kernels.quantize(qtype, wide, importance)
        )


def test_every_half_widens_exactly():
    bits = np.arange(2**16, dtype=np.uint16).reshape(64, 1024)
    half = bits.view(np.float16)
    for name in kernels.simd_levels():
        out = np.empty((64, 4096), np.uint8)
        _native.quantize(name, "f32", half, None, out)
        with np.errstate(invalid="ignore"):
            expected = half.astype(np.float32)
        ours = out.view(np.float32)
        np.testing.assert_array_equal(ours, expected)
        numbers = ~np.isnan(expected)
        np.testing.assert_array_equal(ours[numbers].view(np.uint32), expected[numbers].view(np.uint32))


@pytest.mark.parametrize("qtype", EVERY_TYPE)
def test_any_split_on_any_threads_gives_the_same_bytes(qtype):
    rows = make_rows("heavy", 4, (61, 96 if QTYPES[qtype].block_size <= 32 else 1280))
    importance = make_importance("heavy", 4, rows.shape[1])
    whole = kernels.quantize(qtype, rows, importance)
    for seed, threads in ((1, 1), (2, 2), (3, 7)):
        cuts = np.sort(np.random.default_rng(seed).integers(0, 62, 9))
        pieces = list(zip([0, *cuts], [*cuts, 61], strict=True))
        out = np.zeros_like(whole)
        with ThreadPoolExecutor(threads) as pool:
            jobs = [pool.submit(kernels.quantize, qtype, rows[a:b], importance, out=out[a:b]) for a, b in pieces]
            for job in jobs:
                job.result()
        np.testing.assert_array_equal(out, whole)


@pytest.mark.parametrize("name", _native.levels())
@pytest.mark.parametrize("qtype", EVERY_TYPE)
def test_no_values_lead_outside_of_the_arrays(qtype, name):
    """NaN, infinity and the largest floats end, and write each byte of their rows and no other."""
    columns, count = 768, 35
    rng = np.random.default_rng(8)
    specials = np.array([np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, 1e-45, 0, -0.0, 1], np.float32)
    x = rng.choice(specials, (count, columns))
    x[::3] = rng.integers(0, 2**32, (len(x[::3]), columns), dtype=np.uint32).view(np.float32)
    importance = rng.choice(np.array([np.nan, np.inf, -1, 0, 1, 1e38], np.float32), columns)
    size = QTYPES[qtype].row_bytes(columns)
    for weights in importances(qtype, importance):
        written = []
        for fill in (0xA5, 0x5A):
            arena = np.full((count + 8, size), fill, np.uint8)
            _native.quantize(name, qtype, x, weights, arena[4:-4], iq_grids.native_codebook(qtype))
            assert (arena[:4] == fill).all()
            assert (arena[-4:] == fill).all()
            written.append(arena[4:-4].copy())
        np.testing.assert_array_equal(*written)


def test_zero_rows():
    assert kernels.quantize("q4_k", np.zeros((0, 256), np.float32)).shape == (0, 144)
    assert kernels.dequantize("q4_k", np.zeros((0, 144), np.uint8), 256).shape == (0, 256)


def test_levels_are_chosen_by_name(level, monkeypatch):
    for name in kernels.simd_levels():
        kernels.set_simd_level(name)
        assert kernels.simd_level() == name
    with pytest.raises(UsageError, match="No such SIMD level"):
        kernels.set_simd_level("mmx")
    monkeypatch.setenv("LLM_QUANTIZE_SIMD", kernels.simd_levels()[0])
    assert kernels._first_level() == kernels.simd_levels()[0]
    monkeypatch.setenv("LLM_QUANTIZE_SIMD", "mmx")
    with pytest.raises(UsageError, match="LLM_QUANTIZE_SIMD"):
        kernels._first_level()


ROWS = np.zeros((2, 256), np.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("q9_z", ROWS), "No such type"),
        (("q4_k", ROWS.astype(np.float64)), "wrong form"),
        (("q4_k", ROWS[0]), "wrong form"),
        (("q4_k", np.zeros((2, 512), np.float32)[:, ::2]), "wrong form"),
        (("q4_k", np.zeros((2, 255), np.float32)), "cannot be stored"),
        (("q4_k", ROWS, np.ones(255, np.float32)), "importance"),
        (("q4_k", ROWS, np.ones(256)), "importance"),
        (("iq2_xs", ROWS), "needs an imatrix"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        kernels.quantize(*arguments)


@pytest.mark.parametrize(
    "out", [np.zeros((2, 143), np.uint8), np.zeros((2, 144), np.int8), np.zeros((2, 288), np.uint8)[:, ::2]]
)
def test_a_wrong_output_array_is_refused(out):
    with pytest.raises(UsageError, match="output array"):
        kernels.quantize("q4_k", ROWS, out=out)


def test_a_read_only_output_array_is_refused():
    out = np.zeros((2, 144), np.uint8)
    out.flags.writeable = False
    with pytest.raises(UsageError, match="output array"):
        kernels.quantize("q4_k", ROWS, out=out)


def test_the_native_module_checks_lengths_itself():
    level = kernels.simd_level()
    with pytest.raises(ValueError, match="out has the wrong shape"):
        _native.quantize(level, "q4_k", ROWS, None, np.zeros((2, 10), np.uint8))
    with pytest.raises(ValueError, match="importance"):
        _native.quantize(level, "q4_k", ROWS, np.ones(3, np.float32), np.zeros((2, 144), np.uint8))
    with pytest.raises(ValueError, match="multiple of the block"):
        _native.quantize(level, "q4_k", np.zeros((1, 100), np.float32), None, np.zeros((1, 1), np.uint8))
    with pytest.raises(ValueError, match="needs a codebook"):
        _native.quantize(level, "iq3_s", ROWS, None, np.zeros((2, 110), np.uint8))
    with pytest.raises(ValueError, match="float32, float16 or uint16"):
        _native.quantize(level, "q4_k", ROWS.astype(np.float64), None, np.zeros((2, 144), np.uint8))


def test_wrong_packed_rows_are_refused():
    with pytest.raises(UsageError, match="Packed rows"):
        kernels.dequantize("q4_k", np.zeros((1, 100), np.uint8), 256)
