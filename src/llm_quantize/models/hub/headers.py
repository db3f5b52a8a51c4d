"""A hub model without its weights: small files, and of each safetensors file the header alone.

What needs only headers (info, plan) must not fetch gigabytes. The headers come by HTTP range requests (RFC 9110,
section 14) into sparse files of the true size, in a temporary directory that looks like the model's own, so that
whatever reads headers works unchanged. The rest of those files is zeros: nobody may read weights from them
(``Checkpoint.read_rows`` refuses). A header alone cannot be compared with the hub's hash of the whole file.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from llm_quantize.engine import run, stop_on_signals
from llm_quantize.errors import IntegrityError, MalformedInputError, NetworkError, ResourceError, printable
from llm_quantize.io.gguf_file import MAX_METADATA_BYTES, read_gguf
from llm_quantize.io.paths import inside, opened, pread_into
from llm_quantize.io.safetensors_file import MAX_HEADER_BYTES
from llm_quantize.models.hub.errors import translated

_WORKERS = 4
_TRIES = 3
_TIMEOUT_SECONDS = 30.0
_CHUNK = 64 << 10
_GGUF_FIRST, _GGUF_MORE = 1 << 20, 4  # bytes that are asked for first, and how many times as many next
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-\d{1,19}/(\d{1,19}|\*)", re.ASCII)

Read = Callable[[int, int], bytes]
"""Bytes [start, stop) of a file; fewer where it ends before."""


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A weight file: its name, its size if the hub told it, and where it lies if the cache holds it whole."""

    name: str
    size: int | None
    cached: Path | None


def headers_directory(
    hub: Any, model_id: str, commit: str, small: Mapping[str, Path], weights: Iterable[WeightFile]
) -> tuple[tempfile.TemporaryDirectory[str], Path]:
    """(what to clean up, directory) of a copy of the model in which ``weights`` are headers and a hole.

    ``small``: {name: path} of files to copy. Weight files in the cache cost no request. Raises NetworkError,
    IntegrityError (a size other than the announced one), AccessError, ResourceError. A malformed header is left to
    whoever reads it.
    """
    holder = _temporary()
    try:
        directory = inside(Path(holder.name), model_id)  # messages name files: the model should be in their paths
        with _local_trouble(directory):
            directory.mkdir(parents=True)
            for name, path in small.items():
                inside(directory, name).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, inside(directory, name))
        remote = _Remote(hub, model_id, commit)
        with stop_on_signals() as stop:
            place = partial(_place, directory=directory, remote=remote)
            for _ in run(place, weights, threads=_WORKERS, stop=stop, resumable=None):
                pass
    except BaseException:
        holder.cleanup()
        raise
    return holder, directory


def gguf_headers(
    hub: Any, model_id: str, commit: str, weights: Sequence[WeightFile]
) -> tuple[tempfile.TemporaryDirectory[str], list[Path]]:
    """(what to clean up, the GGUF files ``weights``, each its header and a hole behind it). Files in the cache cost no
    request. Raises as ``headers_directory``, and MalformedInputError and UnsupportedError for what is no GGUF file."""
    holder = _temporary()
    try:
        directory = inside(Path(holder.name), model_id)
        with _local_trouble(directory):
            directory.mkdir(parents=True)
        remote = _Remote(hub, model_id, commit)
        with stop_on_signals() as stop:
            place = partial(_place_gguf, directory=directory, remote=remote)
            return holder, list(run(place, weights, threads=_WORKERS, stop=stop, resumable=None))
    except BaseException:
        holder.cleanup()
        raise


