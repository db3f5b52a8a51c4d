"""How fast each type is rounded: million weights per CPU-second, without and with importance, one core.

Two digits of benchmarks/results/kernels.json (docs/reference/speed.md); for estimates only.
"""

from __future__ import annotations

from collections.abc import Mapping

RATES: Mapping[str, tuple[float, float]] = {
    "f32": (10000, 10000),
    "f16": (5700, 5700),
    "bf16": (8900, 8900),
    "q8_0": (5700, 5700),
    "tq1_0": (5100, 5100),
    "tq2_0": (6100, 6100),
    "mxfp4": (2100, 2100),
    "q4_0": (5400, 360),
    "q4_1": (4600, 110),
    "q5_0": (3100, 350),
    "q5_1": (2900, 110),
    "q2_k": (200, 93),
    "q3_k": (380, 280),
    "q4_k": (180, 100),
    "q5_k": (220, 110),
    "q6_k": (350, 330),
    "iq4_nl": (280, 250),
    "iq4_xs": (270, 230),
    "iq3_s": (22, 22),
    "iq3_xxs": (12, 12),
    "iq2_s": (36, 35),
    "iq2_xs": (17, 17),
    "iq2_xxs": (26, 26),
    "iq1_m": (68, 60),
    "iq1_s": (62, 62),
}

WORD_SECONDS: Mapping[str, float] = {
    **dict.fromkeys(("iq2_xxs", "iq2_xs", "iq3_xxs", "iq3_s"), 2.0),
    "iq2_s": 2.5,
    **dict.fromkeys(("iq1_s", "iq1_m"), 3.5),
}
"""CPU-seconds in which error feedback chooses the codes of a million weights eight at a time, beside what the products
with a Hessian take; a type that is not here chooses them one by one."""

READING = 400.0
"""Million weights per CPU-second that are read, hashed and written, whatever their type."""


def rounding_seconds(weights: int, qtype: str, *, weighted: bool) -> float:
    """CPU seconds to read, round and write ``weights`` as ``qtype``; of a type that was not measured, to read them."""
    million = weights / 1e6
    rate = RATES.get(qtype)
    return million / READING + (million / rate[weighted] if rate else 0.0)
