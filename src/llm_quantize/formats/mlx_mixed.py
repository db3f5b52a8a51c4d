"""Several grids in one MLX directory: config.json has the grid of most modules, and under a module's name what is
different there, as ``mlx_lm.convert`` writes its own mixes.

Read in mlx_lm 0.32.2: it makes each module of what stands under its name, else of the common settings. It joins no
modules, so that any may be on any grid; a recipe of ours gives parts of one answer the same grid all the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from llm_quantize.formats.level_names import known_level
from llm_quantize.formats.recipe import Recipe
from llm_quantize.qtypes.affine import WIDTHS, affine_type

BITS: Mapping[str, int] = {f"{bits}bit": bits for bits in (4, *(width for width in reversed(WIDTHS) if width != 4))}
"""{level of integers: its bits}, the usual one first."""

_TITLE = "MLX"


def recipe_level(text: str) -> str:
    """The level that a recipe may build on: one of integers. Raises UsageError."""
    return known_level(text, _TITLE, list(BITS), usual={bits: name for name, bits in BITS.items()})


def recipe_type(text: str) -> str:
    """The grid that a recipe calls ``text``: affine4_g64. Raises UsageError."""
    return affine_type(text.strip().lower()).name


def check_head(recipe: Recipe, qtype: str) -> None:
    """Nothing to refuse: MLX's kernels take an output matrix of any grid."""
    del recipe, qtype


def mixed_level(qtypes: Collection[str]) -> str:
    """What a directory with matrices on these grids is called: 4bit, 3+4+6bit."""
    return "+".join(str(bits) for bits in sorted({affine_type(name).bits for name in qtypes})) + "bit"


def order(mixed: Mapping[str, Sequence[str]]) -> list[str]:
    """The grids by how many modules have them: the first is what config.json says of all. Of equals, by name."""
    return sorted(mixed, key=lambda qtype: (-len(mixed[qtype]), qtype))


def cautions(mixed: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """None: mlx_lm reads what stands there."""
    del mixed
    yield from ()


def settings(usual: str, mixed: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """{module: its group_size and bits} of those that are not on the grid ``usual``."""
    found: dict[str, Any] = {}
    for qtype, names in mixed.items():
        if qtype != usual:
            grid = affine_type(qtype)
            found |= {name: {"group_size": grid.group_size, "bits": grid.bits} for name in names}
    return found
