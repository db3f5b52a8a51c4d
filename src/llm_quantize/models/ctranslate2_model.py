"""A CTranslate2 model as a model to start from: its weights under the names and in the shapes of the checkpoint that a
converter would have made it of.

Such a model keeps no configuration of its network, only numbers among its variables. From these a configuration is
derived for each family that is known here, and the first is taken whose network (formats/ctranslate2/network.py) has
exactly the file's variables, shapes and numbers: so what comes out is proved. What a converter leaves out cannot be
had back: of how many tokens the model was trained for only a few families say anything, and of an epsilon that is the
runtime's own nothing is written.
"""

from __future__ import annotations

import hashlib
import os
import struct
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llm_quantize.architectures import ARCHITECTURES
from llm_quantize.architectures.architecture import Architecture
from llm_quantize.architectures.base import Family as Rows
from llm_quantize.architectures.base import TensorMap
from llm_quantize.architectures.config_reader import ALIASES
from llm_quantize.architectures.mapping import checkpoint_shapes, output_name
from llm_quantize.architectures.rows import held_output_rows, read_output_rows
from llm_quantize.errors import LlmQuantizeError, MalformedInputError, UnsupportedError, printable
from llm_quantize.formats.ctranslate2.families import EMBEDDING, FAMILIES, HEAD, Family, Linear, Part, Table
from llm_quantize.formats.ctranslate2.levels import CODES
from llm_quantize.formats.ctranslate2.network import (
    ACTIVATIONS,
    FORMS,
    KIND,
    SCALING_NUMBERS,
    SCALINGS,
    TOP,
    network_of,
)
from llm_quantize.formats.gguf.vocabulary.special import read_optional
from llm_quantize.io.ctranslate2_file import Entry
from llm_quantize.io.gguf_file import MetaValue
from llm_quantize.io.json_file import read_json
from llm_quantize.io.paths import inside, opened, read_range
from llm_quantize.io.safetensors_file import Header, TensorInfo
from llm_quantize.models.base import Digest, Opened, Values, writable
from llm_quantize.models.ctranslate2 import CTranslate2Directory, SourceRows, StoredBlocks, is_ctranslate2
from llm_quantize.models.hub.locate import Place
from llm_quantize.models.safetensors import without_weights
from llm_quantize.qtypes.held import Held

if TYPE_CHECKING:
    import torch

    from llm_quantize.grids.grid import Grid

LENGTH = 8192
"""What is written for how many tokens a model was trained for where nothing says it."""

_VOCABULARY_LIMIT = 64 << 20
_LONGEST = 1 << 24
_MOST_LAYERS = 4096
_EPSILON, _OF_GEMMA = 1e-5, 1e-6
_HELD = "line8"
_PLAIN = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
_ORIGINAL = "give the model that it was made from; verify, analyze quality, compare and run take this one"


def sniff(path: Path) -> bool:
    """As ``is_ctranslate2``."""
    return path.is_dir() and is_ctranslate2(path)


def open_at(place: Place, model: str, *, headers_only: bool = False) -> CTranslate2Model:
    """The CTranslate2 model that lies at ``place``. Raises MalformedInputError (damaged files), UnsupportedError (a
    network that no family here has)."""
    del model
    return CTranslate2Model(CTranslate2Directory(place.path), place, headers_only)


@dataclass(frozen=True)
class _Checkpoint:
    """A checkpoint of which names and shapes are known."""

    tensors: Mapping[str, TensorInfo]
    config: dict[str, Any]
    config_file: Path
    directory: Path


@dataclass(frozen=True)
class _Derived:
    """A source as a network sees it. ``told``: the file says how many tokens it was trained for."""

    checkpoint: _Checkpoint
    architecture: Architecture
    tensors: TensorMap
    told: bool


