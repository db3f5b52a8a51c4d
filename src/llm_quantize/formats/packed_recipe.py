"""A recipe for a packed directory: which matrix is on which grid, and what of that no runtime would read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from llm_quantize.errors import UsageError
from llm_quantize.formats.modules import Module, joined_with
from llm_quantize.formats.packing import mixture_of
from llm_quantize.formats.recipe import Recipe
from llm_quantize.measures.amounts import counted
from llm_quantize.qtypes.integer import GROUPS, WHOLE_ROW, IntegerType, dividing
from llm_quantize.qtypes.packed import PackedType, packed_type

_SHOWN = 6


def together(name: str) -> str:
    """What runtimes make one module of that module ``name`` is part of: the experts of its layer, or its queries, keys
    and values, or gate and up. Modules of one answer need one grid."""
    mixture = mixture_of(name)
    if mixture != name:
        return mixture
    return "+".join(sorted(joined_with(name))) or name


def named(recipe: Recipe) -> dict[str, str]:
    """{module: its grid} as ``recipe`` names them, with or without the end of their weights' names. Raises UsageError
    where both names of a module are there, with a grid each."""
    found: dict[str, str] = {}
    for name, grid in recipe.tensors.items():
        module = name.removesuffix(".weight")
        if found.setdefault(module, grid) != grid:
            raise UsageError(
                f"the recipe {recipe.name} names a module twice",
                tensor=module,
                expected="one type",
                found=f"{found[module]} and {grid}",
                remedy="leave one of the two lines out: the name with .weight and the one without mean the same",
            )
    return found


def types_of(recipe: Recipe | None, modules: Sequence[Module], qtype: str) -> dict[str, str]:
    """{module: its grid}; ``qtype``: of those that no recipe names. A recipe names modules, or a layer's experts
    together by what they are in (``model.layers.0.mlp.experts``).

    Raises UsageError for names that are no packed modules, rows that are not whole groups, and where parts of what
    runtimes make one module are on several grids, naming the modules.
    """
    if recipe is None:
        return {module.name: qtype for module in modules}
    wanted = named(recipe)
    known = {name for module in modules for name in (module.name, mixture_of(module.name))}
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise UsageError(
            f"the recipe {recipe.name} names what is no matrix to be quantized in this model",
            expected="modules that are quantized",
            found=", ".join(unknown[:_SHOWN]) + (f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""),
            remedy="take these out of the recipe: norms, the embedding and what --ignore finds stay as they are; or "
            "make a recipe for this model",
        )
    found = {module.name: wanted.get(module.name) or wanted.get(mixture_of(module.name)) or qtype for module in modules}
    for module in modules:
        _check_groups(recipe, module, found[module.name])
    _refuse_split(recipe, found)
    return found


def as_far_as_both(
    recipe: Recipe, modules: Sequence[Module]
) -> tuple[Recipe, tuple[str, ...], dict[str, tuple[str, ...]]]:
    """``recipe``, which repeats what another model's directory has, for a model of ``modules``: (the same of the
    modules that both have, those of this model that stay as they are, as they do there, {what differs: which}).
    """
    if recipe.origin is None:
        return recipe, (), {}
    wanted, known = named(recipe), {module.name for module in modules}
    extra, kept = sorted(wanted.keys() - known), sorted(known - wanted.keys())
    told = {
        f"{counted(len(extra), 'module')} of {recipe.origin.file} that this model has not: passed over": tuple(extra),
        f"{counted(len(kept), 'module')} that {recipe.origin.file} has not quantized: left as they are": tuple(kept),
    }
    told = {f"{text} (-v lists them)": names for text, names in told.items() if names}
    return replace(recipe, tensors={name: grid for name, grid in wanted.items() if name in known}), tuple(kept), told


def _check_groups(recipe: Recipe, module: Module, qtype: str) -> None:
    grid, columns = packed_type(qtype), module.weight.shape[-1]
    size = grid.group_size
    if size > 0 and columns % size:
        raise UsageError(
            f"the recipe {recipe.name} asks for {qtype} where it cannot be",
            tensor=module.name,
            expected=f"rows of whole groups of {size}",
            found=f"rows of {columns} weights",
            remedy=_divided(grid, columns),
        )


def _divided(grid: PackedType, columns: int) -> str:
    """What to do where groups of ``grid`` do not divide rows of so many ``columns``."""
    group = dividing(GROUPS, [columns])
    if group is None and not isinstance(grid, IntegerType):
        return "leave this matrix as it is: --ignore"
    return f"name a type with a group that divides them, such as {replace(grid, group_size=group or WHOLE_ROW).name}"


def _refuse_split(recipe: Recipe, types: Mapping[str, str]) -> None:
    parts: dict[str, dict[str, list[str]]] = {}
    for name, qtype in types.items():
        parts.setdefault(together(name), {}).setdefault(qtype, []).append(name)
    for grids in parts.values():
        if len(grids) > 1:
            named = [f"{name} {qtype}" for qtype, names in grids.items() for name in names]
            more = f" and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
            raise UsageError(
                f"the recipe {recipe.name} splits modules that vLLM makes one: queries, keys and values; gate and up; "
                "all experts of a layer",
                expected="one type for all of them",
                found=", ".join(named[:_SHOWN]) + more,
                remedy="give them one type, each by its name (experts also by what they are in: "
                "model.layers.0.mlp.experts)",
            )


def by_grid(types: Mapping[str, str]) -> dict[str, list[str]]:
    """{grid: the modules on it}."""
    found: dict[str, list[str]] = {}
    for name, qtype in types.items():
        found.setdefault(qtype, []).append(name)
    return found


def bits_per_weight(sizes: Iterable[tuple[int, int]]) -> float:
    """Bits for each weight of matrices of so many (bytes, weights)."""
    found = list(sizes)
    return 8 * sum(nbytes for nbytes, _ in found) / sum(weights for _, weights in found)
