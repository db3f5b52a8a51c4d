"""A LoRA adapter as peft saves one, opened: its settings, its tensors, and which tensors of a model they change.

adapter_config.json is data from a stranger, as the names and shapes of its tensors are: all is held against the model
from headers alone, before anything of it is read. Of LoRA's kin, what is not the sum W + scale (B A), or DoRA's form of
it, is refused by name.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from llm_quantize.architectures.architecture import Architecture
from llm_quantize.architectures.rows import chunk_rows, to_float32
from llm_quantize.errors import MalformedInputError, NumericPolicyError, UnsupportedError, UsageError, printable
from llm_quantize.events import EventSink
from llm_quantize.formats.expressions import compiled, each_meant
from llm_quantize.io.journal import canonical_json
from llm_quantize.io.json_file import read_json_object
from llm_quantize.io.paths import inside
from llm_quantize.io.safetensors_file import Header, read_header
from llm_quantize.io.torch_file import View, read_torch_file
from llm_quantize.models.base import Merge, Model
from llm_quantize.models.files import CONFIG_LIMIT
from llm_quantize.models.hub.locate import Place, locate_adapter
from llm_quantize.models.pickled import PickledCheckpoint, check_view
from llm_quantize.models.safetensors import Checkpoint
from llm_quantize.models.weight_sets import ADAPTER, ADAPTER_WEIGHTS

_ROOT = "base_model.model."
_PARTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
_PART = re.compile(rf"(.+)\.({'|'.join(_PARTS)})(?:\.default)?(?:\.(weight|bias))?", re.DOTALL)
_WRAPPED = re.compile(r"\.(base_layer|modules_to_save(\.default)?|original_module)(?=\.)")
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Ways in which training began that leave the model as it is; others (PiSSA, OLoRA, LoftQ) train on a changed one."""
_OTHER_SUMS = {
    "alora_invocation_tokens": "an activated LoRA, which changes the model from some token on",
    "use_qalora": "QALoRA, which pools its inputs",
    "use_bdlora": "BD-LoRA, whose matrices are block-diagonal",
    "arrow_config": "Arrow, which routes between adapters",
    "kasa_config": "KaSA, which changes the model before it trains",
    "monteclora_config": "MonteCLoRA, which draws its matrices",
    "layer_replication": "a model with layers repeated",
    "trainable_token_indices": "single rows of the embedding",
    "target_parameters": "parameters of stacked experts",
}
"""Settings of peft with which the change is another one, or lies elsewhere."""
_MOST_RANK = 1 << 16


@dataclass(frozen=True, slots=True)
class Factor:
    """A matrix of an adapter as (n, rank): ``turned``: it is stored as (rank, n)."""

    name: str
    turned: bool


@dataclass(frozen=True, slots=True)
class Change:
    """What becomes of one tensor of a model, named by tensors of the adapter: it is replaced by ``whole``, then
    ``scaling`` times ``left`` ``right``ᵀ is added (as the tensor is stored: left has its rows, right its columns), or
    ``scaling`` times the vector ``added``. ``magnitude``: DoRA's length for each row of what came out, or for each
    column (``by_column``)."""

    whole: str | None = None
    left: Factor | None = None
    right: Factor | None = None
    rank: int = 0
    scaling: float = 0.0
    added: str | None = None
    magnitude: str | None = None
    by_column: bool = False


@dataclass(frozen=True)
class Adapter:
    """An opened adapter. ``tensors``: its rows; ``config``: adapter_config.json; ``scale``: the user's factor."""

    place: Place
    config: Mapping[str, Any]
    tensors: Checkpoint
    scale: float

    @property
    def file(self) -> Path:
        """Where its settings are."""
        return self.place.path / ADAPTER

    @property
    def base(self) -> str:
        """What model it says that it was trained on, "" where it does not."""
        found = self.config.get("base_model_name_or_path")
        return found if isinstance(found, str) else ""

    @property
    def header(self) -> Header:
        """Of its file of weights; ``sha256`` is also of its settings and of the user's factor."""
        return self.tensors.headers[0]

    def merge(self) -> Merge:
        """What is said of it where it is merged."""
        found = "DoRA" if self.config.get("use_dora") else "rsLoRA" if self.config.get("use_rslora") else "LoRA"
        name = printable(self.place.name, 120)
        return Merge(self.place.path, name, self.place.revision, self.scale, found, self.header.sha256)


