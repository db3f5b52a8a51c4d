"""The formats by the names that users give. A format is a row here and a file (or a folder) beside this one."""

from __future__ import annotations

from collections.abc import Mapping

from llm_quantize.formats.base import Format
from llm_quantize.formats.gguf.plan import Gguf
from llm_quantize.formats.packed_directory import PackedFormat
from llm_quantize.formats.packed_formats import PACKED
from llm_quantize.formats.safetensors import Safetensors

FORMATS: Mapping[str, Format] = {
    Gguf.name: Gguf(),
    **{name: PackedFormat(form) for name, form in PACKED.items()},
    Safetensors.name: Safetensors(),
}
