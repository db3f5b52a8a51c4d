"""Which tensor of a checkpoint fills which part of which parameter of transformers' model.

The names are brought to the model's by transformers' own conversion, so prefixes, old names and experts that files
hold singly are understood as ``from_pretrained`` understands them; but a parameter that no tensor fills is an error
here, where transformers would make up random values.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from llm_quantize.errors import MalformedInputError, UnsupportedError
from llm_quantize.streams.weights import Weights, fill


@dataclass(frozen=True)
class Slot:
    """The checkpoint tensor ``name`` is ``rows`` (start, stop; None = all) of ``expert`` (None = there are none, or
    all) of a parameter. ``shape``: of the tensor."""

    name: str
    shape: tuple[int, ...]
    expert: int | None = None
    rows: tuple[int, int] | None = None

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """The view of ``parameter`` that this tensor fills."""
        view = parameter if self.expert is None else parameter[self.expert]
        return view if self.rows is None else view[self.rows[0] : self.rows[1]]


Places = Mapping[str, tuple[Slot, ...]]
"""Parameter -> what fills it."""


def find_places(
    model: Any,
    state: Mapping[str, torch.Tensor],
    tied: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    left_out: Collection[str],
) -> Places:
    """Places for every parameter that the checkpoint fills. ``shapes``: of the checkpoint's tensors.

    Tensors of ``left_out`` fill nothing. A tied parameter without tensors of its own has those of the one it is tied
    to. Raises MalformedInputError (a tensor that fills nothing, or has another shape than its place, or two for one
    place), UnsupportedError (a conversion of transformers that is not understood).
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    collected: dict[str, dict[str | None, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(set(shapes) - set(left_out), key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in state:
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, state)
        if target not in state:
            raise MalformedInputError(
                "transformers' form of this model has no place for a tensor of the checkpoint",
                tensor=name,
                remedy="the checkpoint may be of a newer version of its family; update transformers",
            )
        collected[target][pattern].append(name)
    places: dict[str, tuple[Slot, ...]] = {}
    for target, groups in collected.items():
        pattern = next(iter(groups))
        if pattern is None:
            found = [Slot(name, shapes[name]) for names in groups.values() for name in names]
        else:
            found = _experts(target, by_pattern[pattern], groups, shapes)
        places[target] = tuple(found)
        _check(target, tuple(state[target].shape), places[target])
    for one, other in [*tied.items(), *((b, a) for a, b in tied.items())]:
        if one not in places and other in places:
            places[one] = places[other]
    return places


def _experts(
    target: str, converter: Any, groups: Mapping[str | None, list[str]], shapes: Mapping[str, tuple[int, ...]]
) -> list[Slot]:
    """Places in a parameter that stacks experts, each perhaps the rows of several matrices one below the other."""
    steps = [(type(step).__name__, getattr(step, "dim", None)) for step in converter.operations]
    if steps not in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
        raise UnsupportedError(
            "transformers converts tensors of this model in a way that is not understood",
            tensor=target,
            expected="experts stacked, gate and up joined",
            found=repr(converter.operations)[:200],
            remedy="this model cannot be calibrated or measured by this version",
        )
    found: list[Slot] = []
    start = 0
    for pattern in converter.source_patterns:
        names = groups.get(pattern, [])
        rows = shapes[names[0]][0] if names else 0
        found += [Slot(name, shapes[name], expert, (start, start + rows)) for expert, name in enumerate(names)]
        start += rows
    return found


def _check(target: str, shape: tuple[int, ...], places: tuple[Slot, ...]) -> None:
    """Raise MalformedInputError unless ``places`` fill a parameter of ``shape`` exactly."""
    whole = torch.empty(shape, device="meta")
    filled = 0
    for place in places:
        fits = place.expert is None or place.expert < shape[0]
        view = tuple(place.of(whole).shape) if fits else ()
        if view != place.shape:
            raise MalformedInputError(
                "a tensor of the checkpoint does not fit its place in the model",
                tensor=place.name,
                expected=f"shape {view} in {target}",
                found=f"shape {place.shape}",
            )
        filled += place.of(whole).numel()
    if filled != whole.numel():
        raise MalformedInputError(
            "the checkpoint does not fill a parameter of the model exactly",
            tensor=places[0].name,
            expected=f"{whole.numel()} weights for {target}",
            found=filled,
        )


def require(places: Places, parameters: Iterable[str]) -> None:
    """Raise MalformedInputError unless something fills each parameter."""
    for name in parameters:
        if name not in places:
            raise MalformedInputError(
                "the checkpoint lacks a weight that the model needs",
                tensor=name,
                remedy="the checkpoint is incomplete, or config.json describes another model",
            )


def load(weights: Weights, places: tuple[Slot, ...], like: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A parameter shaped and typed as ``like``, on ``device``, filled from ``weights``.

    Raises MalformedInputError: ``weights`` lacks a tensor, or has it in another shape.
    """
    values = torch.empty(like.shape, dtype=like.dtype, device=device)
    for place in places:
        if place.name not in weights.names:
            raise MalformedInputError("these weights lack a tensor that the model needs", tensor=place.name)
        fill(weights, place.name, place.of(values))
    return values
