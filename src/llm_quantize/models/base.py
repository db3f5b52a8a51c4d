"""What a model is to everything else: named tensors that can be read by rows, and the facts about it."""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from llm_quantize.io.gguf_file import MetaValue
from llm_quantize.io.safetensors_file import DTYPE_BITS, Header, TensorInfo
from llm_quantize.models.hub.locate import Place
from llm_quantize.qtypes.held import Held, HeldWords

if TYPE_CHECKING:
    import torch

    from llm_quantize.grids.grid import Grid

Values = npt.NDArray[np.float32] | npt.NDArray[np.float16] | npt.NDArray[np.uint16]


class Digest(Protocol):
    """What ``hashlib`` objects can do."""

    def update(self, data: Any, /) -> None: ...


@dataclass(frozen=True, slots=True)
class FileFact:
    """What tells one source file from another of the same name, without reading its tensors."""

    name: str
    size: int
    mtime_ns: int
    header_sha256: str


@dataclass(frozen=True, slots=True)
class Merge:
    """An adapter that is merged into a model. ``directory``: where it lies; ``name``, ``revision``: as of a model;
    ``scale``: the user's factor; ``kind``: LoRA, rsLoRA or DoRA; ``sha256``: of its settings, header and scale;
    ``changes``: the tensors that are others by it."""

    directory: Path
    name: str
    revision: str | None
    scale: float
    kind: str
    sha256: str
    changes: frozenset[str] = frozenset()

    @property
    def words(self) -> str:
        """What people read of it."""
        where = self.name if self.revision is None else f"{self.name} at commit {self.revision}"
        if self.scale == 1:
            return f"the adapter {where} ({self.kind})"
        return f"the adapter {where} ({self.kind}, {self.scale:g} of it)"

    @property
    def facts(self) -> dict[str, Any]:
        """The same for the identity of an artifact: nothing of this machine."""
        return {
            **{"name": self.name, "revision": self.revision, "scale": self.scale},
            **{"kind": self.kind, "sha256": self.sha256, "words": self.words},
        }


class Rows(Protocol):
    """Tensors under the names and in the shapes of an unquantized model. Threads may share one.

    ``tensors``: in file order; a dtype is safetensors' word ("BF16"), or a grid's for what is quantized ("int4_g128").
    """

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def matrix(self, name: str, *, transpose: bool = False) -> tuple[int, int]:
        """(rows, columns) of the tensor as ``read_rows`` sees it: leading dimensions flattened, 1-D is one row,
        a scalar is (1, 1). With ``transpose`` the last two dimensions are exchanged first."""

    def check_readable(self, name: str) -> None:
        """Raise UnsupportedError unless the tensor can be read as weights."""

    def is_readable(self, name: str) -> bool:
        """Whether the tensor can be read as weights."""

    def stored_dtype(self, name: str) -> np.dtype[Any]:
        """The numpy element type that ``read_rows`` returns for this tensor (bfloat16 as uint16 bits)."""

    def raw_rows(self, name: str, start: int, stop: int, *, buffer: Any = None) -> memoryview:
        """The bytes of rows [start, stop) as they are stored; of a quantized matrix, which has none, of its values."""

    def read_rows(
        self,
        name: str,
        start: int,
        stop: int,
        *,
        transpose: bool = False,
        buffer: Any = None,
        digest: Digest | None = None,
    ) -> Values:
        """Rows [start, stop) of the tensor seen as ``matrix`` says: (stop - start, columns), C-contiguous.

        ``buffer`` (writable bytes, large enough) may be used for the result. ``digest`` is updated with what was
        read. Raises UnsupportedError, IntegrityError (the file changed), ResourceError, NumericPolicyError.
        """

    def is_stamped(self, name: str) -> bool:
        """Whether the tensor is decoded from fields of a packed matrix, which ``stamp`` hashes; from headers alone."""

    def stamp(self, name: str) -> bytes:
        """SHA-256 of all fields of such a tensor as they are stored, in the order of their names, each after its name.
        Raises ValueError for another tensor, and what ``read_rows`` raises."""

    def close(self) -> None:
        """Close all file handles."""


