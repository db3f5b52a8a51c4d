"""The same definitions as llm_quantize.measures.divergence, token by token in plain Python floats."""

from __future__ import annotations

import math


def probabilities(logits: list[float]) -> list[float]:
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    total = math.fsum(weights)
    return [w / total for w in weights]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    count = len(values)
    mean = math.fsum(values) / count
    spread = math.fsum(v * v for v in values) / count - mean * mean
    return mean, math.sqrt(max(spread, 0.0) / (count - 1))


def percentile(values: list[float], fraction: float) -> float:
    ordered = sorted(values)
    place = fraction * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] * (1 - (place - low)) + ordered[high] * (place - low)


def divergence(reference: list, candidate: list, windows: list[list[int]]) -> dict[str, float]:
    """``reference[w][i]`` are the logits after token i of window w."""
    base_losses, losses, klds, tops, deltas = [], [], [], [], []
    for window, base_rows, rows in zip(windows, reference, candidate, strict=True):
        n = len(window)
        for i in range(n // 2, n - 1):
            p, q = probabilities(base_rows[i]), probabilities(rows[i])
            follows = window[i + 1]
            base_losses.append(-math.log(p[follows]))
            losses.append(-math.log(q[follows]))
            klds.append(math.fsum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0))
            tops.append(1.0 if p.index(max(p)) == q.index(max(q)) else 0.0)
            deltas.append(q[follows] - p[follows])
    count = len(klds)
    base_mean, base_error = mean_and_error(base_losses)
    mean, error = mean_and_error(losses)
    # Covariance of the two means, the way the tool writes it.
    product = math.fsum(a * b for a, b in zip(losses, base_losses, strict=True)) / count
    covariance = (product - mean * base_mean) / (count - 1)
    square, square_error = mean_and_error([d * d for d in deltas])
    top = math.fsum(tops) / count
    return {
        "tokens": count,
        "perplexity": math.exp(mean),
        "perplexity_sem": math.exp(mean) * error,
        "reference_perplexity": math.exp(base_mean),
        "reference_perplexity_sem": math.exp(base_mean) * base_error,
        "ln_ratio": mean - base_mean,
        "ln_ratio_sem": math.sqrt(error**2 + base_error**2 - 2 * covariance),
        "kld": mean_and_error(klds)[0],
        "kld_sem": mean_and_error(klds)[1],
        "kld_median": percentile(klds, 0.5),
        "kld_99": percentile(klds, 0.99),
        "kld_999": percentile(klds, 0.999),
        "kld_max": max(klds),
        "same_top": top,
        "same_top_sem": math.sqrt(top * (1 - top) / (count - 1)),
        "rms_delta_p": math.sqrt(square),
        "rms_delta_p_sem": 0.5 / math.sqrt(square) * square_error,
    }


def paired(reference: list, first: list, second: list, windows: list[list[int]]) -> dict[str, float]:
    """Mean KLD of the first minus the second's with the error of the differences, and ln perplexity likewise."""
    klds, losses = [], []
    for window, base_rows, rows, others in zip(windows, reference, first, second, strict=True):
        n = len(window)
        for i in range(n // 2, n - 1):
            p, q, r = (probabilities(one[i]) for one in (base_rows, rows, others))
            klds.append([math.fsum(a * math.log(a / b) for a, b in zip(p, x, strict=True)) for x in (q, r)])
            losses.append([-math.log(x[window[i + 1]]) for x in (q, r)])
    difference = mean_and_error([a - b for a, b in klds])
    loss = mean_and_error([a - b for a, b in losses])
    below = math.fsum(b for _, b in klds) / len(klds)
    ratio = math.fsum(a for a, _ in klds) / len(klds) / below
    return {
        "tokens": len(klds),
        "kld_difference": difference[0],
        "kld_difference_sem": difference[1],
        "kld_ratio": ratio,
        "kld_ratio_sem": mean_and_error([a - ratio * b for a, b in klds])[1] / below,
        "ln_perplexity_difference": loss[0],
        "ln_perplexity_difference_sem": loss[1],
    }
