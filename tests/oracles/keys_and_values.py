"""The keys and values that a whole model puts into its cache: transformers' own cache, filled and read."""

from __future__ import annotations

from typing import Any

import torch


def largest(model: Any, windows: torch.Tensor) -> list[tuple[float, float]]:
    """(largest key, largest value) of each layer over int64 ``windows`` (n, length), every token of them kept."""
    found: list[tuple[float, float]] = []
    with torch.inference_mode():
        for window in windows:
            cache = model(input_ids=window[None], use_cache=True).past_key_values
            own = [(float(layer.keys.abs().max()), float(layer.values.abs().max())) for layer in cache.layers]
            found = [(max(a, c), max(b, d)) for (a, b), (c, d) in zip(found or own, own, strict=True)]
    return found