def open_adapter(text: str, on_event: EventSink) -> Adapter:
    """The adapter that ``text`` names: DIR, or a hub id (with @REVISION), and =SCALE after either.

    Raises UsageError (no such adapter, a scale that is no number), UnsupportedError (no LoRA, or a kind of it that is
    no sum), MalformedInputError, AccessError, NetworkError.
    """
    where, revision, scale = _parsed(text)
    place = locate_adapter(where, revision, on_event)
    file = place.path / ADAPTER
    if not place.path.is_dir() or not os.path.lexists(file):
        raise UsageError(
            "no adapter is here",
            file=file if place.path.is_dir() else place.path,
            expected=f"a directory with {ADAPTER}, as peft saves it, or a hub id of one",
            found="a directory without it" if place.path.is_dir() else "a file",
            remedy="give the directory of a LoRA adapter: --lora DIR, or --lora DIR=0.5 for half of it",
        )
    config = read_json_object(inside(place.path, ADAPTER), limit_bytes=CONFIG_LIMIT)
    _check_kind(config, file)
    header, views = _read_weights(place.path)
    facts = canonical_json({"config": config, "scale": scale, "weights": header.sha256})
    header = Header(
        header.path, header.tensors, {}, header.header_bytes, header.file_size, header.mtime_ns, header.device,
        header.inode, hashlib.sha256(facts).hexdigest(),
    )  # fmt: skip
    arguments: tuple[Any, ...] = (place.path, place.name, {}, None, place.revision, (header,), header.tensors)
    tensors = PickledCheckpoint(*arguments) if views else Checkpoint(*arguments)
    if isinstance(tensors, PickledCheckpoint):
        tensors.views = views
    return Adapter(place, config, tensors, scale)


def _parsed(text: str) -> tuple[str, str | None, float]:
    """(directory or hub id, revision, scale)."""
    where, scale = text, 1.0
    if not Path(text).exists() and "=" in text:
        where, _, number = text.rpartition("=")
        try:
            scale = float(number)
        except ValueError:
            scale = math.nan
        if not where or not math.isfinite(scale):
            raise UsageError(
                "the scale of an adapter is no number",
                file=printable(text, 200),
                expected="DIR=SCALE, for example DIR=0.5",
                found=printable(number, 80),
                remedy="leave it out for the whole adapter",
            )
    if not Path(where).exists() and "@" in where:
        where, _, revision = where.partition("@")
        return where, revision, scale
    return where, None, scale


def _check_kind(config: Mapping[str, Any], file: Path) -> None:
    """Raise UnsupportedError for what is no LoRA, or a kind of it that does something else than add B A."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(
            "only LoRA adapters can be merged",
            file=file,
            expected="peft_type LORA (LoRA, rsLoRA, DoRA)",
            found=printable(str(kind), 80),
            remedy="merge it with peft's merge_and_unload() where that can, and give the result as MODEL",
        )
    start = config.get("init_lora_weights", True)
    other = next((words for key, words in _OTHER_SUMS.items() if config.get(key)), None)
    if isinstance(start, str | bool | None) and start in _PLAIN_STARTS and other is None:
        return
    raise UnsupportedError(
        "this adapter is a kind of LoRA that is not merged here",
        file=file,
        expected="LoRA, rsLoRA or DoRA on the model as it was published",
        found=other or f"init_lora_weights {printable(str(start), 80)}, which trains on a changed model",
        remedy="merge it with peft's merge_and_unload(), and give the result as MODEL",
    )


def _read_weights(directory: Path) -> tuple[Header, Mapping[str, View]]:
    """The header of the adapter's weights, and which of its tensors are views."""
    name = next((name for name in ADAPTER_WEIGHTS if os.path.lexists(directory / name)), None)
    if name is None:
        raise MalformedInputError(
            "the adapter has no weights",
            file=directory / ADAPTER_WEIGHTS[0],
            expected=" or ".join(ADAPTER_WEIGHTS),
            found="neither",
            remedy="fetch all files of the adapter",
        )
    path = inside(directory, name)
    if path.suffix == ".safetensors":
        return read_header(path), {}
    found = read_torch_file(path)
    for view in found.views.values():
        check_view(view, scaled=False)
    return found.header, found.views


