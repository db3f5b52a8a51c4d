"""Weights under the names of the checkpoint, one tensor at a time, as torch tensors."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol, runtime_checkable

import torch

from llm_quantize.errors import MalformedInputError
from llm_quantize.models.base import Model
from llm_quantize.qtypes.inputs import InputGrid

_CHUNK_WEIGHTS = 1 << 20
_STORED = {"F16": torch.float16, "BF16": torch.bfloat16}


class Weights(Protocol):
    """Values for the tensors of a checkpoint, whatever they come from.

    ``names``: what ``read`` can give. ``read``: the tensor in the checkpoint's shape, on the CPU, in float32, float16
    or bfloat16. Threads may not share one.
    """

    @property
    def names(self) -> Collection[str]: ...

    def read(self, name: str) -> torch.Tensor: ...


@runtime_checkable
class FillsTensors(Protocol):
    """Weights that need no tensor of their own to fill another: less memory at the peak."""

    def read_into(self, name: str, out: torch.Tensor) -> None: ...


@runtime_checkable
class ReadsRows(Protocol):
    """Weights of which single rows can be read: an embedding need not be loaded whole."""

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor: ...


@runtime_checkable
class RoundsInputs(Protocol):
    """Weights of matrices whose inputs are rounded before they are multiplied: ``inputs`` says to what, by checkpoint
    tensor, and by expert where that is a stack of them; None: not at all."""

    def inputs(self, name: str, expert: int | None = None) -> InputGrid | None: ...


@runtime_checkable
class RoundsCache(Protocol):
    """Weights of a model whose keys and values are kept in few bits: ``cache`` says how those of the attention with
    the checkpoint tensors ``names`` are rounded, keys first; None: not at all, or not in a way that is followed."""

    def cache(self, names: Sequence[str]) -> tuple[InputGrid, InputGrid] | None: ...


class CheckpointWeights:
    """The weights of an opened checkpoint. FP8 is decoded with its scales to float32, F64 rounded to float32.

    Every method raises what ``Checkpoint.read_rows`` does: UnsupportedError (integers), IntegrityError (the file
    changed meanwhile), ResourceError, NumericPolicyError (F64 beyond float32).
    """

    def __init__(self, checkpoint: Model) -> None:
        self._checkpoint = checkpoint

    @property
    def names(self) -> Collection[str]:
        return self._checkpoint.tensors.keys()

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor: float16 and bfloat16 as they are stored, everything else float32."""
        info = self._checkpoint.tensors[name]
        whole = torch.empty(info.shape, dtype=_STORED.get(info.dtype, torch.float32))
        self.read_into(name, whole)
        return whole

    def read_into(self, name: str, out: torch.Tensor) -> None:
        """Fill ``out`` (contiguous, of the checkpoint's shape, any float type, any device), a few rows at a time."""
        info = self._checkpoint.tensors[name]
        if tuple(out.shape) != tuple(info.shape):
            raise ValueError(f"{name} has shape {tuple(info.shape)}, not {tuple(out.shape)}")
        rows, columns = self._checkpoint.matrix(name)
        target = out.view(rows, columns)
        if _STORED.get(info.dtype) == out.dtype and out.device.type == "cpu" and out.is_contiguous():
            self._checkpoint.raw_rows(name, 0, rows, buffer=target.view(torch.uint8).numpy().data)
            return
        step = max(1, _CHUNK_WEIGHTS // max(1, columns))
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            target[start:stop].copy_(self._rows(name, start, stop))

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Rows ``rows`` (int64, ascending, none twice) of a matrix: (len(rows), columns)."""
        columns = self._checkpoint.matrix(name)[1]
        wanted = rows.tolist()
        step = max(1, _CHUNK_WEIGHTS // max(1, columns))
        parts: list[torch.Tensor] = []
        at = 0
        while at < len(wanted):
            end = at + 1
            while end < len(wanted) and wanted[end] == wanted[end - 1] + 1 and end - at < step:
                end += 1
            parts.append(self._rows(name, wanted[at], wanted[end - 1] + 1))
            at = end
        return torch.cat(parts) if parts else self._rows(name, 0, 0)

    def _rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        stored = self._checkpoint.read_rows(name, start, stop)
        if not stored.flags.writeable:
            stored = stored.copy()
        if self._checkpoint.tensors[name].dtype == "BF16":
            return torch.from_numpy(stored.view("int16")).view(torch.bfloat16)
        return torch.from_numpy(stored)


class FiniteWeights(CheckpointWeights):
    """The same, with zeros for NaN and infinity: what a run that replaces them stores."""

    def read_into(self, name: str, out: torch.Tensor) -> None:
        super().read_into(name, out)
        out.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        return super().read_rows(name, rows).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def fill(weights: Weights, name: str, out: torch.Tensor) -> None:
    """Fill ``out`` with the tensor ``name``, cast to its type. Raises MalformedInputError for another shape."""
    if isinstance(weights, FillsTensors) and out.is_contiguous():
        weights.read_into(name, out)
        return
    value = weights.read(name)
    if value.shape != out.shape:
        raise MalformedInputError(
            "these weights have another shape than the model",
            tensor=name,
            expected=tuple(out.shape),
            found=tuple(value.shape),
        )
    out.copy_(value)
