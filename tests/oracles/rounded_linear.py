"""transformers with the arithmetic of llama.cpp's CPU kernels: weights as the file holds them, activations rounded.

llama.cpp multiplies a BF16 or Q8_0 matrix with activations that are first rounded to the same type (each row, in
blocks along it, by the same rule). F32 matrices and attention scores are not rounded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import gguf
import torch

# GGUF keeps these in F32.
_ROUTERS = ("mlp.gate.weight", "block_sparse_moe.gate.weight", "moe.router.weight", "shared_expert_gate.weight")


def rounded(values: torch.Tensor, qtype: str) -> torch.Tensor:
    """``values`` through the type and back, along the last dimension; as they are where it is no whole blocks."""
    kind = gguf.GGMLQuantizationType[qtype]
    if values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        return values
    plain = values.detach().float().contiguous().numpy()
    packed = gguf.quants.quantize(plain.reshape(-1, plain.shape[-1]), kind)
    return torch.from_numpy(gguf.quants.dequantize(packed, kind).reshape(plain.shape).copy())


@contextlib.contextmanager
def rounding(model: Any, qtype: str) -> Iterator[None]:
    """Inside, ``model`` (of transformers) computes as llama.cpp does with a file whose matrices are ``qtype``."""
    storages: set[int] = set()
    kept: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[qtype]][0]
    convolutions = {id(m.weight) for m in model.modules() if type(m).__name__ == "Conv1D"}
    for name, value in model.named_parameters():
        router = name.endswith(_ROUTERS)
        if value.ndim < 2 or router or name.endswith(("wpe.weight", "conv1d.weight")):
            continue
        swapped = id(value) in convolutions
        rows = value.detach().t() if swapped else value.detach()
        if rows.shape[-1] % block:
            continue
        kept.append((value, value.detach().clone()))
        new = rounded(rows, qtype)
        value.data.copy_(new.t() if swapped else new)
        storages.add(value.untyped_storage().data_ptr())
    linear = torch.nn.functional.linear

    def rounded_linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if weight.untyped_storage().data_ptr() in storages:
            input = rounded(input, qtype)
        return linear(input, weight, bias)

    hooks = [
        module.register_forward_pre_hook(lambda _, given: (rounded(given[0], qtype), *given[1:]))
        for module in model.modules()
        if type(module).__name__ in ("Conv1D", "FalconLinear")
        and module.weight.untyped_storage().data_ptr() in storages
    ]
    torch.nn.functional.linear = rounded_linear
    try:
        yield
    finally:
        torch.nn.functional.linear = linear
        for hook in hooks:
            hook.remove()
        for value, before in kept:
            value.data.copy_(before)