@dataclass(frozen=True, slots=True)
class _Module:
    """Tensors of the adapter that change one weight: {part: tensor}, "lora_B.bias" among them."""

    name: str
    parts: Mapping[str, str]


def changes(adapter: Adapter, model: Model, architecture: Architecture) -> tuple[dict[str, Change], dict[str, str]]:
    """({tensor of ``model``: what becomes of it}, {tensor of the adapter that is left out: why}).

    Raises UsageError where the adapter is of another model, UnsupportedError for tensors of it that are not known,
    MalformedInputError where they or its settings contradict each other; no value is read.
    """
    modules, wholes = _sorted(adapter)
    left_out: dict[str, str] = {}
    named = [f"{module.name}.weight" for module in modules]
    rename = _renaming(adapter, model, [*named, *(name for name in wholes if not _is_head(name, model, architecture))])
    found: dict[str, Change] = {}
    for name, key in wholes.items():
        target = rename(name)
        if target not in model.tensors and _is_head(name, model, architecture):
            if _trained(adapter, name):
                raise _other_base(adapter, model, f"a head of its own ({key}), where this model has none")
            left_out[key] = "a copy of the embedding, which this model ties to its head"
            continue
        _check_shape(adapter, model, key, target, model.tensors[target].shape)
        found[target] = Change(whole=key)
    ranks = _settings(adapter, modules, "r", "rank_pattern", 8)
    alphas = _settings(adapter, modules, "lora_alpha", "alpha_pattern", 8)
    for module in modules:
        weight, said = rename(f"{module.name}.weight"), (ranks[module.name], alphas[module.name])
        change = _low_rank(adapter, model, architecture, module, weight, *said)
        before = found.get(weight, Change())
        found[weight] = Change(before.whole, *_fields(change))
        if "lora_B.bias" in module.parts:
            _add_bias(adapter, model, found, module, f"{weight.removesuffix('.weight')}.bias", change.scaling)
    if not found:
        raise MalformedInputError("the adapter changes nothing", file=adapter.header.path, remedy="fetch it again")
    return found, left_out


def _fields(change: Change) -> tuple[Any, ...]:
    return (change.left, change.right, change.rank, change.scaling, change.added, change.magnitude, change.by_column)


def _sorted(adapter: Adapter) -> tuple[list[_Module], dict[str, str]]:
    """(what is added to weights, {tensor of the model: the tensor that takes its place})."""
    parts: dict[str, dict[str, str]] = {}
    wholes: dict[str, str] = {}
    for key in adapter.header.tensors:
        adapter.tensors.check_readable(key)
        name = key.removeprefix(_ROOT)
        match = _PART.fullmatch(name)
        if match is not None and ".base_layer." not in f"{match[1]}.":
            part = match[2] if match[3] != "bias" else f"{match[2]}.bias"
            known = parts.setdefault(match[1], {})
            if part in known or (match[3] == "bias" and match[2] != "lora_B"):
                _refuse_tensor(adapter, key, "the adapter has a tensor twice, or a bias where there is none")
            known[part] = key
            continue
        if "lora_" in name:
            _refuse_tensor(adapter, key, "the adapter has a tensor of a kind that is not known here")
        target = _WRAPPED.sub("", name)
        if target in wholes:
            _refuse_tensor(adapter, key, "the adapter has a tensor twice")
        wholes[target] = key
    return [_Module(name, known) for name, known in parts.items()], wholes


def _refuse_tensor(adapter: Adapter, key: str, what: str) -> NoReturn:
    info = adapter.header.tensors[key]
    raise UnsupportedError(
        what,
        file=info.file,
        tensor=key,
        offset=info.offset,
        expected=", ".join(_PARTS),
        found=printable(key.rsplit(".", 2)[-2] if key.count(".") > 1 else key, 80),
        remedy="merge it with peft's merge_and_unload(), and give the result as MODEL",
    )


def _trained(adapter: Adapter, name: str) -> bool:
    """Whether the settings say that a module was trained as a whole, or that its LoRA is one of the head."""
    saved = adapter.config.get("modules_to_save")
    module = name.rpartition(".")[0].rpartition(".")[2]
    return isinstance(saved, list) and module in saved


