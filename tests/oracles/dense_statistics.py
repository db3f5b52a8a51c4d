"""The slow, obvious twin of calibration: transformers' whole model, hooks on its modules, float64 sums at the end.

Nothing here knows blocks, taps or pieces: the inputs of every module that multiplies are kept whole, and names come
from the gguf package's own table.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch

from tests.tiny_models import auto_class


@dataclass(frozen=True)
class Dense:
    """Of one tensor: tokens (matrices,), and over them, float64 (matrices, columns): sum of x^2, sum of x, max |x|;
    ``hessian``: (matrices, columns, columns)."""

    counts: np.ndarray
    sum_squares: np.ndarray
    sums: np.ndarray
    absmax: np.ndarray
    hessian: np.ndarray


def dense_statistics(directory: Path, windows: torch.Tensor, arch: gguf.MODEL_ARCH) -> dict[str, Dense]:
    """GGUF tensor name -> statistics over ``windows`` (n, length) of the model in ``directory``, run in float32."""
    model = auto_class(directory).from_pretrained(directory, dtype=torch.float32).eval()
    seen: dict[str, dict[int, list[torch.Tensor]]] = defaultdict(lambda: defaultdict(list))
    matrices: dict[str, int] = {}
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    for path, module in model.named_modules():
        kind = type(module).__name__
        if kind.endswith("Experts"):
            _hook_experts(path, module, seen, matrices)
        elif isinstance(module, torch.nn.Linear) or kind == "Conv1D" or kind.endswith("Router"):
            name = names.get_name(path)
            if name is None:
                continue
            matrices[name] = 1

            def keep(_module: object, given: tuple[torch.Tensor, ...], name: str = name) -> None:
                seen[name][0].append(given[0].reshape(-1, given[0].shape[-1]).clone())

            module.register_forward_pre_hook(keep)
    with torch.no_grad():
        for window in windows:
            model(input_ids=window[None])
    return {f"{name}.weight": _sums(found, matrices[name]) for name, found in seen.items()}


def _hook_experts(path: str, module: torch.nn.Module, seen: dict, matrices: dict[str, int]) -> None:
    """Each expert's inputs, by asking for each token and each of its choices, one after the other."""
    layer = next(part for part in path.split(".") if part.isdigit())
    names = [f"blk.{layer}.ffn_{part}_exps" for part in ("gate", "up", "down")]
    matrices.update(dict.fromkeys(names, module.gate_up_proj.shape[0]))

    def keep(module: torch.nn.Module, given: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor]) -> None:
        hidden, index = (*given, *named.values())[:2]
        for token, row in enumerate(hidden):
            for expert in index[token].tolist():
                gate, up = (module.gate_up_proj[expert] @ row).chunk(2)
                inner = module.act_fn(gate) * up
                for name, value in zip(names, (row, row, inner), strict=True):
                    seen[name][expert].append(value[None].clone())

    module.register_forward_pre_hook(keep, with_kwargs=True)


def _sums(found: dict[int, list[torch.Tensor]], matrices: int) -> Dense:
    columns = next(iter(found.values()))[0].shape[1]
    empty = np.zeros((0, columns))
    inputs = [torch.cat(found[m]).double().numpy() if m in found else empty for m in range(matrices)]
    return Dense(
        counts=np.array([len(x) for x in inputs]),
        sum_squares=np.stack([(x * x).sum(0) for x in inputs]),
        sums=np.stack([x.sum(0) for x in inputs]),
        absmax=np.stack([np.abs(x).max(0, initial=0) for x in inputs]),
        hessian=np.stack([x.T @ x for x in inputs]),
    )
