"""Which inputs of a block are collected together, from the names of its taps alone. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TypeVar

from llm_quantize.architectures.base import OutputTensor
from llm_quantize.io.statistics_layout import TapLike

AnyTap = TypeVar("AnyTap", bound=TapLike)


def routers(outputs: Iterable[OutputTensor]) -> frozenset[str]:
    """The source's tensors that choose experts, which see what all experts of their layer together see."""
    chosen = (output for output in outputs if output.name.endswith(".ffn_gate_inp.weight"))
    return frozenset(piece.source for output in chosen for piece in output.pieces)


def parent_tap(name: str, taps: Sequence[TapLike], routers: Collection[str]) -> str | None:
    """The tap that sees what all experts of the stack ``name`` together see: their router's, for the first stack of a
    block. The inputs of a later one are made by the experts themselves: None, though they may be as wide."""
    stacks = [tap for tap in taps if tap.matrices > 1]
    if stacks[0].name != name:
        return None
    found = (tap for tap in taps if tap.matrices == 1 and not tap.tensors.keys().isdisjoint(routers))
    return next((tap.name for tap in found if tap.columns == stacks[0].columns), None)


def stages(
    taps: Sequence[AnyTap], wanted: set[str], routers: Collection[str], *, sequential: bool
) -> Iterator[list[AnyTap]]:
    """The taps whose inputs are collected together: all at once, or one after the other; then the first stack of
    experts comes with what its router sees, which may have had a stage of its own before."""
    if not sequential:
        if any(tap.name in wanted for tap in taps):
            yield list(taps)
        return
    known = {tap.name: tap for tap in taps}
    for index, tap in enumerate(taps):
        group = [tap]
        if (parent := _parent_of(tap, taps, routers)) is not None:
            group = [known[parent], tap]
        elif index + 1 < len(taps) and tap.name == _parent_of(taps[index + 1], taps, routers):
            continue  # it comes with the stack
        if any(one.name in wanted for one in group):
            yield group


def _parent_of(tap: TapLike, taps: Sequence[TapLike], routers: Collection[str]) -> str | None:
    return parent_tap(tap.name, taps, routers) if tap.matrices > 1 else None
