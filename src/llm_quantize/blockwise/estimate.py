"""What a calibrated run will take, from headers alone and without torch: text, memory, arithmetic.

The run itself plans again with the network at hand (``memory.py``); this is what a plan says before anything is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from llm_quantize.architectures.base import OutputTensor
from llm_quantize.architectures.rows import weights_of
from llm_quantize.models.opening import Source
from llm_quantize.options import MethodOptions
from llm_quantize.plan import ArtifactPlan
from llm_quantize.streams.fitting import MARGIN_BYTES, workspace_bytes

CHUNK_TOKENS = 8192
"""Tokens whose inputs are held together; a constant, as sums in another order would be other sums."""

TOKENS_PER_COLUMN = 16
"""Tokens for each input of the widest matrix that are drawn unless the user says how many. Twice as many lowered the
divergence of a 2-bit file by 6 % for half as much time again (docs/concepts/methods.md)."""

HELD_OUT_WINDOWS = 4
"""Further windows of the text that go along, are never calibrated on, and tell at the end what was lost."""

TORCH_BYTES = 400 << 20  # torch, transformers and their libraries, loaded
TORCH_ALONE_BYTES = 240 << 20


@dataclass(frozen=True)
class Estimate:
    """``memory``: peak bytes with one thread, hidden states on disk; ``operations``: floating-point, in all."""

    memory: int
    operations: float


def enough_windows(source: Source, length: int) -> int:
    """Windows of ``length`` tokens that give TOKENS_PER_COLUMN; at least 8, at most 256."""
    length = min(length, source.architecture.hyper.context_length)
    widest = max((output.shape[-1] for output in _matrices(source.tensors.outputs)), default=1)
    return min(256, max(8, math.ceil(TOKENS_PER_COLUMN * widest / length)))


def estimate(source: Source, artifact: ArtifactPlan, options: MethodOptions, windows: int, length: int) -> Estimate:
    """See ``Estimate``. ``windows`` of ``length`` tokens."""
    hyper = source.architecture.hyper
    length = min(length, hyper.context_length)
    paired = options.stages(artifact.format).correction > 0
    itemsize = max(2, min(4, artifact.source_itemsize))
    outputs = list(_matrices(source.tensors.outputs))
    weights = sum(weights_of(output.shape) for output in outputs)
    block = itemsize * weights // max(1, hyper.n_layer)
    grams = max((_experts(output) * output.shape[-1] ** 2 * 4 * (3 + paired) for output in outputs), default=0)
    widest = max((output.shape[-1] for output in outputs), default=0)
    values = max((weights_of(matrix.weight.shape) for matrix in artifact.matrices), default=0)
    captured = max(CHUNK_TOKENS, length) * widest * itemsize * (1 + paired)
    factor = (20 if paired else 16) * widest**2
    each = max(workspace_bytes(hyper, length, itemsize, eager=False), 40 * widest * 256 + (160 << 20))
    memory = TORCH_BYTES + MARGIN_BYTES + block + grams + captured + factor + 5 * values + each
    return Estimate(memory, _operations(outputs, weights, windows * length, options, paired=paired))


def rounding_bytes(artifact: ArtifactPlan) -> int:
    """Peak bytes of rounding matrices one after the other, without text: torch, and the largest matrix as codes."""
    values = max((weights_of(matrix.weight.shape) for matrix in artifact.matrices), default=0)
    return TORCH_ALONE_BYTES + 5 * values if values else 0


def _operations(
    outputs: list[OutputTensor], weights: int, tokens: int, options: MethodOptions, *, paired: bool
) -> float:
    """Forward passes, sums of products, and about eight products of each matrix with its Hessian."""
    passes = (2.2 if options.inputs == "sequential" else 1.75) + paired
    taps = {(output.name.split(".")[1], output.shape[-1]): output.shape[-1] for output in outputs}
    products = sum(columns**2 for columns in taps.values()) * tokens * (1.25 + 2 * paired)
    solved = sum(16.0 * weights_of(output.shape) * output.shape[-1] for output in outputs)
    factors = sum(3.0 * columns**3 for columns in taps.values())
    return 2.0 * weights * tokens * passes + products + solved + factors


def _matrices(outputs: Iterable[OutputTensor]) -> Iterable[OutputTensor]:
    """The matrices of the blocks."""
    return (output for output in outputs if output.name.startswith("blk.") and len(output.shape) > 1)


def _experts(output: OutputTensor) -> int:
    return math.prod(output.shape[:-2])
