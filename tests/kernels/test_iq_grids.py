"""The codebooks of the I-quants: the native one is the numpy one, which is what ggml's rule says."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from llm_quantize.kernels import _native, iq_grids

SIZES = {"iq2_xxs": 256, "iq2_xs": 512, "iq2_s": 1024, "iq3_xxs": 256, "iq3_s": 512, "iq1_s": 2048, "iq1_m": 2048}


def test_every_codebook_type_has_a_known_grid() -> None:
    assert set(iq_grids.WANTED) == set(SIZES)


@pytest.mark.parametrize("qtype", sorted(SIZES))
def test_the_native_codebook_is_the_numpy_one(qtype: str) -> None:
    book = iq_grids.codebook(qtype)
    assert book.codes.shape == (SIZES[qtype], 4 if qtype.startswith("iq3") else 8)
    native = iq_grids.native_codebook(qtype)
    assert native is not None
    index, start, words = (np.array(part) for part in native.arrays())
    np.testing.assert_array_equal(index, book.index)
    np.testing.assert_array_equal(start, book.start)
    bits = 2 if book.levels == 3 else 3
    field = bits * np.arange(book.codes.shape[1])
    np.testing.assert_array_equal(words, (book.codes[book.neighbours] << field).sum(axis=1))


@pytest.mark.parametrize("qtype", sorted(SIZES))
def test_entries_are_distinct_and_neighbours_are_nearest_first(qtype: str) -> None:
    book = iq_grids.codebook(qtype)
    points = book.points(book.codes)
    assert len(set(points.tolist())) == len(points)
    np.testing.assert_array_equal(book.index[points], np.arange(len(points)))
    digits = np.arange(len(book.index))[:, None] // book.levels ** np.arange(book.codes.shape[1]) % book.levels
    rng = np.random.default_rng(7)
    for point in rng.choice(np.flatnonzero(book.index < 0), 50, replace=False):
        distance = ((book.codes - digits[point]) ** 2).sum(axis=1)
        order = np.lexsort((np.arange(len(distance)), distance))
        found = book.neighbours[book.start[point] : book.start[point + 1]]
        np.testing.assert_array_equal(found, order[: len(found)])
        assert len(set(distance[found].tolist())) == iq_grids.WANTED[qtype]
        assert distance[order[len(found)]] > distance[found[-1]]


def test_threads_share_one_codebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iq_grids, "_native_books", {})
    with ThreadPoolExecutor(8) as pool:
        books = list(pool.map(lambda _: iq_grids.native_codebook("iq3_s"), range(32)))
    assert len({id(book) for book in books}) == 1
    assert iq_grids.native_codebook("q4_k") is None


@pytest.mark.parametrize(
    ("codes", "levels", "wanted", "message"),
    [
        (np.zeros((4, 5), np.uint8), 3, 2, "8 codes of 3 levels"),
        (np.zeros((4, 8), np.uint8), 8, 2, "8 codes of 3 levels"),
        (np.full((4, 8), 3, np.uint8), 3, 2, "below the number of levels"),
        (np.zeros((0, 8), np.uint8), 3, 2, "entries"),
        (np.zeros((4, 8), np.uint8), 3, 0, "entries"),
    ],
)
def test_a_grid_of_the_wrong_form_is_refused(codes: np.ndarray, levels: int, wanted: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _native.Codebook(codes, levels, wanted)