class CTranslate2Model(SourceRows, Opened):
    """An opened CTranslate2 model (``base.Model``). Its weights are the values that the runtime computes with, so what
    is made of it has its errors too; ``kind`` says so.

    Raises UnsupportedError, MalformedInputError."""

    revision: str | None = None
    metadata: Mapping[str, MetaValue] | None = None
    generation_config: dict[str, Any] | None = None
    temporary: tempfile.TemporaryDirectory[str] | None = None
    folded: Mapping[str, str] = MappingProxyType({})
    left_out: Mapping[str, str] = MappingProxyType({})

    def __init__(self, directory: CTranslate2Directory, place: Place, headers_only: bool) -> None:
        derived = _derive(directory)
        super().__init__(directory, derived)
        self.tensors = {
            name: TensorInfo(name, _PLAIN.get(info.dtype, info.dtype), info.shape, info.file, info.offset, info.nbytes)
            for name, info in self.tensors.items()
        }
        self.config = derived.checkpoint.config
        self.directory, self.name, self.headers_only = place.path, place.name, headers_only
        rounded = any(info.dtype not in _PLAIN.values() for info in self.tensors.values())
        self.kind = directory.label if rounded else ""
        self.headers = (_header(directory, self.tensors),)
        length = f"{self.config['max_position_embeddings']:,}"
        self.notes = (
            ()
            if derived.told
            else (
                f"a CTranslate2 model does not say how many tokens it was trained for; {length} is written, which is "
                f"model_max_length of its tokenizer, or {LENGTH:,} where that is no length",
            )
        )

    @property
    def scratch(self) -> int:
        """As ``Model.scratch``: what is read the other way round is decoded whole."""
        return 8 * max((rows * columns for rows, columns in map(self.matrix, self.tensors)), default=0)

    def check_readable(self, name: str) -> None:
        """As ``Rows.check_readable``: everything is."""

    def is_readable(self, name: str) -> bool:
        """As ``Rows.is_readable``."""
        return name in self.tensors

    def stored_dtype(self, name: str) -> np.dtype[Any]:
        """As ``Rows.stored_dtype``: float32 for what is rounded."""
        return np.dtype({"F16": np.float16, "BF16": np.uint16}.get(self.tensors[name].dtype, np.float32))

    def raw_rows(self, name: str, start: int, stop: int, *, buffer: Any = None) -> memoryview:
        """As ``Rows.raw_rows``."""
        found = np.ascontiguousarray(self.read_rows(name, start, stop)).reshape(-1).view(np.uint8)
        view = writable(buffer, found.size)
        view[:] = found.data
        return view

    def read_rows(  # type: ignore[override]
        self,
        name: str,
        start: int,
        stop: int,
        *,
        transpose: bool = False,
        buffer: Any = None,
        digest: Digest | None = None,
    ) -> Values:
        """As ``Rows.read_rows``."""
        if self.headers_only:
            raise without_weights(self.tensors[name])
        values: Values = super().read_rows(name, start, stop, transpose=transpose)
        dtype = self.stored_dtype(name)
        if dtype == np.uint16:
            values = (np.ascontiguousarray(values).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
        elif dtype == np.float16:
            values = values.astype(np.float16)
        if digest is not None:
            digest.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        return values

    def held(self, name: str, *, transpose: bool = False) -> Held | None:
        """As ``Model.held``: what is int8, by its rows."""
        made = self._made[name]
        by_rows = not any(piece.transpose or piece.columns is not None or piece.add for piece in made.pieces)
        by_rows = by_rows and not transpose
        return Held(_HELD, "float32") if by_rows and self.tensors[name].dtype == _HELD else None

    def held_grid(
        self, name: str, start: int, stop: int, *, transpose: bool = False
    ) -> tuple[Grid, torch.Tensor] | None:
        """As ``Model.held_grid``, with what scales are as factors: the values are those of ``read_rows`` but for the
        last bit of some."""
        if self.headers_only:
            raise without_weights(self.tensors[name])
        return (
            None
            if self.held(name, transpose=transpose) is None
            else held_output_rows(self.stored, self._made[name], start, stop)
        )

    def block_type(self, name: str, *, transpose: bool = False) -> str | None:
        """As ``Model.block_type``: the grid of what is stored as codes, by its rows."""
        (*others, piece), dtype = self._made[name].pieces, self.tensors[name].dtype
        by_rows = piece.columns is None and not piece.add and piece.transpose == transpose
        if transpose:
            by_rows = by_rows and not others and piece.order is None
        else:
            by_rows = by_rows and not any(one.transpose or one.columns is not None or one.add for one in others)
        return dtype if by_rows and dtype in CODES else None

    def block_rows(self, name: str, start: int, stop: int, *, transpose: bool = False) -> npt.NDArray[np.uint8]:
        """As ``Model.block_rows``: the codes of a row, then its scale in float32."""
        if self.headers_only:
            raise without_weights(self.tensors[name])
        if self.block_type(name, transpose=transpose) is None:
            return super().block_rows(name, start, stop)
        made = self._made[name]
        if transpose:
            return self.stored.block_rows(made.pieces[0].source, start, stop)
        found: npt.NDArray[np.uint8] = read_output_rows(StoredBlocks(self.stored), made, start, stop)
        return found

    def close(self) -> None:
        """Nothing is held open."""


def _header(directory: CTranslate2Directory, tensors: Mapping[str, TensorInfo]) -> Header:
    """The facts of model.bin as those of any file of weights: its hash is that of all that is no data."""
    path, digest, front = directory.file.path, hashlib.sha256(), 0
    with opened(path) as descriptor:
        facts = os.fstat(descriptor)
    for offset, nbytes in directory.file.known:
        digest.update(read_range(path, offset, nbytes))
        front += nbytes
    times = (facts.st_mtime_ns, facts.st_dev, facts.st_ino)
    return Header(path, dict(tensors), {}, front, directory.size, *times, digest.hexdigest())


# what it is


class _Numbers:
    """What the file says of its network. ``layers``: how many blocks it has. ``tokens``, ``length``: what lies beside
    it says of special tokens, and of how many the model was trained for; damage there is no network's."""

    def __init__(self, directory: CTranslate2Directory) -> None:
        self._file = directory.file
        self.tokens, self.length = _tokens(directory), _said_length(directory.path)
        inside_blocks = (name.split("/") for name in directory.file.variables if name.startswith(f"{TOP}/layer_"))
        numbers = {parts[1].removeprefix("layer_") for parts in inside_blocks if len(parts) > 2} - {"norm"}
        self.layers = len(numbers)
        known = {str(number) for number in range(min(self.layers, _MOST_LAYERS))}
        if not numbers or numbers != known:
            raise self.absent(f"{TOP}/layer_0", f"blocks numbered from 0, at most {_MOST_LAYERS}")

    def absent(self, name: str, expected: str) -> UnsupportedError:
        """The error for a network that says less than any family's does."""
        return UnsupportedError(
            "this CTranslate2 model is no model to start from: its network is of no family that is known here",
            file=self._file.path,
            tensor=printable(name, 200),
            expected=expected,
            found="no such variable",
            remedy=_ORIGINAL,
        )

    def get(self, name: str) -> float | int | None:
        """The number called ``name``, None where there is none. Raises MalformedInputError for one of many values."""
        entry = self._file.variables.get(name)
        if entry is None:
            return None
        if entry.shape or entry.dtype not in FORMS:
            raise MalformedInputError(
                "a number of the network is none",
                file=self._file.path,
                tensor=printable(name, 200),
                offset=entry.offset,
                expected=f"one of {', '.join(FORMS)}",
                found=f"{entry.dtype} {list(entry.shape)}",
                remedy="convert the model again with CTranslate2 4.8",
            )
        found: float | int = struct.unpack(FORMS[entry.dtype], read_range(self._file.path, entry.offset, entry.nbytes))[
            0
        ]
        return float(str(np.float32(found))) if isinstance(found, float) else found

    def need(self, name: str) -> int:
        """A whole number from 0 on. Raises UnsupportedError where there is none."""
        found = self.get(name)
        if not isinstance(found, int) or found < 0:
            raise self.absent(name, "a whole number")
        return found

    def of_layer(self, layer: int, name: str) -> float | int | None:
        """The number ``name`` of a block's attention."""
        return self.get(f"{TOP}/layer_{layer}/self_attention/{name}")

    def shape(self, name: str) -> tuple[int, int]:
        """The shape of a matrix. Raises UnsupportedError where there is none."""
        entry = self._file.find(name)
        if entry is None or len(entry.shape) != 2:
            raise self.absent(name, "a matrix")
        return entry.shape[0], entry.shape[1]


@dataclass(frozen=True)
class _Problem:
    """Why a file is not of a family. ``off``: how many variables and numbers differ."""

    off: int
    error: LlmQuantizeError


def _derive(directory: CTranslate2Directory) -> _Derived:
    """What the file is a conversion of. Raises UnsupportedError, which tells of the nearest family."""
    file = directory.file
    if file.kind != KIND:
        raise UnsupportedError(
            "this CTranslate2 model is no model to start from: its network is no decoder that continues text",
            file=file.path,
            expected=KIND,
            found=printable(file.kind, 80),
            remedy=_ORIGINAL,
        )
    numbers, problems = _Numbers(directory), list[_Problem]()
    for name, family in FAMILIES.items():
        rows = ARCHITECTURES[name]
        ways = [(family, {}), *([] if family.instead is None else [(family.instead[1], {family.instead[0]: True})])]
        for way, said in ways if not rows.nested else ():
            if family.instead is not None and not said:
                said = {family.instead[0]: False}
            try:
                found = _fit(directory, numbers, rows, way, said)
            except (MalformedInputError, UnsupportedError) as error:
                found = _Problem(len(file.variables), error)
            if isinstance(found, _Derived):
                return found
            problems.append(found)
    nearest = min(problems, key=lambda one: one.off).error
    raise UnsupportedError(
        "this CTranslate2 model is no model to start from: its network is of no family that is known here",
        file=file.path,
        tensor=nearest.tensor,
        expected=nearest.expected,
        found=nearest.found,
        remedy=_ORIGINAL,
    ) from nearest


def _fit(
    directory: CTranslate2Directory, numbers: _Numbers, rows: Rows, family: Family, said: Mapping[str, Any]
) -> _Derived | _Problem:
    """The file as one of a family; or what in it is not that family's."""
    config, told = _configuration(directory, numbers, rows, family, said)
    architecture = Architecture(rows, config, directory.file.path)
    shapes = checkpoint_shapes(rows, architecture.config, architecture.hyper)
    infos = {name: TensorInfo(name, "", shape, directory.file.path, 0, 0) for name, shape in shapes.items()}
    checkpoint = _Checkpoint(infos, config, directory.file.path, directory.path)
    derived = _Derived(checkpoint, architecture, architecture.map_tensors(infos), told)
    off = list(_differing(directory, derived, rows))
    return derived if not off else _Problem(len(off), off[0])


def _differing(directory: CTranslate2Directory, derived: _Derived, rows: Rows) -> Iterator[UnsupportedError]:
    """What the network of a family has and the file has not, or the reverse."""
    file, network = directory.file, network_of(derived)
    wanted: dict[str, object] = {weight.output.name: list(weight.output.shape) for weight in network.weights}
    found: dict[str, object] = {name: _shown(file.find(name)) for name in wanted}
    for number in network.scalars:
        entry = file.variables.get(number.name)
        wanted[number.name] = f"{number.dtype} {(number.value or b'').hex()}"
        data = None if entry is None else read_range(file.path, entry.offset, min(entry.nbytes, 8))
        found[number.name] = None if entry is None or data is None else f"{entry.dtype} {data.hex()}"
    ours = {file.aliases.get(name, name) for name in wanted}
    for name, entry in file.variables.items():
        if name not in wanted and name not in ours and not directory.is_scale(name):
            found[name] = _shown(entry)
    for name in sorted(found):
        if found[name] != wanted.get(name):
            yield UnsupportedError(
                f"a variable is not as {rows.model_type} has it",
                file=file.path,
                tensor=printable(name, 200),
                expected=f"{wanted[name]}, as {rows.model_type} has it" if name in wanted else "no such variable",
                found="no such variable" if found[name] is None else found[name],
            )


def _shown(entry: Entry | None) -> list[int] | None:
    return None if entry is None else list(entry.shape)


def _configuration(
    directory: CTranslate2Directory, numbers: _Numbers, rows: Rows, family: Family, said: Mapping[str, Any]
) -> tuple[dict[str, Any], bool]:
    """(the configuration that the file would be of this family, whether it says for how many tokens)."""
    vocabulary, width = numbers.shape(f"{TOP}/{EMBEDDING}/weight")
    heads, block = numbers.need(f"{TOP}/num_heads"), 0
    head_dim = numbers.of_layer(block, "head_dim") or width // max(1, heads)
    head, table = (directory.find(f"{TOP}/{name}/weight") for name in (HEAD, EMBEDDING))
    config: dict[str, Any] = {"model_type": rows.model_type}
    config |= {limit.name: limit.allowed[0] for limit in rows.limits}
    config |= {name: allowed[-1] for name, allowed in (family.fixed or {}).items()}
    config |= _conditions(directory, rows, family) | dict(said)
    code = numbers.need(f"{TOP}/activation")
    acts = [act for act in (*rows.activations, *ACTIVATIONS) if ACTIVATIONS.get(act) == code]
    sizes = {
        "hidden_act": acts[0] if acts else None,
        "num_hidden_layers": numbers.layers,
        "hidden_size": width,
        "intermediate_size": numbers.shape(f"{TOP}/layer_0/ffn/linear_0/weight")[0],
        "num_attention_heads": heads,
        "num_key_value_heads": numbers.of_layer(block, "num_heads_kv") or heads,
        "rms_norm_eps" if rows.norm == "rms" else "layer_norm_eps": _epsilon(directory, rows),
    }
    length, told = _length(numbers, family)
    for name, value in {**sizes, "max_position_embeddings": length}.items():
        config |= dict.fromkeys(ALIASES.get(name, (name,)), value)
    config |= {"vocab_size": vocabulary, "tie_word_embeddings": head is not None and head is table}
    if rows.own_head_dim or family.head_dim:
        config["head_dim"] = head_dim
    if rows.score_layers or "query_pre_attn_scalar" in rows.defaults:
        config["query_pre_attn_scalar"] = head_dim
    for name, usual in family.contexts.items():
        config.setdefault(name, numbers.of_layer(block, name) or usual)
    if (window := numbers.get(f"{TOP}/sliding_window")) is not None:
        config["sliding_window"] = window
    slides = [bool(numbers.of_layer(layer, "sliding_window")) for layer in range(numbers.layers)]
    if rows.layer_types:
        config["layer_types"] = ["sliding_attention" if one else "full_attention" for one in slides]
    config |= _rope(numbers, rows, family, slides, int(head_dim))
    return config | numbers.tokens, told


def _conditions(directory: CTranslate2Directory, rows: Rows, family: Family) -> dict[str, bool]:
    """What weights depend on: true where those that only then exist are there."""
    there = {name for part in family.layer for name in _names(directory, f"{TOP}/layer_0", "blk.0.", part)}
    there |= {name for part in family.edges for name in _names(directory, TOP, "", part)}
    found: dict[str, bool] = {}
    for name in sorted({weight.when.lstrip("!") for weight in rows.weights if weight.when}):
        on, off = ({output_name(one, 0) for one in rows.weights if one.when == when} for when in (name, f"!{name}"))
        found[name] = not there.isdisjoint(on - off) if on - off else there.isdisjoint(off - on)
    return found


def _names(directory: CTranslate2Directory, scope: str, prefix: str, part: Part) -> Iterator[str]:
    """The tensors of the map that a part of the network, which the file has, is made of."""
    name = f"{scope}/{part.name}"
    if isinstance(part, Linear):
        words, sources = {"weight": "weight", "bias": "bias"}, part.sources
    else:
        words, sources = {"gamma": "weight", "beta": "bias"}, (part.source,)
    for word, kind in words.items():
        variable = name if isinstance(part, Table) and kind == "weight" else f"{name}/{word}"
        if directory.find(variable) is not None:
            yield from (f"{prefix}{source}.{kind}" for source in sources)


def _epsilon(directory: CTranslate2Directory, rows: Rows) -> float:
    """What the file says, or what a model of this family has where it does not."""
    said = directory.config.get("layer_norm_epsilon")
    if isinstance(said, int | float) and not isinstance(said, bool):
        return float(said)
    usual = rows.defaults.get("rms_norm_eps" if rows.norm == "rms" else "layer_norm_eps")
    return usual if isinstance(usual, float) else _OF_GEMMA if rows.norm == "rms" else _EPSILON


def _length(numbers: _Numbers, family: Family) -> tuple[int, bool]:
    """(how many tokens the model was trained for, whether the file says so)."""
    for part in family.edges:
        if isinstance(part, Table):
            return numbers.shape(f"{TOP}/{part.name}")[0], True
    if family.contexts:
        return int(numbers.of_layer(0, "max_position_embeddings") or LENGTH), True
    return numbers.length or LENGTH, False


def _said_length(path: Path) -> int | None:
    """model_max_length of the tokenizer beside the model, where it is a length."""
    said = read_optional(path, "tokenizer_config.json").get("model_max_length")
    return said if type(said) is int and 0 < said < _LONGEST else None


def _rope(numbers: _Numbers, rows: Rows, family: Family, slides: list[bool], head_dim: int) -> dict[str, Any]:
    """Rotary positions, as transformers 5 spells them."""
    if rows.rope_default is None or family.rope is None:
        return {}
    full = next((layer for layer, slide in enumerate(slides) if not slide), 0)
    theta = numbers.of_layer(full, "rotary_base")
    if theta is None:
        raise numbers.absent(f"{TOP}/layer_{full}/self_attention/rotary_base", "a number")
    rotary = numbers.of_layer(full, "rotary_dim") or head_dim
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if family.rotary == "share" and rotary != head_dim:
        share = rotary / max(1, head_dim)
        found["partial_rotary_factor"] = share if int(share * head_dim) == rotary else float(np.nextafter(share, 2))
    kind = numbers.of_layer(full, "rotary_scaling_type")
    if kind is not None:
        found["rope_type"] = next((name for name, code in SCALINGS.items() if code == kind), "unknown")
        for key, (name, _) in SCALING_NUMBERS.items():
            if (value := numbers.of_layer(full, name)) is not None:
                found[key] = value
    if rows.rope_local_default is None and not rows.sliding_pattern:
        return {"rope_parameters": found}
    slid = next((layer for layer, slide in enumerate(slides) if slide), None)
    local = theta if slid is None else numbers.of_layer(slid, "rotary_base")
    return {
        "rope_parameters": {
            "full_attention": found,
            "sliding_attention": {"rope_type": "default", "rope_theta": local or rows.rope_local_default},
        }
    }


def _tokens(directory: CTranslate2Directory) -> dict[str, int | None]:
    """The ids of special tokens, by their texts in the vocabulary."""
    path = inside(directory.path, "vocabulary.json")
    words = read_json(path, limit_bytes=_VOCABULARY_LIMIT) if path.is_file() else []
    ids = {word: index for index, word in enumerate(words) if isinstance(word, str)} if isinstance(words, list) else {}
    found: dict[str, int | None] = {}
    for role in ("bos", "eos"):
        text = directory.config.get(f"{role}_token")
        found[f"{role}_token_id"] = ids.get(text) if isinstance(text, str) else None
    return found
