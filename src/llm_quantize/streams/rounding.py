"""Inputs of matrices rounded while a block runs, as the runtime of an artifact rounds them (qtypes/inputs.py)."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

from llm_quantize.grids.inputs import rounded_inputs
from llm_quantize.qtypes.inputs import InputGrid
from llm_quantize.streams import experts
from llm_quantize.streams.names import Places
from llm_quantize.streams.taps import is_matrix
from llm_quantize.streams.weights import RoundsInputs, Weights


class Rounding:
    """What the inputs of matrices of ``root`` are rounded to: of none, until they are ``set``. ``parameters``: those
    that are matrices, or stacks of experts'. Observers see inputs as they were before. ``set`` is not for use while
    another thread runs ``root``."""

    def __init__(self, root: torch.nn.Module, parameters: Iterable[str]) -> None:
        self._grids: dict[tuple[str, int | None], InputGrid] = {}
        for path in dict.fromkeys(name.rpartition(".")[0] for name in parameters):
            module = root.get_submodule(path)
            if experts.is_experts(module):
                setattr(module, experts.ROUNDER, partial(self._expert, f"{path}."))
            elif is_matrix(module):
                module.register_forward_pre_hook(partial(self._matrix, f"{path}.weight"), with_kwargs=True)

    def set(self, parameter: str, expert: int | None, grid: InputGrid | None) -> None:
        """Round the inputs of ``parameter`` (of its matrix ``expert``) from now on; None: do not."""
        self._grids.pop((parameter, expert), None)
        if grid is not None:
            self._grids[parameter, expert] = grid

    def _matrix(
        self, parameter: str, _module: Any, positional: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        grid = self._grids.get((parameter, None))
        if grid is None:
            return None
        if positional:
            return (rounded_inputs(positional[0], grid), *positional[1:]), named
        first = next(iter(named))
        return positional, {**named, first: rounded_inputs(named[first], grid)}

    def _expert(self, prefix: str, parameter: str, expert: int, inputs: torch.Tensor) -> torch.Tensor:
        grid = self._grids.get((prefix + parameter, expert))
        return inputs if grid is None else rounded_inputs(inputs, grid)


def rounded_as(
    root: torch.nn.Module, prefix: str, places: Places, parameters: Iterable[str], weights: Weights
) -> Rounding:
    """The rounding of ``root``, whose ``parameters`` are filled from ``places``, as ``weights`` say, where they do.
    ``prefix``: of its parameters' names in the model."""
    named = {name: root.get_parameter(name.removeprefix(prefix)) for name in parameters}
    matrices = {name: value for name, value in named.items() if value.ndim >= 2}
    rounding = Rounding(root, [name.removeprefix(prefix) for name in matrices])
    if not isinstance(weights, RoundsInputs):
        return rounding
    for name, value in matrices.items():
        for place in places[name]:
            whole = place.expert is None and value.ndim == 3
            for expert in range(value.shape[0]) if whole else (place.expert,):
                grid = weights.inputs(place.name, expert if whole else None)
                if grid is not None:
                    rounding.set(name.removeprefix(prefix), expert, grid)
    return rounding
