"""The bytes of ggml's codebook types, IQ1_S to IQ3_S: what the superblocks of each store, read and written.

Layouts are ggml's (ggml/src/ggml-common.h); ``ggml_words`` makes grids of what they store.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llm_quantize.kernels.reference.blocks import split_bytes
from llm_quantize.kernels.reference.iq2 import with_parity

__all__ = ["D_WITHIN", "READ", "WRITE", "Parts"]

Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Parts:
    """What B superblocks store. ``d`` float16 bits (B,); ``steps`` (B, 256 / weights of a u); ``entries`` (B, words or
    half words); ``signs`` (B, 32) bytes, bit i set where weight i of eight is negative; ``minus`` (B, groups): whether
    the weights of a group are moved down. None where the type has no such thing."""

    d: npt.NDArray[np.uint16]
    steps: Integers
    entries: Integers
    signs: Integers | None = None
    minus: Integers | None = None


def _half(part: Bytes) -> npt.NDArray[np.uint16]:
    return part.view("<u2").astype(np.uint16)[:, 0]


def _nibbles(part: Bytes) -> Integers:
    return np.stack([part & 15, part >> 4], axis=2).reshape(len(part), -1).astype(np.int64)


def _pairs(codes: Integers) -> Bytes:
    found: Bytes = (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8)
    return found


def _words(values: Integers, dtype: str) -> Bytes:
    return values.astype(dtype).view(np.uint8).reshape(len(values), -1)


def _fields(values: Integers, per: int, bits: int) -> Integers:
    """(B, n) as (B, n / per): ``per`` neighbours in one number, ``bits`` each, the first the lowest."""
    found: Integers = (values.reshape(len(values), -1, per) << bits * np.arange(per)).sum(axis=2)
    return found


def _spread(values: Integers, per: int, bits: int) -> Integers:
    """Undoes ``_fields``."""
    return (values[:, :, None] >> bits * np.arange(per) & ((1 << bits) - 1)).reshape(len(values), -1)


def _read_iq2_xxs(packed: Bytes) -> Parts:
    d, rest = split_bytes(packed, 2, 64)
    words = rest.view("<u4").astype(np.int64).reshape(-1, 8, 2)
    return Parts(
        _half(d), words[:, :, 1] >> 28, _spread(words[:, :, 0], 4, 8), with_parity(_spread(words[:, :, 1], 4, 7))
    )


def _write_iq2_xxs(parts: Parts, signs: Integers) -> list[Bytes]:
    upper = _fields(signs & 127, 4, 7) | parts.steps << 28
    return [_words(np.stack([_fields(parts.entries, 4, 8), upper], axis=2).reshape(-1, 16), "<u4")]


def _read_iq2_xs(packed: Bytes) -> Parts:
    d, rest, steps = split_bytes(packed, 2, 64, 8)
    words = rest.view("<u2").astype(np.int64)
    return Parts(_half(d), _nibbles(steps), words & 511, with_parity(words >> 9))


def _write_iq2_xs(parts: Parts, signs: Integers) -> list[Bytes]:
    return [_words(parts.entries | (signs & 127) << 9, "<u2"), _pairs(parts.steps)]


def _read_iq2_s(packed: Bytes) -> Parts:
    d, low, signs, high, steps = split_bytes(packed, 2, 32, 32, 8, 8)
    entries = low.astype(np.int64) | _spread(high.astype(np.int64), 4, 2) << 8
    return Parts(_half(d), _nibbles(steps), entries, signs.astype(np.int64))


def _write_iq2_s(parts: Parts, signs: Integers) -> list[Bytes]:
    high = _fields(parts.entries >> 8, 4, 2)
    return [*(part.astype(np.uint8) for part in (parts.entries & 255, signs, high)), _pairs(parts.steps)]


def _read_iq3_xxs(packed: Bytes) -> Parts:
    d, entries, rest = split_bytes(packed, 2, 64, 32)
    words = rest.view("<u4").astype(np.int64)
    return Parts(_half(d), words >> 28, entries.astype(np.int64), with_parity(_spread(words, 4, 7)))


def _write_iq3_xxs(parts: Parts, signs: Integers) -> list[Bytes]:
    return [parts.entries.astype(np.uint8), _words(_fields(signs & 127, 4, 7) | parts.steps << 28, "<u4")]


def _read_iq3_s(packed: Bytes) -> Parts:
    d, low, high, signs, steps = split_bytes(packed, 2, 64, 8, 32, 4)
    entries = low.astype(np.int64) | _spread(high.astype(np.int64), 8, 1) << 8
    return Parts(_half(d), _nibbles(steps), entries, signs.astype(np.int64))


def _write_iq3_s(parts: Parts, signs: Integers) -> list[Bytes]:
    high = _fields(parts.entries >> 8, 8, 1)
    return [*(part.astype(np.uint8) for part in (parts.entries & 255, high, signs)), _pairs(parts.steps)]


def _read_iq1_s(packed: Bytes) -> Parts:
    d, low, high = split_bytes(packed, 2, 32, 16)
    words = high.view("<u2").astype(np.int64)
    entries = low.astype(np.int64) | _spread(words & 0xFFF, 4, 3) << 8
    return Parts(_half(d), words >> 12 & 7, entries, minus=words >> 15)


def _write_iq1_s(parts: Parts, minus: Integers) -> list[Bytes]:
    words = _fields(parts.entries >> 8, 4, 3) | parts.steps << 12 | minus << 15
    return [(parts.entries & 255).astype(np.uint8), _words(words, "<u2")]


def _read_iq1_m(packed: Bytes) -> Parts:
    low, high, tail = split_bytes(packed, 32, 16, 8)
    words, nibbles = tail.view("<u2").astype(np.int64), _nibbles(high)
    d = (words >> 12 << np.arange(0, 16, 4)).sum(axis=1).astype(np.uint16)
    return Parts(d, _spread(words & 0xFFF, 4, 3), low.astype(np.int64) | (nibbles & 7) << 8, minus=nibbles >> 3)


def _write_iq1_m(parts: Parts, minus: Integers) -> list[Bytes]:
    words = _fields(parts.steps, 4, 3) | (parts.d.astype(np.int64)[:, None] >> np.arange(0, 16, 4) & 15) << 12
    return [(parts.entries & 255).astype(np.uint8), _pairs(parts.entries >> 8 | minus << 3), _words(words, "<u2")]


READ = {
    **{"iq2_xxs": _read_iq2_xxs, "iq2_xs": _read_iq2_xs, "iq2_s": _read_iq2_s},
    **{"iq3_xxs": _read_iq3_xxs, "iq3_s": _read_iq3_s, "iq1_s": _read_iq1_s, "iq1_m": _read_iq1_m},
}
WRITE = {
    **{"iq2_xxs": _write_iq2_xxs, "iq2_xs": _write_iq2_xs, "iq2_s": _write_iq2_s},
    **{"iq3_xxs": _write_iq3_xxs, "iq3_s": _write_iq3_s, "iq1_s": _write_iq1_s, "iq1_m": _write_iq1_m},
}
D_WITHIN = frozenset({"iq1_m"})  # d stands among the words; elsewhere it is the first two bytes
