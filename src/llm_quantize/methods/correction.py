"""How far a layer makes up for the errors of those before it, told by text held back.

The correction W' = W (I + D (Y + ridge)^-1) of hessian.py is a regression, and learns its text by heart as any does:
the less there is of it beside the columns, the more. So D and Y are summed up without some windows, and on those

    t = W (x - y)                what a layer's output lacks, for a token held back
    p = W D (Y + ridge)^-1 y     what the regression says that it lacks

    share = sum <p, t> / sum <p, p>        gain = (sum <p, t>)^2 / sum <p, p>

are the share of p that brings most, by least squares, and the square error that it takes away. Both follow from Y_h and
D_h, the sums over what is held back: with A = W D (Y + ridge)^-1, sum <p, t> = <A, W D_h> and sum <p, p> = <A, A Y_h>.
The ridge of the largest gain is taken. What is written then comes from all windows, whose regression errs less: the
square of the error of sampling, sum <p, p> - sum <p, t>, falls as 1 / tokens. Dense twin:
tests/oracles/dense_correction.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_quantize.methods.cholesky import factor_in_place

__all__ = ["RIDGES", "ROWS", "UNTRIED", "Correction", "Part", "decide", "mean_square", "moment", "sampled"]

RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0)
"""What is tried, as shares of the mean square of the inputs."""

ROWS = 256
"""Rows of the matrices behind an input that tell what is lacking."""

AT_ONCE = 1024
"""Tokens held back of which there are copies in float32."""

OUTLIER = 100.0  # mean squares count at most this many medians in the mean that ridge and damping are shares of


@dataclass(frozen=True)
class Correction:
    """``share`` of the correction, 0 to 1; ``ridge`` of it, a share of the mean square of the inputs."""

    share: float
    ridge: float


UNTRIED = Correction(0.5, 0.1)
"""Of a text of too few windows to hold one back."""


def mean_square(squares: Tensor) -> float:
    """The mean of the mean squares (n,) of inputs that are not always 0, outliers cut; 0.0 where there are none."""
    living = squares[squares > 0]
    return float(living.clamp(max=OUTLIER * float(living.median())).mean()) if living.numel() else 0.0


def sampled(rows: Sequence[int]) -> list[list[int]]:
    """About ROWS rows of matrices with so many ``rows``, at even distances: the indices in each."""
    total = sum(rows)
    counts = [max(1, min(count, count * ROWS // max(1, total))) for count in rows]
    return [[index * count // taken for index in range(taken)] for count, taken in zip(rows, counts, strict=True)]


@dataclass(frozen=True)
class Part:
    """Sums over ``tokens`` inputs: ``hessian`` float32 (n, n) of x x^T; ``moment`` float32 (rows, n): weights (rows, n)
    times the sum of (x_full - x) x^T."""

    hessian: Tensor
    moment: Tensor
    tokens: int


def moment(held: Sequence[tuple[Tensor, Tensor, Tensor | None]], weights: Tensor) -> Tensor:
    """``Part.moment`` of tokens held back: (x, x_full, how much each token counts) of chunks of them, (m, n) of any
    floats, of which a few at a time are copied in float32, and (m,), None: once each. A cross product in bfloat16
    would not do: where the gain is flat, its rounding decides.
    """
    total = torch.zeros_like(weights)
    for inputs, full, counts in held:
        for start in range(0, len(inputs), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            own = inputs[part].float()
            away = full[part].float() - own
            total.addmm_(weights @ (away if counts is None else away * counts[part, None]).T, own)
    return total


def decide(known: Part, held: Part) -> Correction:
    """The correction that serves text held back, of which ``held`` are the sums; ``known`` are those of the rest.

    The gain is climbed from the middle ridge to the first peak, so that most are never tried; where it had two, the
    other would be missed.
    """
    mean = mean_square(known.hessian.diagonal().to(torch.float64) / max(known.tokens, 1))
    if mean <= 0:
        return Correction(0.0, RIDGES[0])
    work = torch.empty_like(known.hessian)
    at = len(RIDGES) // 2
    most, share = _tried(known, held, RIDGES[at], mean, work)
    for step in (-1, 1):
        moved = False
        while 0 <= at + step < len(RIDGES):
            gain, its = _tried(known, held, RIDGES[at + step], mean, work)
            if gain < most or (step < 0 and gain == most):
                break
            at, most, share, moved = at + step, gain, its, True
        if moved:
            break
    return Correction(share, RIDGES[at]) if most > 0 else Correction(0.0, RIDGES[0])


def _tried(known: Part, held: Part, ridge: float, mean: float, work: Tensor) -> tuple[float, float]:
    """(gain, share) of one ridge, a share of ``mean``; (0, 0) where it brings nothing. ``work`` float32 (n, n);
    that suffices to choose: a Cholesky factor errs in proportion to each channel's own size."""
    torch.div(known.hessian, known.tokens, out=work)
    work.diagonal().add_(ridge * mean)
    if not factor_in_place(work):
        return 0.0, 0.0
    half = torch.linalg.solve_triangular(work, known.moment.T / known.tokens, upper=False)
    said = torch.linalg.solve_triangular(work.T, half, upper=True)
    agreement = float((said * held.moment.T).sum(dtype=torch.float64))
    size = float((said * (held.hessian @ said)).sum(dtype=torch.float64))
    if agreement <= 0 or size <= 0:
        return 0.0, 0.0
    error = max(0.0, size / agreement - 1.0) * known.tokens / (known.tokens + held.tokens)
    return agreement * agreement / size, 1.0 / (1.0 + error)
