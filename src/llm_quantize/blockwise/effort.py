"""How long the parts of a run take beside one another, in floating-point operations: for its progress alone.

Rounding, reading and hashing are counted as the operations that a processor does in the same time.
"""

from __future__ import annotations

from llm_quantize.architectures.rows import weights_of
from llm_quantize.blockwise.estimate import FEEDBACK_RATE
from llm_quantize.formats.base import Importance
from llm_quantize.models.opening import Source
from llm_quantize.options import Options
from llm_quantize.plan import ArtifactPlan

ROUNDED, SEARCHED = 200.0, 6000.0
"""Operations for a weight: rounded on a plain grid, or searched for in a codebook."""
SEARCHED_TYPES = ("iq1", "iq2", "iq3")
FINISHED = 100.0
"""Operations for a byte that is read back, hashed and put in place."""


def forward(weights: int, tokens: int) -> float:
    """Tokens through a model."""
    return 2.0 * weights * tokens


def collecting(source: Source, importance: Importance | None, options: Options) -> float:
    """A calibration that is still to be run; 0 where there is none."""
    if importance is None or importance.sha256:
        return 0.0
    length = min(options.calibration.length, source.architecture.hyper.context_length)
    weights = sum(weights_of(output.shape) for output in source.tensors.outputs)
    return forward(weights, importance.chunks * length)


def rounding(plan: ArtifactPlan) -> float:
    """All tensors that a plan rounds by themselves."""
    return sum(
        (SEARCHED if tensor.qtype.startswith(SEARCHED_TYPES) else ROUNDED) * weights_of(tensor.output.shape)
        for tensor in plan.tensors
        if tensor.output.pieces
    )


def solving(plan: ArtifactPlan) -> float:
    """All matrices of a plan, which a method sees whole."""
    if plan.matrices and plan.cost is not None and plan.cost.feedback:
        return plan.cost.feedback * FEEDBACK_RATE
    return sum(ROUNDED * weights_of(matrix.weight.shape) for matrix in plan.matrices)


def finishing(plan: ArtifactPlan) -> float:
    """Putting the artifact in its place."""
    return FINISHED * plan.size


def writing(plan: ArtifactPlan) -> float:
    """All of an artifact but a calibration before it."""
    return rounding(plan) + solving(plan) + finishing(plan)
