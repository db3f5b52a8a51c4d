"""Activation-aware scales (AWQ, Lin et al. 2024), chosen by the loss that is left.

Channels that matter are enlarged before they are rounded, and what makes them is divided (transforms/applying.py).

    W (rows, n)   weights that read one input x (n,), several matrices one below the other
    H (n, n)      mean x x^T                 a = sqrt(diag H), the size of each channel
    c (n,)        conditional variances: of channel j given those that are rounded after it, in the order of falling
                  diag H. Error feedback lets the later ones make up for an error, so what it leaves of an error e_j
                  is e_j^2 c_j (the squared diagonal of the Cholesky factor of H in reverse order)
    t (n,)        mean over rows of |W| / largest of its group
    s (n,)        the scales; candidates a^r, a^r / t^(1-r), and the same with sqrt(c) for a; s = 1 is one of them

With dW = W - Q(W s) / s the loss is tr(dW H dW^T) if codes are only rounded, sum_j c_j |dW_j|^2 if errors are fed back:
the second predicts GPTQ's loss within a few per cent, and the first often chooses scales that make it worse.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llm_quantize.errors import UsageError
from llm_quantize.grids.grid import Grid, GridType, row_tiles
from llm_quantize.methods.gptq_options import GptqOptions
from llm_quantize.methods.hessian import Factor, factorize
from llm_quantize.qtypes.inputs import InputGrid

_LARGEST = 256.0  # of a scale, and of its inverse: float16 activations and scales keep their range
_CHUNK = 256


@dataclass(frozen=True)
class AwqOptions:
    """``judge``: the loss to lower, with error feedback to follow or with plain rounding. ``points``: exponents from 0
    to 1. ``rows``: so many rows in all, evenly spread over the matrices, stand for all of them (0: all). ``finalists``:
    candidates, best by the quick grid, that are judged again with the fitted one. ``least_gain``: share of the loss
    that a scale must save, else s = 1. ``damp``: see GptqOptions."""

    judge: Literal["feedback", "rounding"] = "feedback"
    points: int = 20
    rows: int = 256
    finalists: int = 4
    least_gain: float = 0.02
    damp: float = 0.01


@dataclass(frozen=True, eq=False)
class AwqResult:
    """``scales`` float32 (n,), positive; ones where nothing was gained. ``kind`` and ``exponent``: of the candidate
    ("ones" has 0). ``loss`` and ``plain_loss`` (with s = 1): per token, of the outputs together, on the fitted grid,
    estimated where rows were sampled.
    ``notes``: what was unusual about H."""

    scales: Tensor
    kind: str
    exponent: float
    loss: float
    plain_loss: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """Rows of the matrices, float32 (k, n), and how much each stands for, (k,)."""

    weight: Tensor
    share: Tensor


@dataclass(frozen=True, eq=False)
class Seen:
    """What is known of the inputs that some matrices share: ``hessian`` float32 (n, n), sum x x^T over ``tokens``;
    ``rows`` float32 (k, n), some of them, and ``largest`` (n,), of every channel, for who asked for samples;
    ``inputs``: what a runtime rounds them to."""

    hessian: Tensor
    tokens: int
    rows: Tensor | None = None
    largest: Tensor | None = None
    inputs: InputGrid | None = None


def scales(
    weights: Sequence[Tensor], seen: Seen, kind: GridType, *, feedback: bool, spread: Tensor | None = None
) -> AwqResult:
    """``search`` as a run asks for it; ``feedback``: codes will be chosen with error feedback."""
    options = AwqOptions(judge="feedback" if feedback else "rounding")
    return search(weights, seen.hessian, seen.tokens, kind, options, spread=spread)


def search(
    weights: Sequence[Tensor],
    hessian: Tensor,
    tokens: int,
    grid_type: GridType,
    options: AwqOptions | None = None,
    *,
    spread: Tensor | None = None,
    shares: Sequence[float] | None = None,
) -> AwqResult:
    """The scales for matrices that share an input.

    ``weights``: (rows, n) of any float type, on any device. ``hessian``: float32 (n, n), sum x x^T over ``tokens``
    inputs. ``spread``: int64 (n,), channels of equal number get one scale (a key head's, for all its query heads).
    ``shares``: weight of each matrix's loss (an expert's share of the tokens); None = 1.
    Raises UsageError: shapes that do not fit, or no tokens. NumericPolicyError: a hessian that is not finite.

    A mixture's norm is read by all experts: its input is the router's, and so is the hessian.
    """
    options = options or AwqOptions()
    check_shapes(weights, hessian, tokens, shares)
    hessian = hessian.to(torch.float32)
    factor = factorize(hessian, tokens, GptqOptions(damp=options.damp, correction=0.0))
    conditional = conditional_variances(factor)
    mean = hessian / tokens
    sample = sample_rows(weights, options.rows, shares)
    judge = WeightLoss(mean, conditional if options.judge == "feedback" else None, sample, grid_type)
    typical = _typical(weights, grid_type.block)
    size = mean.diagonal().clamp(min=1e-8 * float(mean.diagonal().mean()) + 1e-30).sqrt()
    ones = torch.ones_like(size)
    found = [
        (judge.loss(scales, fitted=False), kind, exponent, scales)
        for kind, exponent, raw in _candidates(size, conditional.sqrt(), typical, options.points)
        for scales in (normal(raw, spread),)
    ]
    found.sort(key=lambda one: one[0])  # stable: of equals the first
    best = (judge.loss(ones, fitted=True), "ones", 0.0, ones)
    plain = best[0]
    for _, kind, exponent, scales in found[: options.finalists]:
        loss = judge.loss(scales, fitted=True)
        if loss < best[0] and loss <= plain * (1 - options.least_gain):
            best = (loss, kind, exponent, scales)
    loss, kind, exponent, scales = best
    return AwqResult(scales, kind, exponent, loss, plain, factor.notes)


def conditional_variances(factor: Factor) -> Tensor:
    """c (n,), float32, natural order: the squared diagonal of the factor R, which holds only the quotients to it.

    H_jj = sum_{k >= j} R_jk^2 and lower[k, j] = R_jk / R_kk, so c_j = H_jj - sum_{k > j} lower[k, j]^2 c_k: a
    triangular system, solved from its end in float64.
    """
    order, lower = factor.order, factor.lower
    found = factor.hessian.diagonal()[order].double()
    for start in reversed(range(0, len(order), _CHUNK)):
        stop = min(start + _CHUNK, len(order))
        squares = lower[start:, start:stop].double().square_()
        rest = found[start:stop] - found[stop:] @ squares[stop - start :]
        own = squares[: stop - start].T
        found[start:stop] = torch.linalg.solve_triangular(own, rest[:, None], upper=True, unitriangular=True)[:, 0]
    natural = torch.empty_like(factor.importance)
    natural[order] = found.clamp(min=torch.finfo(torch.float32).tiny).float()
    return natural


@dataclass(frozen=True)
class WeightLoss:
    """What rounding the rows of ``sample`` loses, per token, by ``mean`` (x x^T) or ``conditional`` variances."""

    mean: Tensor
    conditional: Tensor | None
    sample: Sample
    grid_type: GridType

    def loss(self, scales: Tensor, *, fitted: bool) -> float:
        """The loss of quantizing W * scales, on the fitted grid or the quick one."""
        importance = self.mean.diagonal() / scales.square()
        total = 0.0
        weight, share = self.sample.weight, self.sample.share
        for start, stop in row_tiles(*weight.shape):
            scaled = weight[start:stop] * scales
            error = _rounded(self.grid_type.fit(scaled, importance, refine=fitted), scaled).sub_(scaled).div_(scales)
            if self.conditional is None:
                each = ((error @ self.mean) * error).sum(dim=1)
            else:
                each = error.square() @ self.conditional
            total += float((each.double() * share[start:stop]).sum())
        return total


def _rounded(grid: Grid, weight: Tensor) -> Tensor:
    """The values nearest to ``weight``, but for the last digit: many grids are tried, and none of these is kept."""
    if not grid.uniform:
        return grid.decode(grid.nearest(weight))
    scale, offset = grid.scale()[:, :, None], grid.offset()[:, :, None]
    parts = weight.reshape(weight.shape[0], -1, grid.group)
    codes = ((parts + offset) / torch.where(scale == 0, torch.ones_like(scale), scale)).round_()
    codes.clamp_(float(grid.levels[0]), float(grid.levels[-1]))
    return (codes * scale).sub_(offset).reshape(weight.shape)


def _candidates(size: Tensor, leftover: Tensor, typical: Tensor, points: int) -> Iterator[tuple[str, float, Tensor]]:
    """(kind, exponent, raw scales); the exponents are steps of 1 / ``points``."""
    for word, base in (("activation", size), ("conditional", leftover)):
        for step in range(1, points + 1):
            yield word, step / points, base ** (step / points)
        for step in range(points):
            yield f"{word}, weight", step / points, base ** (step / points) / typical ** (1 - step / points)


def normal(raw: Tensor, spread: Tensor | None) -> Tensor:
    """Scales around 1, in range; one for all channels that share it: their geometric mean."""
    logs = raw.log()
    if spread is not None:
        index = spread.to(logs.device)
        count = int(index.max()) + 1
        total = torch.zeros(count, dtype=logs.dtype, device=logs.device).index_add_(0, index, logs)
        times = torch.zeros_like(total).index_add_(0, index, torch.ones_like(logs))
        logs = (total / times)[index]
    logs = logs - (logs.max() + logs.min()) / 2
    scales: Tensor = logs.exp().clamp(1 / _LARGEST, _LARGEST)
    return scales


def _typical(weights: Sequence[Tensor], group: int) -> Tensor:
    """t (n,), at least 1e-4: the mean over all rows of |W| / the largest of its group (of its row, if that is 1)."""
    columns = weights[0].shape[1]
    width = group if group > 1 else columns
    total = torch.zeros(columns, dtype=torch.float64, device=weights[0].device)
    for weight in weights:
        for start, stop in row_tiles(*weight.shape):
            part = weight[start:stop].to(torch.float32).abs().reshape(stop - start, -1, width)
            largest = part.amax(dim=2, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
            total += (part / largest).sum(dim=0, dtype=torch.float64).reshape(-1)
    return (total / sum(weight.shape[0] for weight in weights)).float() + 1e-4


def sample_rows(weights: Sequence[Tensor], budget: int, shares: Sequence[float] | None) -> Sample:
    rows = sum(weight.shape[0] for weight in weights)
    parts, share = [], []
    for weight, factor in zip(weights, shares or [1.0] * len(weights), strict=True):
        own = weight.shape[0]
        count = own if budget == 0 or budget >= rows else max(1, budget * own // rows)
        index = torch.arange(count, device=weight.device) * own // count
        parts.append(weight[index].to(torch.float32))
        share.append(torch.full((count,), factor * own / count, dtype=torch.float64, device=weight.device))
    return Sample(torch.cat(parts), torch.cat(share))


def check_shapes(weights: Sequence[Tensor], hessian: Tensor, tokens: int, shares: Sequence[float] | None) -> None:
    columns = hessian.shape[-1]
    fits = hessian.shape == (columns, columns) and bool(weights) and tokens > 0
    fits = fits and all(weight.ndim == 2 and weight.shape[1] == columns for weight in weights)
    if not fits or (shares is not None and len(shares) != len(weights)):
        raise UsageError(
            "A search for scales was given what does not fit together",
            expected="matrices (rows, n), a hessian (n, n), tokens above 0, a share for each matrix",
            found=f"{[tuple(w.shape) for w in weights]}, {tuple(hessian.shape)}, {tokens} tokens, shares {shares}",
        )
