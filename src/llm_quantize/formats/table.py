"""The formats by the names that users give. A format is a row here and a file (or a folder) beside this one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from llm_quantize.errors import UnsupportedError, printable
from llm_quantize.formats.base import Format
from llm_quantize.formats.ctranslate2.format import CTranslate2
from llm_quantize.formats.gguf.plan import Gguf
from llm_quantize.formats.packed_directory import PackedFormat
from llm_quantize.formats.packed_formats import PACKED
from llm_quantize.formats.safetensors import Safetensors

FORMATS: Mapping[str, Format] = {
    Gguf.name: Gguf(),
    **{name: PackedFormat(form) for name, form in PACKED.items()},
    CTranslate2.name: CTranslate2(),
    Safetensors.name: Safetensors(),
}

ACT_ORDER: Sequence[str] = tuple(name for name, form in FORMATS.items() if form.act_order)
"""The formats that can say of each column which group it is in."""


def format_name(text: str) -> str:
    """The format that a user named, in any case. Raises UnsupportedError, which names the nearest."""
    name = text.strip().lower().replace("_", "-")
    if name in FORMATS:
        return name
    levels = ((form.name, level) for form in FORMATS.values() for level in form.levels)
    close = ((other, FORMATS[other].example) for other in difflib.get_close_matches(name, FORMATS, n=1))
    first = next(iter(FORMATS.values()))
    meant = ((form, level) for form, level in levels if level.lower() == text.strip().lower())
    near, level = next(meant, None) or next(close, (first.name, first.example))
    raise UnsupportedError(
        f"this version does not write the format {printable(text, 40)!r}",
        expected=", ".join(FORMATS),
        found=printable(text, 40),
        remedy=f"write {near}, for example: llm-quantize quantize MODEL {near} -q {level}",
    )


def levels_of(form: Format, levels: Sequence[str]) -> tuple[str, ...]:
    """``levels``, or where there are none the format's own; empty where it has none."""
    return tuple(levels) or tuple(filter(None, [form.default]))
