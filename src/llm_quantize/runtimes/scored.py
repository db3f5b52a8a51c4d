"""Predictions of a model in a runtime of another process, for some windows at a time.

Each time is a process of its own that loads the model (isolated.py); what it answers is held until it was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llm_quantize.errors import IntegrityError
from llm_quantize.runtimes.base import Reply

HELD_BYTES = 2 << 30
"""Predictions that are held at a time, in bytes, unless one window has more."""


class ScoredDirectory:
    """``windows`` (n, length) of token ids, to be asked for in their order. ``score``: what the runtime replies to
    some of them; ``vocab_size``: the predictions that it must have for each position."""

    def __init__(
        self,
        path: Path,
        windows: npt.NDArray[np.integer],
        score: Callable[[npt.NDArray[np.int32]], Reply],
        *,
        vocab_size: int,
    ) -> None:
        self.path, self.vocab_size = path, vocab_size
        self._windows, self._ask = np.asarray(windows, np.int32), score
        self._step = max(1, HELD_BYTES // max(1, 4 * self._windows.shape[1] * vocab_size))
        self._held: npt.NDArray[np.float32] | None = None
        self._first = 0
        self._next = 0

    def logits(self, window: Sequence[int]) -> npt.NDArray[np.float32]:
        """Log-probabilities (length, vocab_size) of the next of the windows, which ``window`` must be.

        Raises what ``isolated.run`` raises, and IntegrityError where the runtime has another vocabulary.
        """
        index = self._next
        if index >= len(self._windows) or list(window) != self._windows[index].tolist():
            raise ValueError("windows are to be asked for in their order, each once")
        self._next += 1
        if self._held is None or index >= self._first + len(self._held):
            self._held = None
            self._first = index
            self._held = self._score(self._windows[index : index + self._step])
        found: npt.NDArray[np.float32] = self._held[index - self._first]
        return found

    def _score(self, windows: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        found = self._ask(windows).logprobs
        if found is None or found.shape != (*windows.shape, self.vocab_size):
            raise IntegrityError(
                "the runtime's vocabulary is not the reference model's",
                file=self.path,
                expected=(*windows.shape, self.vocab_size),
                found=None if found is None else found.shape,
                remedy="give the model that the artifact was made from with --reference",
            )
        return found
