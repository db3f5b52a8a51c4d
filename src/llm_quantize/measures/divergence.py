"""What quantization cost: perplexity and Kullback-Leibler divergence against the source, on the same tokens.

The definitions are those of ``llama-perplexity --kl-divergence`` (llama.cpp, tools/perplexity), so that numbers can
be compared. One difference: that tool stores the reference's log-probabilities in 16 bits, which adds
about 5e-4 to the divergence; here both sides are float32 logits and all sums are float64.

    p, q     probabilities of the source and of the quantized model for the token that follows
    KLD      sum over the vocabulary of p (ln p - ln q), nats; 0 where the two models agree
    same top share of positions where both think the same token likeliest
    Δp       q - p of the token that does follow
    accepted sum over the vocabulary of min(p, q): how often a token that the quantized model draws as a draft is taken
             by the source in speculative sampling, at temperature 1 (Leviathan et al. 2023, section 3.2, Corollary 3.6)

Position selection and windows: measures/perplexity.py; standard errors: measures/uncertainty.py. Dense twin:
tests/oracles/divergence.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_quantize.errors import NumericPolicyError, UsageError
from llm_quantize.measures.perplexity import Logits, Tokens, exponential, log_softmax, scored
from llm_quantize.measures.uncertainty import mean_and_sem

Scores = npt.NDArray[np.float64]
ROWS = 6
"""Figures of a position; ``Predicted.score`` says which."""


_FIRST_TOKENS = 4096


@dataclass(frozen=True)
class Divergence:
    """A candidate against its reference over ``tokens`` scored positions in ``clusters`` windows. ``*_sem``: standard
    errors, clustered by window (NaN for one window); KLD in nats. ``acceptance``: the expected share of the candidate's
    drafts that the reference takes. From files of earlier versions ``clusters`` is 0, tokens counting as independent,
    and ``acceptance`` NaN."""

    tokens: int
    perplexity: float
    perplexity_sem: float
    reference_perplexity: float
    reference_perplexity_sem: float
    ln_ratio: float
    ln_ratio_sem: float
    kld: float
    kld_sem: float
    kld_median: float
    kld_99: float
    kld_999: float
    kld_max: float
    same_top: float
    same_top_sem: float
    rms_delta_p: float
    rms_delta_p_sem: float
    acceptance: float = math.nan
    acceptance_sem: float = math.nan
    clusters: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The same numbers, JSON-ready."""
        return asdict(self)


