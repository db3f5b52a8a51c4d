"""A model of transformers without weights, its forward cut where blocks begin and end.

The model is built on the meta device. Its blocks are taken out and stand-ins put in their place; what a block is
called with (masks, rotary positions) is learned by running the model's own forward over stand-ins, and the arithmetic
before the first block and after the last one is that forward itself. Nothing here knows a family by name.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from llm_quantize.errors import UnsupportedError
from llm_quantize.streams import experts

_DRY = 2  # tokens of a run that only shows who calls whom

_TALKS = "transformers.integrations.hub_kernels"
"""The logger that says of delta rules and short convolutions that torch computes them, which is slow."""
_SLOW = re.compile(r"reference\s+PyTorch\s+implementation")

Visit = Callable[[int, torch.Tensor, tuple[Any, ...], dict[str, Any]], torch.Tensor]


@dataclass(frozen=True)
class Arguments:
    """What a block is called with besides the hidden states."""

    positional: tuple[Any, ...]
    named: Mapping[str, Any]


class Reached(Exception):  # noqa: N818 - not an error
    """The forward came to the place where it was to end."""


class Station(torch.nn.Module):
    """Stands where a block stood. ``visit(index, hidden, positional, named)`` says what it returns.

    It has the block's plain attributes (some models ask a block for its type of attention) and none of its weights.
    """

    def __init__(self, index: int, block: torch.nn.Module) -> None:
        super().__init__()
        self.station = index
        self.visit: Visit = lambda _index, hidden, _positional, _named: hidden
        self.gives_tuple = False
        for name, value in vars(block).items():
            if isinstance(value, (str, int, bool)) and not name.startswith("_") and name != "training":
                setattr(self, name, value)

    def forward(self, *positional: Any, **named: Any) -> Any:
        hidden = positional[0] if positional else named.pop("hidden_states")
        result = self.visit(self.station, hidden, positional[1:], named)
        return (result,) if self.gives_tuple else result


class Skeleton:
    """The model on the meta device. ``model``: with stations for blocks; never run, only copied (``copy``).
    ``blocks``: the blocks, on the meta device. ``prefix``: the name of their list. ``state``: every parameter and
    persistent buffer of the model by name. ``tied``: {name: the name whose values it takes}. ``before``/``after``:
    the parameters used before the first and after the last block. ``output``: the module that gives logits.
    ``buffers``: which of ``model`` are real, on ``device``.
    """

    def __init__(self, config: Mapping[str, Any], n_blocks: int, dtype: torch.dtype, device: str) -> None:
        self.dtype, self.device = dtype, torch.device(device)
        self.model: Any = _build(config, dtype)
        self.state: dict[str, torch.Tensor] = dict(self.model.state_dict())
        self.tied: dict[str, str] = dict(self.model.all_tied_weights_keys)
        self.prefix, blocks = _find_blocks(self.model, n_blocks)
        self.blocks: list[torch.nn.Module] = list(blocks)
        for index, block in enumerate(self.blocks):
            blocks[index] = Station(index, block)
        self.restore_buffers(self.model)
        self._arguments: dict[int, list[Arguments]] = {}
        self._set_tuples(self._probe(_DRY, stop=0)[0])
        self._dry: list[Arguments] | None = None
        self.before, self.after, self.output = self._edges()

    def restore_buffers(self, root: torch.nn.Module) -> None:
        """Give every buffer below ``root`` that no file holds its values again, as transformers initialises it."""
        for module in root.modules():
            lost = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
            if not any(name in module._non_persistent_buffers_set for name in lost):
                continue
            for name in lost:
                setattr(module, name, torch.empty_like(module.get_buffer(name), device="cpu"))
            self.model._init_weights(module)
            for name in lost:
                setattr(module, name, module.get_buffer(name).to(self.device))

    def copy(self) -> Any:
        """The model with its stations, to be run: a module whose weights are not loaded gives zeros (an embedding,
        a matrix) or what it is given (a norm), unless its weights are put in (``put``)."""
        model = copy.deepcopy(self.model)
        for module in model.modules():
            if next(module.parameters(recurse=False), None) is not None:
                module.forward = partial(_unless_meta, module, type(module).forward)
        return model

    def stations(self, model: Any) -> list[Station]:
        """The stations of a copy."""
        return list(model.get_submodule(self.prefix))

    def arguments(self, length: int) -> list[Arguments]:
        """What each block is called with for one window of ``length`` tokens; the last length is kept."""
        found = self._arguments.get(length)
        if found is None:
            found = self._probe(length, stop=len(self.blocks) - 1)
            self._arguments = {length: found}
        return found

    def _probe(self, length: int, stop: int) -> list[Arguments]:
        found: list[Arguments] = []

        def visit(index: int, hidden: torch.Tensor, positional: tuple[Any, ...], named: dict[str, Any]) -> torch.Tensor:
            found.append(Arguments(positional, dict(named)))
            if index == stop:
                raise Reached
            return hidden

        model = self.copy()
        for station in self.stations(model):
            station.visit = visit
        try:
            self.run(model, input_ids=torch.zeros((1, length), dtype=torch.int64, device=self.device))
        except Reached:
            return found
        raise UnsupportedError(
            "transformers does not call this model's blocks one after another",
            expected=f"{stop + 1} blocks called",
            found=len(found),
            remedy="this model cannot be calibrated or measured by this version",
        )

    def _set_tuples(self, arguments: Arguments) -> None:
        """Learn from block 0 on the meta device whether blocks give their result alone or in a tuple."""
        gives_tuple = isinstance(self.dry_run(self.blocks[0], arguments), tuple)
        for station in self.stations(self.model):
            station.gives_tuple = gives_tuple

    def dry_arguments(self) -> list[Arguments]:
        """What each block is called with in a dry run."""
        if self._dry is None:
            self._dry = self._probe(_DRY, stop=len(self.blocks) - 1)
        return self._dry

    def dry_run(self, block: torch.nn.Module, arguments: Arguments) -> Any:
        """Call ``block``, all of it on the meta device: nothing is computed, only who calls whom is seen."""
        width = self.model.get_input_embeddings().embedding_dim
        hidden = torch.empty((1, _DRY, width), dtype=self.dtype, device="meta")
        with torch.no_grad():
            return block(hidden, *_moved(arguments.positional, "meta"), **_moved(dict(arguments.named), "meta"))

    def _edges(self) -> tuple[tuple[str, ...], tuple[str, ...], str]:
        """The parameters used before the first block, those used after the last one, and the output's module."""
        model = self.copy()
        called: list[str] = []
        for name, module in model.named_modules():
            if next(module.parameters(recurse=False), None) is not None:
                module.register_forward_pre_hook(lambda _module, _inputs, name=name: called.append(name))
        border: list[int] = []

        def visit(_index: int, hidden: torch.Tensor, _positional: Any, _named: Any) -> torch.Tensor:
            border.append(len(called))
            return hidden

        for station in self.stations(model):
            station.visit = visit
        self.run(model, input_ids=torch.zeros((1, _DRY), dtype=torch.int64, device=self.device))
        before, after = called[: border[0]], called[border[-1] :]
        if border[0] != border[-1] or not before or not after:
            raise UnsupportedError(
                "transformers computes something between the blocks of this model",
                expected="an embedding, blocks, an output",
                found=", ".join(called)[:300],
                remedy="this model cannot be calibrated or measured by this version",
            )
        return self._parameters(before), self._parameters(after), after[-1]

    def _parameters(self, modules: list[str]) -> tuple[str, ...]:
        names = (
            f"{module}.{name}"
            for module in dict.fromkeys(modules)
            for name, _ in self.model.get_submodule(module).named_parameters(recurse=False)
        )
        return tuple(names)

    def run(self, model: Any, **inputs: torch.Tensor) -> Any:
        """The forward of a copy, without a cache. Returns transformers' output."""
        with torch.inference_mode():
            return model(**inputs, use_cache=False)


