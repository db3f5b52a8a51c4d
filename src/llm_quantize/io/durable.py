"""What writing safely needs of the system: files opened without following links, whole reads and writes, real renames.

Failed system calls become members of the error tree here, so that ``output.py`` can speak of artifacts alone.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn

from llm_quantize.errors import AccessError, ResourceError

_WRONG_KIND = (errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENXIO, errno.ENOTEMPTY)


def fail_os(error: OSError, what: str, file: Path) -> NoReturn:
    """Raise the tree's error for a failed system call: disk and limits are 5, access is 6."""
    facts: dict[str, Any] = {"file": file, "found": error.strerror or error}
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "free some disk space and run the same command again: what the journal lists is kept"
        raise ResourceError(f"{what}: the disk is full", remedy=remedy, **facts) from error
    if error.errno == errno.EFBIG:
        remedy = "raise the file size limit, use another file system, or --split-max-size"
        raise ResourceError(f"{what}: the file is larger than allowed", remedy=remedy, **facts) from error
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        remedy = "choose a directory that you can write to with -o"
        raise AccessError(f"{what}: not permitted", remedy=remedy, **facts) from error
    if error.errno in _WRONG_KIND:
        remedy = "move away what stands there, or choose another directory with -o or another name with -n"
        raise AccessError(f"{what}: something else stands in its place", remedy=remedy, **facts) from error
    if error.errno == errno.ENAMETOOLONG:
        raise AccessError(f"{what}: the name is too long", remedy="choose a shorter name with -n", **facts) from error
    remedy = "check the disk and run the same command again: what the journal lists is kept"
    raise ResourceError(f"{what}: the system refused", remedy=remedy, **facts) from error


def open_regular_output(path: Path, *, append: bool = False) -> int:
    """A descriptor for reading and writing ``path``, created if absent; never through a link, never blocking.

    Raises AccessError for anything but a regular file, OSError for what the system refuses.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | (os.O_APPEND if append else 0)
    _refuse_link(path)
    descriptor = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise AccessError("the output exists and is not a regular file", file=path, remedy="choose another -o or -n")
    return descriptor


def make_directory(directory: Path) -> None:
    """``directory`` and those above it where they are not. Raises AccessError, ResourceError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail_os(error, "the directory cannot be created", directory)


def open_directory(path: Path) -> int:
    """A descriptor of a directory, never reached through a link. Raises AccessError, OSError."""
    _refuse_link(path)
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)


def _refuse_link(path: Path) -> None:
    """Say that a link is in the way; O_NOFOLLOW refuses it too, but names it "too many levels of symbolic links"."""
    if path.is_symlink():
        raise AccessError(
            "a link stands where the output is written",
            file=path,
            expected="a regular file or directory, or nothing",
            found=f"a link to {path.readlink()}",
            remedy="remove the link, or choose another directory with -o or another name with -n",
        )


def allocate(descriptor: int, size: int) -> None:
    """Give the file its size and, where the file system can, its blocks: a full disk shows now. Raises OSError."""
    if os.fstat(descriptor).st_size != size:
        os.ftruncate(descriptor, size)
    if size == 0 or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise


def read_at(descriptor: int, count: int, offset: int) -> bytes:
    """``count`` bytes from ``offset``, or fewer where the file ends. Raises OSError."""
    parts = []
    while count > 0:
        part = os.pread(descriptor, count, offset)
        if not part:
            break
        parts.append(part)
        offset += len(part)
        count -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def write_whole(path: Path, data: bytes) -> None:
    """A file of exactly ``data``, durable, replacing what an earlier attempt left under this name. Raises OSError."""
    descriptor = open_regular_output(path)
    try:
        os.ftruncate(descriptor, 0)
        view, offset = memoryview(data), 0
        while view:
            written = os.pwrite(descriptor, view, offset)
            offset += written
            view = view[written:]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(directory: Path) -> None:
    """Make the directory's entries durable. Raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_same_file(descriptor: int, path: Path) -> bool:
    """Whether ``path`` still names the file that ``descriptor`` has open."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except (FileNotFoundError, NotADirectoryError):
        return False


def make_folder(path: Path) -> None:
    """The folder ``path`` where it is not, in a directory that is there. Raises AccessError for a link, OSError."""
    _refuse_link(path)
    path.mkdir(exist_ok=True)


def remove_files(directory: Path, keep: Collection[str] = (), folders: Collection[str] = ()) -> None:
    """Remove the files in ``directory`` and in those of ``folders`` that it has, but those in ``keep`` (NAME or
    FOLDER/NAME), and the folders where nothing is left in them; nothing beneath. Raises OSError."""
    for path in sorted(directory.iterdir()):
        if path.name in folders and path.is_dir() and not path.is_symlink():
            within = [name.removeprefix(f"{path.name}/") for name in keep if name.startswith(f"{path.name}/")]
            remove_files(path, within)
            if not any(path.iterdir()):
                path.rmdir()
        elif path.name not in keep:
            path.unlink()