class Comparison:
    """Collects one float64 per scored position and quantity; logits of one window at a time pass through.

    ``window`` of what is added: the number of the window that the positions are of; None: one of their own.
    """

    def __init__(self) -> None:
        # One array that grows: small ones kept between large temporary ones would scatter over the heap.
        self._values: Scores = np.empty((ROWS, _FIRST_TOKENS), np.float64)
        self._windows: npt.NDArray[np.int64] = np.empty(_FIRST_TOKENS, np.int64)
        self._count = self._next = 0

    def add(
        self,
        reference: Logits,
        candidate: Logits,
        targets: npt.NDArray[np.integer],
        *,
        window: int | None = None,
    ) -> None:
        """Score positions: logits (n, vocabulary) of both models and the tokens (n,) that follow.

        Raises UsageError if the shapes differ, NumericPolicyError if logits or their divergence are not finite.
        """
        self.add_predictions(Predicted.of(reference), candidate, targets, window=window)

    def add_predictions(
        self,
        reference: Predicted,
        candidate: Logits,
        targets: npt.NDArray[np.integer],
        *,
        window: int | None = None,
    ) -> None:
        """``add`` for a reference whose predictions are at hand, as when many candidates meet one source."""
        self.add_scores(reference.score(candidate_like(reference, candidate, targets), targets), window)

    def add_scores(self, scores: Scores, window: int | None = None) -> None:
        """What ``Predicted.score`` gave, in the order of the text: threads may score, one adds."""
        own = self._next if window is None else window
        self._next = max(self._next, own + 1)
        start, self._count = self._count, self._count + scores.shape[1]
        if self._count > self._values.shape[1]:
            wider, windows = np.empty((ROWS, 2 * self._count), np.float64), np.empty(2 * self._count, np.int64)
            wider[:, :start], windows[:start] = self._values[:, :start], self._windows[:start]
            self._values, self._windows = wider, windows
        self._values[:, start : self._count] = scores
        self._windows[start : self._count] = own

    def windows(self) -> npt.NDArray[np.int64]:
        """The window of every position that was added, (tokens,)."""
        return self._windows[: self._count]

    def scores(self) -> Scores:
        """Everything added, (ROWS, tokens), rows as ``Predicted.score`` has them. Raises UsageError if nothing was
        added."""
        if not self._count:
            raise UsageError("no window was compared")
        return self._values[:, : self._count]

    def result(self) -> Divergence:
        """All statistics. Raises UsageError if nothing was added."""
        base, other, kld, same, delta, accepted = self.scores()
        windows = self.windows()
        base_mean, base_sem = mean_and_sem(base, windows)
        mean, sem = mean_and_sem(other, windows)
        # The error of a paired difference: the covariance of the two losses, which share every token, is in it.
        ratio, ratio_sem = mean_and_sem(other - base, windows)
        kld_mean, kld_sem = mean_and_sem(kld, windows)
        median, p99, p999 = np.quantile(kld, [0.5, 0.99, 0.999])
        agreement, agreement_sem = mean_and_sem(same, windows)
        square, square_sem = mean_and_sem(delta * delta, windows)
        rms = math.sqrt(square)
        acceptance, acceptance_sem = mean_and_sem(accepted, windows)
        return Divergence(
            tokens=len(kld),
            perplexity=exponential(mean),
            perplexity_sem=exponential(mean) * sem,
            reference_perplexity=exponential(base_mean),
            reference_perplexity_sem=exponential(base_mean) * base_sem,
            ln_ratio=ratio,
            ln_ratio_sem=ratio_sem,
            kld=kld_mean,
            kld_sem=kld_sem,
            kld_median=float(median),
            kld_99=float(p99),
            kld_999=float(p999),
            kld_max=float(kld.max()),
            same_top=agreement,
            same_top_sem=agreement_sem,
            rms_delta_p=rms,
            rms_delta_p_sem=0.5 * square_sem / rms if rms > 0 else square_sem,
            acceptance=acceptance,
            acceptance_sem=acceptance_sem,
            clusters=len(np.unique(windows)),
        )


@dataclass(frozen=True)
class Predicted:
    """What one model predicts for n positions, as far as comparing it needs that, so that it is computed once however
    many meet it: float64 (n, vocabulary) natural logarithms ``log`` and ``share``, the probabilities; ``top`` (n,), the
    likeliest token; ``possible``: where ``share`` is not 0, None: everywhere."""

    log: npt.NDArray[np.float64]
    share: npt.NDArray[np.float64]
    top: npt.NDArray[np.intp]
    possible: npt.NDArray[np.bool_] | None

    @classmethod
    def of(cls, logits: npt.NDArray[np.floating]) -> Predicted:
        """Of logits (n, vocabulary). Raises NumericPolicyError for NaN and +infinity among them."""
        log = log_softmax(logits)
        share = np.exp(log)
        possible = share > 0
        return cls(log, share, log.argmax(axis=1), None if possible.all() else possible)

    def score(self, candidate: Predicted, targets: npt.NDArray[np.integer]) -> Scores:
        """A candidate against this reference, of tokens (n,) that follow: (ROWS, n), the reference's loss and the
        candidate's (nats), KLD, whether both think the same token likeliest, Δp, and the share of drafts accepted.

        Raises NumericPolicyError if the divergence is not finite.
        """
        rows = np.arange(len(targets))
        if self.possible is None:
            terms = self.log - candidate.log
        else:  # a token that the source rules out (-inf) adds nothing: 0 ln 0 = 0
            terms = np.subtract(self.log, candidate.log, out=np.zeros_like(self.share), where=self.possible)
        np.multiply(self.share, terms, out=terms)
        kld, follows = terms.sum(axis=1), candidate.log[rows, targets]
        if not np.isfinite(kld).all() or not np.isfinite(follows).all():
            raise NumericPolicyError("the candidate rules out a token that the source allows: no finite divergence")
        accepted = np.minimum(self.share, candidate.share, out=terms).sum(axis=1)
        return np.stack(
            [
                -self.log[rows, targets],
                -follows,
                kld,
                (self.top == candidate.top).astype(np.float64),
                np.exp(follows) - self.share[rows, targets],
                np.minimum(accepted, 1.0),
            ]
        )