def _is_head(name: str, model: Model, architecture: Architecture) -> bool:
    """Whether ``name`` is the weight of the head, and this model has none but its embedding."""
    head = architecture.head_of([name])
    return head is not None and name not in model.tensors and architecture.hyper.tied


def _renaming(adapter: Adapter, model: Model, names: Iterable[str]) -> Callable[[str], str]:
    """How names of the adapter become those of the model's tensors: as they are, or with one word in front more or
    less, as the class that was trained may have a word before all others (``transformer.``) that its files have not."""
    wanted = list(names)
    starts = {name.partition(".")[0] for name in wanted}
    ways = [("", "")]
    if len(starts) == 1:
        ways += [(f"{starts.pop()}.", ""), *(("", f"{word}.") for word in ("model", "transformer", "language_model"))]
    for taken, added in ways:
        if all(f"{added}{name.removeprefix(taken)}" in model.tensors for name in wanted):
            return partial(_renamed, taken, added)
    missing = next(name for name in wanted if name not in model.tensors)
    raise _other_base(adapter, model, f"a change of {printable(missing, 200)}, which this model has not")


def _renamed(taken: str, added: str, name: str) -> str:
    return f"{added}{name.removeprefix(taken)}"


def _other_base(adapter: Adapter, model: Model, found: str, tensor: str | None = None) -> UsageError:
    base = printable(adapter.base, 120) or "a model that it does not name"
    return UsageError(
        f"this adapter does not fit: it was trained on {base}, and MODEL is {model.name}",
        file=adapter.header.path,
        tensor=tensor,
        expected=f"an adapter of {model.name}",
        found=found,
        remedy=f"give the model that it was trained on as MODEL: {base}",
    )


def _check_shape(adapter: Adapter, model: Model, key: str, target: str, expected: tuple[int, ...]) -> None:
    found = adapter.header.tensors[key].shape
    if tuple(found) != tuple(expected):
        told = f"{list(found)} for {target}, which is {list(model.tensors[target].shape)} here"
        raise _other_base(adapter, model, told, key)


def _low_rank(
    adapter: Adapter, model: Model, architecture: Architecture, module: _Module, weight: str, said: Any, alpha: Any
) -> Change:
    """The change of a weight by two matrices; proved by shapes. ``said``, ``alpha``: rank and lora_alpha, as set."""
    shape, parts = model.tensors[weight].shape, module.parts
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    down, up = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    if not {down, up} <= parts.keys() <= {down, up, "lora_magnitude_vector", *([] if embedding else ["lora_B.bias"])}:
        raise MalformedInputError(
            "the tensors of an adapter for one weight are not a pair",
            file=adapter.header.path,
            tensor=f"{module.name}.{down}",
            expected=f"{down} and {up}",
            found=", ".join(parts),
            remedy="fetch the adapter again",
        )
    if len(shape) != 2:
        raise UnsupportedError(
            "the adapter changes a tensor that is no matrix",
            file=adapter.header.path,
            tensor=parts[down],
            expected="a matrix",
            found=f"{weight} of {len(shape)} dimensions",
            remedy="merge it with peft's merge_and_unload(), and give the result as MODEL",
        )
    form = architecture.form_of(weight)
    turned = embedding or (bool(adapter.config.get("fan_in_fan_out")) if form is None else form.transpose)
    outputs, inputs = shape[::-1] if turned else shape
    rank = _rank(adapter, said, parts[down])
    _check_shape(adapter, model, parts[down], weight, (rank, inputs))
    _check_shape(adapter, model, parts[up], weight, (outputs, rank))
    magnitude = parts.get("lora_magnitude_vector")
    if (magnitude is not None) != bool(adapter.config.get("use_dora")):
        raise MalformedInputError(
            "the settings of the adapter and its tensors do not agree whether it is DoRA",
            file=adapter.file,
            tensor=module.name,
            expected=f"use_dora {magnitude is not None}",
            found=printable(str(adapter.config.get("use_dora")), 80),
            remedy="fetch the adapter again",
        )
    if magnitude is not None:
        _check_shape(adapter, model, magnitude, weight, (outputs,))
    a, b = Factor(parts[down], True), Factor(parts[up], False)
    left, right = (a, b) if turned else (b, a)
    return Change(None, left, right, rank, _scaling(adapter, module, alpha, rank), None, magnitude, turned)


