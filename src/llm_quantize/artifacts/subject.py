"""An artifact as it is verified: what each kind answers, and its values held against the source's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llm_quantize.artifacts.deviation import Made
from llm_quantize.artifacts.verification import StoredTensor, TensorCheck
from llm_quantize.models.opening import Source

Floats = npt.NDArray[np.float32]
Manifest = Mapping[str, Any]
Checks = Mapping[str, TensorCheck]
Keeps = Callable[[str], bool]
Notes = Iterable[str]


class Subject(Protocol):
    """An artifact as it is verified. ``total``: how much there is to check, in whatever it counts. ``unmarked``: how it
    may have been made where no manifest says so."""

    path: Path
    total: int
    unmarked: Made

    def structure(self, manifest: Manifest | None) -> Iterable[str]:
        """What is wrong beside the values of tensors."""

    def stored(self) -> Iterator[StoredTensor]:
        """Its tensors as they lie in files, each once."""

    def against(self, source: Source, manifest: Manifest | None, stack: ExitStack) -> Iterable[str]:
        """What the source has and this has not, or otherwise; opens on ``stack`` what comparing values takes."""

    def values(self, checks: Checks, source: Source | None, made: Made, poisoned: dict[str, int]) -> Iterator[int]:
        """Look at every value, and at the source's: counts and impossible numbers go into ``checks``, values that are
        not finite where the source's are into ``poisoned``. Yields how much was done."""

    def judge(self, checks: Checks, keeps: Keeps) -> Notes:
        """The errors that ``values`` found, into ``checks``. ``keeps``: whether the run kept what it promises of a
        matrix (promise.py). Returns what a reader of the errors should know."""
