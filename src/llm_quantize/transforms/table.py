"""The transforms by name: rewrites of the float model that keep its function. A transform is a row of TRANSFORMS."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from llm_quantize.architectures.scaling import changed_floats

if TYPE_CHECKING:
    from llm_quantize.architectures.scaling import Opened
    from llm_quantize.transforms.awq import AwqResult


@dataclass(frozen=True)
class Transform:
    """``passes``: how often it runs the text through each block; 0: it does nothing. ``words``: what a model card adds
    to the method's. ``changes``: the source's tensors, kept as floats, that it gives other values. ``module``: where
    its ``scales`` is, which needs torch. ``samples``: tokens whose inputs it wants to see as they are; ``rounded``: it
    is for levels alone whose runtimes round inputs."""

    name: str
    passes: int
    words: str
    changes: Callable[[Opened], frozenset[str]]
    module: str = ""
    samples: int = 0
    rounded: bool = False

    @property
    def scales(self) -> Callable[..., AwqResult]:
        """``scales(weights, seen, kind, feedback=..., spread=...)``: of matrices that share an input, see
        transforms/awq.py."""
        found: Callable[..., AwqResult] = import_module(self.module).scales
        return found


TRANSFORMS: Mapping[str, Transform] = {
    "none": Transform("none", 0, "", lambda _source: frozenset()),
    "awq": Transform("awq", 1, ", channels rescaled as AWQ does", changed_floats, "llm_quantize.transforms.awq"),
    "smoothquant": Transform(
        "smoothquant",
        1,
        ", what is hard to round moved from activations into weights (SmoothQuant)",
        changed_floats,
        "llm_quantize.transforms.smoothquant",
        samples=512,
        rounded=True,
    ),
}
