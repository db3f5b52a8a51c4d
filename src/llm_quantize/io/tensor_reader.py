"""Row ranges of tensors, by positioned reads into the caller's memory.

Never mapped: pages of a mapping count as resident memory, a truncated mapping kills with SIGBUS, and a 70 B model
would not fit the promise of one gigabyte. One descriptor per file is shared by all threads (pread has no cursor).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llm_quantize.errors import IntegrityError
from llm_quantize.io.paths import open_regular, pread_into
from llm_quantize.io.safetensors_file import Header, TensorInfo

_KEPT_OPEN = 128  # descriptors; files beyond these are opened for each read
_BLOCK = 8 << 20  # bytes read at once where a transposed read wants part of every row
_SPARSE = 16 << 10  # a row's unwanted bytes below which reading them costs less than another system call


class TensorReader:
    """Reads byte ranges of the tensors that ``headers`` describe; notices files that changed since."""

    def __init__(self, headers: Iterable[Header]) -> None:
        self._headers = {header.path: header for header in headers}
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._closed = False

    def read(self, tensor: TensorInfo, start: int, view: memoryview) -> None:
        """Fill ``view`` with the tensor's bytes from ``start`` on.

        Raises IntegrityError (the file changed or shrank since its header was read), ResourceError (the device
        failed), AccessError, each naming file, tensor and offset.
        """
        if start < 0 or start + len(view) > tensor.nbytes:
            raise ValueError(f"bytes {start}..{start + len(view)} are not inside {tensor.name}")
        with self._descriptor(tensor) as descriptor:
            pread_into(descriptor, view, tensor.offset + start, tensor.file, tensor.name)
            self._check_unchanged(descriptor, tensor)

    def read_columns(
        self, tensor: TensorInfo, base: int, rows: int, row_bytes: int, first: int, out: npt.NDArray[np.uint8]
    ) -> None:
        """Bytes [first, first + width) of each of ``rows`` rows that begin at byte ``base`` of the tensor.

        ``out``: uint8 (rows, width). Reads either the wanted span of each row, or blocks of whole rows where the
        rest is small, so memory stays bounded and system calls stay few.
        """
        width = out.shape[1]
        if row_bytes - width > _SPARSE:
            for row in range(rows):
                self.read(tensor, base + row * row_bytes + first, out[row].data)
            return
        step = max(1, _BLOCK // max(1, row_bytes))
        block = np.empty((min(step, rows), row_bytes), np.uint8)
        for row in range(0, rows, step):
            count = min(step, rows - row)
            self.read(tensor, base + row * row_bytes, block[:count].reshape(-1).data)
            out[row : row + count] = block[:count, first : first + width]

    @contextmanager
    def _descriptor(self, tensor: TensorInfo) -> Iterator[int]:
        with self._lock:
            if self._closed:
                raise ValueError("the checkpoint is closed")
            descriptor = self._descriptors.get(tensor.file)
            keep = descriptor is not None or len(self._descriptors) < _KEPT_OPEN
            if descriptor is None:
                descriptor = open_regular(tensor.file)
                if keep:
                    self._descriptors[tensor.file] = descriptor
        try:
            yield descriptor
        finally:
            if not keep:
                os.close(descriptor)

    def _check_unchanged(self, descriptor: int, tensor: TensorInfo) -> None:
        facts, header = os.fstat(descriptor), self._headers[tensor.file]
        now = (facts.st_size, facts.st_mtime_ns, facts.st_dev, facts.st_ino)
        then = (header.file_size, header.mtime_ns, header.device, header.inode)
        if now != then:
            raise IntegrityError(
                "the file was changed while it was read",
                file=tensor.file,
                tensor=tensor.name,
                offset=tensor.offset,
                expected=f"{then[0]:,} bytes, modified at {then[1]} ns",
                found=f"{now[0]:,} bytes, modified at {now[1]} ns" + (", another file" if now[2:] != then[2:] else ""),
                remedy="leave the model alone while it is read, then run the command again",
            )

    def close(self) -> None:
        """Close every descriptor. Later reads raise ValueError; closing twice does nothing."""
        with self._lock:
            self._closed = True
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()
