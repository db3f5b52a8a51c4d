"""Losses of levels that nobody has published: mean KL divergence (nats) as ``compare`` measured it on the built-in
model, ``benchmarks/results/formats.json``, which has the command.

That model is tiny: its figures order the levels, and are not those of another model. They are of the weights alone;
levels whose runtime rounds the inputs of matrices too (ROUNDS_INPUTS) lose more.
"""

from __future__ import annotations

from collections.abc import Mapping

ELSEWHERE: Mapping[tuple[str, str], float] = {
    ("gptq", "8bit"): 5.24e-05,
    ("gptq", "4bit"): 0.00932,
    ("awq", "4bit"): 0.00869,
    ("compressed-tensors", "W8A16"): 5.11e-05,
    ("compressed-tensors", "W4A16"): 0.00932,
    ("compressed-tensors", "FP8_DYNAMIC"): 0.000617,
    ("compressed-tensors", "NVFP4A16"): 0.00718,
    ("compressed-tensors", "MXFP4A16"): 0.0121,
    ("bitsandbytes", "INT8"): 6.36e-05,
    ("bitsandbytes", "NF4"): 0.00705,
    ("bitsandbytes", "FP4"): 0.013,
    ("ctranslate2", "int8"): 0.000104,
    ("mlx", "8bit"): 6.04e-05,
    ("mlx", "6bit"): 0.000694,
    ("mlx", "5bit"): 0.00279,
    ("mlx", "4bit"): 0.0114,
    ("mlx", "3bit"): 0.0499,
}

ROUNDS_INPUTS = frozenset({"W8A8", "FP8_DYNAMIC", "W4AFP8", "MXFP4"})
ELSEWHERE_SOURCE = "the built-in model (benchmarks/results/formats.json)"
