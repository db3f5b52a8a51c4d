"""Inputs of matrices rounded one number after another in float64, and transformers' own forward with such inputs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator
from typing import Any

import torch

from llm_quantize.qtypes.inputs import InputGrid

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E4M3 = tuple(k / 512 for k in range(8)) + tuple((8 + k) * 2.0 ** (e - 10) for e in range(1, 16) for k in range(8))[:-1]


def nearest(value: float, levels: tuple[float, ...]) -> float:
    """The nearest level, of two the one of even place, with the sign of ``value``."""
    place = min(range(len(levels)), key=lambda i: (abs(levels[i] - abs(value)), i % 2))
    return math.copysign(levels[place], value)


def rounded(values: list[float], grid: InputGrid) -> list[float]:
    """One token's inputs."""
    size = len(values) if grid.group_size == -1 else grid.group_size
    found: list[float] = []
    for start in range(0, len(values), size):
        part = values[start : start + size]
        scale = _scale(max(map(abs, part)), grid)
        found += [_code(value / scale, grid) * scale for value in part]
    return found


def _scale(most: float, grid: InputGrid) -> float:
    largest = {"e2m1": 6.0, "e4m3": 448.0}.get(grid.codes)
    if grid.static and not grid.nested:
        return float(grid.whole or 0)
    if grid.nested == "e8m0":
        if most == 0:
            return 2.0**-127
        power = math.floor(math.log2(most * 8 / 7 * (1 + 1e-12)))
        return 2.0 ** (power - {"e2m1": 2, "e4m3": 8}[grid.codes])
    if grid.nested == "e4m3":
        whole = float(grid.whole or 0)
        return (nearest(min(most / 6 * whole, 448.0), E4M3) or 0.125) / whole
    return (most / largest if largest else most / (2 ** int(grid.codes[3:]) - 1) * 2) or 2.0**-23


def _code(value: float, grid: InputGrid) -> float:
    if grid.codes == "e2m1":
        return nearest(value, E2M1)
    if grid.codes == "e4m3":
        return nearest(value, E4M3)
    half = 2 ** (int(grid.codes[3:]) - 1)
    return float(min(max(round(value), -half), half - 1))


@contextlib.contextmanager
def rounding(model: Any, names: Collection[str], round_: Any) -> Iterator[None]:
    """Inside, whatever ``model`` (of transformers, experts run "eager") multiplies with a parameter of ``names`` goes
    through ``round_`` first."""
    storages = {value.untyped_storage().data_ptr() for name, value in model.named_parameters() if name in names}
    assert len(storages) == len(names)
    linear = torch.nn.functional.linear

    def rounded_linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        known = weight.untyped_storage().data_ptr() in storages
        return linear(round_(input) if known else input, weight, bias)

    torch.nn.functional.linear = rounded_linear
    try:
        yield
    finally:
        torch.nn.functional.linear = linear