def put(module: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    """Make ``value`` the parameter ``name`` of ``module``, that of no other module it was tied to."""
    module._parameters[name] = torch.nn.Parameter(value, requires_grad=False)


def _build(config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """transformers' causal model for config.json's values, on the meta device, for inference."""
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    values = {name: value for name, value in config.items() if name != "quantization_config"}
    experts.register()
    logging.getLogger(_TALKS).addFilter(_is_news)
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        read = CONFIG_MAPPING[values["model_type"]].from_dict(copy.deepcopy(values))
        with torch.device("meta"):
            known = type(read) in transformers.AutoModelForCausalLM._model_mapping
            auto = transformers.AutoModelForCausalLM if known else transformers.AutoModelForImageTextToText
            model = auto.from_config(read, dtype=dtype, experts_implementation=experts.IMPLEMENTATION)
    except (ValueError, TypeError, KeyError, AssertionError, ImportError, StrictDataclassError) as error:
        raise UnsupportedError(
            "transformers cannot build this model from its configuration",
            found=f"{type(error).__name__}: {error}"[:300],
            remedy="check config.json, or update transformers",
        ) from error
    finally:
        transformers.utils.logging.set_verbosity(before)
    return model.eval()


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a message tells more than that transformers' own torch code computes, which is what is wanted here."""
    return _SLOW.search(record.getMessage()) is None


def _find_blocks(model: Any, n_blocks: int) -> tuple[str, torch.nn.ModuleList]:
    """The list of ``n_blocks`` blocks of the text model (not of what reads pictures), and its name."""
    inside = {id(module) for module in model.get_decoder().modules()}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == n_blocks and id(module) in inside:
            return name, module
    raise UnsupportedError(
        "the blocks of this model cannot be found in transformers' form of it",
        expected=f"a list of {n_blocks} blocks",
        found=type(model).__name__,
        remedy="this model cannot be calibrated or measured by this version",
    )


def _unless_meta(module: Any, forward: Callable[..., Any], *positional: Any, **named: Any) -> Any:
    """The module's forward; or, without weights, zeros of the result's shape, or the input itself."""
    if not any(value.is_meta for value in module.parameters(recurse=False)):
        return forward(module, *positional, **named)
    given = positional[0] if positional else next(iter(named.values()))
    if isinstance(module, torch.nn.Embedding):
        return torch.zeros((*given.shape, module.embedding_dim), dtype=module.weight.dtype, device=given.device)
    if isinstance(module, torch.nn.Linear):
        return given.new_zeros((*given.shape[:-1], module.out_features))
    return given


def _moved(value: Any, device: str | torch.device) -> Any:
    """``value`` with every tensor in it on ``device``."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(one, device) for one in value)
    if isinstance(value, dict):
        return {name: _moved(one, device) for name, one in value.items()}
    return value


def copied(value: Any) -> Any:
    """``value`` with a copy of every tensor in it."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, (tuple, list)):
        return type(value)(copied(one) for one in value)
    if isinstance(value, dict):
        return {name: copied(one) for name, one in value.items()}
    return value
