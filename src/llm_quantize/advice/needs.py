"""What the runtimes beside llama.cpp need to run a model directory: weights, cache, working buffers, and themselves.

All figures in bytes, of one sequence of ``context`` tokens, from the plan and the model's sizes alone.

- *weights*: every tensor of the weight files, as planned.
- *cache*: keys and values, in the type and the blocks of the runtime; layers with a sliding window hold the window, and
  what is read at once. vLLM: 16 bits, blocks of 16 tokens, on the CPU of 128, and there in whole GiB, as
  ``VLLM_CPU_KVCACHE_SPACE`` counts them. Transformers: 16 bits, token by token. CTranslate2: float32. mlx_lm: 16 bits,
  blocks of 256.
- *compute*: three widths of the feed-forward network and some hidden states of every token that is read at once: all of
  the prompt in CTranslate2 and Transformers, 2,048 tokens in vLLM (8,192 on GPUs of 70 GiB and more) and in mlx_lm. In
  float32 on the CPU. CTranslate2 also holds the scores of a layer's attention, heads × prompt × prompt, which makes
  long prompts dear there; vLLM the float32 logits of all sequences that it may run at once, twice; Transformers one
  matrix decoded to 16 bits, and of LLM.int8 four times the rest.
- *runtime*: code and libraries.

Measured (resident memory at its peak, two synthetic Llamas of 512 and 1,024 channels): CTranslate2 4.8.5 was within 6 %
of these sums with prompts of 1,024 to 3,000 tokens, and up to a quarter below them with 64; Transformers 5.23 with
bitsandbytes 0.50 on the CPU between 1 % above and 11 % below. vLLM, mlx_lm, and everything on a GPU are computed from
what their code allocates, and were not measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llm_quantize.advice.footprint import CUDA_CONTEXT, FLOAT, HALF, RUNTIME, RUNTIME_PER_TOKEN, Footprint, Shape
from llm_quantize.advice.machine import Machine

MIB, GIB = 1 << 20, 1 << 30
UTILIZATION = 0.9
"""What vLLM takes of a GPU's memory, unless told otherwise (--gpu-memory-utilization)."""
LARGE_GPU = 70 * GIB
TORCH = 448 * MIB  # measured with transformers: 442
VLLM_CPU = 1 * GIB  # an assumption: torch, and vLLM's processes
GRAPHS = 512 * MIB  # an assumption: vLLM's workspaces and CUDA graphs
MLX = 128 * MIB  # measured before loading, on Linux: 77
INT8_WIDTHS = 4
"""So many times the widths of the feed-forward network LLM.int8 holds on the CPU (measured), in integers and floats."""


@dataclass(frozen=True)
class Load:
    """A planned model directory. ``weights``: bytes of its tensors; ``largest``: weights of its largest matrix;
    ``widens``: its products pass through wide integers (LLM.int8)."""

    weights: int
    largest: int = 0
    widens: bool = False


Need = Callable[[Load, Shape, Machine, int], Footprint]


def cells(shape: Shape, context: int, *, block: int, ahead: int = 0) -> int:
    """Tokens that the caches of all layers have room for: ``context``, or in a window that, and ``ahead``."""
    return sum(_lengths(shape, context, block=block, ahead=ahead).values())


def _lengths(shape: Shape, context: int, *, block: int, ahead: int) -> dict[int, int]:
    """``cells`` of each layer that has any."""
    found = {layer: window for layer, window in enumerate(shape.windows) if window is not None}
    lengths = {layer: context if not window else min(context, window + ahead) for layer, window in found.items()}
    return {layer: -(-length // block) * block for layer, length in lengths.items()}


def _cache(shape: Shape, context: int, width: int, *, block: int = 1, ahead: int = 0) -> int:
    states = shape.state * shape.windows.count(None)
    lengths = _lengths(shape, context, block=block, ahead=ahead)
    return states + 2 * width * sum(shape.width(layer) * length for layer, length in lengths.items())


def _states(shape: Shape, tokens: int, width: int, *, times: int = 1) -> int:
    """Bytes of what ``tokens`` hold on their way through a block."""
    return tokens * width * (3 * times * shape.feed_forward + (2 + shape.experts_used) * shape.hidden)


def vllm_gpu(load: Load, shape: Shape, machine: Machine, context: int) -> Footprint:
    """vLLM's server on one GPU."""
    large = machine.one_gpu >= LARGE_GPU
    tokens, sequences = (8192, 1024) if large else (2048, 256)
    compute = _states(shape, tokens, HALF) + 2 * FLOAT * sequences * shape.vocab
    cache = _cache(shape, context, HALF, block=16, ahead=tokens + 16)
    return Footprint(load.weights, cache, compute, CUDA_CONTEXT + GRAPHS)


def vllm_cpu(load: Load, shape: Shape, _machine: Machine, context: int) -> Footprint:
    """vLLM's server on the CPU."""
    tokens, sequences = 2048, 128
    cache = _cache(shape, context, HALF, block=128, ahead=tokens + 128)
    compute = _states(shape, tokens, FLOAT) + 2 * FLOAT * sequences * shape.vocab
    return Footprint(load.weights, -(-cache // GIB) * GIB, compute, VLLM_CPU)


def transformers_gpu(load: Load, shape: Shape, _machine: Machine, context: int) -> Footprint:
    """``generate`` of Transformers on one GPU."""
    compute = _states(shape, context, HALF) + HALF * load.largest + FLOAT * shape.vocab
    return Footprint(load.weights, _cache(shape, context, HALF), compute, CUDA_CONTEXT)


def transformers_cpu(load: Load, shape: Shape, _machine: Machine, context: int) -> Footprint:
    """``generate`` of Transformers on the CPU."""
    states = _states(shape, context, FLOAT, times=INT8_WIDTHS if load.widens else 1)
    compute = states + HALF * load.largest + FLOAT * shape.vocab
    return Footprint(load.weights, _cache(shape, context, HALF), compute, TORCH)


def ctranslate2(load: Load, shape: Shape, _machine: Machine, context: int) -> Footprint:
    """CTranslate2's Generator on the CPU, which computes all that is not int8 in float32."""
    scores = FLOAT * shape.n_head * context * context
    compute = _states(shape, context, FLOAT) + scores + FLOAT * shape.vocab
    cache = _cache(shape, context, FLOAT)
    return Footprint(load.weights, cache, compute, RUNTIME + RUNTIME_PER_TOKEN * shape.vocab)


def mlx(load: Load, shape: Shape, _machine: Machine, context: int) -> Footprint:
    """mlx_lm on Apple's GPU."""
    compute = _states(shape, min(context, 2048), HALF) + FLOAT * shape.vocab
    return Footprint(load.weights, _cache(shape, context, HALF, block=256), compute, MLX)


def of_one_gpu(machine: Machine) -> int:
    """Bytes that a model may have of the largest GPU."""
    return machine.one_gpu


def of_vllm(machine: Machine) -> int:
    """Bytes that vLLM may have: its share of the largest GPU, if that is free."""
    total = max((gpu.total for gpu in machine.gpus), default=machine.vram)
    return min(int(UTILIZATION * total), machine.one_gpu)


def of_ram(machine: Machine) -> int:
    """Bytes of memory that a model may have on the CPU."""
    return machine.usable_ram


def of_metal(machine: Machine) -> int:
    """Bytes that Metal lets the GPU hold."""
    return min(machine.vram, machine.usable_ram)
