"""A model run block by block: one decoder block in memory at a time, every window through it, then the next.

The logits are those of transformers' whole forward: the same modules, called with the same arguments.

    network = open_network(source, dtype="float32")
    states = list(network.embed(weights, windows))
    for index in range(network.n_blocks):
        with network.block(index, weights) as block:
            states = [block(state) for state in states]
    with network.head(weights) as head:
        logits = head(states[0])
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch

from llm_quantize.errors import MalformedInputError, UnsupportedError, UsageError
from llm_quantize.models.opening import Source
from llm_quantize.options import DEVICES
from llm_quantize.streams.kv_cache import CacheSink, watch
from llm_quantize.streams.model import Arguments, Reached, Skeleton, copied, held, put
from llm_quantize.streams.names import Slot, find_places, load, require
from llm_quantize.streams.replay import Ending, Replay, attach_endings, detach_endings, find_endings
from llm_quantize.streams.rounding import round_inputs
from llm_quantize.streams.sizes import refuse_side_inputs
from llm_quantize.streams.taps import Observer, Sink, Tap, TapPoint, attach, columns_of, find_points
from llm_quantize.streams.weights import ReadsRows, Weights

__all__ = ["Block", "Head", "Network", "Sink", "Tap", "open_network", "require_device"]

Part = int | Literal["embedding", "head"]


def open_network(source: Source, *, dtype: Literal["float32", "bfloat16"], device: str = "cpu") -> Network:
    """transformers' model of ``source``, without weights, to be run in ``dtype`` on ``device`` (torch's name).

    Raises UnsupportedError (transformers' form of the model cannot be cut into blocks, or ``device`` is not here),
    UsageError (no such kind of device), MalformedInputError (the checkpoint lacks a weight of that form, or has one too
    many).
    """
    refuse_side_inputs(source)
    require_device(device)
    return Network(source, getattr(torch, dtype), device)


def require_device(device: str) -> None:
    """Raise UsageError for a device of no known kind, UnsupportedError for one that is not here."""
    kind, colon, number = device.partition(":")
    if kind not in DEVICES or (colon and not number.isdecimal()):
        raise UsageError("there is no such device", expected=", ".join(DEVICES), found=device)
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if int(number or 0) >= counts[kind]:
        raise UnsupportedError(
            "this device is not here, or this torch was built without it",
            expected=device,
            found=f"{counts[kind]} {kind} devices",
            remedy="leave --device out, or install a torch that is built for it",
        )


class Network:
    """``n_blocks``, ``width`` (of the hidden states), ``vocab_size`` (rows of the output). Hidden states are in the
    network's dtype on the CPU, logits float32 on the CPU. Threads may share a network."""

    def __init__(self, source: Source, dtype: torch.dtype, device: str) -> None:
        config = source.checkpoint.config
        self._skeleton = Skeleton(config, source.architecture.hyper.n_layer, dtype, device)
        shapes = {name: tuple(info.shape) for name, info in source.checkpoint.tensors.items()}
        skeleton = self._skeleton
        self._places = find_places(skeleton.model, skeleton.state, skeleton.tied, shapes, source.left_out)
        self._lock = threading.Lock()
        self._points: dict[int, tuple[TapPoint, ...]] = {}
        self._endings: dict[int, tuple[Ending, ...]] = {}
        self.n_blocks = len(skeleton.blocks)
        self.width = source.architecture.hyper.embedding_length
        self.vocab_size = int(skeleton.model.get_submodule(skeleton.output).weight.shape[0])
        parts: list[Part] = [*range(self.n_blocks), "embedding", "head"]
        parameters = [name for part in parts for name in self._parameters(part)]
        require(self._places, parameters)
        used = {place.name for name in parameters for place in self._places[name]}
        for name in shapes:
            if name not in used and name not in source.left_out:
                raise MalformedInputError("no part of the model uses a tensor of the checkpoint", tensor=name)

    def _prefix(self, index: int) -> str:
        return f"{self._skeleton.prefix}.{index}"

    def _parameters(self, part: Part) -> tuple[str, ...]:
        """The parameters of a part, and buffers that checkpoints hold, under their names in the model."""
        if part == "embedding":
            return self._skeleton.before
        if part == "head":
            return self._skeleton.after
        block = self._skeleton.blocks[part]
        names = dict.fromkeys(name for name, _ in block.named_parameters()) | dict.fromkeys(block.state_dict())
        return tuple(f"{self._prefix(part)}.{name}" for name in names)

    def bytes(self, part: Part) -> int:
        """Bytes of a part's weights when loaded. ``part``: a block's index, "embedding" (whole) or "head"."""
        state = self._skeleton.state
        return sum(state[name].numel() * state[name].element_size() for name in self._parameters(part))

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights and hidden states."""
        return self._skeleton.dtype

    @property
    def device(self) -> torch.device:
        """Where the model is run."""
        return self._skeleton.device

    @property
    def eager(self) -> bool:
        """Whether attention computes the scores of all heads at once, as families without another way do."""
        return bool(self._skeleton.model.config.get_text_config()._attn_implementation == "eager")

    def tensors(self, part: Part) -> tuple[str, ...]:
        """The checkpoint tensors of a part; a tied output has the embedding's."""
        names = (place.name for parameter in self._parameters(part) for place in self._places[parameter])
        return tuple(dict.fromkeys(names))

    def _put(self, model: torch.nn.Module, parameter: str, weights: Weights, prefix: str = "") -> None:
        path, _, name = parameter.removeprefix(prefix).rpartition(".")
        like = self._skeleton.state[parameter]
        put(model.get_submodule(path), name, load(weights, self._places[parameter], like, self._skeleton.device))

    def embed(self, weights: Weights, windows: torch.Tensor) -> Iterator[torch.Tensor]:
        """The hidden states (length, width) entering block 0, window by window. ``windows``: int64 (n, length).

        Of a table whose rows can be read singly, only those that occur are loaded.
        """
        skeleton = self._skeleton
        if windows.numel() and not 0 <= int(windows.min()) <= int(windows.max()) < self._embedding_rows():
            raise UsageError(
                "a token id is beyond the model's embedding",
                expected=f"0..{self._embedding_rows() - 1}",
                found=f"{int(windows.min())}..{int(windows.max())}",
                remedy="the text must be tokenized with this model's own tokenizer",
            )
        used = torch.unique(windows)
        model = skeleton.copy()
        table = model.get_input_embeddings()
        for parameter in skeleton.before:
            path, _, name = parameter.rpartition(".")
            places = self._places[parameter]
            if model.get_submodule(path) is table and isinstance(weights, ReadsRows) and len(places) == 1:
                rows = weights.read_rows(places[0].name, used)
                put(table, name, rows.to(device=skeleton.device, dtype=skeleton.state[parameter].dtype))
                table.padding_idx = None
                windows = torch.searchsorted(used, windows)
            else:
                self._put(model, parameter, weights)
        reached: list[torch.Tensor] = []
        stop = _Stop(reached)
        for station in skeleton.stations(model):
            station.visit = stop
        for window in windows:
            try:
                skeleton.run(model, input_ids=window[None].to(skeleton.device))
            except Reached:
                yield reached.pop()[0].cpu()

    def _embedding_rows(self) -> int:
        return int(self._skeleton.model.get_input_embeddings().num_embeddings)

    @contextmanager
    def block(self, index: int, weights: Weights) -> Iterator[Block]:
        """Block ``index`` with its weights loaded; they are freed on leaving. Several may be open at once."""
        points = self._tap_points(index)
        skeleton = self._skeleton
        module = copy.deepcopy(skeleton.blocks[index])
        skeleton.restore_buffers(module)
        observer = Observer()
        attach(module, points, observer)
        prefix = self._prefix(index) + "."
        watch(module, prefix, self._places, self._parameters(index), weights, lambda: observer.cache)
        endings, replay = self._find_endings(index), Replay()
        attach_endings(module, endings, replay)
        for parameter in self._parameters(index):
            self._put(module, parameter, weights, prefix)
        round_inputs(module, prefix, self._places, self._parameters(index), weights)
        tensors: dict[str, list[tuple[str, Slot]]] = {}
        for parameter in self._parameters(index):
            for place in self._places[parameter]:
                tensors.setdefault(place.name, []).append((parameter.removeprefix(prefix), place))
        ends = {ending.matrix for ending in endings}
        known = {point.tap.name: point.module for point in points if point.module in ends}
        skipped = {
            ending.matrix: frozenset(
                point.tap.name
                for point in points
                if point.module.startswith(f"{ending.module}.") and point.module != ending.matrix
            )
            for ending in endings
        }
        filled = {name: tuple(found) for name, found in tensors.items()}
        block = Block(self, index, module, observer, filled, replay, known, skipped)
        try:
            yield block
        finally:
            block.close()
            detach_endings(module, endings)

    @contextmanager
    def head(self, weights: Weights) -> Iterator[Head]:
        """What follows the last block, with its weights loaded; they are freed on leaving."""
        model = self._skeleton.copy()
        for parameter in self._skeleton.after:
            self._put(model, parameter, weights)
        head = Head(self._skeleton, model, self.head_tap())
        round_inputs(model, "", self._places, self._skeleton.after, weights)
        try:
            yield head
        finally:
            head.close()

    def taps(self, index: int) -> list[Tap]:
        """The inputs of block ``index`` that can be observed: every matrix of the block is in one of them."""
        return [point.tap for point in self._tap_points(index)]

    def head_tap(self) -> Tap:
        """The input of the output matrix."""
        name = self._skeleton.output
        module = self._skeleton.model.get_submodule(name)
        return Tap(name, columns_of(module), 1, {place.name: None for place in self._places[f"{name}.weight"]})

    def _tap_points(self, index: int) -> tuple[TapPoint, ...]:
        with self._lock:
            found = self._points.get(index)
            if found is None:
                arguments = self._skeleton.dry_arguments()[index]
                found = find_points(
                    copy.deepcopy(self._skeleton.blocks[index]),
                    self._prefix(index),
                    self._places,
                    lambda block: self._skeleton.dry_run(block, arguments),
                )
                self._points[index] = found
            return found

    def _find_endings(self, index: int) -> tuple[Ending, ...]:
        points = self._tap_points(index)
        with self._lock:
            found = self._endings.get(index)
            if found is None:
                arguments = self._skeleton.dry_arguments()[index]
                matrices = [point.module for point in points if point.tap.matrices == 1]
                block = copy.deepcopy(self._skeleton.blocks[index])
                found = find_endings(block, matrices, lambda block: self._skeleton.dry_run(block, arguments))
                self._endings[index] = found
            return found

    def arguments(self, index: int, length: int) -> Arguments:
        """What block ``index`` is called with for windows of ``length`` tokens."""
        with self._lock:
            return self._skeleton.arguments(length)[index]


class _Stop:
    """A visit that keeps the hidden states and ends the forward."""

    def __init__(self, reached: list[torch.Tensor]) -> None:
        self._reached = reached

    def __call__(self, _index: int, hidden: torch.Tensor, _positional: Any, _named: Any) -> torch.Tensor:
        self._reached.append(hidden)
        raise Reached


class Block:
    """One decoder block. ``tensors``: {checkpoint tensor: what it fills}. ``endings``: {tap: its module} of matrices
    that modules of the block end in (streams/replay.py); ``skipped``: {such a matrix: the taps that nothing sees when
    its module is skipped}. Threads may call it at the same time, one window each, but not
    while ``replace`` runs."""

    def __init__(
        self,
        network: Network,
        index: int,
        module: torch.nn.Module,
        observer: Observer,
        tensors: Mapping[str, tuple[tuple[str, Slot], ...]],
        replay: Replay,
        endings: Mapping[str, str],
        skipped: Mapping[str, frozenset[str]],
    ) -> None:
        self._network, self._module, self._observer = network, module, observer
        self.index, self.tensors, self.endings = index, tensors, endings
        self._replay, self._skipped = replay, skipped

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """The hidden states (length, width) after this block of those before it; on the device of ``hidden``."""
        arguments = self._network.arguments(self.index, hidden.shape[0])
        with torch.inference_mode():
            given = hidden[None].to(self._network._skeleton.device)
            result = self._module(given, *arguments.positional, **arguments.named)
            if isinstance(result, tuple):
                result = result[0]
            found: torch.Tensor = result[0].to(hidden.device)
        return found

    def pull_back(self, hidden: torch.Tensor, after: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Gradients of a scalar through this block: ``hidden`` (length, width) entered it, ``after`` (length, width) is
        the gradient for what left it. Returns that for ``hidden``, and {checkpoint tensor: that for its matrix, its
        shape} for every matrix, all in the network's dtype on the CPU."""
        arguments = self._network.arguments(self.index, hidden.shape[0])
        device = self._network.device
        matrices = {name: value for name, value in self._module.named_parameters() if value.ndim > 1}
        with torch.enable_grad():
            given = hidden[None].to(device).clone().requires_grad_(True)
            watched = [value.requires_grad_(True) for value in matrices.values()]
            # Tensors of inference mode cannot be kept for the way back: these are copies.
            result = self._module(given, *copied(arguments.positional), **copied(dict(arguments.named)))
            if isinstance(result, tuple):
                result = result[0]
            found = torch.autograd.grad(
                result, [given, *watched], after[None].to(device), allow_unused=True, materialize_grads=True
            )
        return found[0][0].cpu(), self._by_tensor(dict(zip(matrices, found[1:], strict=True)))

    def pull_back_from(
        self, hidden: torch.Tensor, choose: Callable[[torch.Tensor], torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Gradients of a scalar of what leaves this block: ``choose`` is given that, (length, width) on the network's
        device, and returns the gradient for it. Returns the gradients for the matrices, as ``pull_back`` does."""
        arguments = self._network.arguments(self.index, hidden.shape[0])
        matrices = {name: value for name, value in self._module.named_parameters() if value.ndim > 1}
        with torch.enable_grad():
            watched = [value.requires_grad_(True) for value in matrices.values()]
            given = hidden[None].to(self._network.device).clone()
            result = self._module(given, *copied(arguments.positional), **copied(dict(arguments.named)))
            if isinstance(result, tuple):
                result = result[0]
            gradient = choose(result[0].detach()).to(result)
            found = torch.autograd.grad(result, watched, gradient[None], allow_unused=True, materialize_grads=True)
        return self._by_tensor(dict(zip(matrices, found, strict=True)))

    def _by_tensor(self, gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name: place.of(gradients[parameter]).cpu()
            for name, places in self.tensors.items()
            for parameter, place in places
            if parameter in gradients
        }

    def observe(self, sink: Sink, cache: CacheSink | None = None) -> AbstractContextManager[None]:
        """While open, calls of this thread give ``sink`` the inputs of every tap, and ``cache`` keys and values. See
        ``Sink`` and ``CacheSink``."""
        return self._observer.listening(sink, cache)

    def skips(self, tap: str, wanted: Collection[str]) -> bool:
        """Whether what leads to ``tap`` of ``endings`` may be skipped where the taps ``wanted`` are to be seen."""
        return self._skipped[self.endings[tap]].isdisjoint(wanted)

    def knowing(self, given: Mapping[str, torch.Tensor]) -> AbstractContextManager[None]:
        """While open, calls of this thread skip what leads to taps of ``endings`` whose inputs are ``given``: {tap:
        (tokens, columns) of the window at hand}. Nothing before those may have been replaced since they were seen."""
        device = self._network.device
        return self._replay.knowing({self.endings[tap]: values.to(device) for tap, values in given.items()})

    def replace(self, name: str, value: torch.Tensor) -> None:
        """Let one checkpoint tensor have ``value`` (its shape, any float type) from now on."""
        with torch.inference_mode():
            for parameter, place in self.tensors[name]:
                view = place.of(held(self._module, parameter))
                if view.shape != value.shape:
                    raise ValueError(f"{name} has shape {tuple(view.shape)}, not {tuple(value.shape)}")
                view.copy_(value)

    def close(self) -> None:
        """Free the weights. The block can no longer be called."""
        self._module = torch.nn.Identity()


class _Given(threading.local):
    """The hidden states that a thread gave to the head."""

    hidden: torch.Tensor


class Head:
    """Final norm, output matrix, and what the model does to its logits. Threads may share one."""

    def __init__(self, skeleton: Skeleton, model: Any, tap: Tap) -> None:
        self._skeleton, self._model, self.tap = skeleton, model, tap
        self._given = _Given()
        self._observer = Observer()
        for station in skeleton.stations(model):
            station.visit = self._visit
        output = model.get_submodule(skeleton.output)
        attach(model, (TapPoint(tap, skeleton.output, "weight"),), self._observer)
        if not isinstance(output, torch.nn.Linear):
            raise UnsupportedError("the output of this model is not a matrix", found=type(output).__name__)

    def _visit(self, index: int, hidden: torch.Tensor, _positional: Any, _named: Any) -> torch.Tensor:
        # The model may have scaled or normed what it took for embeddings: what it was given is put back.
        return self._given.hidden if index == 0 else hidden

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 logits (k, vocab_size) on the CPU of hidden states (k, width) that left the last block."""
        given = self._given.hidden = hidden[None].to(self._skeleton.device)
        try:
            logits: torch.Tensor = self._skeleton.run(self._model, inputs_embeds=given).logits
        finally:
            del self._given.hidden
        return logits[0].float().cpu()

    def pull_back(
        self, hidden: torch.Tensor, choose: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of a scalar of the logits: ``choose`` is given float32 logits (k, vocab_size) on the CPU and
        returns the gradient for them. Returns that for ``hidden`` (k, width), which left the last block, and that for
        the output matrix, on the CPU."""
        matrix = self._model.get_submodule(self._skeleton.output).weight.requires_grad_(True)
        with torch.enable_grad():
            start = hidden.to(self._skeleton.device).clone().requires_grad_(True)
            given = self._given.hidden = start[None]
            try:
                logits = self._model(inputs_embeds=given.detach(), use_cache=False).logits[0]
            finally:
                del self._given.hidden
            gradient = choose(logits.detach().float().cpu()).to(logits)
            found = torch.autograd.grad(logits, [start, matrix], gradient)
        return found[0].cpu(), found[1].cpu()

    def observe(self, sink: Sink) -> AbstractContextManager[None]:
        """While open, calls of this thread give ``sink`` the input of the output matrix."""
        return self._observer.listening(sink)

    def close(self) -> None:
        """Free the weights. The head can no longer be called."""
        self._model = torch.nn.Identity()
