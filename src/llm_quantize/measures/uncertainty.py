"""Standard errors that do not take the tokens of one window for independent.

Tokens of one window stand in one context, so their losses go together: the error of a mean over them is that of its
windows. With e_g the sum of x - mean over the tokens of window g, G windows and N tokens,

    variance of the mean = G / (G - 1) * sum of e_g² / N²

which is the cluster-robust variance of a regression on a constant (Liang and Zeger 1986; Cameron and Miller 2015, "A
Practitioner's Guide to Cluster-Robust Inference", section II, whose factor G/(G-1) * (N-1)/(N-K) has K = 1 here). Where
every window is one token it is the usual variance / (N - 1). One window shows nothing of how windows differ: the error
is NaN then, and nothing is printed for it. Slow twin: tests/oracles/divergence.py.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from llm_quantize.measures.amounts import decimals


def mean_and_sem(values: npt.NDArray[np.float64], windows: npt.NDArray[np.integer]) -> tuple[float, float]:
    """Mean of ``values`` (N,) and its standard error, clustered by ``windows`` (N,), the window of each value; with
    fewer than two windows the error is NaN."""
    mean = float(values.mean())
    _, places = np.unique(windows, return_inverse=True)
    apart = np.bincount(places, weights=values - mean)
    count = len(apart)
    if count < 2:
        return mean, math.nan
    return mean, math.sqrt(count / (count - 1) * float(np.square(apart).sum())) / len(values)


def figure(value: float, error: float | None, places: int = 5, *, signed: bool = False) -> str:
    """``value ± error``: the value as ``decimals`` has it, the error with as many decimals, or as ``decimals`` has it
    where those would not show its first digit; the value alone where there is no error to be told (one window: NaN, or
    None as JSON has it). ``signed``: with its sign, also where that is plus."""
    plain = decimals(value, places)
    told = f"{'+' if signed and value > 0 else ''}{plain}"
    if error is None or not math.isfinite(error):
        return told
    shown = 0 if "e" in plain else len(plain.partition(".")[2])
    return f"{told} ± {decimals(error, places) if abs(error) < 10.0**-shown else f'{error:.{shown}f}'}"
