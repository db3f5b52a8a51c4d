"""The hidden states between two blocks, one window after another: in memory, or in a file when they are many.

``Kept`` is how a run that was killed finds again those that it left beside its output.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from llm_quantize.errors import ResourceError
from llm_quantize.io.durable import allocate, fail_os, open_directory, open_regular_output
from llm_quantize.io.output import ResumableOutput
from llm_quantize.io.paths import pread_into


class Activations:
    """``windows`` slots of hidden states (length, width) in ``dtype``. Threads may use different slots at once.

    ``directory``: where a file without a name holds them (it is gone when the process ends, however it ends), by
    positioned reads and writes. ``file``: a file that stays, with what stands in it. Neither: in memory. Raises
    ResourceError where disk or memory do not suffice: the whole file is reserved at the start. Close it, or use it as
    a context manager.
    """

    def __init__(
        self,
        windows: int,
        length: int,
        width: int,
        dtype: torch.dtype,
        *,
        directory: Path | None = None,
        file: Path | None = None,
    ) -> None:
        self.shape, self.dtype = (windows, length, width), dtype
        self._where = file or directory or Path()
        self._window_bytes = length * width * dtype.itemsize
        self._memory: torch.Tensor | None = None
        self._file = -1
        if directory is None and file is None:
            self._memory = self._in_memory()
            return
        try:
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                os.close(open_directory(file.parent))  # refuses a link
                self._file = open_regular_output(file)
            else:
                self._file, name = tempfile.mkstemp(prefix="llm-quantize-", suffix=".activations", dir=directory)
                Path(name).unlink()
            allocate(self._file, self.nbytes)
        except OSError as error:
            self.close()
            fail_os(error, "the hidden states cannot be put on disk", self._where)

    def _in_memory(self) -> torch.Tensor:
        try:
            return torch.empty(self.shape, dtype=self.dtype)
        except RuntimeError as error:  # torch's way to say that memory is not to be had
            raise ResourceError(
                "there is not enough memory for the hidden states",
                expected=f"{self.nbytes:,} bytes",
                found=str(error).splitlines()[0][:200],
                remedy="use fewer or shorter windows, or let them be kept on disk",
            ) from error

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return self.shape[0] * self._window_bytes

    def read(self, index: int) -> torch.Tensor:
        """The hidden states (length, width) of a window; in memory it is the slot itself, not to be written to."""
        self._check(index)
        if self._memory is not None:
            return self._memory[index]
        found = torch.empty(self.shape[1:], dtype=self.dtype)
        view = found.view(torch.uint8).numpy().reshape(-1).data
        pread_into(self._file, view, index * self._window_bytes, self._where)
        return found

    def write(self, index: int, value: torch.Tensor) -> None:
        """Put the hidden states (length, width) of a window into its slot."""
        self._check(index)
        if tuple(value.shape) != self.shape[1:] or value.dtype != self.dtype:
            raise ValueError(f"{tuple(value.shape)} in {value.dtype} does not fit {self.shape[1:]} in {self.dtype}")
        if self._memory is not None:
            with torch.inference_mode():
                self._memory[index].copy_(value)
            return
        data = value.contiguous().cpu().view(torch.uint8).numpy().reshape(-1).data
        offset = index * self._window_bytes
        try:
            while data:
                written = os.pwrite(self._file, data, offset)
                data, offset = data[written:], offset + written
        except OSError as error:
            fail_os(error, "the hidden states cannot be put on disk", self._where)

    def digest(self) -> str:
        """SHA-256 over the bytes of all slots."""
        digest = hashlib.sha256()
        for index in range(self.shape[0]):
            digest.update(self.read(index).contiguous().view(torch.uint8).numpy().reshape(-1).data)
        return digest.hexdigest()

    def _check(self, index: int) -> None:
        if not 0 <= index < self.shape[0]:
            raise IndexError(f"window {index} of {self.shape[0]}")
        if self._memory is None and self._file < 0:
            raise ValueError("the activations are closed")

    def close(self) -> None:
        """Free the memory, or the file. Closing twice does nothing."""
        self._memory = None
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Activations:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class Kept:
    """Where the hidden states of a run stand between two blocks: ``shape`` (windows, length, width) in ``dtype``, in
    memory (``directory`` None), or in files of ``directory`` that the journal of ``output`` vouches for.

    A run may lead several streams; each has a ``lane`` of two files that take turns, so that what a block left is whole
    until all that leaves the next one is there.
    """

    output: ResumableOutput
    shape: tuple[int, int, int]
    dtype: torch.dtype
    directory: Path | None

    def entering(self, index: int, lane: int = 0) -> Activations:
        """The slots of what enters block ``index``; in files, with what stands in them."""
        file = None if self.directory is None else self.directory / str(2 * lane + index % 2)
        return Activations(*self.shape, self.dtype, file=file)

    def leaving(self, index: int, states: Activations, lane: int = 0) -> Activations:
        """Where what leaves block ``index`` goes when ``states`` entered it: in memory to the same place."""
        return states if self.directory is None else self.entering(index + 1, lane)

    def remember(self, index: int, states: Sequence[Activations]) -> None:
        """Note that ``states``, one of each lane, left block ``index``."""
        if self.directory is not None:
            self.output.note({"hidden": {"after": index, "sha256": [one.digest() for one in states]}})

    def resume(
        self, wanted: int, lanes: Sequence[int], warn: Callable[[str], None]
    ) -> tuple[list[Activations], int] | None:
        """What an earlier run left before block ``wanted``, in the order of ``lanes``, and the block that it enters;
        None where there is nothing to trust. ``warn`` is told of files that are damaged."""
        note = self.output.notes.get("hidden")
        after, digests = (note.get("after"), note.get("sha256")) if isinstance(note, dict) else (None, None)
        if self.directory is None or type(after) is not int:
            return None
        if 0 <= after < wanted:
            found = [self.entering(after + 1, lane) for lane in lanes]
            if [states.digest() for states in found] == digests:
                return found, after + 1
            close(found)
            warn(f"{self.directory}: the hidden states are damaged; finished blocks are run again")
        self.output.note({"hidden": None})
        return None


def close(states: Iterable[Activations]) -> None:
    """Close all of them."""
    for one in states:
        one.close()
