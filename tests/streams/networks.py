"""What the tests of the streamed forward share: tiny models opened, run in pieces, and run whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llm_quantize.models.opening import open_source
from llm_quantize.streams.network import Network, open_network
from llm_quantize.streams.weights import CheckpointWeights, Weights
from tests.tiny_models import auto_class, quiet


def opened(directory: Path, dtype: Any = "float32") -> tuple[Network, CheckpointWeights]:
    source = open_source(str(directory))
    return open_network(source, dtype=dtype), CheckpointWeights(source.checkpoint)


def windows(count: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 250, (count, length), generator=torch.Generator().manual_seed(seed))


def streamed_states(network: Network, weights: Weights, ids: torch.Tensor) -> list[torch.Tensor]:
    states = list(network.embed(weights, ids))
    for index in range(network.n_blocks):
        with network.block(index, weights) as block:
            states = [block(state) for state in states]
    return states


def streamed_logits(network: Network, weights: Weights, ids: torch.Tensor) -> list[torch.Tensor]:
    states = streamed_states(network, weights, ids)
    with network.head(weights) as head:
        return [head(state) for state in states]


def whole_model(directory: Path, dtype: Any = torch.float32) -> Any:
    """The checkpoint as transformers loads it, with its usual attention and its plain experts."""
    with quiet():
        return auto_class(directory).from_pretrained(directory, dtype=dtype, experts_implementation="eager").eval()


def whole_logits(directory: Path, ids: torch.Tensor, dtype: Any = torch.float32) -> list[torch.Tensor]:
    model = whole_model(directory, dtype)
    with torch.inference_mode():
        return [model(input_ids=window[None], use_cache=False).logits[0].float() for window in ids]
