"""The transforms by name: rewrites of the float model that keep its function. A transform is a row of TRANSFORMS."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_quantize.architectures.scaling import changed_floats

if TYPE_CHECKING:
    from llm_quantize.architectures.scaling import Opened


@dataclass(frozen=True)
class Transform:
    """``passes``: how often it runs the text through each block; 0: it does nothing. ``words``: what a model card adds
    to the method's. ``changes``: the source's tensors, kept as floats, that it gives other values."""

    name: str
    passes: int
    words: str
    changes: Callable[[Opened], frozenset[str]]


TRANSFORMS: Mapping[str, Transform] = {
    "none": Transform("none", 0, "", lambda _source: frozenset()),
    "awq": Transform("awq", 1, ", channels rescaled as AWQ does", changed_floats),
}
