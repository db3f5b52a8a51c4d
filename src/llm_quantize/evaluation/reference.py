"""The source as artifacts meet it: hidden states that left its last block, kept for the next artifact and the next run.

Of a window only the scored half is of use, tokens × width float32: a fraction of the model. A file holds the states of
one source over one text, under the hash of all that decides a bit of them:

    {"bytes", "identity", "sha256"} as JSON, a line feed, then float32 (windows, scored, width), then those of the
    first windows in another order of arithmetic (streams/reordered.py)

``sha256`` is of the identity and of what follows; nothing is believed that has another. A file appears whole or not at
all (io/whole_file.py). Together they take at most KEPT_BYTES: what was not used for longest goes first.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import llm_quantize
from llm_quantize import events
from llm_quantize.errors import AccessError, BusyError, IntegrityError, ResourceError, UsageError
from llm_quantize.events import EventSink
from llm_quantize.io.durable import sync_directory
from llm_quantize.io.journal import canonical_json
from llm_quantize.io.paths import opened, pread_into
from llm_quantize.io.whole_file import write_file
from llm_quantize.measures.perplexity import Tokens, scored
from llm_quantize.models.opening import Source
from llm_quantize.streams.hidden import Activations
from llm_quantize.streams.products import available
from llm_quantize.streams.weights import Weights

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

KEPT_BYTES = 4 << 30
"""All files together; one that is larger than half of it is not kept."""
_HEADER_BYTES = 1 << 16


@dataclass
class Reference:
    """``states``: (windows, scored, width), what left the last block at the scored positions; ``again``: those of the
    first windows in another order of arithmetic. ``path``: for messages."""

    path: Path
    head_weights: Weights
    states: Activations
    again: Activations

    def parts(self) -> Iterator[torch.Tensor]:
        """What a file holds, window by window."""
        for slots in (self.states, self.again):
            for index in range(slots.shape[0]):
                yield slots.read(index)


def scored_positions(windows: Tokens) -> int:
    """How many positions of each of ``windows`` (n, length) are scored."""
    return len(scored(windows[0])[1])


def identity_of(source: Source, windows: Tokens, again: int, device: str, on_event: EventSink) -> dict[str, Any] | None:
    """All that decides a bit of a source's hidden states (JSON-ready); None for a model whose weights are not here.

    Raises what reading the source raises, where the hashes of its files are not kept.
    """
    if source.checkpoint.temporary is not None:
        return None
    return {
        "model": source.content(on_event),
        "windows": hashlib.sha256(windows.astype("<i4").tobytes()).hexdigest(),
        "shape": [*windows.shape, again],
        "device": _device(device),
        "code": _code(),
        "torch": [torch.__version__, torch.backends.cpu.get_cpu_capability(), "oneDNN" if available() else "torch"],
        "transformers": version("transformers"),
        "processor": [platform.machine(), _processor()],
    }


class KeptStates:
    """Where hidden states of ``identity`` are kept in ``directory``."""

    def __init__(self, directory: Path, identity: Mapping[str, Any]) -> None:
        self._identity = canonical_json(identity)
        self.path = directory / f"{hashlib.sha256(self._identity).hexdigest()}.states"

    def load(self, reference: Reference, on_event: EventSink) -> bool:
        """Fill ``reference`` with what is kept; False where nothing is that can be read. What is not as it was written
        is removed, with a warning."""
        try:
            if not self.path.is_file():
                return False
            self._read(reference)
        except IntegrityError:
            on_event(events.Caution(f"{self.path}: these hidden states were damaged; they are computed again"))
            with suppress(OSError):  # then it is written over, or that is told
                self.path.unlink(missing_ok=True)
            return False
        except (AccessError, ResourceError, OSError):
            on_event(events.Caution(f"{self.path}: these hidden states cannot be read; they are computed again"))
            return False
        with suppress(OSError):  # of a cache that may only be read
            os.utime(self.path)
        return True

    def keep(self, reference: Reference, on_event: EventSink) -> None:
        """Keep ``reference``, and let go of what was not used for longest. What cannot be kept is computed again."""
        needed = reference.states.nbytes + reference.again.nbytes
        if needed > KEPT_BYTES // 2:
            return
        digest = hashlib.sha256(self._identity)
        for part in reference.parts():
            digest.update(_bytes(part))
        identity = json.loads(self._identity)
        header = canonical_json({"bytes": needed, "identity": identity, "sha256": digest.hexdigest()})
        try:
            _prune(self.path.parent, needed)
            write_file(self.path, _pieces(header + b"\n", reference), replace=True)
        except (AccessError, BusyError, ResourceError, UsageError) as error:
            on_event(events.Note(f"the reference's hidden states are not kept for other runs: {error.what}"))

    def _read(self, reference: Reference) -> None:
        """Raises IntegrityError for a file that is not what was kept of this identity."""
        needed = reference.states.nbytes + reference.again.nbytes
        with opened(self.path) as descriptor:
            size = os.fstat(descriptor).st_size
            front = bytearray(min(size, _HEADER_BYTES))
            pread_into(descriptor, memoryview(front), 0, self.path)
            line, ended, _ = bytes(front).partition(b"\n")
            offset, digest = len(line) + 1, hashlib.sha256(self._identity)
            if not ended or size != offset + needed:
                raise self._damaged()
            for slots in (reference.states, reference.again):
                for index in range(slots.shape[0]):
                    part = torch.empty(slots.shape[1:], dtype=slots.dtype)
                    view = _bytes(part)
                    pread_into(descriptor, view, offset, self.path)
                    offset += len(view)
                    digest.update(view)
                    slots.write(index, part)
        expected = {"bytes": needed, "identity": json.loads(self._identity), "sha256": digest.hexdigest()}
        if line != canonical_json(expected):
            raise self._damaged()

    def _damaged(self) -> IntegrityError:
        return IntegrityError("kept hidden states are not what was written", file=self.path)


def _bytes(part: torch.Tensor) -> memoryview:
    return part.contiguous().view(torch.uint8).numpy().reshape(-1).data


def _pieces(header: bytes, reference: Reference) -> Iterator[bytes | memoryview]:
    yield header
    for part in reference.parts():
        yield _bytes(part)


def _prune(directory: Path, needed: int) -> None:
    """Remove what was not used for longest until ``needed`` bytes more are within KEPT_BYTES; a file that is left of a
    killed run is one like another."""
    if not directory.is_dir():
        return
    found = []
    for path in directory.iterdir():
        with suppress(FileNotFoundError):  # another run removed it
            fact = path.lstat()
            found.append((fact.st_mtime_ns, path.name, fact.st_size, path))
    total = needed + sum(size for _, _, size, _ in found)
    removed = False
    for _, _, size, path in sorted(found):
        if total <= KEPT_BYTES:
            break
        with suppress(OSError):  # of another user, or gone: the next one is tried
            path.unlink()
            total, removed = total - size, True
    if removed:
        sync_directory(directory)


@cache
def _code() -> str:
    """SHA-256 over this package's version and its code, native too: whatever reads, decodes or runs a source."""
    digest = hashlib.sha256(llm_quantize.__version__.encode())
    for name, text in sorted(_modules(files("llm_quantize"), "")):
        digest.update(canonical_json([name, hashlib.sha256(text).hexdigest()]))
    return digest.hexdigest()


def _modules(folder: Traversable, inside: str) -> Iterator[tuple[str, bytes]]:
    for entry in folder.iterdir():
        name = f"{inside}/{entry.name}"
        if entry.is_dir():
            yield from _modules(entry, name)
        elif name.endswith((".py", *EXTENSION_SUFFIXES)):
            yield name, entry.read_bytes()


def _device(device: str) -> str:
    """A device and, of a GPU, its name."""
    return f"{device} {torch.cuda.get_device_name(device)}" if torch.device(device).type == "cuda" else device


def _processor(path: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name: libraries choose their products, and so the order of sums, by it."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
