"""Amounts in units that people read: bytes, time, and how many."""

from __future__ import annotations

import math

ABSENT = "–"


def significant(value: float, digits: int = 3) -> str:
    """``value`` with that many significant digits, never in powers of ten above 1e-7: 0.00123, 45.6, 1230."""
    if not math.isfinite(value):
        return ABSENT
    if value == 0:
        return "0"
    power = math.floor(math.log10(abs(value)))
    if power < -7:
        return f"{value:.{digits - 1}e}"
    rounded = round(value, digits - 1 - power)
    power = math.floor(math.log10(abs(rounded)))  # 9.999 became 10.0
    return f"{rounded:.{max(0, digits - 1 - power)}f}"


def decimals(value: float, places: int) -> str:
    """``value`` with so many decimals, or three significant digits where those would show fewer: 0.12346, 0.0000123,
    4.56e-08; what is 0 is "0", and nothing else is."""
    if value == 0:
        return "0"
    small = math.isfinite(value) and abs(value) < 10.0 ** (2 - places)
    return significant(value) if small else f"{value:.{places}f}"


def bytes_text(count: float) -> str:
    """3.58 MB, in powers of ten, three significant digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{significant(count)} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{significant(count)} TB"


def time_text(seconds: float) -> str:
    """40 s, 12 min, 46 h: two significant digits, as it is for estimates, and a second at least."""
    seconds = max(1.0, seconds)
    for limit, size, unit in ((90, 1, "s"), (90 * 60, 60, "min"), (math.inf, 3600, "h")):
        if seconds < limit:
            count = float(f"{seconds / size:.2g}")
            return f"{count:g} {unit}" if count < 1000 else f"{count:,.0f} {unit}"
    return ABSENT


def counted(count: int, noun: str, plural: str = "") -> str:
    """1 matrix, 1,234 matrices."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"
