"""The inputs of a matrix, rounded as a runtime rounds them (qtypes/inputs.py)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llm_quantize.errors import UsageError
from llm_quantize.qtypes.inputs import InputGrid
from llm_quantize.qtypes.integer import WHOLE_ROW

_LARGEST = {"e4m3": 448.0, "e2m1": 6.0}
_E4M3 = torch.float8_e4m3fn
_LEADS = {"e4m3": 8, "e2m1": 2}
"""Exponents of the largest powers of two that are codes."""
_HALF_STEP = 1 << 21  # of the mantissa of a float32: what is within 1/8 of the next power of two becomes it
_LEAST_E4M3 = 0.125  # what a scale of zero becomes


def rounded_inputs(inputs: Tensor, grid: InputGrid) -> Tensor:
    """``inputs`` (..., columns) of any float type, each replaced by what the runtime multiplies; computed in float32.

    Tokens do not depend on one another. Raises UsageError where the columns are not whole groups, ValueError for a
    grid whose calibrated number is not known.
    """
    columns = inputs.shape[-1]
    size = columns if grid.group_size == WHOLE_ROW else grid.group_size
    if columns % size:
        raise UsageError(
            f"inputs of {columns} channels are not whole groups of {size}",
            expected=f"a multiple of {size}",
            found=columns,
            remedy="this artifact is not one that a runtime can compute with; make it again",
        )
    if grid.static and grid.whole is None:
        raise ValueError("the scale of these inputs was not calibrated")
    groups = inputs.float().reshape(*inputs.shape[:-1], columns // size, size)
    return (_coded(groups, _scales(groups, grid), grid)).flatten(-2).to(inputs.dtype)


def calibrated(grid: InputGrid, largest: float) -> InputGrid:
    """``grid`` with the number that inputs of at most ``largest`` call for, where that is calibrated; 1 where none was
    ever seen."""
    if not grid.static:
        return grid
    if not largest > 0:
        return replace(grid, whole=1.0)
    most = torch.tensor(largest, dtype=torch.float32).clamp(min=1e-30)
    if grid.nested:
        whole = torch.tensor(_LARGEST["e4m3"] * _LARGEST[grid.codes]) / most
    else:
        whole = most / (_LARGEST.get(grid.codes) or _steps(grid) / 2)
    return replace(grid, whole=float(whole))


def _scales(groups: Tensor, grid: InputGrid) -> Tensor:
    """float32 (..., groups, 1), above zero."""
    if grid.static and not grid.nested:
        return torch.full_like(groups[..., :1], grid.whole or 0.0)
    most = groups.abs().amax(dim=-1, keepdim=True)
    if grid.nested == "e8m0":
        raised = ((most.view(torch.int32) + _HALF_STEP) >> 23) & 0xFF
        return torch.exp2((raised - _LEADS[grid.codes]).clamp(min=0).float() - 127)
    scales = most / (_LARGEST.get(grid.codes) or _steps(grid) / 2)
    if grid.nested == "e4m3":
        whole = grid.whole or 1.0
        stored = (scales * whole).clamp(max=_LARGEST["e4m3"]).to(_E4M3).float()
        return torch.where(stored == 0, _LEAST_E4M3, stored) / whole
    return torch.where(scales == 0, torch.finfo(torch.float32).eps, scales)


def _steps(grid: InputGrid) -> int:
    """Codes of integers, less one."""
    return int((1 << int(grid.codes.removeprefix("int"))) - 1)


def _coded(groups: Tensor, scales: Tensor, grid: InputGrid) -> Tensor:
    """The nearest codes, times the scales."""
    scaled = groups / scales
    most = _LARGEST.get(grid.codes)
    if most is None:
        half = (_steps(grid) + 1) // 2
        return scaled.clamp_(-half, half - 1).round_().mul_(scales)
    scaled.clamp_(-most, most)
    nearest = scaled.to(_E4M3).float() if grid.codes == "e4m3" else _e2m1(scaled)
    return nearest.mul_(scales)


def _e2m1(values: Tensor) -> Tensor:
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 with either sign, of two the one of even mantissa; up to 6."""
    exponents = ((values.view(torch.int32) >> 23) & 0xFF).clamp_(min=127)
    steps = ((exponents - 1) << 23).view(torch.float32)  # half of the power of two below, at least 1/2
    return (values / steps).round_().mul_(steps)
