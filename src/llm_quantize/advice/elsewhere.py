"""Losses of levels that nobody has published: mean KL divergence (nats) as ``compare`` measured it on the built-in
model, ``benchmarks/results/formats.json``, which has the command.

That model is tiny: its figures order the levels, and are not those of another model. They are of the weights alone;
levels whose runtime rounds the inputs of matrices too (ROUNDS_INPUTS) lose more.
"""

from __future__ import annotations

from collections.abc import Mapping

ELSEWHERE: Mapping[tuple[str, str], float] = {}

ROUNDS_INPUTS = frozenset({"W8A8", "FP8_DYNAMIC", "W4AFP8", "MXFP4"})
ELSEWHERE_SOURCE = "the built-in model (benchmarks/results/formats.json)"
