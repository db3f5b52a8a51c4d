"""Scales moved from one weight into another (architectures/scaling.py says where): the arithmetic.

s (n,)      scales of a group's input channels, positive; equal where heads share them
x / s       what the divided tensors now make
W * s       columns of the matrices that read it, so that (W * s)(x / s) = W x
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from llm_quantize.architectures.scaling import ScaleGroup, Slice

Tensors = Mapping[str, torch.Tensor]


def apply(group: ScaleGroup, scales: torch.Tensor, tensors: Tensors) -> dict[str, torch.Tensor]:
    """The tensors that change, float32, in their own shapes. ``tensors`` (any float type) holds ``group.tensors``.

    ``scales``: float32 (group.columns,). Groups that share a tensor are applied one to the other's result.
    """
    changed = {name: tensors[name].to(torch.float32, copy=True) for name in group.tensors}
    own = channel_scales(group, scales)
    for part in group.divided:
        _scale(part, changed[part.name], 1 / (own if part.power == 1 else own**part.power))
    for part in group.multiplied:
        _scale(part, changed[part.name], scales)
    return changed


def settle(group: ScaleGroup, scales: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    """The scales nearest to ``scales`` for which the divided norm needs no rounding where it is stored, float32 (n,).

    A stored norm weight g becomes g' = round(g / s) in its own type; s = g / g' then moves exactly what was taken
    away. Where g' would be zero or not finite the channel keeps its weight (s = 1). Groups without a norm, whose
    divided rows are quantized afterwards, keep their scales. Biases of norms and routers are stored with one rounding.
    """
    norm = group.divided[0]
    if group.spread is not None or norm.along != "columns" or norm.index is not None:
        return scales
    stored = tensors[norm.name]
    if stored.ndim != 1 or not norm.float_stored:
        return scales
    whole = stored.float().to(scales.device) + norm.add
    divided = (whole / scales - norm.add).to(stored.dtype).float() + norm.add
    settled = whole / divided
    usable = torch.isfinite(divided) & torch.isfinite(settled) & (settled > 0)
    return torch.where(usable, settled, torch.ones_like(settled))


def channel_scales(group: ScaleGroup, scales: torch.Tensor) -> torch.Tensor:
    """The scales of what is divided, (group.channels,), of those of the inputs, (group.columns,)."""
    if group.spread is None:
        return scales
    own = torch.ones(group.channels, dtype=scales.dtype, device=scales.device)
    own[torch.from_numpy(group.spread).to(scales.device)] = scales
    return own


def readers(group: ScaleGroup, tensors: Tensors, *, floats: bool = False) -> list[torch.Tensor]:
    """The matrices that read the group's channels, views (rows, n); without those stored as floats unless asked."""
    return [_view(part, tensors[part.name]) for part in group.multiplied if floats or not part.float_stored]


def scaled_hessian(hessian: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """sum x x^T (n, n) of the inputs x / s."""
    return hessian / scales[:, None] / scales[None, :]


def _view(part: Slice, tensor: torch.Tensor) -> torch.Tensor:
    """The part of a reader, W (rows, n)."""
    matrix = tensor.reshape(-1, tensor.shape[-1])
    matrix = matrix if part.along == "columns" else matrix.T
    return matrix if part.across is None else matrix[part.across[0] : part.across[1]]


def _scale(part: Slice, tensor: torch.Tensor, factors: torch.Tensor) -> None:
    """Multiply the channels of ``part`` by ``factors`` in place."""
    matrix = tensor.view(-1, tensor.shape[-1]) if tensor.ndim else tensor
    matrix = matrix if part.along == "columns" else matrix.T
    if part.across is not None:
        matrix = matrix[part.across[0] : part.across[1]]
    factors = factors.to(matrix.device)
    if part.index is not None:
        index = torch.from_numpy(part.index).to(matrix.device)
        matrix[:, index] = (matrix[:, index] + part.add) * factors - part.add
    elif part.add:
        matrix.add_(part.add).mul_(factors).sub_(part.add)
    else:
        matrix.mul_(factors)


def apply_all(
    groups: Sequence[ScaleGroup], scales: Sequence[torch.Tensor], tensors: Tensors
) -> dict[str, torch.Tensor]:
    """``apply`` for several groups that may share tensors: all that change."""
    changed: dict[str, torch.Tensor] = {}
    for group, own in zip(groups, scales, strict=True):
        changed |= apply(group, own, {name: changed.get(name, tensors[name]) for name in group.tensors})
    return changed
