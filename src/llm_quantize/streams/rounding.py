"""Inputs of matrices rounded while a block runs, as an artifact's runtime does (qtypes/inputs.py)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch

from llm_quantize.grids.inputs import rounded_inputs
from llm_quantize.qtypes.inputs import InputGrid
from llm_quantize.streams import experts
from llm_quantize.streams.names import Places
from llm_quantize.streams.taps import is_matrix
from llm_quantize.streams.weights import RoundsInputs, Weights


def round_inputs(
    root: torch.nn.Module, prefix: str, places: Places, parameters: Iterable[str], weights: Weights
) -> None:
    """Let the matrices among ``parameters`` of ``root`` have their inputs rounded as ``weights`` say, where they do.

    ``prefix``: of the parameters' names in the model; ``places``: what fills them. Observers that were attached before
    see inputs as they come.
    """
    if not isinstance(weights, RoundsInputs):
        return
    stacks: dict[str, dict[tuple[str, int | None], InputGrid]] = {}
    for name in parameters:
        path, _, own = name.removeprefix(prefix).rpartition(".")
        module = root.get_submodule(path)
        value: torch.Tensor = getattr(module, own)
        found: dict[int | None, InputGrid] = {}
        for place in places[name] if value.ndim >= 2 else ():
            whole = place.expert is None and value.ndim == 3
            for expert in range(value.shape[0]) if whole else (place.expert,):
                grid = weights.inputs(place.name, expert if whole else None)
                if grid is not None:
                    found[expert] = grid
        if found and experts.is_experts(module):
            stacks.setdefault(path, {}).update({(own, expert): grid for expert, grid in found.items()})
        elif found and is_matrix(module):
            module.register_forward_pre_hook(partial(_matrix, found[None]), with_kwargs=True)
    for path, grids in stacks.items():
        setattr(root.get_submodule(path), experts.ROUNDER, partial(_expert, grids))


def _matrix(
    grid: InputGrid, _module: Any, positional: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if positional:
        return (rounded_inputs(positional[0], grid), *positional[1:]), named
    first = next(iter(named))
    return positional, {**named, first: rounded_inputs(named[first], grid)}


def _expert(
    grids: Mapping[tuple[str, int | None], InputGrid], parameter: str, expert: int, inputs: torch.Tensor
) -> torch.Tensor:
    grid = grids.get((parameter, expert))
    return inputs if grid is None else rounded_inputs(inputs, grid)
