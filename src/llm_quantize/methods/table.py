"""The methods by name: how the codes of a matrix are chosen on its grid. A method is a row of METHODS."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING

from llm_quantize.methods.gptq_options import GptqOptions

if TYPE_CHECKING:
    from llm_quantize.methods.gptq import Solution


@dataclass(frozen=True)
class Method:
    """``reads_text``: it chooses codes by what goes into a matrix, so it needs text, and sees matrices whole.
    ``words``: what a model card says of it. ``stages``: the optimiser's stages that are left of those asked for.
    ``module``: where its ``solve`` is, which needs torch. ``keeps``: codes and scales that the source has are taken as
    they are where the format holds them (blockwise/keeping.py)."""

    name: str
    reads_text: bool
    words: str
    stages: Callable[[GptqOptions], GptqOptions]
    module: str = "llm_quantize.methods.gptq"
    keeps: bool = False

    @property
    def solve(self) -> Callable[..., Solution]:
        """``solve(weight, kind, factor, options)``: grid and codes of some rows, see methods/gptq.py."""
        found: Callable[..., Solution] = import_module(self.module).solve
        return found


def _none(asked: GptqOptions) -> GptqOptions:
    return replace(asked, feedback=False, sweeps=0, refit=False, correction=0.0)


def _all(asked: GptqOptions) -> GptqOptions:
    return asked


METHODS: Mapping[str, Method] = {
    "rtn": Method("rtn", False, "rounding to nearest on fitted grids", _none),
    "gptq": Method("gptq", True, "error feedback (GPTQ) on importance-weighted grids fixed first", _all),
    "keep": Method(
        "keep", False, "those of the source, where this format holds them; else rounding", _none, keeps=True
    ),
}
