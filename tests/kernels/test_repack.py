"""Codes between the layouts of packed matrices: the native steps against their meaning, at every SIMD level."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_quantize import kernels
from llm_quantize.kernels import repack
from llm_quantize.kernels.reference import repack as reference

from .legacy_cases import at_level, quickly

LAYOUTS = (repack.ROWS, repack.INPUTS, repack.INTERLEAVED)
SHAPES = ((8, 8), (8, 136), (40, 8), (128, 128), (136, 264), (264, 72), (1000, 248))  # whole tiles, and all remainders
LEVELS = kernels.simd_levels()


def drawn(rows: int, columns: int, bits: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << bits, (rows, columns), np.uint8)


def pairs(bits: int) -> Iterator[tuple[str, str]]:
    known = LAYOUTS if bits == 4 else LAYOUTS[:2]
    return ((one, other) for one in known for other in known)


def test_the_reference_is_its_own_inverse_and_what_files_hold() -> None:
    values = np.arange(16, dtype=np.uint8).reshape(8, 2).repeat(4, axis=1)
    for layout in LAYOUTS:
        assert np.array_equal(reference.codes(reference.words(values, layout, 4), layout, 4), values)
    order = reference.words(np.arange(8, dtype=np.uint8)[:, None].repeat(8, axis=1), repack.INTERLEAVED, 4)
    assert [hex(word) for word in order[:, 0]] == ["0x75316420"] * 8  # AWQ: 0, 2, 4, 6, 1, 3, 5, 7 from the low end
    row = reference.words(np.arange(8, dtype=np.uint8)[None], repack.ROWS, 4)
    assert [hex(word) for word in row[0]] == ["0x76543210"]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_are_those_of_the_reference(level: str, bits: int) -> None:
    with at_level(level):
        for seed, (rows, columns) in enumerate(SHAPES):
            if columns * bits % 32:
                continue
            values = drawn(rows, columns, bits, seed)
            for layout, wanted in pairs(bits):
                source, target = (reference.words(values, one, bits) for one in (layout, wanted))
                assert np.array_equal(repack.moved(source, layout, wanted), target), (rows, columns, layout, wanted)
                assert repack.same(source, layout, target, wanted)


@pytest.mark.parametrize("level", LEVELS)
@quickly
@given(st.sampled_from(list(pairs(4))), st.sampled_from(SHAPES), st.data())
def test_one_code_that_is_another_is_seen(
    level: str, pair: tuple[str, str], shape: tuple[int, int], data: st.DataObject
) -> None:
    values = drawn(*shape, 4, 1)
    source = reference.words(values, pair[0], 4)
    row, column = (data.draw(st.integers(0, size - 1)) for size in shape)
    values[row, column] ^= data.draw(st.integers(1, 15))
    with at_level(level):
        assert not repack.same(source, pair[0], reference.words(values, pair[1], 4), pair[1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_in_other_places_are_not_the_same(layout: str) -> None:
    """What moving would give if it took rows, inputs, or the places of a word for one another."""
    values = drawn(64, 64, 4, 3)
    words = reference.words(values, layout, 4)
    eights = values.reshape(8, 8, 64)
    wrong = (values.T, values[::-1], values[:, ::-1], eights[:, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(64, 64))
    for other in LAYOUTS:
        assert repack.same(words, layout, reference.words(values, other, 4), other)
        for moved in wrong:
            assert not repack.same(words, layout, reference.words(np.ascontiguousarray(moved), other, 4), other)


def test_a_room_is_used_again_whatever_the_size() -> None:
    room = repack.Room()
    for seed, (rows, columns) in enumerate(((40, 64), (8, 8), (264, 72), (16, 24))):
        words = reference.words(drawn(rows, columns, 4, seed), repack.INPUTS, 4)
        found = repack.moved(words, repack.INPUTS, repack.ROWS, room)
        assert np.array_equal(found, words.T)
        assert np.shares_memory(found, room.words(rows * columns // 8))


def test_shapes_that_are_of_no_matrix() -> None:
    words = np.zeros((16, 3), np.uint32)
    for call in (
        lambda: repack.same(words, repack.INPUTS, words, repack.ROWS),
        lambda: repack.same(words, repack.INTERLEAVED, words, repack.ROWS),
        lambda: repack.moved(np.zeros((12, 4), np.uint32), repack.INTERLEAVED, repack.ROWS),
        lambda: repack.moved(np.zeros((12, 4), np.uint32), repack.ROWS, repack.INTERLEAVED),
    ):
        with pytest.raises(ValueError, match=r"whole words|not of one matrix"):
            call()
    assert not repack.same(words, repack.ROWS, words[:8], repack.ROWS)


@pytest.mark.parametrize("level", LEVELS)
def test_every_float16_is_widened_as_numpy_does_it(level: str) -> None:
    halves = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16).view(np.float16)
    with at_level(level), np.errstate(invalid="ignore"):
        for values in (halves, halves.reshape(256, 256).T, halves[:0]):
            found = kernels.widened(values)
            assert (found.dtype, found.shape) == (np.float32, values.shape)
            assert np.array_equal(found.view(np.uint32), values.astype(np.float32, order="C").view(np.uint32))
