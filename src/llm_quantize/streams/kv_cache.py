"""Keys and values seen on their way into a cache, while a block runs without one.

Attention of transformers hands keys, after their rotary positions, and values to the ``update`` of what it is given as
``past_key_values``. That is where compressed-tensors (0.20) rounds them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

CacheSink = Callable[[torch.Tensor, torch.Tensor], None]
"""(keys, values), each (1, heads, tokens, columns of a head) in the network's dtype."""

_GIVEN = "past_key_values"


class _Passing:
    """Stands where a cache would: tells ``sink`` what it is to keep, and keeps nothing."""

    def __init__(self, sink: CacheSink) -> None:
        self._sink = sink

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *_positional: Any, **_named: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._sink(keys, values)
        return keys, values


def watch(block: torch.nn.Module, listening: Callable[[], CacheSink | None]) -> None:
    """Give the attention of ``block`` something to tell of keys and values whenever somebody is ``listening``."""
    for name, module in block.named_modules():
        if name and _GIVEN in inspect.signature(module.forward).parameters:
            module.register_forward_pre_hook(partial(_give, listening), with_kwargs=True)


def _give(
    listening: Callable[[], CacheSink | None], _module: Any, positional: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    sink = listening()
    return None if sink is None else (positional, {**named, _GIVEN: _Passing(sink)})
