"""What the artifact loses, told by the run that makes it: windows that were never calibrated on, at the end of both
streams.

The hidden states that leave the last block of the source and of the quantized model are at hand; the final norm and
the output matrix turn them into predictions. All is computed in the network's dtype: in bfloat16 two runs of the same
model already differ by some 1e-4 nats, so the figure of an 8-bit artifact is mostly that. ``analyze quality`` measures
in float32, and on more text. Activations are as they are, also where a runtime rounds them: the quantized stream is
what matrices are calibrated on, and they came out worse where it was rounded (docs/concepts/methods.md).
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from llm_quantize.blockwise.embedding import written_head
from llm_quantize.blockwise.inputs import Streams
from llm_quantize.measures.divergence import Comparison, Predicted, Scores, candidate_like
from llm_quantize.measures.perplexity import scored
from llm_quantize.streams.passes import Pass

if TYPE_CHECKING:
    from llm_quantize.blockwise.run import Matrices

POSITIONS = 64


def measure(matrices: Matrices, way: Pass, streams: Streams, first: int) -> dict[str, Any]:
    """KL divergence (nats per token, mean and its standard error clustered by window, null for one window), agreement
    and expected acceptance of windows ``first`` and later, JSON-ready; the second half of each window counts. Raises
    NumericPolicyError for predictions that are not finite."""
    weights, network, ids = matrices.weights, way.network, way.ids
    own = written_head(matrices)
    comparison = Comparison()
    with ExitStack() as stack:
        reference = stack.enter_context(network.head(weights))
        candidate = reference if own is None else stack.enter_context(network.head(own))

        def part(job: tuple[int, int]) -> tuple[tuple[int, int], Scores]:
            window, start = job
            where, targets = scored(ids[window].numpy())
            rows = slice(start, min(start + POSITIONS, len(targets)))
            base = Predicted.of(reference(streams.full.read(window)[where][rows]).numpy())
            other = candidate(streams.quantized.read(window)[where][rows]).numpy()
            follow = targets[rows]
            return job, base.score(candidate_like(base, other, follow), follow)

        length = len(scored(ids[first].numpy())[1])
        jobs = [(window, start) for window in range(first, len(ids)) for start in range(0, length, POSITIONS)]
        found = dict(way.pool.each(part, jobs))
    for job in jobs:
        comparison.add_scores(found[job], job[0])
    result = comparison.result()
    return {
        "windows": len(ids) - first,
        "tokens": result.tokens,
        "kld": result.kld,
        "kld_sem": result.kld_sem if math.isfinite(result.kld_sem) else None,
        "clusters": result.clusters,
        "same_top": result.same_top,
        "acceptance": result.acceptance,
        "dtype": str(network.dtype).removeprefix("torch."),
    }
