"""An opened model that other processes can be given: it is opened there by path, once."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from llm_quantize.architectures.rows import Rows
from llm_quantize.errors import IntegrityError
from llm_quantize.io.safetensors_file import Header
from llm_quantize.models.base import Model
from llm_quantize.models.opening import open_model

Fact = tuple[Path, str, int, int, int, int]


class SharedModel:
    """The rows of ``model``, which is open in this process (``architectures.rows.RowSource``).

    Another process that is given it, pickled, opens the same files, once, and keeps them open to its end; it raises
    IntegrityError where they have changed by then, and what opening raises.
    """

    def __init__(self, model: Model) -> None:
        self._model = model

    def __reduce__(self) -> tuple[object, ...]:
        lora = tuple(f"{merge.directory}={merge.scale!r}" for merge in self._model.adapters)
        return _opened_here, (self._model.directory, lora, tuple(_fact(header) for header in self._model.headers))

    def matrix(self, name: str, *, transpose: bool = False) -> tuple[int, int]:
        """As ``Rows.matrix``."""
        return self._model.matrix(name, transpose=transpose)

    def read_rows(
        self, name: str, start: int, stop: int, *, transpose: bool = False, buffer: Any = None, digest: Any = None
    ) -> Rows:
        """As ``Rows.read_rows``."""
        return self._model.read_rows(name, start, stop, transpose=transpose, buffer=buffer, digest=digest)

    def is_stamped(self, name: str) -> bool:
        """As ``Rows.is_stamped``."""
        return self._model.is_stamped(name)

    def stamp(self, name: str) -> bytes:
        """As ``Rows.stamp``."""
        return self._model.stamp(name)


def _fact(header: Header) -> Fact:
    return header.path, header.sha256, header.file_size, header.mtime_ns, header.device, header.inode


@cache
def _opened_here(directory: Path, lora: tuple[str, ...], facts: tuple[Fact, ...]) -> SharedModel:
    """The same model, opened by this process."""
    model = open_model(str(directory), lora=lora)
    for known, found in zip(facts, map(_fact, model.headers), strict=False):
        if known != found:
            raise IntegrityError(
                "the source changed while it was read",
                file=known[0],
                expected=f"{known[2]:,} bytes, modified at {known[3]} ns",
                found=f"{found[2]:,} bytes, modified at {found[3]} ns",
                remedy="run the same command again when the source is at rest",
            )
    return SharedModel(model)
