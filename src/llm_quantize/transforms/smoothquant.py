"""Activations made easier to round: what is large in them is moved into the weights (SmoothQuant, Xiao et al. 2023,
arXiv 2211.10438, equation 4), how far is chosen by the loss that is left.

    W (rows, n)   weights that read one input x (n,)          s (n,)   scales; W s reads x / s
    m (n,)        largest |x_j| of the calibration text       w (n,)   largest |W_j| of all matrices
    candidates    s = m^a / w^(1-a), a from 0 to 1 in steps, around 1 and in range; s = 1 is one of them

A runtime computes Q(W s) q(x / s). With dW = W - Q(W s) / s and dx = x - s q(x / s) it loses W dx + dW x, and next to
nothing beyond, and the two have nothing to do with each other:

    loss = mean over sampled tokens of |W dx|^2, with x rounded as the runtime does, and the loss of dW (awq.py)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from llm_quantize.errors import UsageError
from llm_quantize.grids.grid import GridType
from llm_quantize.grids.inputs import calibrated, rounded_inputs
from llm_quantize.methods.gptq_options import GptqOptions
from llm_quantize.methods.hessian import factorize
from llm_quantize.transforms.awq import (
    AwqOptions,
    AwqResult,
    Sample,
    Seen,
    WeightLoss,
    check_shapes,
    conditional_variances,
    normal,
    sample_rows,
)

_TOKENS = 64  # rounded together: a few arrays of this many inputs stay small


def scales(
    weights: Sequence[Tensor], seen: Seen, kind: GridType, *, feedback: bool, spread: Tensor | None = None
) -> AwqResult:
    """``search`` as a run asks for it; ``feedback``: codes will be chosen with error feedback."""
    return search(weights, seen, kind, AwqOptions(judge="feedback" if feedback else "rounding"), spread=spread)


def search(
    weights: Sequence[Tensor],
    seen: Seen,
    kind: GridType,
    options: AwqOptions | None = None,
    *,
    spread: Tensor | None = None,
) -> AwqResult:
    """The scales for matrices (rows, n) that share an input, as ``transforms.awq.search`` finds them. ``spread``: see
    there. ``exponent`` of the result: a, the migration strength.

    Raises UsageError: shapes that do not fit, no sampled tokens, inputs that no runtime rounds. NumericPolicyError: a
    hessian that is not finite.
    """
    options = options or AwqOptions()
    check_shapes(weights, seen.hessian, seen.tokens, None)
    if seen.rows is None or seen.largest is None or seen.inputs is None or not len(seen.rows):
        raise UsageError(
            "SmoothQuant was given no inputs that a runtime rounds",
            expected="sampled tokens, the largest of each channel, and the grid of the inputs",
            found=f"{0 if seen.rows is None else len(seen.rows)} tokens, {seen.inputs}",
        )
    hessian = seen.hessian.to(torch.float32)
    factor = factorize(hessian, seen.tokens, GptqOptions(damp=options.damp, correction=0.0))
    conditional = conditional_variances(factor) if options.judge == "feedback" else None
    sample = sample_rows(weights, options.rows, None)
    judge = WeightLoss(hessian / seen.tokens, conditional, sample, kind)
    largest, rows = seen.largest.float(), seen.rows.float()

    def loss(own: Tensor, *, fitted: bool) -> float:
        grid = calibrated(seen_inputs, float((largest / own).max()))
        tiles = (rows[start : start + _TOKENS] for start in range(0, len(rows), _TOKENS))
        lost = sum(_input_loss(x - rounded_inputs(x / own, grid) * own, sample) for x in tiles)
        return judge.loss(own, fitted=fitted) + lost / len(rows)

    seen_inputs, ones = seen.inputs, torch.ones_like(largest)
    found = [
        (loss(own, fitted=False), strength, own)
        for strength, raw in candidates(largest, _largest_weights(weights), options.points)
        for own in (normal(raw, spread),)
    ]
    found.sort(key=lambda one: one[0])  # stable: of equals the first
    best = (loss(ones, fitted=True), "ones", 0.0, ones)
    plain = best[0]
    for _, strength, own in found[: options.finalists]:
        left = loss(own, fitted=True)
        if left < best[0] and left <= plain * (1 - options.least_gain):
            best = (left, "migration", strength, own)
    left, word, strength, own = best
    return AwqResult(own, word, strength, left, plain, factor.notes)


def candidates(largest: Tensor, weights: Tensor, points: int) -> Iterator[tuple[float, Tensor]]:
    """(a, m^a / w^(1-a)) for a in steps of 1 / ``points``; what is never large in either counts as nearly nothing."""
    m = largest.clamp(min=1e-5 * float(largest.max()) + 1e-30)
    w = weights.clamp(min=1e-5 * float(weights.max()) + 1e-30)
    for step in range(points + 1):
        strength = step / points
        yield strength, m**strength / w ** (1 - strength)


def _largest_weights(weights: Sequence[Tensor]) -> Tensor:
    """w (n,)."""
    return torch.stack([weight.to(torch.float32).abs().amax(dim=0) for weight in weights]).amax(dim=0)


def _input_loss(dx: Tensor, sample: Sample) -> float:
    """Sum over tokens of |W dx|^2, of all rows that the sampled ones stand for. ``dx``: (k, n)."""
    each = (dx @ sample.weight.T).double().square().sum(dim=0)
    return float((each * sample.share).sum())
