"""MXFP4 and NVFP4: the bytes of ggml, at every SIMD level."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_quantize import kernels
from llm_quantize.kernels.reference.mxfp4 import half_of_e4m3

from ..oracles import ggml
from .legacy_cases import (
    KINDS,
    assert_equal,
    assert_same_bytes,
    assert_same_values,
    cases,
    make_rows,
    quickly,
    random_packed,
)


@quickly
@given(case=cases(32))
def test_bytes_are_those_of_ggml(case: tuple[np.ndarray, np.ndarray | None]) -> None:
    assert_same_bytes("mxfp4", *case)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_row(kind: str) -> None:
    assert_same_bytes("mxfp4", make_rows(kind, 7, (9, 224)))


def test_scales_beside_every_power_of_two() -> None:
    """log2f rounds up to a whole number within some units in the last place below a power of two."""
    powers = np.ldexp(np.float32(1), np.arange(-149, 128)).astype(np.float32)
    bits = powers.view(np.uint32).astype(np.int64)[:, None] + np.arange(-128, 6)
    largest = np.clip(bits, 1, 0x7F7FFFFF).astype(np.uint32).view(np.float32).reshape(-1)
    largest = np.append(largest, np.finfo(np.float32).max)
    rows = largest[:, None] * np.linspace(-1, 1, 32, dtype=np.float32)
    assert_same_bytes("mxfp4", rows.astype(np.float32))


def test_values_on_and_beside_the_middle_of_two_levels() -> None:
    middles = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5], np.float32)
    near = np.concatenate([np.nextafter(middles, 0), middles, np.nextafter(middles, np.float32(9))])
    rows = np.zeros((20, 32), np.float32)
    rows[:, 1:22] = near * np.ldexp(np.float32(1), np.arange(-10, 10)).astype(np.float32)[:, None]
    rows[:, 0] = np.ldexp(np.float32(6), np.arange(-10, 10))
    rows[1::2] *= -1
    packed = assert_same_bytes("mxfp4", rows)
    assert (packed[:, 0] == np.arange(-10, 10) + 127).all()


def test_rows_are_independent_and_16_bit_rows_are_their_values() -> None:
    rows = make_rows("heavy", 3, (19, 160))
    whole = kernels.quantize("mxfp4", rows)
    for start, stop in ((0, 1), (1, 6), (6, 19)):
        assert_equal(kernels.quantize("mxfp4", rows[start:stop]), whole[start:stop], "split")
    half = rows.astype(np.float16)
    brain = (rows.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    wide = (brain.astype(np.uint32) << np.uint32(16)).view(np.float32)
    assert_equal(kernels.quantize("mxfp4", half), kernels.quantize("mxfp4", half.astype(np.float32)), "f16")
    assert_equal(kernels.quantize("mxfp4", brain), kernels.quantize("mxfp4", wide), "bf16")


@quickly
@given(seed=st.integers(0, 2**32 - 1))
def test_decoding_is_that_of_gguf(seed: int) -> None:
    packed = random_packed("mxfp4", seed, 3, 96)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.MXFP4)
        found = kernels.dequantize("mxfp4", packed, 96)
    assert_same_values(found, expected)


@quickly
@given(case=cases(64))
def test_nvfp4_bytes_are_those_of_ggml(case: tuple[np.ndarray, np.ndarray | None]) -> None:
    assert_same_bytes("nvfp4", *case)


@pytest.mark.parametrize("kind", KINDS)
def test_nvfp4_of_every_kind_of_row(kind: str) -> None:
    assert_same_bytes("nvfp4", make_rows(kind, 7, (9, 448)))


def test_nvfp4_scales_on_and_beside_every_step() -> None:
    """Halves up, subnormals, and 448 from 256 on; far beyond, where all distances are alike, the first level."""
    codes = np.arange(127, dtype=np.uint8)
    scales = 2 * half_of_e4m3(codes).astype(np.float64)
    middles = (scales[1:] + scales[:-1]) / 2
    largest = (6 * np.concatenate([scales, middles, [256, 300, 448, 449, 1e5, 1e8, 1e13, 1e30]])).astype(np.float32)
    largest = np.concatenate([largest, np.nextafter(largest, 0), np.nextafter(largest, np.float32(3e38))])
    rows = (largest[:, None] * np.linspace(-1, 1, 64, dtype=np.float32)).astype(np.float32)
    assert_same_bytes("nvfp4", rows)


def test_nvfp4_rows_are_independent() -> None:
    rows = make_rows("heavy", 3, (19, 192))
    whole = kernels.quantize("nvfp4", rows)
    for start, stop in ((0, 1), (1, 6), (6, 19)):
        assert_equal(kernels.quantize("nvfp4", rows[start:stop]), whole[start:stop], "split")


@quickly
@given(seed=st.integers(0, 2**32 - 1))
def test_nvfp4_decoding_is_that_of_ggml_and_gguf(seed: int) -> None:
    packed = random_packed("nvfp4", seed, 3, 192)
    found = kernels.dequantize("nvfp4", packed, 192)
    assert_same_values(found, ggml.dequantize("nvfp4", packed, 192))
    assert_same_values(found, gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.NVFP4).astype(np.float32))
