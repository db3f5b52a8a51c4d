"""CTranslate2's levels by its converter's names, and what each makes of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llm_quantize.formats.level_names import known_level


@dataclass(frozen=True)
class Level:
    """``matrix``: the grid of matrices, or the type that they are stored in; ``rest``: the type of all else, None: the
    one that the model is stored in."""

    matrix: str
    rest: str | None

    @property
    def rounds(self) -> bool:
        """Whether matrices become codes."""
        return self.matrix not in VARIABLE_TYPES


VARIABLE_TYPES: Mapping[str, str] = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
"""CTranslate2's words for element types."""

CODES: Mapping[str, str] = {"line8": "int8", "line16": "int16"}
"""The element types of codes, by grid."""

FED = "line8"
"""The grid that error feedback knows; int16 loses next to nothing, and is rounded plainly."""

LEVELS: Mapping[str, Level] = {
    "int8": Level("line8", None),
    "int8_float32": Level("line8", "f32"),
    "int8_float16": Level("line8", "f16"),
    "int8_bfloat16": Level("line8", "bf16"),
    "int16": Level("line16", "f32"),
    "float16": Level("f16", "f16"),
    "bfloat16": Level("bf16", "bf16"),
    "float32": Level("f32", "f32"),
}


def level_of(name: str) -> str:
    """The level called ``name``, in any case, or by its bits. Raises UsageError."""
    return known_level(name, "ctranslate2", tuple(LEVELS), usual={8: "int8", 16: "float16", 32: "float32"})
