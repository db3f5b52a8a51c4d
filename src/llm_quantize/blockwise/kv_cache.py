"""Scales of the keys and values that the attention of a block would keep: found with the matrix after it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from typing import Any

import numpy.typing as npt
import torch

from llm_quantize.errors import NumericPolicyError, UnsupportedError
from llm_quantize.formats.packing import store_floats
from llm_quantize.grids.grid import to_storage
from llm_quantize.grids.inputs import calibrated
from llm_quantize.plan import MatrixPlan, TensorPlan
from llm_quantize.qtypes.inputs import InputGrid


@dataclass
class Largest:
    """The largest magnitudes of ``keys`` and ``values`` so far; below 0 where none was seen. Threads may share it: no
    order of windows changes it."""

    keys: float = -1.0
    values: float = -1.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def see(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keys and values of one window."""
        found = [float(one.detach().abs().amax()) for one in (keys, values)]
        with self.lock:
            self.keys, self.values = max(self.keys, found[0]), max(self.values, found[1])

    def fields(self, matrix: MatrixPlan, tensors: tuple[TensorPlan, ...]) -> list[npt.NDArray[Any]]:
        """The scales of keys and of values as ``tensors`` store them, those of ``matrix``'s plan.

        Raises UnsupportedError where attention told of none, NumericPolicyError where they are not finite.
        """
        if matrix.cache is None or min(self.keys, self.values) < 0:
            raise UnsupportedError(
                "the keys and values of this attention cannot be observed",
                tensor=matrix.name,
                remedy="leave --kv-cache out",
            )
        pairs = zip(tensors, (self.keys, self.values), strict=True)
        return [_scale(matrix.cache, tensor, largest) for tensor, largest in pairs]


def _scale(grid: InputGrid, tensor: TensorPlan, largest: float) -> npt.NDArray[Any]:
    """One scale, (1,): above 0 in its type, so that nothing is divided by 0."""
    kind = getattr(torch, tensor.qtype)
    whole = calibrated(replace(grid, static=True), largest).whole
    if whole is None or not torch.isfinite(torch.tensor(whole)):
        raise NumericPolicyError(
            "keys or values are not finite",
            tensor=tensor.name,
            expected="finite keys and values",
            found=largest,
            remedy="check the checkpoint with `llm-quantize info`; finished blocks are kept",
        )
    value = torch.tensor([max(whole, torch.finfo(kind).tiny)], dtype=torch.float32)
    return store_floats(to_storage(value, kind).numpy(), tensor.qtype)
