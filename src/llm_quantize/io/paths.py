"""Opening files that a model repository names: regular files only, inside the model directory, never blocking.

A hub cache keeps file contents in ``blobs/`` and lets ``snapshots/COMMIT/NAME`` point there; those links are
followed. Any other link that leaves the model directory is refused, so that a repository cannot make us read
(or publish, inside an artifact) somebody's private file.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm_quantize.errors import (
    AccessError,
    IntegrityError,
    LlmQuantizeError,
    MalformedInputError,
    ResourceError,
    UsageError,
    printable,
)

_COMPONENT = re.compile(r"[A-Za-z0-9._-]{1,255}", re.ASCII)


def read_failure(error: OSError, path: str | Path, **where: object) -> LlmQuantizeError:
    """The member of our tree that a system call's refusal to read ``path`` belongs to."""
    tensor, offset = where.get("tensor"), where.get("offset")
    tensor = tensor if isinstance(tensor, str) else None
    offset = offset if isinstance(offset, int) else None
    reason = os.strerror(error.errno) if error.errno else str(error)
    if error.errno in (errno.EACCES, errno.EPERM):
        return AccessError(
            f"the system does not let us read this file ({reason})",
            file=path,
            tensor=tensor,
            remedy="give this user read permission on the file and on the directories above it",
        )
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENXIO, errno.ELOOP, errno.ENAMETOOLONG):
        return MalformedInputError(
            f"cannot open this file ({reason})",
            file=path,
            tensor=tensor,
            expected="a regular file",
            remedy="fetch the model again, all of its files",
        )
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        return ResourceError(
            f"the system has no more file handles or memory for us ({reason})",
            file=path,
            remedy="raise the limit (ulimit -n) or close other programs",
        )
    return ResourceError(
        f"reading failed ({reason})",
        file=path,
        tensor=tensor,
        offset=offset,
        remedy="check the disk or network mount that holds this file, then run the same command again",
    )


def open_regular(path: str | Path) -> int:
    """A read-only descriptor of the regular file at ``path`` (the caller closes it).

    Opened without blocking, so that a FIFO or a device cannot hang us, and refused unless it is a regular file.
    Raises MalformedInputError (absent, or not a regular file), AccessError, ResourceError.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        raise read_failure(error, path) from error
    except ValueError as error:  # a NUL, or a lone surrogate, in the name
        raise MalformedInputError("not a possible file name", file=path, found=error) from error
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        names = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
        raise MalformedInputError(
            "not a regular file",
            file=path,
            expected="a regular file",
            found=names.get(kind, "a device"),
            remedy="put the real file here, or fetch the model again",
        )
    return descriptor


def open_argument(path: str | Path, what: str) -> tuple[int, int]:
    """(descriptor, size) of a regular file that the user named; ``what`` it should be, for the message.

    Raises UsageError (no such file) and AccessError (not readable, or not a regular file).
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except FileNotFoundError as error:
        raise UsageError(f"no such {what}", file=path, remedy="check the path") from error
    except OSError as error:
        raise AccessError(f"the {what} cannot be opened", file=path, found=error.strerror) from error
    facts = os.fstat(descriptor)
    if not stat.S_ISREG(facts.st_mode):
        os.close(descriptor)
        raise AccessError(f"the {what} is not a regular file", file=path, remedy="give the path of the file itself")
    return descriptor, facts.st_size


@contextmanager
def opened(path: str | Path) -> Iterator[int]:
    """``open_regular`` as a context manager."""
    descriptor = open_regular(path)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def pread_into(descriptor: int, view: memoryview, offset: int, path: str | Path, tensor: str | None = None) -> None:
    """Fill ``view`` from ``offset``; short reads are continued.

    Raises IntegrityError when the file ends first (it shrank since its header was read), ResourceError when the
    device fails. Interrupted calls are repeated by Python itself (PEP 475).
    """
    done = 0
    while done < len(view):
        try:
            count = os.preadv(descriptor, [view[done : done + (1 << 30)]], offset + done)
        except OSError as error:
            raise read_failure(error, path, tensor=tensor, offset=offset + done) from error
        if count == 0:
            raise IntegrityError(
                "the file became shorter while it was read",
                file=path,
                tensor=tensor,
                offset=offset + done,
                expected=f"{len(view) - done:,} more bytes",
                found="end of file",
                remedy="do not change the model while it is read; fetch it again, then run the same command",
            )
        done += count


def refuse_larger(path: str | Path, limit_bytes: int, size: int | None = None) -> int:
    """The ``size`` of the file at ``path`` (None: looked up). Raises MalformedInputError for more than the limit."""
    found = Path(path).stat().st_size if size is None else size
    if found > limit_bytes:
        raise MalformedInputError(
            "this file is larger than its kind may be",
            file=path,
            expected=f"at most {limit_bytes:,} bytes",
            found=f"{found:,} bytes",
            remedy="fetch the file again; if it is really this large, it is not what its name says",
        )
    return found


def read_limited(path: str | Path, limit_bytes: int) -> bytes:
    """All bytes of a regular file of at most ``limit_bytes``; the size is checked before anything is allocated."""
    with opened(path) as descriptor:
        size = refuse_larger(path, limit_bytes, os.fstat(descriptor).st_size)
        data = bytearray(size)
        pread_into(descriptor, memoryview(data), 0, path)
    return bytes(data)


def inside(directory: Path, name: str, *, declared_in: str | Path | None = None) -> Path:
    """The path of the repository's file ``name`` (components ``[A-Za-z0-9._-]``, "/" between them).

    ``declared_in`` is the file that names it, for the message. The file need not exist. Raises AccessError when
    the name is absolute, climbs with "..", has other characters, or is a link that leaves both ``directory``
    and the hub cache's blob store beside it.
    """
    parts = name.split("/")
    if any(not _COMPONENT.fullmatch(part) or part in (".", "..") for part in parts):
        raise AccessError(
            "this name may not be followed: it could lead outside the model directory",
            file=declared_in or directory,
            expected="names of letters, digits, '.', '_' and '-', inside the model directory",
            found=name,
            remedy="fetch the model again from a source you trust; its index was edited",
        )
    path = directory.joinpath(*parts)
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(home) for home in _homes(directory)):
        raise AccessError(
            f"{printable(name, 100)} is a link that leads outside the model directory",
            file=path,
            expected=f"a file inside {directory}",
            found=real,
            remedy="replace the link by the file itself if you trust it",
        )
    return path


def _homes(directory: Path) -> tuple[Path, ...]:
    real = Path(os.path.realpath(directory))
    places = [real]
    for place in {real, directory.absolute()}:
        if place.parent.name == "snapshots":
            places.append(Path(os.path.realpath(place.parent.parent / "blobs")))
    return tuple(places)


def read_range(path: Path, offset: int, nbytes: int) -> bytes:
    """Bytes of a file. Raises IntegrityError where it became shorter, ResourceError where the disk fails."""
    data = bytearray(nbytes)
    with opened(path) as descriptor:
        pread_into(descriptor, memoryview(data), offset, path)
    return bytes(data)
