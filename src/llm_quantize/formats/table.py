"""The formats by the names that users give. A format is a row here and a file (or a folder) beside this one."""

from __future__ import annotations

from collections.abc import Mapping

from llm_quantize.errors import UnsupportedError
from llm_quantize.formats.base import Format, Packed
from llm_quantize.formats.directory import Directory
from llm_quantize.formats.gguf.plan import Gguf
from llm_quantize.formats.packed_formats import PACKED

FORMATS: Mapping[str, Format] = {Gguf.name: Gguf(), **{name: Directory(form) for name, form in PACKED.items()}}


def packed_format(name: str) -> Packed:
    """The packed format of that name. Raises UnsupportedError."""
    if name not in PACKED:
        raise UnsupportedError("there is no such packed format", expected=", ".join(PACKED), found=name[:40])
    return PACKED[name]
