"""What a user may set about calibration, and where its results are kept. Nothing here needs torch."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from llm_quantize.errors import UsageError
from llm_quantize.io.statistics_layout import check_kinds

DEFAULT_SAMPLES = 256
DEVICES = ("cpu", "cuda", "mps")


@dataclass(frozen=True)
class CalibrationOptions:
    """Text: ``data`` (files and names of built-in sets; none: the built-in mix), at most ``samples`` windows (None:
    DEFAULT_SAMPLES, or as many as a method needs) of ``length`` tokens (no longer than the model's context), drawn with
    ``seed``; ``chat`` sets plain text as a conversation in the model's template. ``collect``: which statistics, of the
    kinds in io/statistics_layout.py. ``expert_minimum``: tokens that each expert should see; more text is drawn until
    it does or the text ends (0: never). ``threads`` and ``max_ram`` (bytes) bound the run and do not change a byte of
    its result.
    """

    data: tuple[str, ...] = ()
    samples: int | None = None
    length: int = 2048
    chat: bool = False
    seed: int = 0
    collect: tuple[str, ...] = ("imatrix",)
    expert_minimum: int = 16
    device: str = "cpu"
    threads: int | None = None
    max_ram: int | None = None

    def settled(self, samples: int = DEFAULT_SAMPLES) -> CalibrationOptions:
        """The same with a number of windows: ``samples`` where the user gave none."""
        return self if self.samples is not None else replace(self, samples=samples)

    def __post_init__(self) -> None:
        check_kinds(self.collect)
        if self.device not in DEVICES:
            raise UsageError("there is no such device", expected=", ".join(DEVICES), found=self.device)
        if (self.samples is not None and self.samples < 1) or self.length < 2:
            raise UsageError("calibration needs at least 1 window of 2 tokens", found=f"{self.samples} x {self.length}")


def cache_directory() -> Path:
    """Where statistics are kept: LLM_QUANTIZE_CACHE, or llm-quantize in the user's cache directory."""
    chosen = os.environ.get("LLM_QUANTIZE_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "llm-quantize"
