"""Keys and values on their way into a cache, while a block runs without one: seen, and rounded as the cache would.

Attention of transformers hands keys, after their rotary positions, and values to the ``update`` of what it is given as
``past_key_values``. That is where compressed-tensors (0.20) rounds them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from llm_quantize.grids.inputs import rounded_inputs
from llm_quantize.qtypes.inputs import InputGrid
from llm_quantize.streams.names import Places
from llm_quantize.streams.weights import RoundsCache, Weights

CacheSink = Callable[[torch.Tensor, torch.Tensor], None]
"""(keys, values), each (1, heads, tokens, columns of a head) in the network's dtype."""

_GIVEN = "past_key_values"


class _Passing:
    """Stands where a cache would: tells ``sink`` what it is to keep, gives it back as ``grids`` of keys and of values
    round it, and keeps nothing."""

    def __init__(self, sink: CacheSink | None, grids: tuple[InputGrid, InputGrid] | None) -> None:
        self._sink, self._grids = sink, grids

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *_positional: Any, **_named: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._sink is not None:
            self._sink(keys, values)
        if self._grids is None:
            return keys, values
        return rounded_inputs(keys, self._grids[0]), rounded_inputs(values, self._grids[1])


def watch(
    block: torch.nn.Module,
    prefix: str,
    places: Places,
    parameters: Iterable[str],
    weights: Weights,
    listening: Callable[[], CacheSink | None],
) -> None:
    """Give the attention of ``block`` something to tell of keys and values whenever somebody is ``listening``, and to
    round them where ``weights`` say so. ``prefix``, ``places``, ``parameters``: as of ``rounding.round_inputs``."""
    names = [parameter for parameter in parameters if places[parameter]]
    for path, module in block.named_modules():
        if path and _GIVEN in inspect.signature(type(module).forward).parameters:  # not one put before it (replay.py)
            own = [name for name in names if name.startswith(f"{prefix}{path}.")]
            held = [place.name for name in own for place in places[name]]
            grids = weights.cache(held) if isinstance(weights, RoundsCache) else None
            module.register_forward_pre_hook(partial(_give, grids, listening), with_kwargs=True)


def _give(
    grids: tuple[InputGrid, InputGrid] | None,
    listening: Callable[[], CacheSink | None],
    _module: Any,
    positional: tuple[Any, ...],
    named: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    sink = listening()
    if sink is None and grids is None:
        return None
    return positional, {**named, _GIVEN: _Passing(sink, grids)}
