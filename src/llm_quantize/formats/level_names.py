"""Levels as users name them: in any case, or by a number of bits; a wrong one is answered with the nearest."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping

from llm_quantize.errors import UsageError, printable

FLOATS: Mapping[str, str] = {
    **dict.fromkeys(("FP16", "FLOAT16", "HALF"), "F16"),
    **dict.fromkeys(("BFLOAT16",), "BF16"),
    **dict.fromkeys(("FP32", "FLOAT32", "FLOAT"), "F32"),
}
"""What others call plain types."""

_BITS = re.compile(r"(?:INT|W)?(\d{1,2})_?(?:BITS?)?")


def known_level(
    text: str, form: str, levels: Collection[str], *, usual: Mapping[int, str], others: Mapping[str, str] | None = None
) -> str:
    """The one of ``levels`` that ``text`` means. ``usual``: {bits: the level that people mean by them}; ``others``:
    further names, in upper case. Raises UsageError, which lists the levels and names the nearest."""
    wanted = re.sub(r"[\s.-]+", "_", text.strip()).upper()
    names = {**(others or {}), **{name.upper(): name for name in levels}}
    if wanted in names:
        return names[wanted]
    bits = _BITS.fullmatch(wanted)
    if bits and int(bits[1]) in usual:
        return usual[int(bits[1])]
    near = list(dict.fromkeys(names[name] for name in difflib.get_close_matches(wanted, names, n=4, cutoff=0.5)))
    raise UsageError(
        f"there is no {form} level {printable(text, 40)!r}",
        expected=("one of " if len(levels) > 1 else "") + ", ".join(levels),
        found=printable(text, 40),
        remedy=f"did you mean {' or '.join(near[:3])}?" if near else "take one of these",
    )