def _place_gguf(file: WeightFile, directory: Path, remote: _Remote) -> Path:
    """The GGUF file itself where it is here, else a copy of its header. How long that is shows while it is read: as
    long as it ends in what is not here yet, more is fetched."""
    if file.cached is not None:
        return file.cached
    target = inside(directory, file.name)
    header, size = remote.read(file, 0, _GGUF_FIRST)
    with _local_trouble(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with _local_trouble(target), target.open("wb") as stream:
            stream.write(header)
            stream.truncate(size)
        try:
            if read_gguf(target).data_start <= len(header):
                return target
        except MalformedInputError:
            if len(header) >= min(size, MAX_METADATA_BYTES) or not header.startswith(b"GGUF"):
                raise
        if len(header) >= min(size, MAX_METADATA_BYTES):
            return target
        header += remote.read(file, len(header), min(size, _GGUF_MORE * len(header), MAX_METADATA_BYTES))[0]


def _temporary() -> tempfile.TemporaryDirectory[str]:
    with _local_trouble(Path(tempfile.gettempdir())):
        return tempfile.TemporaryDirectory(prefix="llm-quantize-headers-")


@contextmanager
def _local_trouble(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ResourceError(
            f"the model's headers cannot be put into a temporary file ({error.strerror or type(error).__name__})",
            file=path,
            remedy="free some space, or set TMPDIR to another disk",
        ) from error


def _place(file: WeightFile, directory: Path, remote: _Remote) -> None:
    """Write ``file``'s header and the hole behind it into ``directory``."""
    target = inside(directory, file.name)
    if file.cached is not None:
        with opened(file.cached) as descriptor:
            size = os.fstat(descriptor).st_size

            def read(start: int, stop: int) -> bytes:
                block = bytearray(max(0, min(stop, size) - start))
                pread_into(descriptor, memoryview(block), start, target)
                return bytes(block)

            header = _header(read, size)
    elif file.size == 0:  # no range of an empty file can be asked for
        size, header = 0, b""
    else:
        first, size = remote.read(file, 0, 8)
        header = _header(lambda start, stop: first if stop == 8 else remote.read(file, start, stop)[0], size)
    with _local_trouble(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as stream:
            stream.write(header)
            stream.truncate(size)


def _header(read: Read, size: int) -> bytes:
    """The length and the header; the length alone where it breaks the format's limits (read_header says how)."""
    first = read(0, 8)
    length = int.from_bytes(first, "little")
    if len(first) < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        return first
    return first + read(8, 8 + length)


class _Remote:
    """Ranges of the files of one commit, through huggingface_hub's own session and token."""

    def __init__(self, hub: Any, model_id: str, commit: str) -> None:
        self._hub, self._model_id, self._commit = hub, model_id, commit
        self._errors = importlib.import_module("huggingface_hub.errors")

    def read(self, file: WeightFile, start: int, stop: int) -> tuple[bytes, int]:
        """(bytes [start, stop) or fewer where the file ends before, the file's size)."""
        with translated(self._model_id, file.name, self._commit):
            data, size = self._retried(file, start, stop)
        if file.size is not None and size is not None and size != file.size:
            raise IntegrityError(
                f"a file of {printable(self._model_id, 120)} is not the one that the hub announced",
                file=file.name,
                expected=f"{file.size} bytes",
                found=f"{size} bytes",
                remedy="run the same command again; if it comes again, check proxy and HF_ENDPOINT",
            )
        known = size if size is not None else file.size
        if known is None:
            self._refuse(file, start, "a size", "none")
        if len(data) != max(0, min(stop, known) - start):
            self._refuse(file, start, f"{min(stop, known) - start:,} bytes", f"{len(data):,} bytes")
        return data, known

    def _refuse(self, file: WeightFile, start: int, expected: str, found: str) -> NoReturn:
        raise NetworkError(
            "the hub's answer is not the part of the file that was asked for",
            file=f"{self._model_id}/{file.name}",
            offset=start,
            expected=expected,
            found=found,
            remedy="run the same command again; if it comes again, check proxy and HF_ENDPOINT",
        )

    def _retried(self, file: WeightFile, start: int, stop: int) -> tuple[bytes, int | None]:
        for _ in range(_TRIES - 1):
            try:
                return self._once(file, start, stop)
            except (self._errors.HTTPError, OSError) as error:
                if getattr(error, "response", None) is not None:
                    raise  # the hub answered, and would answer the same again
                time.sleep(1)
        return self._once(file, start, stop)

    def _once(self, file: WeightFile, start: int, stop: int) -> tuple[bytes, int | None]:
        url = self._hub.hf_hub_url(self._model_id, file.name, revision=self._commit)
        headers = dict(self._hub.utils.build_hf_headers())
        headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        with self._answer(url, headers) as response:
            self._hub.utils.hf_raise_for_status(response)
            skip, size = start, response.headers.get("Content-Length", "")
            total = int(size) if size.isdecimal() else None
            if response.status_code == 206:
                match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
                if match is None or int(match[1]) != start:
                    self._refuse(file, start, f"bytes from {start:,} on", "another part, or none named")
                skip, total = 0, None if match[2] == "*" else int(match[2])
            # A server that knows no ranges sends the whole file: what comes before is dropped, what comes after is
            # never read, for leaving the block closes the connection.
            return _take(_chunks(response), skip, stop - start), total

    @contextmanager
    def _answer(self, url: str, headers: Mapping[str, str]) -> Iterator[Any]:
        """The open answer to a GET, its body unread; huggingface_hub 1 and later speak httpx, before it requests."""
        session = self._hub.utils.get_session()
        if callable(session.stream):
            with session.stream(
                "GET", url, headers=headers, timeout=_TIMEOUT_SECONDS, follow_redirects=True
            ) as response:
                yield response
        else:
            with closing(session.get(url, headers=headers, timeout=_TIMEOUT_SECONDS, stream=True)) as response:
                yield response


def _chunks(response: Any) -> Iterator[bytes]:
    pieces: Iterator[bytes] = (
        response.iter_bytes() if hasattr(response, "iter_bytes") else response.iter_content(_CHUNK)
    )
    return pieces


def _take(pieces: Iterator[bytes], skip: int, count: int) -> bytes:
    """``count`` bytes after the first ``skip``, or fewer if ``pieces`` end."""
    taken = bytearray()
    for piece in pieces:
        taken += piece[skip : skip + count - len(taken)]
        skip = max(0, skip - len(piece))
        if len(taken) == count:
            break
    return bytes(taken)