class Model(Rows, Protocol):
    """An opened model. ``name``: as the user knows it; ``revision``: the hub commit, None for a directory.

    ``directory``: where the small files beside its weights are; of a model in one file, which has none, that file.
    ``config_file``: what says its configuration. ``metadata``: what a GGUF file says of it, vocabulary and all, as it
    stands there; None where files in ``directory`` do.
    ``kind``: what was done to its weights ("GPTQ-4bit"), "" for nothing. ``headers``: of its weight files. ``folded``:
    {stored tensor: the weight that is decoded with it}. ``left_out``: {stored tensor: why it is not in ``tensors``}.
    ``notes``: what a user should know. ``scratch``: bytes that a thread holds while it reads rows, beside them.
    ``headers_only``: reading rows is refused. ``temporary``: ``directory`` is a copy without weights, gone at close.
    ``adapters``: what is merged into it, in this order.
    """

    @property
    def directory(self) -> Path: ...
    @property
    def name(self) -> str: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def kind(self) -> str: ...
    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def config_file(self) -> Path: ...
    @property
    def metadata(self) -> Mapping[str, MetaValue] | None: ...
    @property
    def generation_config(self) -> dict[str, Any] | None: ...
    @property
    def headers(self) -> tuple[Header, ...]: ...
    @property
    def files(self) -> tuple[Path, ...]: ...
    @property
    def folded(self) -> Mapping[str, str]: ...
    @property
    def left_out(self) -> Mapping[str, str]: ...
    @property
    def notes(self) -> Sequence[str]: ...
    @property
    def scratch(self) -> int: ...
    @property
    def headers_only(self) -> bool: ...
    @property
    def temporary(self) -> tempfile.TemporaryDirectory[str] | None: ...
    @property
    def adapters(self) -> tuple[Merge, ...]: ...

    def held(self, name: str, *, transpose: bool = False) -> Held | None:
        """The grid on which rows of the tensor ``name``, as ``matrix`` sees them, are stored, but for the order of its
        columns; None where it is not quantized, or not in a form that ``held_grid`` may give. From headers alone.
        Needs no torch. Raises IntegrityError for columns of groups that do not exist."""

    def held_grid(
        self, name: str, start: int, stop: int, *, transpose: bool = False
    ) -> tuple[Grid, torch.Tensor] | None:
        """Rows [start, stop) of a stored quantized matrix, in the orientation of ``matrix``: the grid, and codes uint8
        (stop - start, columns), whose ``Grid.decode`` is ``read_rows`` bit for bit; but for the last bit where scales
        divide (CTranslate2). None where the tensor is not quantized or these rows are not of this form (groups of
        several sizes, numbers that are NaN).

        Needs torch. Raises what ``read_rows`` raises."""

    def held_words(self, name: str) -> HeldWords | None:
        """All of a stored matrix of packed integers, in the orientation of ``matrix``, its codes in the words of the
        file; None where it is not that. Needs no torch. Raises what ``read_rows`` raises."""

    def block_type(self, name: str, *, transpose: bool = False) -> str | None:
        """The type of ggml whose blocks are all that is stored of the tensor ``name``, by its rows as ``matrix`` sees
        them, or the grid of a CTranslate2 model, whose codes a scale follows; None: there is none. From headers
        alone."""

    def block_rows(self, name: str, start: int, stop: int, *, transpose: bool = False) -> npt.NDArray[np.uint8]:
        """uint8 (stop - start, row_bytes): rows [start, stop) of such a tensor as they are stored. Raises ValueError
        for another, and what ``read_rows`` raises."""

    def fingerprint(self) -> list[FileFact]:
        """One fact per weight file, sorted by name: enough for resume and manifest to tell that a source changed."""

    def __enter__(self) -> Model: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Reader(Protocol):
    """A way in which models are stored: a row of READERS (opening.py)."""

    def sniff(self, path: Path) -> bool:
        """Whether the model at ``path``, a directory or a file, is stored so. Raises what reading its configuration
        raises."""

    def open_at(self, place: Place, model: str, *, headers_only: bool) -> Model:
        """The model that lies there; the user called it ``model``. Raises the error tree."""


class Opened(ABC):
    """What every opened model has in common: its files, and that it is closed."""

    directory: Path
    headers: tuple[Header, ...]
    notes: tuple[str, ...] = ()
    adapters: tuple[Merge, ...] = ()

    @property
    def scratch(self) -> int:
        """As ``Model.scratch``."""
        return 0

    @property
    def config_file(self) -> Path:
        """As ``Model.config_file``."""
        return self.directory / "config.json"

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files, in the order of ``tensors``."""
        return tuple(header.path for header in self.headers)

    def held(self, name: str, *, transpose: bool = False) -> Held | None:
        """As ``Model.held``: nothing is, unless the reader says so."""
        del name, transpose
        return None

    def held_grid(
        self, name: str, start: int, stop: int, *, transpose: bool = False
    ) -> tuple[Grid, torch.Tensor] | None:
        """As ``Model.held_grid``."""
        del name, start, stop, transpose
        return None

    def held_words(self, name: str) -> HeldWords | None:
        """As ``Model.held_words``."""
        del name
        return None

    def is_stamped(self, name: str) -> bool:
        """As ``Rows.is_stamped``."""
        del name
        return False

    def stamp(self, name: str) -> bytes:
        """As ``Rows.stamp``."""
        raise ValueError(f"{name} has no fields of a packed matrix")

    def block_type(self, name: str, *, transpose: bool = False) -> str | None:
        """As ``Model.block_type``."""
        del name, transpose
        return None

    def block_rows(self, name: str, start: int, stop: int, *, transpose: bool = False) -> npt.NDArray[np.uint8]:
        """As ``Model.block_rows``."""
        del transpose
        raise ValueError(f"rows {start} to {stop} of {name} are not stored in blocks of ggml")

    def fingerprint(self) -> list[FileFact]:
        """As ``Model.fingerprint``."""
        return fingerprint(self.directory, self.headers)

    @abstractmethod
    def close(self) -> None:
        """As ``Rows.close``."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def fingerprint(directory: Path, headers: Sequence[Header]) -> list[FileFact]:
    """One fact per weight file, sorted by name."""
    facts = [FileFact(h.path.relative_to(directory).as_posix(), h.file_size, h.mtime_ns, h.sha256) for h in headers]
    return sorted(facts, key=lambda fact: fact.name)


_DECODED = ("F8_E4M3",)
"""Stored types of weights that are read as float32."""


def itemsize(dtype: str) -> int:
    """Bytes of a weight of a stored type as it is read; of a grid's and of FP8, of the float32 it is decoded to."""
    return 4 if dtype in _DECODED else DTYPE_BITS.get(dtype, 32) // 8


def writable(buffer: Any, nbytes: int) -> memoryview:
    """``nbytes`` bytes to read into: of ``buffer``, or fresh ones where it is None. Raises ValueError if it is
    read-only or too small."""
    if buffer is None:
        return np.empty(nbytes, np.uint8).data
    view = memoryview(buffer).cast("B")
    if view.readonly or len(view) < nbytes:
        raise ValueError(f"the buffer must be writable and hold {nbytes} bytes")
    return view[:nbytes]
