"""What llama.cpp needs to run a GGUF file: weights, cache, working buffers; and how much of it fits on a GPU.

All figures in bytes, from the plan and the model's sizes alone. What they rest on:

- *weights*: the bytes of the tensors, as planned. A file is mapped: the system counts its pages as cache, and a copy
  that llama.cpp repacks for the CPU (q4_0, q4_k, ...) takes the place of pages that are not read again.
- *cache*: keys and values in float16 for every layer; a layer with a sliding window holds the window and one batch.
  Cells are counted in blocks of 256, as llama.cpp allocates them. A layer with a recurrent state has that instead, in
  float32, whatever the context: of each value head key by value numbers, and what the convolution looks back at.
- *compute*: 512 tokens are computed at once in float32. The graph is largest either at the logits (a vocabulary wide)
  or in the feed-forward network (three of its widths, for every expert used), beside five hidden states; and there is
  a mask in float16 for each kind of attention. With flash attention, which llama.cpp takes by itself. Measured on
  models of six shapes at 2048, 8192 and 32768 tokens it was at most 4 % short and 17 % long of what llama.cpp reports.
- *runtime*: code, vocabulary and the small rest: 64 MiB (measured: less than 30), and 512 bytes for each token of the
  vocabulary (measured: 442). On a CUDA GPU 512 MiB for its context and libraries: an assumption, not measured here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from llm_quantize.advice.machine import Machine
from llm_quantize.architectures.base import Hyper
from llm_quantize.models.opening import Source

CONTEXT = 8192  # tokens of the cache that is counted, where nobody says how many
BATCH = 512  # tokens computed at once (llama.cpp's n_ubatch)
CELLS = 256
RUNTIME, RUNTIME_PER_TOKEN = 64 << 20, 512
CUDA_CONTEXT = 512 << 20
FLOAT, HALF = 4, 2


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that memory depends on. ``windows``: for each layer the tokens its attention sees, 0: all,
    None: it has a recurrent state of ``state`` bytes instead. ``feed_forward``: width of what one token passes through:
    the experts used, and shared ones, together. ``widths``: of the keys of each layer, 0 where it takes an earlier
    one's; none: those of ``n_head_kv`` heads in all."""

    n_layer: int
    n_head_kv: int
    head_dim: int
    hidden: int
    feed_forward: int
    experts_used: int
    vocab: int
    windows: tuple[int | None, ...]
    n_head: int = 0
    state: int = 0
    widths: tuple[int, ...] = ()

    def cells(self, layer: int, context: int) -> int:
        """Places for keys and values in one layer."""
        window = self.windows[layer]
        if window is None:
            return 0
        return _blocks(context) if not window else min(_blocks(context), _blocks(window + BATCH))

    def layer_cache(self, layer: int, context: int) -> int:
        """Bytes of one layer's keys and values, or of its state."""
        if self.windows[layer] is None:
            return self.state
        return 2 * HALF * self.width(layer) * self.cells(layer, context)

    def width(self, layer: int) -> int:
        """Values that the keys of one token take in a layer."""
        return self.widths[layer] if self.widths else self.n_head_kv * self.head_dim

    def cache(self, context: int) -> int:
        """Bytes of the keys and values of all layers."""
        return sum(self.layer_cache(layer, context) for layer in range(self.n_layer))

    def compute(self, context: int) -> int:
        """Bytes of the working buffers."""
        states = self.experts_used + 5
        widest = max(self.vocab, 3 * self.feed_forward)
        masks = {self.cells(layer, context) for layer in range(self.n_layer)}
        return BATCH * (FLOAT * (widest + states * self.hidden) + HALF * sum(masks)) * 17 // 16


def shape_of(source: Source) -> Shape:
    """What memory depends on, of an opened model."""
    architecture, hyper = source.architecture, source.architecture.hyper
    dense = hyper.feed_forward_length if not hyper.n_expert else 0
    if hyper.uneven is not None:
        dense = max(hyper.feed_forward_length, hyper.uneven.feed_forward_length)
    experts = hyper.n_expert_used * hyper.expert_feed_forward_length + hyper.shared_feed_forward_length
    return Shape(
        n_layer=hyper.n_layer,
        n_head_kv=hyper.n_head_kv,
        head_dim=hyper.head_dim,
        hidden=hyper.embedding_length,
        feed_forward=max(dense, experts if hyper.n_expert else 0),
        experts_used=hyper.n_expert_used if hyper.n_expert else 0,
        vocab=hyper.vocab_size,
        windows=tuple(
            None if hyper.holds("recurrent", layer) else architecture.window if slides else 0
            for layer, slides in enumerate(architecture.sliding)
        ),
        n_head=hyper.n_head,
        state=_state(hyper),
        widths=_widths(hyper),
    )


