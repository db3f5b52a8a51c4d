"""What a calibrated run will take, from sizes alone and without torch: text, memory, arithmetic.

A plan asks with the sizes that headers tell, the run again with those of its network, by the same formulas.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_quantize.architectures.base import OutputTensor
from llm_quantize.architectures.rows import weights_of
from llm_quantize.blockwise.stages import routers, stages
from llm_quantize.io.statistics_layout import TapLike
from llm_quantize.memory import TORCH_BYTES, Sizes
from llm_quantize.methods.sizes import WORKING_BYTES, factor_bytes, solve_bytes
from llm_quantize.models.opening import Source
from llm_quantize.options import MethodOptions
from llm_quantize.plan import ArtifactPlan
from llm_quantize.streams.sizes import NetworkSizes, block_matrices, from_headers

if TYPE_CHECKING:
    from llm_quantize.options import Options

CHUNK_TOKENS = 8192
"""Tokens whose inputs are held together; a constant, as sums in another order would be other sums."""

HELD_OUT_WINDOWS = 4
"""Further windows of the text that go along, are never calibrated on, and tell at the end what was lost."""

TORCH_ALONE_BYTES = 240 << 20


@dataclass(frozen=True)
class Estimate:
    """``sizes``: what the run will hold; ``operations``: floating-point, in all."""

    sizes: Sizes
    operations: float


def estimate(source: Source, artifact: ArtifactPlan, options: Options, windows: int) -> Estimate:
    """See ``Estimate``: ``windows`` run through the model; with statistics, whose Hessians are known, none do."""
    method, length = options.method, min(options.calibration.length, source.architecture.hyper.context_length)
    paired = method.stages(artifact.format).correction > 0
    network = from_headers(source, options.calibration.device)
    chosen, device = routers(source.tensors.outputs), options.calibration.device
    if options.statistics is None:
        together = (windows + HELD_OUT_WINDOWS, length)
        sizes = feedback_sizes(network, artifact, method, together, chosen, paired=paired, device=device)
    else:
        sizes = known_sizes(network, artifact)
    outputs = list(block_matrices(source.tensors.outputs))
    return Estimate(sizes, _operations(outputs, windows * length, method, paired=paired))


def feedback_sizes(
    network: NetworkSizes,
    artifact: ArtifactPlan,
    options: MethodOptions,
    windows: tuple[int, int],
    chosen: Collection[str],
    *,
    paired: bool,
    device: str,
) -> Sizes:
    """What a run through the model holds: ``windows`` (number, length); ``paired``: the source's stream goes along.

    Windows are captured while sums grow, then a factor is made and rows are solved, stage after stage.
    """
    number, length = windows
    tokens = max(CHUNK_TOKENS, length)
    alone = options.inputs == "sequential" and not options.transform_of(artifact.format).passes
    most, seen = (0, 0), 0
    for taps in network.taps:
        for stage in stages(taps, {tap.name for tap in taps}, chosen, sequential=alone):
            sums = sum(tap.matrices * gram_bytes(tap.columns, cross=paired and tap.matrices == 1) for tap in stage)
            captured = sum(_used(network, tap) * tokens * tap.columns * network.itemsize for tap in stage)
            most = max(most, (sums, captured * (1 + paired)), key=sum)
        seen = max(seen, sum(number * length * tap.columns * network.itemsize for tap in taps if tap.matrices == 1))
    widest = _widest(network)
    return Sizes(
        libraries=TORCH_BYTES,
        ends=max(network.embedding, 2 * network.head),
        block=network.block,
        sums=most[0],
        captured=most[1],
        factor=factor_bytes(widest, paired),
        values=_values(artifact),
        working=WORKING_BYTES,
        each=max(network.workspace(length), solve_bytes(widest)) + network.scratch,
        hidden=network.hidden(number, length),
        copies=2 if options.inputs != "source" else 1,
        inputs=seen if paired else 0,
        device=device,
    )


def known_sizes(network: NetworkSizes, artifact: ArtifactPlan) -> Sizes:
    """What solving with the Hessians of a file holds: those of a block, and no model."""
    widest = _widest(network)
    grams = (sum(tap.matrices * gram_bytes(tap.columns, cross=False) for tap in taps) for taps in network.taps)
    return Sizes(
        libraries=TORCH_BYTES,
        sums=max(grams, default=0),
        factor=factor_bytes(widest),
        values=_values(artifact),
        working=WORKING_BYTES,
        each=solve_bytes(widest) + network.scratch,
    )


def rounding_sizes(artifact: ArtifactPlan) -> tuple[Sizes, ...]:
    """What rounding matrices one after the other holds, without text: torch, and the largest matrix as codes."""
    if not artifact.matrices:
        return ()
    values, each = _values(artifact), artifact.source_scratch
    return (Sizes(libraries=TORCH_ALONE_BYTES, margin=0, values=values, each=each),)


def gram_bytes(columns: int, *, cross: bool) -> int:
    """Bytes that a ``gram.Gram`` of so many columns holds, with what ``finish`` needs for a moment."""
    return 4 * columns * columns * (3 + cross)


def _values(artifact: ArtifactPlan) -> int:
    """The largest matrix in float32 and as codes."""
    return 5 * max((weights_of(matrix.weight.shape) for matrix in artifact.matrices), default=0)


def _widest(network: NetworkSizes) -> int:
    return max((tap.columns for taps in network.taps for tap in taps), default=0)


def _used(network: NetworkSizes, tap: TapLike) -> int:
    """How often a token is among the inputs of a tap: once for every expert that it uses."""
    return network.hyper.n_expert_used if tap.matrices > 1 else 1


def _operations(outputs: list[OutputTensor], tokens: int, options: MethodOptions, *, paired: bool) -> float:
    """Forward passes, sums of products, and about eight products of each matrix with its Hessian."""
    weights = sum(weights_of(output.shape) for output in outputs)
    passes = (2.2 if options.inputs == "sequential" else 1.75) + paired
    taps = {(output.name.split(".")[1], output.shape[-1]): output.shape[-1] for output in outputs}
    products = sum(columns**2 for columns in taps.values()) * tokens * (1.25 + 2 * paired)
    solved = sum(16.0 * weights_of(output.shape) * output.shape[-1] for output in outputs)
    factors = sum(3.0 * columns**3 for columns in taps.values())
    return 2.0 * weights * tokens * passes + products + solved + factors
