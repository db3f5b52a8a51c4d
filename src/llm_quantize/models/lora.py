"""A model with an adapter merged into it, computed as its rows are read: no merged copy is anywhere.

Of LoRA, W + scale (B A); of DoRA, the rows of that set to the length that was trained (Liu et al., "DoRA:
Weight-Decomposed Low-Rank Adaptation", 2024, section 4). Values are float32, rounded once from float64, and the same
for any rows, threads and machine (``low_rank.py``). What an adapter does not touch is read as it was.
"""

from __future__ import annotations

import re
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llm_quantize import events
from llm_quantize.architectures import open_architecture
from llm_quantize.architectures.rows import to_float32
from llm_quantize.errors import UsageError, printable
from llm_quantize.events import EventSink
from llm_quantize.io.content import contents
from llm_quantize.io.paths import inside
from llm_quantize.io.safetensors_file import TensorInfo
from llm_quantize.models.adapter import Adapter, Change, Factor, changes, check_values, open_adapter
from llm_quantize.models.base import Digest, FileFact, Merge, Model, Opened, Values, writable
from llm_quantize.models.low_rank import PARTS, Doubles, Right, cut, laid_out, product
from llm_quantize.models.safetensors import without_weights
from llm_quantize.qtypes.held import Held, HeldWords

if TYPE_CHECKING:
    import torch

    from llm_quantize.grids.grid import Grid

_BLOCK_WEIGHTS = 1 << 18
"""Weights merged at a time by one thread."""
_OWN_FILES = ("tokenizer.json", "chat_template.jinja")
_SAME_WEIGHTS = re.compile(r"^meta-|-(unsloth|bnb|4bit|8bit|gptq|awq|fp8|gguf|hf|bf16)(?=-|$)")
"""What names of the same weights differ by, where people train on a copy of them."""

Floats = npt.NDArray[np.float32]


def merged(model: Model, text: str, on_event: EventSink) -> Model:
    """``model`` with the adapter that ``text`` names (``open_adapter``) merged into it; it closes both.

    Raises what ``open_adapter`` and ``changes`` raise; UsageError for an adapter of another model, or DoRA on top of
    another adapter; NumericPolicyError where it has values that are not finite.
    """
    adapter = open_adapter(text, on_event)
    try:
        _check_base(adapter, model, on_event)
        architecture = open_architecture(model.config, file=model.config_file)
        found, left_out = changes(adapter, model, architecture)
        _check_order(adapter, model, found)
        if not model.headers_only:
            check_values(adapter, found)
        result = MergedModel(model, adapter, found, left_out)
    except BaseException:
        adapter.tensors.close()
        raise
    on_event(events.Note(f"{result.adapters[-1].words} is merged into {len(found):,} tensors"))
    return result


def _check_base(adapter: Adapter, model: Model, on_event: EventSink) -> None:
    """Refuse an adapter that was trained on another model of the hub; of directories, whose names say little, tell."""
    base = adapter.base.rstrip("/")
    if not base or _plain(base) == _plain(model.name):
        return
    if model.revision is not None and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base, re.ASCII):
        raise UsageError(
            f"this adapter was trained on {printable(base, 120)}, and MODEL is {model.name}",
            file=adapter.file,
            expected=f"an adapter of {model.name}",
            found=f"base_model_name_or_path {printable(base, 120)}",
            remedy=f"give {printable(base, 120)} as MODEL; if both are the same weights, give a directory of them",
        )
    text = f"{adapter.place.name} says that it was trained on {printable(base, 120)}; it is merged into {model.name}"
    on_event(events.Caution(text))


def _plain(name: str) -> str:
    """A model's name without its owner and without what does not change its weights."""
    return _SAME_WEIGHTS.sub("", name.rsplit("/", 1)[-1].lower().replace("_", "-"))


def _check_order(adapter: Adapter, model: Model, found: Mapping[str, Change]) -> None:
    """DoRA's lengths are those of the model that was trained: after another adapter they are not."""
    before = model.changed if isinstance(model, MergedModel) else {}
    both = [name for name in found if name in before]
    name = next((name for name in both if found[name].magnitude or before[name].magnitude), None)
    if name is not None:
        raise UsageError(
            "DoRA and another adapter cannot be merged into the same tensor",
            file=adapter.file,
            tensor=name,
            expected="one adapter of this tensor, or several that are no DoRA",
            found=f"{model.adapters[-1].name} and {adapter.place.name}",
            remedy="merge one of them",
        )


