"""Codes of packed matrices between the layouts of files, without unpacking them; what they mean is in
``reference/repack.py``, the speed in ``native/repack.hpp``, the same words at every SIMD level.

N outputs (rows), K inputs (columns), b bits, least significant first; words are uint32:

    rows          (N, K b / 32)   codes dense along the inputs of a row; compressed-tensors, MLX
    inputs        (K b / 32, N)   the same words, turned; GPTQ
    interleaved   (K, N / 8)      4 bits, eight rows in a word, in AWQ's order
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from llm_quantize import kernels
from llm_quantize.kernels import _native

__all__ = ["INPUTS", "INTERLEAVED", "ROWS", "Room", "moved", "same"]

ROWS, INPUTS, INTERLEAVED = "rows", "inputs", "interleaved"
Words = npt.NDArray[np.uint32]


class Room:
    """Memory for the words of one matrix after the other: what it gave before is written over. Fresh memory costs as
    much as the work on it. For one thread."""

    def __init__(self) -> None:
        self._words = np.empty(0, np.uint32)

    def words(self, *shape: int) -> Words:
        """uint32 ``shape``, of any content."""
        size = math.prod(shape)
        if self._words.size < size:
            self._words = np.empty(0, np.uint32)  # given up first
            self._words = np.empty(size, np.uint32)
        return self._words[:size].reshape(shape)


def moved(words: Words, layout: str, wanted: str, room: Room | None = None) -> Words:
    """The codes of ``words``, in ``layout``, as ``wanted`` has them, in ``room`` if one is given; ``words`` themselves
    where that is the same. Both are C-contiguous. Releases the GIL. Raises ValueError for shapes that no whole matrix
    has."""
    if layout == wanted:
        return words
    room = Room() if room is None else room
    level, turned = kernels.simd_level(), INPUTS in (layout, wanted)
    if layout == INTERLEAVED:
        inputs, across = words.shape
        out = room.words(inputs // 8, 8 * across) if turned else room.words(8 * across, inputs // 8)
        _native.from_interleaved(level, words, turned, out)
    elif wanted == INTERLEAVED:
        inputs, rows = words.shape if turned else words.shape[::-1]
        if rows % 8:
            raise ValueError(f"{rows} rows are not whole words of 8")
        out = room.words(8 * inputs, rows // 8)
        _native.to_interleaved(level, words, turned, out)
    else:
        out = room.words(*words.shape[::-1])
        _native.turn_words(level, words, out)
    return out


def same(words: Words, layout: str, other: Words, its: str) -> bool:
    """Whether ``words``, in ``layout``, hold the very codes that ``other``, in the layout ``its``, holds: each is taken
    by its place in both, by no step that ``moved`` takes. Releases the GIL. Raises ValueError for shapes that are not
    of one matrix."""
    if layout == its:
        return np.array_equal(words, other)
    level = kernels.simd_level()
    if layout == INTERLEAVED:
        return _native.same_interleaved(level, words, its == INPUTS, other)
    if its == INTERLEAVED:
        return _native.same_interleaved(level, other, layout == INPUTS, words)
    return _native.same_turned(level, words, other)
