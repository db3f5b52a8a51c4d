"""How large the file of weights may be, where a model and what it needs to run must fit a size: the size, less the
cache of keys and values, the working buffers and the runtime itself (advice/footprint.py, advice/needs.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from llm_quantize.advice import needs
from llm_quantize.advice.footprint import Footprint, Shape, Weights, footprint, shape_of
from llm_quantize.advice.machine import Machine
from llm_quantize.errors import ResourceError, UsageError
from llm_quantize.measures.amounts import bytes_text
from llm_quantize.models.opening import Source
from llm_quantize.qtypes import QTYPES

PLAIN = "f16"
"""What runtimes keep keys and values as, where nobody says."""


@dataclass(frozen=True)
class Room:
    """``size``: bytes that were asked for; ``file``: those that the weight files may have. ``context``: tokens that the
    cache has room for (0: the file alone was asked for), ``kv``: its type, ``beside``: what the model needs beside its
    weights."""

    size: int
    file: int
    context: int = 0
    kv: str = PLAIN
    beside: int = 0

    def facts(self) -> dict[str, int | str]:
        """JSON-ready; without a context the size and the file's alone."""
        told: dict[str, int | str] = {"size": self.size, "file": self.file}
        if self.context:
            told |= {"context": self.context, "kv": self.kv, "beside": self.beside}
        return told


def _llama_cpp(shape: Shape, context: int, _size: int) -> Footprint:
    return footprint(Weights(0, (), 0, False), shape, context)


def _vllm(shape: Shape, context: int, size: int) -> Footprint:
    return needs.vllm_gpu(needs.Load(0), shape, Machine("cuda", 0, vram=size), context)


def _mlx(shape: Shape, context: int, size: int) -> Footprint:
    return needs.mlx(needs.Load(0), shape, Machine("apple", size, vram=size), context)


@dataclass(frozen=True)
class _Runtime:
    """What runs a format: its ``need`` beside the weights, of (shape, context, size), and the types of its cache,
    ``caches``: {name: share of 16 bits}."""

    name: str
    need: Callable[[Shape, int, int], Footprint]
    caches: Mapping[str, float]


_GGML = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
_RUNTIMES: Mapping[str, _Runtime] = {
    "gguf": _Runtime("llama.cpp", _llama_cpp, {name: QTYPES[name].bits_per_weight / 16 for name in _GGML}),
    "compressed-tensors": _Runtime("vLLM on one GPU", _vllm, {PLAIN: 1.0, "fp8": 0.5}),
    "mlx": _Runtime("mlx_lm", _mlx, {PLAIN: 1.0}),
}


def room_for(source: Source, form: str, size: int, *, context: int | None = None, kv: str | None = None) -> Room:
    """What of ``size`` bytes the weight files of ``source`` in the format ``form`` may have.

    ``context``: tokens of a cache of the type ``kv`` (None: 16 bits) that must fit too, with what the runtime itself
    takes; None: the file alone. Raises UsageError (a context that the model has not, a type of cache without a context,
    or that the runtime has not), ResourceError where nothing is left for the weights.
    """
    if context is None:
        if kv is not None:
            raise UsageError(
                "the type of a cache decides nothing without its length",
                found=f"--kv {kv}",
                remedy="say how many tokens it must hold: --context 8k",
            )
        return Room(size, size)
    runtime, shape = _RUNTIMES[form], shape_of(source)
    longest = source.architecture.hyper.context_length
    if longest and context > longest:
        raise UsageError(
            "the model was not made for so long a context",
            expected=f"at most {longest:,} tokens",
            found=f"--context {context:,}",
        )
    kv = (kv or PLAIN).lower()
    if kv not in runtime.caches:
        raise UsageError(
            f"{runtime.name} has no cache of this type", expected=", ".join(runtime.caches), found=f"--kv {kv}"
        )
    need = runtime.need(shape, context, size)
    state = shape.state * shape.windows.count(None)  # of layers that have one: as large whatever keys and values are
    need = replace(need, cache=state + int((need.cache - state) * runtime.caches[kv]))
    if need.total >= size:
        raise ResourceError(
            "nothing is left of this size for the weights",
            expected=f"more than {need.total:,} bytes: {bytes_text(need.cache)} of keys and values for {context:,} "
            f"tokens in {kv}, {bytes_text(need.compute)} of working buffers, {bytes_text(need.runtime)} for "
            f"{runtime.name}",
            found=f"{size:,} bytes",
            remedy="allow a larger --fit, a smaller --context, or a smaller type of cache with --kv",
        )
    return Room(size, size - need.total, context, kv, need.total)
