"""A loss of quality in words, with the thresholds that the words stand for.

The thresholds are mean KL divergences in nats per token. They are set between the levels that people know, by the
figures that llama.cpp publishes for Llama 3 8B (base model in F16, wikitext test, windows of 512):

    Q8_0 0.0014 | Q6_K 0.0055 | Q5_K_M 0.011, Q4_K_M 0.028 to 0.031, Q4_K_S 0.032 to 0.043 | Q4_0 0.072, Q3_K_M 0.084
    to 0.10 | IQ3_XXS 0.18, Q2_K 0.33 to 0.45 | IQ2_XS 0.55, IQ2_XXS 0.81, IQ1_M 1.4

The same level costs other models more or less (Llama 2 7B two and a half to four times less), so that the grade is
of the artifact on this text and not of the level's name.
"""

from __future__ import annotations

import math

GRADES: tuple[tuple[str, float], ...] = (
    ("indistinguishable", 0.002),
    ("excellent", 0.01),
    ("good", 0.05),
    ("noticeable loss", 0.15),
    ("heavy loss", 0.5),
    ("damaged", math.inf),
)
"""(name, mean KLD below which it is earned), from the best on."""

MEANING = {
    "indistinguishable": "as 8-bit types are",
    "excellent": "as 6-bit types usually are",
    "good": "as 4- and 5-bit types with K-quants usually are",
    "noticeable loss": "as 3-bit types, and plain 4-bit ones, usually are",
    "heavy loss": "as 2- and small 3-bit types usually are: compare with a smaller model at more bits",
    "damaged": "the model often says something else",
}


def grade(kld: float) -> str:
    """The name for a mean KL divergence. NaN is "damaged"."""
    return next((name for name, limit in GRADES if kld < limit), GRADES[-1][0])
