"""What a block has computed once and need not compute again.

Many modules of a block end in a matrix: attention returns what its output projection gives, an MLP what the last of its
matrices gives. Where a caller still knows what that matrix is given, all that the module does before it is skipped:

    module(...) = last matrix(what it is given)

The values are those of the whole way, bit for bit, as long as nothing before that matrix has changed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

__all__ = ["Ending", "Replay", "attach_endings", "detach_endings", "find_endings"]


@dataclass(frozen=True)
class Ending:
    """``module`` (its name in the block) returns what ``matrix`` gives, followed by ``nothing`` times None, or, with
    ``nothing`` None, alone. ``batched``: the matrix is given (1, tokens, columns), not (tokens, columns)."""

    module: str
    matrix: str
    nothing: int | None
    batched: bool


class Replay(threading.local):
    """What the last matrices of modules are given in this thread: {name of the matrix: (tokens, columns)}."""

    def __init__(self) -> None:
        self.given: Mapping[str, torch.Tensor] = {}

    @contextmanager
    def knowing(self, given: Mapping[str, torch.Tensor]) -> Iterator[None]:
        before, self.given = self.given, given
        try:
            yield
        finally:
            self.given = before


def find_endings(
    block: torch.nn.Module, matrices: Collection[str], dry_run: Callable[[torch.nn.Module], Any]
) -> tuple[Ending, ...]:
    """The modules of a block on the meta device that end in one of ``matrices``; of modules around one another
    the outermost. ``block`` is a copy that may be changed."""
    given: dict[str, torch.Tensor] = {}
    gave: dict[str, list[Any]] = {}
    found: dict[str, list[tuple[str, int | None]]] = {}

    def note(name: str, _module: Any, positional: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        gave.setdefault(name, []).append(output)
        if name in matrices:
            first = positional[0] if positional else next(iter(named.values()))
            given[name] = first
            return
        alone = not isinstance(output, tuple)
        first, rest = (output, ()) if alone else (output[0], output[1:])
        for matrix in matrices:
            inside = matrix.startswith(f"{name}.") and len(gave.get(matrix, ())) == 1 and first is gave[matrix][0]
            if inside and all(one is None for one in rest):
                found.setdefault(matrix, []).append((name, None if alone else len(rest)))

    for name, module in block.named_modules():
        if name:
            module.register_forward_hook(partial(note, name), with_kwargs=True)
    dry_run(block)
    endings = []
    for matrix, around in found.items():
        name, nothing = min(around, key=lambda one: len(one[0]))
        if len(gave[matrix]) == len(gave[name]) == 1 and given[matrix].ndim in (2, 3):
            endings.append(Ending(name, matrix, nothing, batched=given[matrix].ndim == 3))
    return tuple(endings)


def attach_endings(block: torch.nn.Module, endings: tuple[Ending, ...], replay: Replay) -> None:
    """Let the modules of ``endings`` skip what leads to their last matrix whenever ``replay`` knows what that is
    given."""
    for ending in endings:
        module: Any = block.get_submodule(ending.module)
        matrix = block.get_submodule(ending.matrix)
        module.forward = partial(_forward, module.forward, matrix, ending, replay)


def detach_endings(block: torch.nn.Module, endings: tuple[Ending, ...]) -> None:
    """Undo ``attach_endings``: modules that hold themselves would hold their weights until garbage is collected."""
    for ending in endings:
        vars(block.get_submodule(ending.module)).pop("forward", None)


def _forward(
    forward: Callable[..., Any], matrix: torch.nn.Module, ending: Ending, replay: Replay, *positional: Any, **named: Any
) -> Any:
    known = replay.given.get(ending.matrix)
    if known is None:
        return forward(*positional, **named)
    result = matrix(known[None] if ending.batched else known)
    return result if ending.nothing is None else (result, *[None] * ending.nothing)