class MergedModel(Opened):
    """``model`` with ``adapter`` merged (``base.Model``). ``changed``: what becomes of which tensors, those of adapters
    before it too. Threads may share it; each keeps the factors of one tensor."""

    def __init__(
        self, model: Model, adapter: Adapter, found: Mapping[str, Change], left_out: Mapping[str, str]
    ) -> None:
        self._model, self._adapter, self._found = model, adapter, found
        before = model.changed if isinstance(model, MergedModel) else {}
        self.changed: Mapping[str, Change] = {**before, **found}
        self.directory, self.name, self.revision = model.directory, model.name, model.revision
        self.kind, self.config, self.metadata = model.kind, model.config, model.metadata
        self.generation_config, self.folded = model.generation_config, model.folded
        self.headers_only: bool = model.headers_only
        self.temporary: tempfile.TemporaryDirectory[str] | None = model.temporary
        self.headers = (*model.headers, adapter.header)
        self.left_out: Mapping[str, str] = {**model.left_out, **left_out}
        self.tensors: dict[str, TensorInfo] = {
            name: replace(info, dtype="F32", nbytes=4 * info.elements) if name in found else info
            for name, info in model.tensors.items()
        }
        self.adapters: tuple[Merge, ...] = (*model.adapters, replace(adapter.merge(), changes=frozenset(found)))
        self.notes = (*model.notes, *self._notes())
        self._local = threading.local()
        self._lengths: dict[str, Doubles] = {}

    def _notes(self) -> list[str]:
        whole = [name for name, change in self._found.items() if change.whole is not None]
        notes: list[str] = []
        if whole and self._adapter.scale != 1:
            notes.append(
                f"{whole[0]}{f' and {len(whole) - 1} more' if len(whole) > 1 else ''}: replaced whole by the adapter, "
                "whatever its scale"
            )
        directory = self._adapter.place.path
        own = [name for name in _OWN_FILES if (directory / name).is_file() and self.directory.is_dir()]
        own = [name for name in own if _differs(directory, self.directory, name)]
        if own:
            notes.append(f"the adapter has {' and '.join(own)} of its own, which is not taken: the model's is")
        return notes

    @property
    def config_file(self) -> Path:
        """As ``Model.config_file``."""
        return self._model.config_file

    @property
    def scratch(self) -> int:
        """As ``Model.scratch``: what is held of the factors of a tensor, and a block of weights in float64."""
        factors = 0
        for name, change in self._found.items():
            rows, columns = self._model.matrix(name)
            whole = 8 * rows * columns if change.added or change.by_column else 0
            factors = max(factors, change.rank * (rows + columns) * 8 * (PARTS + 3), whole if rows == 1 else 0)
        return self._model.scratch + factors + 8 * 8 * max(_BLOCK_WEIGHTS, self._widest())

    def _widest(self) -> int:
        return max((max(self._model.matrix(name)) for name in self._found), default=0)

    def fingerprint(self) -> list[FileFact]:
        """As ``Model.fingerprint``."""
        header = self._adapter.header
        name = f"{self.adapters[-1].name}/{header.path.name}"
        return [*self._model.fingerprint(), FileFact(name, header.file_size, header.mtime_ns, header.sha256)]

    def matrix(self, name: str, *, transpose: bool = False) -> tuple[int, int]:
        """As ``Rows.matrix``."""
        return self._model.matrix(name, transpose=transpose)

    def check_readable(self, name: str) -> None:
        """As ``Rows.check_readable``."""
        self._model.check_readable(name)

    def is_readable(self, name: str) -> bool:
        """As ``Rows.is_readable``."""
        return self._model.is_readable(name)

    def stored_dtype(self, name: str) -> np.dtype[Any]:
        """As ``Rows.stored_dtype``: float32 of what is merged."""
        return np.dtype(np.float32) if name in self._found else self._model.stored_dtype(name)

    def held(self, name: str, *, transpose: bool = False) -> Held | None:
        """As ``Model.held``: of what is merged, nothing."""
        return None if name in self._found else self._model.held(name, transpose=transpose)

    def held_grid(
        self, name: str, start: int, stop: int, *, transpose: bool = False
    ) -> tuple[Grid, torch.Tensor] | None:
        """As ``Model.held_grid``."""
        return None if name in self._found else self._model.held_grid(name, start, stop, transpose=transpose)

    def held_words(self, name: str) -> HeldWords | None:
        """As ``Model.held_words``."""
        return None if name in self._found else self._model.held_words(name)

    def is_stamped(self, name: str) -> bool:
        """As ``Rows.is_stamped``: what is merged is no matrix of the file any more."""
        return name not in self._found and self._model.is_stamped(name)

    def stamp(self, name: str) -> bytes:
        """As ``Rows.stamp``."""
        return self._model.stamp(name)

    def block_type(self, name: str, *, transpose: bool = False) -> str | None:
        """As ``Model.block_type``."""
        return None if name in self._found else self._model.block_type(name, transpose=transpose)

    def block_rows(self, name: str, start: int, stop: int, *, transpose: bool = False) -> npt.NDArray[np.uint8]:
        """As ``Model.block_rows``."""
        return self._model.block_rows(name, start, stop, transpose=transpose)

    def raw_rows(self, name: str, start: int, stop: int, *, buffer: Any = None) -> memoryview:
        """As ``Rows.raw_rows``: of what is merged, its values."""
        if name not in self._found:
            return self._model.raw_rows(name, start, stop, buffer=buffer)
        columns = self.matrix(name)[1]
        view = writable(buffer, (stop - start) * columns * 4)
        out = np.frombuffer(view, np.float32).reshape(stop - start, columns)
        self._fill(name, start, out, transpose=False)
        return view

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
        """As ``Rows.read_rows``; of what is merged, ``digest`` is updated with its values."""
        if name not in self._found:
            return self._model.read_rows(name, start, stop, transpose=transpose, buffer=buffer, digest=digest)
        rows, columns = self.matrix(name, transpose=transpose)
        if not 0 <= start <= stop <= rows:
            raise ValueError(f"rows {start}..{stop} are not inside {name}, which has {rows}")
        out = np.empty((stop - start, columns), np.float32)
        self._fill(name, start, out, transpose=transpose)
        if digest is not None:
            digest.update(out.reshape(-1).view(np.uint8).data)
        return out

    def _fill(self, name: str, start: int, out: Floats, *, transpose: bool) -> None:
        """Merged rows from ``start`` on into ``out``, some at a time."""
        if self.headers_only:
            raise without_weights(self.tensors[name])
        columns = out.shape[1]
        step = max(1, _BLOCK_WEIGHTS // max(1, columns))
        for at in range(0, len(out), step):
            last = min(len(out), at + step)
            block = self._sum(name, start + at, start + last, transpose=transpose)
            self._set_lengths(name, start + at, block, transpose=transpose)
            with np.errstate(over="ignore", invalid="ignore"):  # what is beyond float32, whoever writes it judges
                out[at:last] = block

    def _sum(self, name: str, start: int, stop: int, *, transpose: bool) -> Doubles:
        """Rows of W + scale (B A), float64."""
        change = self._found[name]
        source = self._model if change.whole is None else self._adapter.tensors
        key = name if change.whole is None else change.whole
        block: Doubles = to_float32(source.read_rows(key, start, stop, transpose=transpose)).astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            if change.added is not None:
                block += change.scaling * self._floats(change.added).astype(np.float64)
            elif change.left is not None and change.right is not None:
                left, right = (change.right, change.left) if transpose else (change.left, change.right)
                rows = self._factor(left, start, stop)
                block += change.scaling * product(cut(rows), self._right(name, right, transpose))
        return block

    def _set_lengths(self, name: str, start: int, block: Doubles, *, transpose: bool) -> None:
        """DoRA: give each row (or column) of ``block`` the length that was trained, in place."""
        change = self._found[name]
        if change.magnitude is None:
            return
        wanted = self._floats(change.magnitude).reshape(-1).astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            if not change.by_column and not transpose:
                block *= wanted[start : start + len(block), None] / _lengths(block)[:, None]
                return
            factors = wanted / self._all_lengths(name)
            along = change.by_column != transpose
            block *= factors[None, :] if along else factors[start : start + len(block), None]

    def _all_lengths(self, name: str) -> Doubles:
        """The length of every row of W + scale (B A), or of every column where DoRA's are those of columns; kept."""
        known = self._lengths.get(name)
        if known is None:
            change = self._found[name]
            rows, columns = self.matrix(name)
            step = max(1, _BLOCK_WEIGHTS // max(1, columns))
            blocks = (self._sum(name, at, min(rows, at + step), transpose=False) for at in range(0, rows, step))
            if change.by_column:
                sums = np.zeros(columns)
                for block in blocks:
                    for row in block:  # one after another: the order of a sum of rows is numpy's own affair
                        sums += row * row
                known = np.sqrt(sums)
            else:
                known = np.concatenate([_lengths(block) for block in blocks])
            self._lengths[name] = known
        return known

    def _right(self, name: str, factor: Factor, transpose: bool) -> Right:
        """The right factor of a tensor, as this thread keeps it until it asks for another's."""
        kept: tuple[tuple[str, bool], Right] | None = getattr(self._local, "right", None)
        if kept is None or kept[0] != (name, transpose):
            self._local.right = None
            count = self.matrix(name, transpose=transpose)[1]
            kept = (name, transpose), laid_out(cut(self._factor(factor, 0, count)))
            self._local.right = kept
        return kept[1]

    def _factor(self, factor: Factor, start: int, stop: int) -> Floats:
        return to_float32(self._adapter.tensors.read_rows(factor.name, start, stop, transpose=factor.turned))

    def _floats(self, key: str) -> Floats:
        return to_float32(self._adapter.tensors.read_rows(key, 0, 1))

    def close(self) -> None:
        """As ``Rows.close``."""
        self._adapter.tensors.close()
        self._model.close()


def _lengths(block: Doubles) -> Doubles:
    """The length of each row. The sums are over rows of one size, which numpy adds in one order."""
    found: Doubles = np.sqrt(np.add.reduce(np.ascontiguousarray(block * block), axis=1))
    return found


def _differs(directory: Path, other: Path, name: str) -> bool:
    """Whether a file of the adapter is not the model's."""
    if not (other / name).is_file():
        return True
    one, two = contents([inside(directory, name), inside(other, name)], kept=None)
    return one != two
