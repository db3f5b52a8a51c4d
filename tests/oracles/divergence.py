"""The same definitions as llm_quantize.measures.divergence, token by token in plain Python floats."""

from __future__ import annotations

import math


def probabilities(logits: list[float]) -> list[float]:
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    total = math.fsum(weights)
    return [w / total for w in weights]


def mean_and_error(values: list[list[float]]) -> tuple[float, float]:
    """Mean of all values and its error, a list for each window: every pair of tokens of one window, their covariance
    being what the two together say (the double sum of Cameron and Miller 2015, written out)."""
    count, windows = sum(map(len, values)), len(values)
    mean = math.fsum(v for window in values for v in window) / count
    pairs = [(a - mean) * (b - mean) for window in values for a in window for b in window]
    if windows < 2:
        return mean, math.nan
    return mean, math.sqrt(max(math.fsum(pairs), 0.0) * windows / (windows - 1)) / count


def percentile(values: list[float], fraction: float) -> float:
    ordered = sorted(values)
    place = fraction * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] * (1 - (place - low)) + ordered[high] * (place - low)


def divergence(reference: list, candidate: list, windows: list[list[int]]) -> dict[str, float]:
    """``reference[w][i]`` are the logits after token i of window w."""
    base_losses, losses, klds, tops, deltas, drafts = [], [], [], [], [], []
    for window, base_rows, rows in zip(windows, reference, candidate, strict=True):
        n = len(window)
        for found in (base_losses, losses, klds, tops, deltas, drafts):
            found.append([])
        for i in range(n // 2, n - 1):
            p, q = probabilities(base_rows[i]), probabilities(rows[i])
            follows = window[i + 1]
            base_losses[-1].append(-math.log(p[follows]))
            losses[-1].append(-math.log(q[follows]))
            klds[-1].append(math.fsum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0))
            tops[-1].append(1.0 if p.index(max(p)) == q.index(max(q)) else 0.0)
            deltas[-1].append(q[follows] - p[follows])
            drafts[-1].append(accepted(p, q))
    every = [kld for window in klds for kld in window]
    base_mean, base_error = mean_and_error(base_losses)
    mean, error = mean_and_error(losses)
    square, square_error = mean_and_error([[d * d for d in window] for window in deltas])
    top, top_error = mean_and_error(tops)
    draft, draft_error = mean_and_error(drafts)
    return {
        "tokens": len(every),
        "perplexity": math.exp(mean),
        "perplexity_sem": math.exp(mean) * error,
        "reference_perplexity": math.exp(base_mean),
        "reference_perplexity_sem": math.exp(base_mean) * base_error,
        "ln_ratio": mean - base_mean,
        "ln_ratio_sem": mean_and_error(combined(losses, base_losses, 1.0))[1],
        "kld": mean_and_error(klds)[0],
        "kld_sem": mean_and_error(klds)[1],
        "kld_median": percentile(every, 0.5),
        "kld_99": percentile(every, 0.99),
        "kld_999": percentile(every, 0.999),
        "kld_max": max(every),
        "same_top": top,
        "same_top_sem": top_error,
        "rms_delta_p": math.sqrt(square),
        "rms_delta_p_sem": 0.5 / math.sqrt(square) * square_error,
        "acceptance": draft,
        "acceptance_sem": draft_error,
        "clusters": len(windows),
    }


def accepted(p: list[float], q: list[float]) -> float:
    """How often a draft drawn from q is taken: each token x with q(x), then with min(1, p(x) / q(x))."""
    return math.fsum(b * min(1.0, a / b) for a, b in zip(p, q, strict=True) if b > 0)


def combined(one: list[list[float]], two: list[list[float]], factor: float) -> list[list[float]]:
    """one - factor × two, window by window."""
    return [[a - factor * b for a, b in zip(*pair, strict=True)] for pair in zip(one, two, strict=True)]


def paired(reference: list, first: list, second: list, windows: list[list[int]]) -> dict[str, float]:
    """Mean KLD of the first minus the second's with the error of the differences, and ln perplexity likewise."""
    klds, losses = ([], []), ([], [])
    for window, base_rows, rows, others in zip(windows, reference, first, second, strict=True):
        n = len(window)
        for found in (*klds, *losses):
            found.append([])
        for i in range(n // 2, n - 1):
            p, q, r = (probabilities(one[i]) for one in (base_rows, rows, others))
            for place, x in enumerate((q, r)):
                klds[place][-1].append(math.fsum(a * math.log(a / b) for a, b in zip(p, x, strict=True)))
                losses[place][-1].append(-math.log(x[window[i + 1]]))
    difference = mean_and_error(combined(*klds, 1.0))
    loss = mean_and_error(combined(*losses, 1.0))
    above, below = (mean_and_error(one)[0] for one in klds)
    return {
        "tokens": sum(map(len, klds[0])),
        "kld_difference": difference[0],
        "kld_difference_sem": difference[1],
        "kld_ratio": above / below,
        "kld_ratio_sem": mean_and_error(combined(*klds, above / below))[1] / below,
        "ln_perplexity_difference": loss[0],
        "ln_perplexity_difference_sem": loss[1],
        "clusters": len(windows),
    }
