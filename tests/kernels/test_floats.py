"""F32, F16 and BF16: ggml's rounding for every kind of number, and the search for non-finite values."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_quantize import kernels
from llm_quantize.errors import UsageError
from llm_quantize.kernels.reference import floats

from .legacy_cases import (
    KINDS,
    assert_equal,
    assert_same_bytes,
    assert_same_values,
    at_level,
    cases,
    make_rows,
    quickly,
)

TYPES = ("f32", "f16", "bf16")


@pytest.mark.parametrize("qtype", TYPES)
@quickly
@given(case=cases(1))
def test_bytes_are_those_of_ggml(qtype: str, case: tuple[np.ndarray, np.ndarray | None]) -> None:
    assert_same_bytes(qtype, *case)


@pytest.mark.parametrize("qtype", TYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_row(qtype: str, kind: str) -> None:
    assert_same_bytes(qtype, make_rows(kind, 7, (3, 61)))


@pytest.mark.parametrize("qtype", TYPES)
@pytest.mark.parametrize("low", [0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_every_upper_half_of_a_float(qtype: str, low: int) -> None:
    """All signs, exponents, NaNs and upper mantissas, with lower mantissas on and beside the ties of both types."""
    bits = (np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)) + np.uint32(low)
    assert_same_bytes(qtype, bits.view(np.float32).reshape(16, -1))


def test_every_tie_of_float16() -> None:
    """Half way between each two neighbours of float16, and the floats beside it."""
    values = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    ties = (values[:-1] + values[1:]) / 2
    rows = np.concatenate([np.nextafter(ties, np.float32(0)), ties, np.nextafter(ties, np.float32(1e9)), -ties])
    assert_same_bytes("f16", rows[None])


@pytest.mark.parametrize(("qtype", "dtype"), [("f16", np.float16), ("bf16", np.uint16)])
def test_values_of_the_target_type_pass_through(qtype: str, dtype: type) -> None:
    """Not even the payload of a NaN changes."""
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype).reshape(64, -1)
    out = np.zeros((64, 2048), np.uint8)
    assert kernels.quantize(qtype, every, out=out) is out
    assert_equal(out, every.view(np.uint8), qtype)


def test_16_bit_values_to_other_types_go_through_float32() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).reshape(64, -1)
    brain = (every.astype(np.uint32) << np.uint32(16)).view(np.float32)
    half = every.view(np.float16).astype(np.float32)
    for level in kernels.simd_levels():
        with at_level(level):
            assert_equal(kernels.quantize("f16", every), kernels.quantize("f16", brain), "bf16 to f16")
            assert_equal(kernels.quantize("f32", every), brain.view(np.uint8), "bf16 to f32")
            numbers = ~np.isnan(half)
            widened = kernels.quantize("f32", every.view(np.float16)).view(np.float32)
            np.testing.assert_array_equal(widened[numbers], half[numbers])
            np.testing.assert_array_equal(np.isnan(widened), ~numbers)


@pytest.mark.parametrize("qtype", TYPES)
def test_decoding_is_that_of_gguf(qtype: str) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(64, -1)
    packed = bits.view(np.uint8)
    columns = packed.shape[1] // (4 if qtype == "f32" else 2)
    if qtype == "bf16":
        expected = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.BF16)
    else:
        expected = packed.view(np.float16 if qtype == "f16" else np.float32).astype(np.float32)
    assert_same_values(kernels.dequantize(qtype, packed, columns), expected)


def _as_stored(rows: np.ndarray, dtype: type) -> np.ndarray:
    return floats.bfloat16_bits(rows) if dtype is np.uint16 else rows.astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16])
@quickly
@given(
    size=st.integers(0, 9000),
    bad=st.lists(st.tuples(st.integers(0, 8999), st.sampled_from([np.inf, -np.inf, np.nan])), max_size=5),
)
def test_scan_finds_what_numpy_finds(dtype: type, size: int, bad: list[tuple[int, float]]) -> None:
    rows = make_rows("normal", size, (1, 9000))[0, :size]
    for place, value in bad:
        if place < size:
            rows[place] = value
    stored = _as_stored(rows, dtype)
    places = sorted({place for place, _ in bad if place < size})
    expected = (len(places), places[0] if places else -1)
    assert floats.scan_nonfinite(stored) == expected
    for level in kernels.simd_levels():
        with at_level(level):
            assert kernels.scan_nonfinite(stored) == expected


@pytest.mark.parametrize("dtype", [np.float16, np.uint16])
def test_scan_of_every_16_bit_value(dtype: type) -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype).reshape(256, 256)
    found = kernels.scan_nonfinite(every)
    assert found == floats.scan_nonfinite(every)
    assert found == ((2048, 0x7C00) if dtype is np.float16 else (256, 0x7F80))


def test_scan_takes_subnormals_and_the_largest_value_as_finite() -> None:
    largest = np.finfo(np.float32).max
    assert kernels.scan_nonfinite(np.array([[1e-45, -0.0], [largest, -largest]], np.float32)) == (0, -1)


@pytest.mark.parametrize("rows", [np.zeros((2, 4), np.float64), np.zeros((4, 4), np.float32)[:, ::2]])
def test_scan_refuses_other_arrays(rows: np.ndarray) -> None:
    with pytest.raises(UsageError, match="wrong form"):
        kernels.scan_nonfinite(rows)
