"""Mixture of experts, one expert after another in fixed order.

transformers keeps the experts of a layer as two three-dimensional parameters: gate and up (experts, 2 ff, width), and
down (experts, width, ff); or turned, each (experts, in, out); in some with biases, (experts, out). Its decorator
``use_experts_implementation`` lets others compute them. Ours does the same arithmetic in the same order as its "eager"
one, and tells what each expert's two matrices are given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from llm_quantize.errors import UnsupportedError

IMPLEMENTATION = "llm_quantize_one_by_one"
LISTENER = "_llm_quantize_listener"
ROUNDER = "_llm_quantize_rounder"
ROWS = 64
"""Rows of an expert's bfloat16 inputs on a CPU are a multiple of this. See ``_linear``."""

Listener = Callable[[str, int, torch.Tensor], None]
"""(parameter, expert, its inputs (tokens, columns)): called before each matrix is used."""

Rounder = Callable[[str, int, torch.Tensor], torch.Tensor]
"""The same, after it: what the matrix is given instead."""

_USUAL = {"has_gate": True, "has_post_expert_norm": False}
_BIAS = "_bias"


def register() -> None:
    """Make ``IMPLEMENTATION`` known to transformers; any number of times."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, one_by_one)


def is_convolution(module: torch.nn.Module) -> bool:
    """Whether ``module`` is a short convolution along the tokens: small, never quantized, seen by no tap."""
    return isinstance(module, torch.nn.Conv1d)


def is_experts(module: torch.nn.Module) -> bool:
    """Whether ``module`` holds fused experts. Raises UnsupportedError where they are not of the usual kind."""
    if is_convolution(module) or not any(value.ndim == 3 for value in module.parameters(recurse=False)):
        return False
    names = {name for name, _ in module.named_parameters(recurse=False)}
    found = {name: getattr(module, name, None) for name in _USUAL}
    wanted = {"gate_up_proj", "down_proj"}
    wanted |= {name + _BIAS for name in wanted} if getattr(module, "has_bias", False) else set()
    if names != wanted or found != _USUAL:
        raise UnsupportedError(
            "experts of this kind cannot be run one by one",
            expected="gate_up_proj and down_proj, gated",
            found=f"{type(module).__name__}: {sorted(names)}",
            remedy="this model cannot be calibrated or measured by this version",
        )
    return True


def columns_of(module: Any, parameter: str) -> int:
    """The length of the inputs of each matrix of ``parameter``."""
    return int(getattr(module, parameter).shape[-2 if module.is_transposed else -1])


def one_by_one(
    module: Any, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts' weighted sum: hidden (tokens, width), index and weights (tokens, k) -> (tokens, width).

    For each expert its tokens stand in the order (rank among the token's k, token), experts in ascending order.
    """
    listener: Listener | None = getattr(module, LISTENER, None)
    rounder: Rounder = getattr(module, ROUNDER, _as_they_are)
    if hidden.is_meta:
        if listener is not None:
            listener("gate_up_proj", 0, hidden)
            listener("down_proj", 0, hidden.new_empty(hidden.shape[0], columns_of(module, "down_proj")))
        return torch.empty_like(hidden)
    tokens = hidden.shape[0]
    chosen = top_k_index.T.reshape(-1)
    share = top_k_weights.T.reshape(-1)
    order = torch.argsort(chosen, stable=True)
    counts = torch.bincount(chosen, minlength=module.num_experts).tolist()
    total = torch.zeros_like(hidden)
    multiplied, multiplied_again = _layers(module, "gate_up_proj"), _layers(module, "down_proj")
    start = 0
    for expert, count in enumerate(counts):
        if count == 0:
            continue
        rows = order[start : start + count]
        start += count
        token = rows % tokens
        inputs = hidden[token]
        if listener is not None:
            listener("gate_up_proj", expert, inputs)
        inputs = rounder("gate_up_proj", expert, inputs)
        inner = module._apply_gate(multiplied(expert, inputs))
        if listener is not None:
            listener("down_proj", expert, inner)
        inner = rounder("down_proj", expert, inner)
        outputs = multiplied_again(expert, inner) * share[rows, None]
        total.index_add_(0, token, outputs.to(total.dtype))
    return total


def _layers(module: Any, parameter: str) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """A function of (expert, its inputs (tokens, columns)): what its matrix makes of them, (tokens, out)."""
    weights = getattr(module, parameter).unbind()  # all at once: so is the way back through them
    biases = getattr(module, parameter + _BIAS).unbind() if module.has_bias else None

    def through(expert: int, inputs: torch.Tensor) -> torch.Tensor:
        weight = weights[expert]
        made = _linear(inputs, weight.T if module.is_transposed else weight)
        return made if biases is None else made + biases[expert]

    return through


def _as_they_are(_parameter: str, _expert: int, inputs: torch.Tensor) -> torch.Tensor:
    return inputs


def _linear(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """inputs (tokens, columns) by weight (out, columns), transposed: (tokens, out).

    On a CPU oneDNN multiplies bfloat16, and keeps a compiled kernel for every number of rows that it meets. Each
    expert of each window has its own number, which grew to hundreds of MB: rows of zeros leave few numbers.
    """
    if inputs.dtype != torch.bfloat16 or inputs.device.type != "cpu":
        return functional.linear(inputs, weight)
    tokens = inputs.shape[0]
    padded = functional.pad(inputs, (0, 0, 0, -tokens % ROWS))
    return functional.linear(padded, weight)[:tokens]
