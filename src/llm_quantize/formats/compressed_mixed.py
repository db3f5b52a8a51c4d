"""Several grids in one compressed-tensors directory: a config group for each, whose targets name its modules.

Read in the package (0.20) and Transformers (5.23), which were run too, and in vLLM's code, which was not:

- vLLM asks for the parts of what it fuses only after the class of the fused module, so a directory that mixes grids
  names every module, and never ``Linear``. Of what it fuses, all parts must have one group.
- vLLM has treated a packed output matrix (not one that is the embedding) as a linear module since 2026; its Humming
  kernels ask for sizes that heads do not tell (v0.27), so heads are given 4 or 8 bits, which have other kernels.
- Transformers gives all experts of a model the first group with an expression that holds "experts", and reads zero
  points only by decoding everything as one group says.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from llm_quantize.errors import UsageError
from llm_quantize.formats.compressed_groups import Groups, weights_of
from llm_quantize.formats.compressed_levels import BITS, LEVELS, NAME
from llm_quantize.formats.level_names import known_level
from llm_quantize.formats.packed import PackedMatrix
from llm_quantize.formats.packing import mixture_of
from llm_quantize.formats.recipe import Recipe
from llm_quantize.qtypes.integer import integer_type

HEAD_BITS = (4, 8)
_LINEAR = "Linear"


def recipe_level(text: str) -> str:
    """The level that a recipe may build on: one of integers in words. Raises UsageError."""
    known = known_level(text, NAME, LEVELS, usual={bits: f"W{bits}A16" for bits in BITS.values()})
    if known not in BITS:
        raise UsageError(
            f"a recipe cannot build on {known}",
            expected="W2A16 to W8A16, or one of them with _ASYM",
            found=known,
            remedy="bits are mixed among integer weights with activations of 16 bits",
        )
    return known


def recipe_type(text: str) -> str:
    """The grid of integers that a recipe calls ``text``: int3_g64, int4_g128_asym, int8. Raises UsageError."""
    return integer_type(text.strip().lower()).name


def check_head(recipe: Recipe, qtype: str) -> None:
    """Raise UsageError for an output matrix of widths that vLLM has its Humming kernels alone for."""
    grid = integer_type(qtype)
    if grid.bits not in HEAD_BITS:
        raise UsageError(
            f"the recipe {recipe.name} gives the output matrix {grid.bits} bits",
            expected="4 or 8 bits: for other widths vLLM has kernels of one kind only, which take no output matrix",
            found=qtype,
            remedy="name int8_g128 or int4_g128 for it, or leave it out: it stays as it is",
        )


def mixed_level(qtypes: Collection[str], inputs: str = "16") -> str:
    """What a directory with matrices on these grids of integers is called: W2-8A16, W4A16_ASYM, W8A8. ``inputs``: in
    how many bits activations are."""
    grids = [integer_type(name) for name in qtypes]
    bits = sorted({grid.bits for grid in grids})
    width = f"{bits[0]}-{bits[-1]}" if len(bits) > 1 else str(bits[0])
    return f"W{width}A{inputs}{'' if all(grid.symmetric for grid in grids) else '_ASYM'}"


def order(mixed: Mapping[str, Sequence[str]]) -> list[str]:
    """The grids as groups stand in the configuration: those of experts first, as Transformers looks for them by a word
    that shared experts may have in their names too; then by bits and name."""

    def key(qtype: str) -> tuple[bool, int, str]:
        routed = any(mixture_of(name) != name for name in mixed[qtype])
        return not routed, integer_type(qtype).bits, qtype

    return sorted(mixed, key=key)


def cautions(mixed: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """What Transformers reads otherwise than it stands in such a mix, a sentence each: loaded all the same, the values
    would be others."""
    if len(mixed) < 2:
        return
    experts = [qtype for qtype, names in mixed.items() if any(mixture_of(name) != name for name in names)]
    if len(experts) > 1:
        yield (
            f"Transformers 5.23 reads the experts of all layers on one grid, and these are on {', '.join(experts)}: "
            "only vLLM loads this artifact"
        )
    if not all(integer_type(qtype).symmetric for qtype in mixed):
        yield (
            "Transformers 5.23 decodes zero points on one grid for all modules: only vLLM loads this artifact; "
            "a recipe of symmetric grids loads in both"
        )


def contradictions(groups: Groups, matrices: Sequence[PackedMatrix]) -> Iterator[str]:
    """Where the group that readers find for a module is not what its tensors hold, or is none: a sentence for each
    kind, with the first such module. Raises as ``Groups.named``."""
    if not groups.mixed:
        return
    named = groups.named([matrix.name for matrix in matrices])
    found: dict[tuple[str, str], list[str]] = {}
    for matrix in matrices:
        group = named.get(matrix.name, groups.of_class)
        weights = None if group is None else weights_of(group)
        if group is None and named:  # where no name is known, readers know modules by other names than the file
            found.setdefault(("", ""), []).append(matrix.name)
        elif weights is not None and not matrix.grid and weights.get("type", "int") == "int":
            declared = _said(weights, matrix)
            if declared not in ("", held := f"{matrix.bits} bits in {matrix.groups} groups a row"):
                found.setdefault((held, declared), []).append(matrix.name)
    for (held, declared), names in found.items():
        text = f"{names[0]} is quantized, but no target of the configuration means it"
        if held:
            text = f"{names[0]} has {held}, and its group in the configuration {declared}"
        yield f"{text} ({len(names):,} such modules)" if len(names) > 1 else text


def _said(weights: Mapping[str, Any], matrix: PackedMatrix) -> str:
    """What a group says of a matrix, in the words of ``contradictions``; "" where it is of another kind."""
    size = weights.get("group_size") if weights.get("strategy") == "group" else matrix.columns
    if weights.get("strategy") not in ("group", "channel") or type(size) is not int or size < 1:
        return ""
    return f"{weights.get('num_bits')} bits in {-(-matrix.columns // size)} groups a row"
