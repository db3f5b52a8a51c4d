"""What quantization cost: perplexity and Kullback-Leibler divergence against the source, on the same tokens.

The definitions are those of ``llama-perplexity --kl-divergence`` (llama.cpp, tools/perplexity), so that numbers can
be compared. One difference: that tool stores the reference's log-probabilities in 16 bits, which adds
about 5e-4 to the divergence; here both sides are float32 logits and all sums are float64.

    p, q     probabilities of the source and of the quantized model for the token that follows
    KLD      sum over the vocabulary of p (ln p - ln q), nats; 0 where the two models agree
    same top share of positions where both think the same token likeliest
    Δp       q - p of the token that does follow

Position selection and windows: evaluation/perplexity.py. Dense twin: tests/oracles/divergence.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_quantize.errors import NumericPolicyError, UsageError
from llm_quantize.measures.perplexity import Logits, Tokens, exponential, log_softmax, mean_and_sem, scored

Scores = npt.NDArray[np.float64]


_FIRST_TOKENS = 4096


@dataclass(frozen=True)
class Divergence:
    """A candidate against its reference over ``tokens`` scored positions. ``*_sem``: standard errors; KLD in nats."""

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

    def to_dict(self) -> dict[str, Any]:
        """The same numbers, JSON-ready."""
        return asdict(self)


class Comparison:
    """Collects one float64 per scored position and quantity; logits of one window at a time pass through."""

    def __init__(self) -> None:
        # One array that grows: small ones kept between large temporary ones would scatter over the heap.
        self._values: Scores = np.empty((5, _FIRST_TOKENS), np.float64)
        self._count = 0

    def add(self, reference: Logits, candidate: Logits, targets: npt.NDArray[np.integer]) -> None:
        """Score positions: logits (n, vocabulary) of both models and the tokens (n,) that follow.

        Raises UsageError if the shapes differ, NumericPolicyError if logits or their divergence are not finite.
        """
        self.add_log_probabilities(log_softmax(reference), candidate, targets)

    def add_log_probabilities(
        self, reference: npt.NDArray[np.float64], candidate: Logits, targets: npt.NDArray[np.integer]
    ) -> None:
        """``add`` for a reference whose log_softmax is at hand, as when many candidates meet one source."""
        self.add_scores(score(reference, log_softmax_like(reference, candidate, targets), targets))

    def add_scores(self, scores: Scores) -> None:
        """What ``score`` gave, in the order of the text: threads may score, one adds."""
        start, self._count = self._count, self._count + scores.shape[1]
        if self._count > self._values.shape[1]:
            wider = np.empty((5, 2 * self._count), np.float64)
            wider[:, :start] = self._values[:, :start]
            self._values = wider
        self._values[:, start : self._count] = scores

    def scores(self) -> Scores:
        """Everything added, (5, tokens): the rows that ``score`` describes. Raises UsageError if nothing was added."""
        if not self._count:
            raise UsageError("no window was compared")
        return self._values[:, : self._count]

    def result(self) -> Divergence:
        """All statistics. Raises UsageError if nothing was added."""
        base, other, kld, same, delta = self.scores()
        count = len(kld)
        base_mean, base_sem = mean_and_sem(base)
        mean, sem = mean_and_sem(other)
        # The error of a paired difference: the covariance of the two losses, which share every token, is in it.
        ratio, ratio_sem = mean_and_sem(other - base)
        kld_mean, kld_sem = mean_and_sem(kld)
        median, p99, p999 = np.quantile(kld, [0.5, 0.99, 0.999])
        agreement = float(same.mean())
        square, square_sem = mean_and_sem(delta * delta)
        rms = math.sqrt(square)
        return Divergence(
            tokens=count,
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
            same_top_sem=math.sqrt(agreement * (1 - agreement) / (count - 1)) if count > 1 else math.nan,
            rms_delta_p=rms,
            rms_delta_p_sem=0.5 * square_sem / rms if rms > 0 else 0.0,
        )


def log_softmax_like(
    reference: npt.NDArray[np.float64], candidate: Logits, targets: npt.NDArray[np.integer]
) -> npt.NDArray[np.float64]:
    """``log_softmax`` of a candidate that must predict what the reference predicts. Raises UsageError, and
    NumericPolicyError for logits that are not finite."""
    if reference.shape != candidate.shape or len(targets) != len(reference):
        raise UsageError(
            "the two models do not predict the same vocabulary",
            expected=f"logits {reference.shape} for {len(targets)} tokens",
            found=f"logits {candidate.shape}",
        )
    return log_softmax(candidate)


def score(
    reference: npt.NDArray[np.float64], candidate: npt.NDArray[np.float64], targets: npt.NDArray[np.integer]
) -> Scores:
    """Of log-probabilities (n, vocabulary) of both models and the tokens (n,) that follow, five rows (5, n): the
    reference's loss and the candidate's (nats), KLD, whether both think the same token likeliest, and Δp.

    Raises NumericPolicyError if the divergence is not finite.
    """
    rows = np.arange(len(targets))
    p = np.exp(reference)
    # A token that the source rules out (-inf) adds nothing: 0 ln 0 = 0.
    terms = np.subtract(reference, candidate, out=np.zeros_like(p), where=p > 0)
    np.multiply(p, terms, out=terms)
    if not np.isfinite(terms).all() or not np.isfinite(candidate[rows, targets]).all():
        raise NumericPolicyError("the candidate rules out a token that the source allows: no finite divergence")
    return np.stack(
        [
            -reference[rows, targets],
            -candidate[rows, targets],
            terms.sum(axis=1),
            (reference.argmax(axis=1) == candidate.argmax(axis=1)).astype(np.float64),
            np.exp(candidate[rows, targets]) - p[rows, targets],
        ]
    )


@dataclass(frozen=True)
class Paired:
    """Two candidates on the same tokens, ``first`` and ``second`` being their places. Differences are first minus
    second: of the mean KLD (nats), of ln perplexity; ``kld_ratio`` is mean KLD of the first over the second's.

    The standard errors are of the paired values, token by token: smaller than those of the two means taken apart, the
    more so the more alike the candidates are, as both stumble over the same tokens. The ratio's is by the delta method.
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

    def to_dict(self) -> dict[str, Any]:
        """The same numbers, JSON-ready."""
        return asdict(self)


def pair(comparisons: Sequence[Comparison], first: int, second: int) -> Paired:
    """Compare two candidates of one reference, which were scored on the same tokens in the same order.

    Raises UsageError if the reference's losses show that they were not.
    """
    one, two = comparisons[first].scores(), comparisons[second].scores()
    if one.shape != two.shape or not np.allclose(one[0], two[0], rtol=1e-9, atol=1e-9):
        raise UsageError("the two candidates were not compared on the same tokens", found=f"{one.shape}, {two.shape}")
    difference, difference_sem = mean_and_sem(one[2] - two[2])
    losses, losses_sem = mean_and_sem(one[1] - two[1])
    below = float(two[2].mean())
    ratio = float(one[2].mean()) / below if below > 0 else math.nan
    _, spread = mean_and_sem(one[2] - ratio * two[2])
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
