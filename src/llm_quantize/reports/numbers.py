"""Numbers as a reader wants them: as many digits as the measurement has, units that stay short."""

from __future__ import annotations

import math

from llm_quantize.measures.amounts import ABSENT, bytes_text, significant

__all__ = ["ABSENT", "bytes_text", "count_text", "percent", "rate_text", "significant", "tick_text", "with_error"]


def with_error(value: float, sem: float) -> tuple[str, str]:
    """Value and standard error to the error's first digit, or its first two if that is a 1 (0.0158 ± 0.0003, 0.2013 ±
    0.0014); the error is empty where it is not known."""
    if not math.isfinite(value):
        return ABSENT, ""
    if not math.isfinite(sem) or sem <= 0:
        return significant(value), ""
    power = math.floor(math.log10(sem))
    places = min(12, max(0, -power + (1 if sem / 10**power < 1.95 else 0)))
    return f"{value:.{places}f}".replace("-", "−"), f"{sem:.{places}f}"


def tick_text(count: float) -> str:
    """A round number of bytes without idle zeros: 3 MB, 2.5 GB."""
    number, unit = bytes_text(count).split(" ")
    return f"{number.rstrip('0').rstrip('.') if '.' in number else number} {unit}"


def count_text(count: float) -> str:
    """5.77 M, 7.24 B: parameters."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= limit:
            return f"{significant(count / limit)} {unit}"
    return str(int(count))


def rate_text(rate: float) -> str:
    """Tokens per second: whole above 100, else three digits."""
    return f"{rate:,.0f}" if rate >= 100 else significant(rate)


def percent(share: float, places: int = 1) -> str:
    """0.874 as 87.4."""
    return f"{100 * share:.{places}f}" if math.isfinite(share) else ABSENT


def rough_percent(share: float) -> str:
    """0.874 as 87, and as many digits as it takes below one per cent: nothing that is there is shown as 0."""
    if not math.isfinite(share):
        return ABSENT
    return f"{100 * share:.0f}" if share >= 0.00995 or share <= 0 else significant(100 * share, 1)
