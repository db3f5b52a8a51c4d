"""Where the inputs of a block's matrices can be seen: found once without data, reported while a block runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from llm_quantize.errors import UnsupportedError
from llm_quantize.streams import experts
from llm_quantize.streams.kv_cache import CacheSink
from llm_quantize.streams.names import Places

_TRANSPOSED = "Conv1D"


@dataclass(frozen=True)
class Tap:
    """Matrices that multiply the same input, seen once. ``name``: of the first of them in transformers' model.

    ``columns``: of the input. ``matrices``: 1, or the number of experts. ``tensors``: {checkpoint tensor: the matrix
    it is (an expert), None = all of them in order}; only matrices, no biases.
    """

    name: str
    columns: int
    matrices: int
    tensors: Mapping[str, int | None]


Sink = Callable[[Tap, int, torch.Tensor], None]
"""(tap, matrix, inputs (tokens, columns) in the network's dtype). The tensor may be changed after the call."""


@dataclass(frozen=True)
class TapPoint:
    """``tap`` is seen at the input of ``module`` (its name in the block), before its parameter ``parameter``."""

    tap: Tap
    module: str
    parameter: str


class Observer(threading.local):
    """Who listens in this thread, to inputs and to keys and values."""

    def __init__(self) -> None:
        self.sink: Sink | None = None
        self.cache: CacheSink | None = None

    @contextmanager
    def listening(self, sink: Sink, cache: CacheSink | None = None) -> Iterator[None]:
        before = self.sink, self.cache
        self.sink, self.cache = sink, cache
        try:
            yield
        finally:
            self.sink, self.cache = before


@dataclass(frozen=True)
class _Call:
    """``parameter`` of ``module`` was used. ``identity``: equal for calls with one input; ``given`` is kept so that
    its storage is not used again."""

    module: str
    parameter: str
    identity: tuple[object, ...]
    given: torch.Tensor


def find_points(
    block: torch.nn.Module, prefix: str, places: Places, dry_run: Callable[[torch.nn.Module], Any]
) -> tuple[TapPoint, ...]:
    """The taps of a block on the meta device, in the order of their use. ``prefix``: the block's name in the model.

    ``block`` is a copy that may be changed. Raises UnsupportedError if a matrix of the block has no tap: nothing may
    be left unseen in silence.
    """
    calls: list[_Call] = []
    for name, module in block.named_modules():
        if experts.is_experts(module):
            note = partial(_note_expert, calls, name)
            setattr(module, experts.LISTENER, note)
        elif is_matrix(module):
            module.register_forward_pre_hook(partial(_note, calls, name), with_kwargs=True)
    dry_run(block)
    grouped: dict[tuple[object, ...], list[tuple[str, str]]] = {}
    for call in calls:
        members = grouped.setdefault(call.identity, [])
        if (call.module, call.parameter) not in members:
            members.append((call.module, call.parameter))
    points = tuple(_point(block, prefix, places, members) for members in grouped.values())
    _check_complete(block, {member for members in grouped.values() for member in members}, prefix)
    return points


def attach(block: torch.nn.Module, points: tuple[TapPoint, ...], observer: Observer) -> None:
    """Make ``block`` tell ``observer`` what its matrices are given."""
    for point in points:
        module = block.get_submodule(point.module)
        if point.parameter == "weight":
            module.register_forward_pre_hook(partial(_report, point.tap, observer), with_kwargs=True)
        elif not hasattr(module, experts.LISTENER):
            taps = {other.parameter: other.tap for other in points if other.module == point.module}
            setattr(module, experts.LISTENER, partial(_report_expert, taps, observer))


def is_matrix(module: torch.nn.Module) -> bool:
    """A linear layer, GPT-2's transposed one, or a router: anything whose own weight is a matrix."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.nn.Parameter) and weight.ndim == 2 and not isinstance(module, torch.nn.Embedding)


def columns_of(module: Any) -> int:
    """The length of the inputs of a module for which ``is_matrix`` holds."""
    transposed = type(module).__name__ == _TRANSPOSED
    return int(module.weight.shape[0 if transposed else 1])


def _first(positional: tuple[Any, ...], named: Mapping[str, Any]) -> torch.Tensor:
    given = positional[0] if positional else next(iter(named.values()))
    if not isinstance(given, torch.Tensor):
        raise TypeError(f"a matrix was given {type(given).__name__}, not a tensor")
    return given


def _note(calls: list[_Call], name: str, _module: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
    given = _first(positional, named)
    # One input is one tensor, or views of the whole of it that nothing has written to in between.
    storage = given.untyped_storage()._cdata
    identity = (storage, given.storage_offset(), given.shape[-1], given.numel(), given._version)
    calls.append(_Call(name, "weight", identity, given))


def _note_expert(calls: list[_Call], name: str, parameter: str, _expert: int, given: torch.Tensor) -> None:
    calls.append(_Call(name, parameter, (name, parameter), given))


def _report(tap: Tap, observer: Observer, _module: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
    if observer.sink is not None:
        observer.sink(tap, 0, _first(positional, named).reshape(-1, tap.columns))


def _report_expert(taps: Mapping[str, Tap], observer: Observer, parameter: str, expert: int, given: Any) -> None:
    if observer.sink is not None:
        observer.sink(taps[parameter], expert, given)


def _point(block: torch.nn.Module, prefix: str, places: Places, members: list[tuple[str, str]]) -> TapPoint:
    tensors: dict[str, int | None] = {}
    for name, parameter in members:
        tensors |= {place.name: place.expert for place in places[f"{prefix}.{name}.{parameter}"]}
    name, parameter = members[0]
    module: Any = block.get_submodule(name)
    value = getattr(module, parameter)
    if value.ndim == 3:
        tap = Tap(f"{prefix}.{name}.{parameter}", experts.columns_of(module, parameter), value.shape[0], tensors)
    else:
        tap = Tap(f"{prefix}.{name}", columns_of(module), 1, tensors)
    return TapPoint(tap, name, parameter)


def _check_complete(block: torch.nn.Module, tapped: set[tuple[str, str]], prefix: str) -> None:
    for name, value in block.named_parameters():
        module, _, parameter = name.rpartition(".")
        if experts.is_convolution(block.get_submodule(module)) or parameter.endswith("bias"):
            continue  # experts have their biases one below the other
        if value.ndim >= 2 and (module, parameter) not in tapped:
            raise UnsupportedError(
                "the input of a matrix of this model cannot be observed",
                tensor=f"{prefix}.{name}",
                remedy="this model cannot be calibrated by this version",
            )
