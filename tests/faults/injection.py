"""Faults at the system calls that persist anything: the k-th one fails, writes short, kills, or cuts the power.

``wrapped`` replaces the functions of the ``os`` module, through which the package does all of its writing. The wrapped
names are looked up at call time by ``pathlib`` too, so a ``Path.rename`` counts as ``os.rename``.
"""

from __future__ import annotations

import os
import random
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CALLS = ("open", "mkdir", "pwrite", "write", "fsync", "ftruncate", "posix_fallocate", "rename", "unlink", "rmdir")

Before = Callable[[str, tuple[Any, ...]], Any]


def _counts(name: str, arguments: tuple[Any, ...]) -> bool:
    """Whether a call persists something: of ``open`` only the creating kind, of ``mkdir`` all."""
    return name != "open" or (len(arguments) > 1 and bool(arguments[1] & os.O_CREAT))


@contextmanager
def wrapped(before: Before) -> Iterator[list[str]]:
    """``before(name, arguments)`` runs ahead of every persistence call; the yielded list collects their names.

    It may raise, kill, or return a callable that takes the place of the call.
    """
    seen: list[str] = []
    lock = threading.Lock()
    real = {name: getattr(os, name) for name in CALLS if hasattr(os, name)}

    def wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if not _counts(name, arguments):
                return function(*arguments, **options)
            with lock:
                seen.append(name)
                instead = before(name, arguments)
            return (instead or function)(*arguments, **options)

        return call

    for name, function in real.items():
        setattr(os, name, wrap(name, function))
    try:
        yield seen
    finally:
        for name, function in real.items():
            setattr(os, name, function)


def failing(nth: int, number: int) -> Before:
    """The ``nth`` call (from 1) raises OSError ``number``; the others pass."""
    count = [0]

    def before(_name: str, _arguments: tuple[Any, ...]) -> None:
        count[0] += 1
        if count[0] == nth:
            raise OSError(number, os.strerror(number))

    return before


def killing(nth: int) -> Before:
    """SIGKILL to this process ahead of the ``nth`` call."""
    count = [0]

    def before(_name: str, _arguments: tuple[Any, ...]) -> None:
        count[0] += 1
        if count[0] == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    return before


def short_writes(name: str, arguments: tuple[Any, ...]) -> Callable[..., int] | None:
    """Every write takes one byte or half of what it was given."""
    real = {"pwrite": _pwrite, "write": _write}.get(name)
    if real is None:
        return None
    return lambda descriptor, data, *rest: real(descriptor, memoryview(data)[: (len(data) + 1) // 2], *rest)


_pwrite, _write, _rename, _unlink = os.pwrite, os.write, os.rename, os.unlink


class PowerLoss(BaseException):
    """The machine stopped. Not an Exception: no handler of ours may survive it."""


class Disk:
    """What a directory would hold after the power failed: writes that were not fsynced survive in part, or not at all.

    Contents are remembered at each fsync; renames and removals that no directory fsync followed may be undone, each
    on its own.
    """

    def __init__(self, root: Path, seed: int, nth: int) -> None:
        self.root, self.random, self.nth, self.count = root, random.Random(seed), nth, 0
        self.durable = {_inode(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        self.moves: list[tuple[str, Path, Path | bytes]] = []

    def before(self, name: str, arguments: tuple[Any, ...]) -> Callable[..., Any] | None:
        self.count += 1
        if self.count == self.nth:
            raise PowerLoss
        if name == "fsync":
            return self._synced
        if name == "rename":
            self.moves.append(("rename", Path(arguments[0]), Path(arguments[1])))
        if name == "unlink":
            path = Path(arguments[0])
            if path.exists():
                self.durable.pop(_inode(path), None)
            self.moves.append(("unlink", path, path.read_bytes() if path.exists() else b""))
        return None

    def _synced(self, descriptor: int) -> None:

        facts = os.fstat(descriptor)
        if stat.S_ISDIR(facts.st_mode):
            self.moves.clear()
        else:
            self.durable[facts.st_dev, facts.st_ino] = os.pread(descriptor, facts.st_size, 0)

    def lose(self) -> None:
        """Leave in ``root`` what the disk would hold now."""
        for path in sorted(self.root.rglob("*")):
            if path.is_file():
                self._tear(path, self.durable.get(_inode(path), b""))
        for kind, path, other in reversed(self.moves):
            if self.random.random() < 0.5:
                continue
            if kind == "rename" and isinstance(other, Path) and other.exists() and not path.exists():
                _rename(other, path)
            elif kind == "unlink" and isinstance(other, bytes) and not path.exists() and path.parent.exists():
                path.write_bytes(other)

    def _tear(self, path: Path, durable: bytes) -> None:
        """Mix the current contents with those that were last made durable, block by block."""
        current = path.read_bytes()
        if current == durable:
            return
        size = self.random.choice((len(current), len(durable)))
        mixed = bytearray()
        for start in range(0, size, 64):
            source = current if self.random.random() < 0.5 else durable
            mixed += source[start : start + 64].ljust(min(64, size - start), b"\0")
        path.write_bytes(bytes(mixed[:size]))


def _inode(path: Path) -> tuple[int, int]:
    facts = path.stat()
    return facts.st_dev, facts.st_ino