def _add_bias(
    adapter: Adapter, model: Model, found: dict[str, Change], module: _Module, bias: str, scaling: float
) -> None:
    key = module.parts["lora_B.bias"]
    if bias not in model.tensors:
        raise _other_base(
            adapter, model, f"a bias for {printable(module.name, 200)}, which has none in this model", key
        )
    _check_shape(adapter, model, key, bias, model.tensors[bias].shape)
    found[bias] = Change(found.get(bias, Change()).whole, scaling=scaling, added=key)


def _rank(adapter: Adapter, said: Any, key: str) -> int:
    """The rank, as the tensors and the settings (``said``) have it."""
    shape = adapter.header.tensors[key].shape
    rank = shape[0] if len(shape) == 2 else 0
    if type(said) is not int or said != rank or not 0 < rank <= _MOST_RANK:
        raise MalformedInputError(
            "the rank of the adapter is not what its settings say, or none",
            file=adapter.file,
            tensor=key,
            expected=f"r {printable(str(said), 80)}, between 1 and {_MOST_RANK:,}",
            found=f"a tensor of {list(shape)}",
            remedy="fetch the adapter again",
        )
    return rank


def _scaling(adapter: Adapter, module: _Module, alpha: Any, rank: int) -> float:
    """What B A is multiplied with: alpha / rank, or alpha / sqrt(rank) of rsLoRA, and the user's factor."""
    usable = isinstance(alpha, int | float) and not isinstance(alpha, bool) and abs(alpha) < 1e30
    if not usable:
        raise MalformedInputError(
            "lora_alpha is no number that can be multiplied with",
            file=adapter.file,
            tensor=module.name,
            expected="a number below 1e30",
            found=printable(str(alpha)[:200], 80),
            remedy="fetch the adapter again",
        )
    scale = float(alpha) / (math.sqrt(rank) if adapter.config.get("use_rslora") else rank) * adapter.scale
    if not math.isfinite(scale):
        raise UsageError("the scale of the adapter is too large", file=adapter.file, found=adapter.scale)
    return scale


def _settings(adapter: Adapter, modules: Iterable[_Module], name: str, pattern: str, usual: int) -> dict[str, Any]:
    """{module: its setting ``name``}: of the first pattern that fits the end of its name, else of all."""
    patterns = adapter.config.get(pattern) or {}
    if not isinstance(patterns, dict):
        raise MalformedInputError(
            f"{pattern} must be an object", file=adapter.file, found=type(patterns).__name__, remedy="fetch it again"
        )
    found = dict.fromkeys((module.name for module in modules), adapter.config.get(name, usual))
    rules = ((text, compiled(rf"(.*\.)?({text})$", adapter.file)) for text in patterns)
    return found | {module: patterns[text] for module, text in each_meant(rules, list(found), adapter.file)}


def check_values(adapter: Adapter, found: Mapping[str, Change]) -> None:
    """Raise NumericPolicyError for the first factor, bias or magnitude that is not finite. What replaces a tensor whole
    is a weight like those of the model, which whoever writes them judges."""
    for key in dict.fromkeys(_read(found.values())):
        rows, columns = adapter.tensors.matrix(key)
        step = chunk_rows(columns)
        for start in range(0, rows, step):
            values = to_float32(adapter.tensors.read_rows(key, start, min(rows, start + step)))
            wrong = np.argwhere(~np.isfinite(values))
            if len(wrong):
                row, column = wrong[0]
                raise NumericPolicyError(
                    "the adapter has values that are not finite",
                    file=adapter.header.path,
                    tensor=key,
                    offset=adapter.header.tensors[key].offset,
                    expected="numbers",
                    found=f"{values[row, column]} in row {start + row}, column {column}",
                    remedy="its training failed, or it is damaged: fetch it again, or take an earlier checkpoint of it",
                )


def _read(found: Iterable[Change]) -> Iterator[str]:
    for change in found:
        factors = [factor.name for factor in (change.left, change.right) if factor is not None]
        yield from (*factors, *(key for key in (change.added, change.magnitude) if key is not None))
