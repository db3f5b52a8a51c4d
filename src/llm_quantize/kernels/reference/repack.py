"""The meaning of ``kernels.repack`` in plain numpy: codes taken out of one layout and put into another, one by one."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["codes", "words"]

Words = npt.NDArray[np.uint32]
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of the eight rows of a word of AWQ's


def codes(stored: Words, layout: str, bits: int) -> npt.NDArray[np.uint8]:
    """uint8 (N, K): the codes that ``stored`` holds in ``layout``."""
    if layout == "interleaved":
        apart = [(stored >> np.uint32(4 * place)) & np.uint32(15) for place in range(8)]
        rows = np.empty((stored.shape[1], 8, stored.shape[0]), np.uint8)
        for place, row in enumerate(_ORDER):
            rows[:, row] = apart[place].T
        return rows.reshape(-1, stored.shape[0])
    rows_of_words = stored.T if layout == "inputs" else stored
    each = (rows_of_words[:, :, None] >> np.arange(32, dtype=np.uint32)) & np.uint32(1)
    stream = each.reshape(len(rows_of_words), -1)
    count = stream.shape[1] // bits
    weights = np.uint32(1) << np.arange(bits, dtype=np.uint32)
    split = stream[:, : count * bits].reshape(-1, count, bits)
    found: npt.NDArray[np.uint8] = (split * weights).sum(axis=2).astype(np.uint8)
    return found


def words(values: npt.NDArray[np.uint8], layout: str, bits: int) -> Words:
    """uint32: ``values`` uint8 (N, K) in ``layout``; K times ``bits`` is whole words, and for AWQ's N too."""
    if layout == "interleaved":
        apart = values.reshape(-1, 8, values.shape[1]).astype(np.uint32)
        found = np.zeros((values.shape[1], len(apart)), np.uint32)
        for place, row in enumerate(_ORDER):
            found |= apart[:, row].T << np.uint32(4 * place)
        return found
    stream = (values[:, :, None] >> np.arange(bits, dtype=np.uint8)) & np.uint8(1)
    each = stream.reshape(len(values), -1, 32).astype(np.uint32) << np.arange(32, dtype=np.uint32)
    packed = each.sum(axis=2, dtype=np.uint32)
    return np.ascontiguousarray(packed.T) if layout == "inputs" else packed
