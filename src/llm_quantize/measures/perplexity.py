"""Perplexity as ``llama-perplexity`` of llama.cpp defines it, from logits of any runtime.

The text is cut into windows of n tokens without overlap; a rest shorter than n is dropped. Where the vocabulary
begins texts with a token (BOS), that token takes the first place of every window. Only the second half of a window
is scored, so that each prediction has at least n / 2 tokens before it: position i, n/2 <= i < n - 1, predicts
token i + 1. Sums in float64. Standard errors are clustered by window (measures/uncertainty.py); llama.cpp takes tokens
for independent, sqrt((E[x²] - E[x]²) / (N - 1)), and its are smaller.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llm_quantize.errors import NumericPolicyError, UsageError
from llm_quantize.measures.uncertainty import mean_and_sem

Logits = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of ``tokens`` scored tokens, and its standard error."""

    value: float
    sem: float
    tokens: int


def cut_windows(ids: Sequence[int], context: int, *, bos: int | None = None, limit: int | None = None) -> Tokens:
    """Windows of ``context`` tokens, (windows, context) int32, the first token of each replaced by ``bos`` if given.

    ``limit`` keeps that many windows at even distances over the text (llama.cpp's ``--chunks`` keeps the first ones).
    Raises UsageError if the text is shorter than one window, or ``context`` is below 4 tokens.
    """
    if context < 4 or (limit is not None and limit < 1):
        raise UsageError("a window needs at least 4 tokens, and a limit at least 1", found=f"{context}, {limit}")
    count = len(ids) // context
    if count == 0:
        raise UsageError(
            "the text is shorter than one window",
            expected=f"at least {context} tokens",
            found=len(ids),
            remedy="give a longer text or a smaller context",
        )
    windows = np.asarray(ids[: count * context], np.int32).reshape(count, context)
    if limit is not None and limit < count:
        windows = windows[(np.arange(limit) * count) // limit]
    windows = windows.copy()
    if bos is not None:
        windows[:, 0] = bos
    return windows


def scored(window: Tokens) -> tuple[slice, Tokens]:
    """The positions of a window whose predictions count, and the tokens they should predict."""
    first = len(window) // 2
    return slice(first, len(window) - 1), window[first + 1 :]


def log_softmax(logits: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Natural logarithms of the probabilities, (n, vocabulary) float64.

    Raises NumericPolicyError if a logit is NaN or +infinity: such a model has no perplexity.
    """
    wide: npt.NDArray[np.float64] = np.asarray(logits, np.float64)
    top = wide.max(axis=-1, keepdims=True)
    if not np.isfinite(top).all():
        raise NumericPolicyError("the model gives logits that are not finite", found=float(top.max()))
    wide = wide - top
    wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return wide


def perplexity(logits: Iterable[Logits], windows: Tokens) -> Perplexity:
    """Perplexity of one model; ``logits`` yields (context, vocabulary) for each row of ``windows``."""
    losses = []
    for window, rows in zip(windows, logits, strict=True):
        where, targets = scored(window)
        losses.append(-log_softmax(rows[where])[np.arange(len(targets)), targets])
    mean, sem = mean_and_sem(np.concatenate(losses), np.repeat(np.arange(len(losses)), [len(one) for one in losses]))
    return Perplexity(exponential(mean), exponential(mean) * sem, sum(map(len, losses)))


def exponential(value: float) -> float:
    """e to the power of ``value``; infinity where float64 ends, at the perplexity of a model that knows nothing."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
