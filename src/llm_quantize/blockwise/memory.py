"""What a calibrated run holds at its peak, from sizes alone, and whether it fits."""

from __future__ import annotations

from llm_quantize.assemble import matrix_shape
from llm_quantize.blockwise.gram import gram_bytes
from llm_quantize.blockwise.inputs import CHUNK_TOKENS
from llm_quantize.blockwise.options import MethodOptions
from llm_quantize.calibration import memory
from llm_quantize.calibration.forward import Network
from llm_quantize.calibration.memory import Fitted
from llm_quantize.calibration.network_taps import Tap
from llm_quantize.methods.gptq import solve_bytes
from llm_quantize.methods.hessian import factor_bytes
from llm_quantize.plan import ArtifactPlan
from llm_quantize.source import Source

__all__ = ["Fitted", "fit"]


def fit(
    source: Source,
    artifact: ArtifactPlan,
    network: Network,
    windows: tuple[int, int],
    options: MethodOptions,
    *,
    paired: bool,
    threads: int | None,
    max_ram: int | None,
    device: str,
) -> Fitted:
    """Threads and the place of hidden states.

    ``windows``: (number, length); ``paired``: the source's stream goes along. Planned is the sum of what a stage's
    phases hold: windows captured while sums grow, a factor being made, rows solved.
    Raises ResourceError where one thread does not fit.
    """
    number, length = windows
    itemsize = network.dtype.itemsize
    block = max(network.bytes(index) for index in range(network.n_blocks))
    tokens = max(CHUNK_TOKENS, length)
    most, widest = 0, 0
    for index in range(network.n_blocks):
        taps = network.taps(index)
        stages = [[tap] for tap in taps] if options.inputs == "sequential" and artifact.format != "awq" else [taps]
        for stage in stages:
            captured = sum(tokens * tap.columns * itemsize * (1 + paired) for tap in stage)
            most = max(most, captured + sum(_held(tap, paired=paired) for tap in stage))
            widest = max(widest, *(tap.columns for tap in stage))
    values = max(matrix_shape(m.weight.shape)[0] * m.weight.shape[-1] for m in artifact.matrices)
    each = memory.workspace_bytes(source.architecture.hyper, length, itemsize, eager=network.eager) * (1 + paired)
    return memory.fit(
        fixed=max(network.bytes("embedding"), block * (1 + paired) + most + factor_bytes(widest, paired) + 5 * values),
        each=max(each, solve_bytes(widest)),
        hidden=number * length * network.width * itemsize,
        threads=threads,
        max_ram=max_ram,
        device=device,
        copies=2 if options.inputs != "source" else 1,
    )


def _held(tap: Tap, *, paired: bool) -> int:
    """The sums of a tap: of every expert, or of one matrix and its cross product."""
    return tap.matrices * gram_bytes(tap.columns, cross=paired and tap.matrices == 1)
