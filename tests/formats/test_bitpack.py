"""Dense packing, against one value at a time in Python's whole numbers, and against AutoGPTQ's layout of 3 bits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_quantize.formats.bitpack import pack_bits, packed_words, unpack_bits


def stream(values: list[int], bits: int) -> list[int]:
    """The words of one row: the whole row as one number, cut in pieces of 32 bits, as signed numbers."""
    number = sum(value << (bits * index) for index, value in enumerate(values))
    words = [number >> (32 * word) & 0xFFFFFFFF for word in range(-(-len(values) * bits // 32))]
    return [word - (1 << 32) if word >> 31 else word for word in words]


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(1, 8),
    rows=st.integers(1, 5),
    columns=st.integers(1, 100),
    axis=st.integers(0, 1),
    seed=st.integers(0, 99),
)
def test_every_width_packs_as_a_bit_stream(bits: int, rows: int, columns: int, axis: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, columns)).astype(np.uint8)
    words = pack_bits(codes, bits, axis)
    assert words.dtype == np.int32
    assert words.flags.c_contiguous
    lines = codes if axis == 1 else codes.T
    found = words if axis == 1 else words.T
    assert found.tolist() == [stream(line.tolist(), bits) for line in lines]
    back = unpack_bits(words, bits, codes.shape[axis], axis)
    assert back.dtype == np.uint8
    assert np.array_equal(back, codes)


def test_three_bits_cross_words_where_gptq_splits_them() -> None:
    """Word A: values 0..9 and the two low bits of value 10; B: its top bit, 11..20, the low bit of 21; C: the rest."""
    values = (np.arange(32) * 5 % 8).tolist()
    a = sum(values[i] << 3 * i for i in range(10)) | (values[10] & 3) << 30
    b = values[10] >> 2 | sum(values[i] << 3 * (i - 11) + 1 for i in range(11, 21)) | (values[21] & 1) << 31
    c = values[21] >> 1 | sum(values[i] << 3 * (i - 22) + 2 for i in range(22, 32))
    packed = pack_bits(np.array([values], np.uint8).T.copy(), 3, 0)
    assert packed.view(np.uint32)[:, 0].tolist() == [a, b, c]


def test_words_and_misuse() -> None:
    assert [packed_words(count, 3) for count in (0, 1, 10, 11, 32, 33)] == [0, 1, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="code 4 does not fit 2 bits"):
        pack_bits(np.full((2, 2), 4, np.uint8), 2, 1)
    with pytest.raises(ValueError, match="2 words for 33 values"):
        unpack_bits(np.zeros((2, 2), np.int32), 3, 33, 0)
    with pytest.raises(ValueError, match="1 dimensions"):
        pack_bits(np.zeros(4, np.uint8), 4, 0)
    with pytest.raises(ValueError, match="9 bits"):
        pack_bits(np.zeros((4, 4), np.uint8), 9, 0)
