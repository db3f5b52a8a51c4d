"""From the second moments of a linear's inputs to what error feedback needs: conditioned, ordered, factored.

GPTQ (Frantar et al. 2022, arXiv 2210.17323) takes the Cholesky factor of the inverse Hessian. Here it is the
factor of the Hessian itself, which gives the same codes (LDLQ: Chee et al. 2023, arXiv 2307.13304, theorem 6) for a
quarter of the work and without the loss of digits of an inverse:

    H (n, n)  mean of x x^T over the inputs, conditioned: H <- (1 - l) H + l diag(H), then damped
    p (n,)    order of processing; H_p = H[p][:, p] = R R^T with R upper triangular
    loss      d H d^T = sum_k R_kk^2 (d_k + sum_{j<k} d_j R_jk / R_kk)^2   for a row d = w - q in that order
    feedback  so column k should come near to w_k + sum_{j<k} d_j R_jk / R_kk; those quotients are ``lower[k, j]``

The factor is float64, in place. Correction (GPTAQ, Li et al. 2025, arXiv 2504.02692, in closed form): x is what the
full-precision model gives a linear, y what it gets behind quantized layers; the least squares solution of
W' y = W x is W' = W (I + D (Y + ridge)^-1) with Y = sum y y^T and D = sum (x - y) y^T (how much of it, and which
ridge: correction.py).
Dense twin: tests/oracles/dense_gptq.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_quantize.errors import NumericPolicyError, UsageError
from llm_quantize.methods.cholesky import factor_in_place
from llm_quantize.methods.correction import UNTRIED, Correction, mean_square
from llm_quantize.methods.gptq_options import GptqOptions
from llm_quantize.methods.sizes import CHUNK

__all__ = ["Factor", "factorize", "mix"]

DAMP_STEPS = 3  # tries with 1, 10, 100 times the damping, before a fallback
PART = 1024  # columns of one block of the block-diagonal fallback
FLOOR = 1e-3  # least importance of a channel, in medians of the living ones


@dataclass(frozen=True)
class Factor:
    """What the solver needs to know of a linear's inputs; n = columns.

    ``hessian`` float32 (n, n): mean of x x^T, conditioned and damped, in natural order: the loss of everything that
    follows. ``order`` int64 (n,): which column is processed when. ``lower`` float32 (n, n): strictly lower triangle
    in processing order, see the top of the file; ``pivots`` float32 (n,): R_kk^2 there. ``importance`` float32 (n,):
    mean square of each channel, never below a floor. ``correction`` float32 (n, n) or None: W <- W + W @ correction.
    ``mode``: "full", "block-diagonal" or "diagonal"; ``notes``: what was out of the ordinary, one sentence each.
    ``damp``: what was added to the diagonal, ``dead``: channels that were always 0.
    """

    hessian: Tensor
    order: Tensor
    lower: Tensor
    pivots: Tensor
    importance: Tensor
    correction: Tensor | None
    mode: str
    notes: tuple[str, ...]
    damp: float
    dead: int


def mix(
    hessian: Tensor, tokens: int, prior: Tensor, prior_tokens: int, *, strength: int | None = None
) -> tuple[Tensor, int]:
    """Second moments of an expert that saw few tokens, drawn towards those of its layer: (sum, tokens).

    mean = N / (N + k) * H / N + k / (N + k) * P / N_P, with k = ``strength`` (2 n unless told) but at most
    ``prior_tokens``; returned as the sum over N + k tokens. ``hessian``, ``prior`` float32 (n, n): sums of x x^T over
    ``tokens`` (N, may be 0) and ``prior_tokens`` (N_P). Raises UsageError for other shapes.
    """
    if prior.shape != hessian.shape or prior_tokens < 0 or tokens < 0:
        raise UsageError(
            "The Hessian of a layer does not fit that of its expert",
            expected=f"{tuple(hessian.shape)} and token counts of 0 or more",
            found=f"{tuple(prior.shape)}, {tokens} and {prior_tokens} tokens",
        )
    wanted = 2 * len(hessian) if strength is None else strength
    added = min(wanted, prior_tokens)
    if added == 0:
        return hessian, tokens
    return torch.add(hessian, prior, alpha=added / prior_tokens), tokens + added


def factorize(
    hessian: Tensor,
    tokens: int,
    options: GptqOptions,
    *,
    cross: Tensor | None = None,
    correction: Correction | None = None,
    prior: Tensor | None = None,
    prior_tokens: int = 0,
    joint: int = 1,
) -> Factor:
    """Conditions and factors ``hessian`` float32 (n, n), the sum of x x^T over ``tokens`` inputs.

    ``cross`` float32 (n, n): sum of (x_full - x) x^T; the correction is written over it. ``correction``: how much of it
    and on which ridge; None: the share of the options on a ridge of the damping, ``UNTRIED`` where they say none.
    ``prior``: see :func:`mix`. ``joint``: so many neighbouring columns stay together in the order, which then goes by
    the sum of their mean squares.
    A channel that was always 0 keeps its weights and takes no part in feedback. Raises UsageError for wrong shapes,
    NumericPolicyError for NaN, infinity, or a negative mean square. What cannot be factored is damped more, then cut
    to blocks, then to its diagonal; ``notes`` tells it.
    """
    n = len(hessian)
    if hessian.shape != (n, n) or n == 0 or tokens < 0 or (cross is not None and cross.shape != (n, n)):
        found = f"{tuple(hessian.shape)}, {tokens} tokens" + ("" if cross is None else f", cross {tuple(cross.shape)}")
        raise UsageError("A Hessian has the wrong form", expected="(n, n), tokens of 0 or more", found=found)
    if prior is not None:
        hessian, tokens = mix(hessian, tokens, prior, prior_tokens)
    for name, matrix in (("Hessian", hessian), ("cross product", cross)):
        if matrix is not None:
            _check_finite(matrix, name)
    conditioning = _Conditioning.of(hessian, tokens, options)
    if conditioning.living == 0:
        return _unseen(hessian, conditioning)
    notes: list[str] = []
    moved = None
    how = correction or conditioning.asked(options)
    if cross is not None and how.share > 0:
        moved = _correct(hessian, cross, conditioning, how, notes)
    order = conditioning.order(options, joint)
    mode, damp, lower, pivots = _factor(hessian, conditioning, order, notes)
    if conditioning.dead:
        notes.append(f"{conditioning.dead} of {n} channels were always 0: they keep their weights")
    return Factor(
        hessian=_conditioned(hessian, conditioning, order, mode, damp),
        order=order,
        lower=lower,
        pivots=pivots,
        importance=conditioning.importance(),
        correction=moved,
        mode=mode,
        notes=tuple(notes),
        damp=damp,
        dead=conditioning.dead,
    )


@dataclass(frozen=True)
class _Conditioning:
    """The numbers that conditioning follows from. ``diagonal`` float64 (n,): mean squares; ``alive`` bool (n,)."""

    diagonal: Tensor
    alive: Tensor
    tokens: int
    shrink: float
    damp: float

    @classmethod
    def of(cls, hessian: Tensor, tokens: int, options: GptqOptions) -> _Conditioning:
        diagonal = hessian.diagonal().to(torch.float64) / max(tokens, 1)
        if float(diagonal.min()) < 0:
            raise NumericPolicyError(
                "A Hessian has a negative diagonal: it is no sum of squares", found=float(diagonal.min())
            )
        alive = diagonal > 0
        damp = options.damp * mean_square(diagonal)
        shrink = min(0.9, len(diagonal) / max(tokens, 1)) if options.shrink else 0.0
        return cls(diagonal, alive, tokens, shrink, damp)

    def asked(self, options: GptqOptions) -> Correction:
        """What the options say of the correction, its ridge damp * (1 + n / tokens)."""
        if options.correction is None:
            return UNTRIED
        return Correction(options.correction, options.damp * (1 + len(self.diagonal) / max(self.tokens, 1)))

    @property
    def living(self) -> int:
        return int(self.alive.sum())

    @property
    def dead(self) -> int:
        return len(self.alive) - self.living

    def importance(self) -> Tensor:
        """float32 (n,): mean squares, the least ones raised to the floor."""
        floor = FLOOR * float(self.diagonal[self.alive].median())
        return self.diagonal.clamp(min=floor).to(torch.float32)

    def order(self, options: GptqOptions, joint: int) -> Tensor:
        """int64 (n,): the columns as they are processed, ``joint`` neighbours together."""
        columns = torch.arange(len(self.diagonal), device=self.diagonal.device)
        if options.order == "natural":
            return columns
        if joint == 1:
            return torch.argsort(self.diagonal, descending=True, stable=True)
        mass = self.diagonal.reshape(-1, joint).sum(1)
        return columns.reshape(-1, joint)[torch.argsort(mass, descending=True, stable=True)].flatten()


def _chunks(count: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, CHUNK):
        yield start, min(count, start + CHUNK)


def _check_finite(matrix: Tensor, name: str) -> None:
    for start, stop in _chunks(len(matrix)):
        if not bool(torch.isfinite(matrix[start:stop]).all()):
            raise NumericPolicyError(
                f"A {name} holds NaN or infinity",
                expected="finite second moments",
                remedy="the model gave activations that are not finite: look at its dtype and at the calibration text",
            )


def _unseen(hessian: Tensor, conditioning: _Conditioning) -> Factor:
    """The factor of a linear that saw nothing: all channels alike."""
    n = len(hessian)
    return Factor(
        hessian=torch.eye(n, device=hessian.device),
        order=torch.arange(n, device=hessian.device),
        lower=torch.zeros(n, n, device=hessian.device),
        pivots=torch.ones(n, device=hessian.device),
        importance=torch.ones(n, device=hessian.device),
        correction=None,
        mode="diagonal",
        notes=(f"no input was ever seen ({conditioning.tokens} tokens): every channel weighs the same",),
        damp=0.0,
        dead=n,
    )


def _damped(try_once: Callable[[float], bool], damp: float, what: str, notes: list[str]) -> float | None:
    """The damping with which ``try_once`` succeeds: ``damp``, or 10, 100 times it, noted; None if none does."""
    for step in range(DAMP_STEPS):
        used = damp * 10.0**step
        if try_once(used):
            if step:
                notes.append(f"{what} needed {10**step} times the damping ({used:.3g})")
            return used
    return None


def _factor(
    hessian: Tensor, conditioning: _Conditioning, order: Tensor, notes: list[str]
) -> tuple[str, float, Tensor, Tensor]:
    """(mode, damping, lower, pivots): the most of the Hessian that can be factored."""
    n = len(hessian)
    work = torch.empty(n, n, dtype=torch.float64, device=hessian.device)
    for mode, part in (("full", n), ("block-diagonal", PART)):
        bounds = [(start, min(n, start + part)) for start in range(0, n, part)]

        def attempt(damp: float, bounds: list[tuple[int, int]] = bounds) -> bool:
            return all(_factor_part(hessian, conditioning, order[a:b], damp, work[a:b, a:b]) for a, b in bounds)

        damp = _damped(attempt, conditioning.damp, "the Cholesky factor", notes)
        if damp is not None:
            lower = torch.zeros(n, n, device=hessian.device)
            for a, b in bounds:
                _take_quotients(work[a:b, a:b], lower[a:b, a:b])
            # Every block was factored backwards.
            roots = torch.cat([work.diagonal()[a:b].flip(0) for a, b in bounds])
            return mode, damp, lower, roots.square().to(torch.float32)
        notes.append(f"the {mode} Hessian could not be factored even with {10 ** (DAMP_STEPS - 1)} times the damping")
    notes.append("only the diagonal of the Hessian is used: nearest codes, no feedback")
    alone = (conditioning.diagonal + conditioning.damp)[order].to(torch.float32)
    return "diagonal", conditioning.damp, torch.zeros(n, n, device=hessian.device), alone


def _factor_part(hessian: Tensor, conditioning: _Conditioning, order: Tensor, damp: float, work: Tensor) -> bool:
    """Cholesky of the Hessian of the columns ``order`` reversed, in place in ``work`` float64; whether it worked."""
    backwards = order.flip(0)
    alive = conditioning.alive[backwards].to(torch.float64)
    share = (1 - conditioning.shrink) / max(conditioning.tokens, 1)
    for start, stop in _chunks(len(backwards)):
        rows = hessian[backwards[start:stop]][:, backwards]
        torch.mul(rows, alive * share, out=work[start:stop])
        work[start:stop] *= alive[start:stop, None]
    work.diagonal().copy_(conditioning.diagonal[backwards] + damp)
    return factor_in_place(work)


def _take_quotients(work: Tensor, lower: Tensor) -> None:
    """``lower[k, j]`` = R_jk / R_kk, from the Cholesky factor of the reversed Hessian in ``work``."""
    n = len(work)
    for start, stop in _chunks(n):
        columns = slice(n - stop, n - start)
        part = work[n - stop :, columns] / work.diagonal()[columns]
        lower[start:stop, :stop] = part.flip(0, 1).T
        lower[start:stop, start:stop].tril_(-1)


def _conditioned(hessian: Tensor, conditioning: _Conditioning, order: Tensor, mode: str, damp: float) -> Tensor:
    """float32 (n, n) in natural order: the matrix that was factored, exactly symmetric."""
    n = len(hessian)
    out = torch.zeros(n, n, device=hessian.device)
    diagonal = conditioning.diagonal + damp
    if mode != "diagonal":
        alive = conditioning.alive.to(torch.float32)
        share = (1 - conditioning.shrink) / max(conditioning.tokens, 1) / 2
        place = torch.empty_like(order)
        place[order] = torch.arange(n, device=order.device) // (PART if mode == "block-diagonal" else n)
        for start, stop in _chunks(n):
            rows = torch.add(hessian[start:stop], hessian[:, start:stop].T, out=out[start:stop])
            rows *= (alive[start:stop, None] * share) * alive
            if mode == "block-diagonal":
                rows *= place[start:stop, None] == place
    out.diagonal().copy_(diagonal.to(torch.float32))
    return out


def _correct(
    hessian: Tensor, cross: Tensor, conditioning: _Conditioning, how: Correction, notes: list[str]
) -> Tensor | None:
    """share D (H + ridge)^-1, written over D."""
    n = len(hessian)
    work = torch.empty(n, n, dtype=torch.float64, device=hessian.device)

    def attempt(ridge: float) -> bool:
        work.copy_(hessian)
        work.div_(max(conditioning.tokens, 1))
        work.diagonal().add_(ridge)
        return factor_in_place(work)

    first = how.ridge * mean_square(conditioning.diagonal)
    if _damped(attempt, first, "the correction", notes) is None:
        notes.append("no correction: its least squares problem could not be solved")
        return None
    scale = how.share / max(conditioning.tokens, 1)
    root = work.to(torch.float32)  # what it is solved with errs by 2^-24 times the root of the condition of the whole
    for start, stop in _chunks(n):
        half = torch.linalg.solve_triangular(root, cross[start:stop].T, upper=False)
        cross[start:stop] = torch.linalg.solve_triangular(root.T, half, upper=True).T * scale
    return cross