def candidate_like(
    reference: Predicted, candidate: npt.NDArray[np.floating], targets: npt.NDArray[np.integer]
) -> Predicted:
    """``Predicted.of`` a candidate's logits, which must be for what the reference predicts. Raises UsageError, and
    NumericPolicyError for logits that are not finite."""
    if reference.log.shape != candidate.shape or len(targets) != len(reference.log):
        raise UsageError(
            "the two models do not predict the same vocabulary",
            expected=f"logits {reference.log.shape} for {len(targets)} tokens",
            found=f"logits {candidate.shape}",
        )
    return Predicted.of(candidate)


@dataclass(frozen=True)
class Paired:
    """Two candidates on the same tokens, ``first`` and ``second`` being their places. Differences are first minus
    second: of the mean KLD (nats), of ln perplexity; ``kld_ratio`` is mean KLD of the first over the second's.

    The standard errors are of the paired values, token by token: smaller than those of the two means taken apart, the
    more so the more alike the candidates are, as both stumble over the same tokens. They are clustered by window, of
    which there are ``clusters`` (NaN for one). The ratio's is by the delta method: r = a / b has the error of the mean
    of a - r b, divided by b.
    """

    first: int
    second: int
    tokens: int
    kld_difference: float
    kld_difference_sem: float
    kld_ratio: float
    kld_ratio_sem: float
    ln_perplexity_difference: float
    ln_perplexity_difference_sem: float
    clusters: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The same numbers, JSON-ready."""
        return asdict(self)


def pair(comparisons: Sequence[Comparison], first: int, second: int) -> Paired:
    """Compare two candidates of one reference, which were scored on the same tokens in the same order.

    Raises UsageError if the reference's losses show that they were not.
    """
    one, two = comparisons[first].scores(), comparisons[second].scores()
    windows = comparisons[first].windows()
    same = one.shape == two.shape and np.array_equal(windows, comparisons[second].windows())
    if not same or not np.allclose(one[0], two[0], rtol=1e-9, atol=1e-9):
        raise UsageError("the two candidates were not compared on the same tokens", found=f"{one.shape}, {two.shape}")
    difference, difference_sem = mean_and_sem(one[2] - two[2], windows)
    losses, losses_sem = mean_and_sem(one[1] - two[1], windows)
    below = float(two[2].mean())
    ratio = float(one[2].mean()) / below if below > 0 else math.nan
    _, spread = mean_and_sem(one[2] - ratio * two[2], windows)
    return Paired(
        first=first,
        second=second,
        tokens=one.shape[1],
        kld_difference=difference,
        kld_difference_sem=difference_sem,
        kld_ratio=ratio,
        kld_ratio_sem=spread / below if below > 0 else math.nan,
        ln_perplexity_difference=losses,
        ln_perplexity_difference_sem=losses_sem,
        clusters=len(np.unique(windows)),
    )


def compare(reference: Iterable[Logits], candidate: Iterable[Logits], windows: Tokens) -> Divergence:
    """Compare two models; each iterable yields logits (context, vocabulary) for each row of ``windows``.

    ``windows``: (windows, context) token ids, from ``cut_windows``. Raises UsageError on different shapes.
    """
    comparison = Comparison()
    for window, base, other in zip(windows, reference, candidate, strict=True):
        where, targets = scored(window)
        comparison.add(base[where], other[where], targets)
    return comparison.result()