def _widths(hyper: Hyper) -> tuple[int, ...]:
    """Of the keys of each layer, where they differ."""
    if hyper.uneven is None:
        return ()
    layers = [(layer, hyper.in_layer(layer)) for layer in range(hyper.n_layer)]
    return tuple(one.n_head_kv * one.head_dim if hyper.holds("own_keys", layer) else 0 for layer, one in layers)


def _state(hyper: Hyper) -> int:
    """Bytes of the state of a layer that has one."""
    found = hyper.recurrence
    if found is None:
        return FLOAT * (hyper.kernel - 1) * hyper.embedding_length if hyper.convolved else 0
    return FLOAT * (found.value_heads * found.key_dim * found.value_dim + (found.kernel - 1) * found.channels)


def context_of(source: Source) -> int:
    """Tokens of the cache, where nobody says how many: CONTEXT, or what the model was made for, if that is less."""
    return min(CONTEXT, source.architecture.hyper.context_length or CONTEXT)


def _blocks(cells: int) -> int:
    return -(-cells // CELLS) * CELLS


@dataclass(frozen=True)
class Footprint:
    """Bytes that a running model takes, wherever they lie."""

    weights: int
    cache: int
    compute: int
    runtime: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.compute + self.runtime


@dataclass(frozen=True)
class Weights:
    """Bytes of an artifact's tensors: of the token ``embedding``, each of the ``layers``, and the ``output`` (norm and
    matrix; the embedding once more where it serves as the output)."""

    embedding: int
    layers: tuple[int, ...]
    output: int
    tied: bool

    @property
    def total(self) -> int:
        return self.embedding + sum(self.layers) + self.output - (self.embedding if self.tied else 0)


def weights_of(sizes: Mapping[str, int], n_layer: int) -> Weights:
    """The bytes of tensors by GGUF name, sorted by the part of the model that llama.cpp moves as one."""
    layers, output = [0] * n_layer, 0
    embedding = sizes.get("token_embd.weight", 0)
    for name, size in sizes.items():
        found = re.match(r"blk\.(\d+)\.", name)
        if found and int(found[1]) < n_layer:
            layers[int(found[1])] += size
        elif name != "token_embd.weight":
            output += size
    tied = "output.weight" not in sizes
    return Weights(embedding, tuple(layers), output + (embedding if tied else 0), tied)


@dataclass(frozen=True)
class Placement:
    """Where a model lies: ``gpu_layers`` of ``layers``, as llama.cpp's -ngl counts them (the output is one), and bytes
    on the GPU and in RAM. ``kind``: cpu, gpu or split. ``read``: bytes of layers, cache and output there, (GPU, CPU):
    what a token reads, but for experts that it does not use. ``context``: of ``gpu``, what CUDA itself takes."""

    kind: str
    gpu_layers: int
    layers: int
    gpu: int
    ram: int
    read: tuple[int, int]
    context: int = 0


def footprint(weights: Weights, shape: Shape, context: int) -> Footprint:
    """What the model takes on the CPU alone."""
    return Footprint(
        weights.total, shape.cache(context), shape.compute(context), RUNTIME + RUNTIME_PER_TOKEN * shape.vocab
    )


def place(weights: Weights, shape: Shape, machine: Machine, context: int) -> Placement | None:
    """The most of the model on the GPU, the rest in RAM; None where both together are too small."""
    count = shape.n_layer + 1 if machine.vram else 0
    for gpu_layers in range(count, -1, -1):
        found = _placed(weights, shape, machine, context, gpu_layers)
        if found is not None:
            return found
    return None


def _placed(weights: Weights, shape: Shape, machine: Machine, context: int, gpu_layers: int) -> Placement | None:
    """With the last ``gpu_layers`` of layers and output on the GPU, as llama.cpp counts them."""
    need, caches = footprint(weights, shape, context), [shape.layer_cache(i, context) for i in range(shape.n_layer)]
    parts = [size + cache for size, cache in zip(weights.layers, caches, strict=True)] + [weights.output]
    first = len(parts) - gpu_layers
    on_gpu, rest = sum(parts[first:]), sum(parts[:first]) + weights.embedding
    if weights.tied and first == len(parts):
        rest -= weights.embedding  # one copy serves as both where nothing is on the GPU
    cuda = CUDA_CONTEXT if machine.device == "cuda" and gpu_layers else 0
    if gpu_layers:
        on_gpu += need.compute + cuda
        rest += need.runtime + BATCH * FLOAT * shape.hidden
    else:
        rest += need.compute + need.runtime
    shared = machine.device == "apple"
    if on_gpu > (machine.vram if gpu_layers else 0) or rest + (on_gpu if shared else 0) > machine.usable_ram:
        return None
    if shared and 0 < gpu_layers < len(parts):
        return None  # the two halves would lie in the same memory
    kind = "cpu" if not gpu_layers else "gpu" if gpu_layers == len(parts) else "split"
    read = (sum(parts[first:]), sum(parts[:first]))
    return Placement(kind, gpu_layers, len(parts), on_gpu, rest, read, cuda)
