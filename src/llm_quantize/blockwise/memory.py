"""What a calibrated run holds at its peak, from sizes alone, and whether it fits."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from llm_quantize.architectures.rows import matrix_shape
from llm_quantize.blockwise.estimate import CHUNK_TOKENS
from llm_quantize.blockwise.gram import gram_bytes
from llm_quantize.blockwise.segments import routers
from llm_quantize.blockwise.solver import stages
from llm_quantize.errors import ResourceError
from llm_quantize.methods.gptq import solve_bytes
from llm_quantize.methods.hessian import factor_bytes
from llm_quantize.models.opening import Source
from llm_quantize.options import MethodOptions
from llm_quantize.plan import ArtifactPlan
from llm_quantize.streams import fitting
from llm_quantize.streams.fitting import Fitted
from llm_quantize.streams.network import Network
from llm_quantize.streams.taps import Tap

__all__ = ["KEPT_BYTES", "Plan", "fit"]

KEPT_BYTES = 2 << 30
"""The source's inputs of one block beyond this go to a file."""


@dataclass(frozen=True)
class Plan:
    """A run that fits: see streams.fitting.Fitted; and whether the source's inputs of a block stay in memory, and
    their bytes."""

    threads: int
    in_memory: bool
    hidden_bytes: int
    peak: int
    inputs_in_memory: bool
    inputs_bytes: int

    @property
    def disk_bytes(self) -> int:
        """What lies in files meanwhile: hidden states twice (before and after a block), inputs once."""
        hidden = 0 if self.in_memory else 2 * self.hidden_bytes
        return hidden + (0 if self.inputs_in_memory else self.inputs_bytes)


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
) -> Plan:
    """Threads and the place of hidden states.

    ``windows``: (number, length); ``paired``: the source's stream goes along. Planned is the sum of what a stage's
    phases hold: windows captured while sums grow, a factor being made, rows solved.
    Raises ResourceError where one thread does not fit.
    """
    number, length = windows
    itemsize = network.dtype.itemsize
    block = max(network.bytes(index) for index in range(network.n_blocks))
    tokens = max(CHUNK_TOKENS, length)
    most, widest, seen = 0, 0, 0
    for index in range(network.n_blocks):
        taps = network.taps(index)
        alone = options.inputs == "sequential" and not options.transform_of(artifact.format).passes
        wanted = {tap.name for tap in taps}
        for stage in stages(taps, wanted, routers(source.tensors.outputs), sequential=alone):
            captured = sum(tokens * tap.columns * itemsize * (1 + paired) for tap in stage)
            most = max(most, captured + sum(_held(tap, paired=paired) for tap in stage))
            widest = max(widest, *(tap.columns for tap in stage))
        seen = max(seen, sum(number * length * tap.columns * itemsize for tap in taps if tap.matrices == 1))
    values = max(matrix_shape(m.weight.shape)[0] * m.weight.shape[-1] for m in artifact.matrices)
    each = fitting.workspace_bytes(source.architecture.hyper, length, itemsize, eager=network.eager)
    ends = max(network.bytes("embedding"), 2 * network.bytes("head"))
    fixed = max(ends, block + most + factor_bytes(widest, paired) + 5 * values)
    seen = seen if paired else 0

    def fitted(kept: int) -> Fitted:
        return fitting.fit(
            fixed=fixed + kept,
            each=max(each, solve_bytes(widest)),
            hidden=number * length * network.width * itemsize,
            threads=threads,
            max_ram=max_ram,
            device=device,
            copies=2 if options.inputs != "source" else 1,
        )

    found = fitted(0)
    if seen <= KEPT_BYTES:
        with suppress(ResourceError):  # then they lie in a file
            larger = fitted(seen)
            if (larger.threads, larger.in_memory) == (found.threads, found.in_memory):
                return Plan(larger.threads, larger.in_memory, larger.hidden_bytes, larger.peak, True, seen)
    return Plan(found.threads, found.in_memory, found.hidden_bytes, found.peak, seen == 0, seen)


def _held(tap: Tap, *, paired: bool) -> int:
    """The sums of a tap: of every expert, or of one matrix and its cross product."""
    return tap.matrices * gram_bytes(tap.columns, cross=paired and tap.matrices == 1)
