"""Losses of levels that nobody has published: mean KL divergence (nats) as ``compare`` measured it on the built-in
model, ``benchmarks/results/formats.json``, which has the command.

That model is tiny: its figures order the levels, and are not those of another model. Where a runtime rounds the inputs
of matrices too, they are of that runtime. W8A8 is left out: what 8-bit integer inputs cost depends on the outliers
among them, of which that model has none. ``compare`` rounds the inputs of matrices as the configurations of
compressed-tensors say; of ROUNDS_INPUTS it measures the weights alone.
"""

from __future__ import annotations

from collections.abc import Mapping

ELSEWHERE: Mapping[tuple[str, str], float] = {
    ("gptq", "8bit"): 5.24e-05,
    ("gptq", "4bit"): 0.00932,
    ("awq", "4bit"): 0.00869,
    ("compressed-tensors", "W8A16"): 5.11e-05,
    ("compressed-tensors", "W4A16"): 0.00932,
    ("compressed-tensors", "FP8_DYNAMIC"): 0.00267,
    ("compressed-tensors", "NVFP4A16"): 0.00718,
    ("compressed-tensors", "MXFP4A16"): 0.0121,
    ("bitsandbytes", "INT8"): 0.000345,
    ("bitsandbytes", "NF4"): 0.00705,
    ("bitsandbytes", "FP4"): 0.013,
    ("ctranslate2", "int8"): 0.000731,
    ("mlx", "8bit"): 6.04e-05,
    ("mlx", "6bit"): 0.000694,
    ("mlx", "5bit"): 0.00279,
    ("mlx", "4bit"): 0.0114,
    ("mlx", "3bit"): 0.0499,
}

ROUNDS_INPUTS = frozenset(
    {("bitsandbytes", "INT8")}
    | {("ctranslate2", level) for level in ("int8", "int8_float32", "int8_float16", "int8_bfloat16")}
)
ELSEWHERE_SOURCE = "the built-in model (benchmarks/results/formats.json)"
