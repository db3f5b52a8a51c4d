"""Standard output and error that survive a reader that goes away and a narrow encoding.

A job of hours must not end because the pager it talks to was closed: what nobody reads is dropped, and the job goes
on to its own exit code. Only a device that fails while somebody waits for the result (a full disk) is an error.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import sys
from collections.abc import Mapping
from typing import Any

from llm_quantize.errors import ResourceError

_GONE = (errno.EPIPE, errno.ECONNRESET)


class Output(io.FileIO):
    """The raw end of a standard stream. ``gone``: nobody reads any more, so what is written is dropped.

    ``write`` raises ResourceError, once, where the device of standard output fails; never for standard error.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.gone = False

    def write(self, data: Any, /) -> int:
        if self.gone:
            return len(memoryview(data).cast("B"))
        try:
            return super().write(data)
        except OSError as error:
            self.gone = True
            if self.fileno() == 2 or error.errno in _GONE:
                return len(memoryview(data).cast("B"))
            raise ResourceError(
                "standard output cannot be written",
                found=error.strerror,
                remedy="free some space, or send the output elsewhere",
            ) from error


def json_text(value: Any) -> str:
    """``value`` as JSON that standard output can say whole; NaN and infinity, which JSON has no word for, are null.

    Half a surrogate pair (a file name's byte that is not UTF-8) has no UTF-8; JSON's own escape for it is the same.
    """
    utf = str(getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "") == "utf8"
    text = json.dumps(_finite(value), ensure_ascii=not utf, allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _finite(value: Any) -> Any:
    """A file from elsewhere may hold such a number, in its metadata for example."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def reader_gone() -> bool:
    """Whether what goes to standard output is dropped."""
    return bool(getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "gone", False))


def install() -> None:
    """Make ``sys.stdout`` and ``sys.stderr`` such streams, with escapes for what their encoding cannot say."""
    for descriptor in (0, 1, 2):
        _fill(descriptor)
    sys.stdout = _stream(sys.stdout, 1)
    sys.stderr = _stream(sys.stderr, 2)


def _fill(descriptor: int) -> None:
    """Give a closed descriptor to /dev/null, or the next file that is opened would get this number, and the words."""
    try:
        os.fstat(descriptor)
    except OSError:
        os.open(os.devnull, os.O_RDWR)


def _stream(stream: Any, descriptor: int) -> Any:
    if stream is None:  # it was closed when Python started; its number may be another file's by now
        return open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")  # noqa: PTH123
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(Output(descriptor)),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=descriptor == 2 or stream.isatty(),
    )
