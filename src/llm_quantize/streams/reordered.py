"""The same network in another order of arithmetic: how much of a divergence is float32 rounding.

Every matrix product is summed in two unequal parts that are then added, x W = x[:k] W[:k] + x[k:] W[k:], which
is the same number in exact arithmetic and is rounded otherwise in float32. A source measured against itself so
shows the divergence below which no figure of this evaluation means anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_LEAST = 8  # a sum of fewer terms is left as it is


def _cut(terms: int) -> int:
    """Where a sum of so many terms is divided: unequal parts, the first a multiple of no vector width."""
    return terms * 3 // 8 + 1


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    k = _cut(weight.shape[-1])
    left = torch._C._nn.linear(x[..., :k], weight[:, :k])
    right = torch._C._nn.linear(x[..., k:], weight[:, k:])
    return left + right if bias is None else left + right + bias


def _matmul(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    k = _cut(x.shape[-1])
    return torch.matmul(x[..., :k], y[..., :k, :]) + torch.matmul(x[..., k:], y[..., k:, :])


def _addmm(bias: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return _matmul(x, y) + bias


class Reordered(TorchFunctionMode):
    """While open, products of this thread are summed in two parts."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        positional: Sequence[Any] = (),
        named: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(named or {})
        if function is torch.nn.functional.linear and positional[1].shape[-1] >= _LEAST:
            return _linear(*positional, **given)
        products = (torch.matmul, torch.bmm, torch.mm, torch.Tensor.matmul, torch.Tensor.__matmul__)
        if function in products and not given and positional[0].shape[-1] >= _LEAST and positional[1].ndim >= 2:
            return _matmul(*positional)
        if function is torch.addmm and not given and positional[1].shape[-1] >= _LEAST:
            return _addmm(*positional)
        return function(*positional, **given)
