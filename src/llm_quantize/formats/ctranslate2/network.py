"""A source as CTranslate2's network: its weights under their names there, and the numbers that describe it."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, Protocol

from llm_quantize.architectures.architecture import Architecture
from llm_quantize.architectures.base import OutputTensor, Piece, TensorMap
from llm_quantize.errors import UnsupportedError
from llm_quantize.formats.ctranslate2.families import EMBEDDING, FAMILIES, HEAD, Family, Linear, Norm, Part, Table
from llm_quantize.io.ctranslate2_file import Variable
from llm_quantize.io.safetensors_file import TensorInfo

KIND, REVISION = "TransformerDecoderSpec", 8
FORMS = {"int8": "<b", "int16": "<h", "int32": "<i", "float32": "<f"}
ACTIVATIONS = {
    **{"relu": 0, "gelu_fast": 1, "gelu_new": 1, "gelu_pytorch_tanh": 1, "silu": 2, "swish": 2},
    **{"gelu": 3, "gelu_python": 3, "quick_gelu": 4},
}
SCALINGS = {"linear": 0, "llama3": 2}
TOP = "decoder"


class Stored(Protocol):
    """What a network asks of a checkpoint."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...
    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def config_file(self) -> Path: ...
    @property
    def directory(self) -> Path: ...


class Source(Protocol):
    """What a network asks of a source (``models.opening.Source``)."""

    @property
    def checkpoint(self) -> Stored: ...
    @property
    def architecture(self) -> Architecture: ...
    @property
    def tensors(self) -> TensorMap: ...


@dataclass(frozen=True)
class Weight:
    """A variable with data: ``output``, called by its name there. ``quantized``: it is a matrix that int8 and int16
    round; ``seen``: its inputs can be observed, as it stands in a block."""

    output: OutputTensor
    quantized: bool
    seen: bool


@dataclass(frozen=True)
class Network:
    """``weights`` in the order of the file, ``scalars`` known from the configuration, ``aliases`` {name: variable}."""

    weights: tuple[Weight, ...]
    scalars: tuple[Variable, ...]
    aliases: Mapping[str, str]


def family_of(source: Source) -> Family:
    """The row of FAMILIES. Raises UnsupportedError naming the families that there are."""
    name = source.architecture.family.model_type
    if name not in FAMILIES:
        raise UnsupportedError(
            f"models of type {name} are not written as CTranslate2",
            file=source.checkpoint.config_file,
            expected=", ".join(FAMILIES),
            found=name,
            remedy="write gguf, which has this family: quantize MODEL gguf -q Q8_0",
        )
    family = FAMILIES[name]
    if family.instead is not None and source.architecture.config.boolean(family.instead[0]):
        return family.instead[1]
    return family


def network_of(source: Source) -> Network:
    """The network of ``source``. Raises UnsupportedError for a family, or a variant of one, that CTranslate2's network
    does not compute; MalformedInputError for a configuration that makes no sense."""
    family = family_of(source)
    _check(source, family)
    outputs = {output.name: output for output in source.tensors.outputs}
    used: set[str] = set()
    weights = list(_weights(source, family, outputs, used))
    for output in outputs.values():
        lost = [piece.source for piece in output.pieces if piece.source not in used]
        if lost:
            _refuse(source, "CTranslate2's network has no place for a weight of this model", lost[0], "no such weight")
    tied = _tied(source, outputs)
    aliases = {f"{TOP}/{HEAD}/weight": f"{TOP}/{EMBEDDING}/weight"} if tied else {}
    weights.sort(key=lambda weight: weight.output.name)
    return Network(tuple(weights), tuple(_scalars(source, family)), aliases)


def _refuse(source: Source, what: str, found: object, expected: object) -> NoReturn:
    raise UnsupportedError(
        what,
        file=source.checkpoint.config_file,
        expected=expected,
        found=found,
        remedy="write gguf, which has this variant: quantize MODEL gguf -q Q8_0",
    )


def _check(source: Source, family: Family) -> None:
    architecture = source.architecture
    config, hyper, rope = architecture.config, architecture.hyper, architecture.rope
    for name, allowed in (family.fixed or {}).items():
        if config.get(name) not in allowed:
            _refuse(source, f"CTranslate2 does not compute this {name}", config.get(name), allowed[-1])
    if rope is not None and family.rope is not None:
        if rope.kind not in family.rope:
            _refuse(
                source, "CTranslate2 does not compute this rotary scaling", rope.kind, ", ".join(sorted(family.rope))
            )
        if rope.share != 1 and family.rotary != "share":
            _refuse(source, "CTranslate2 rotates whole heads in this family", rope.share, 1)
    if not family.head_dim and hyper.head_dim * hyper.n_head != hyper.embedding_length:
        _refuse(
            source,
            "CTranslate2 takes the size of a head from the width in this family",
            hyper.head_dim,
            "width / heads",
        )
    if not family.window and any(architecture.sliding):
        _refuse(source, "CTranslate2 has no sliding window in this family", "sliding layers", "full attention")
    scale = config.get("query_pre_attn_scalar")
    if scale is not None and scale != hyper.head_dim:
        _refuse(source, "CTranslate2 divides scores by the root of the head's size", scale, hyper.head_dim)
    _activation(source)


def _activation(source: Source) -> int:
    found = source.architecture.config.text("hidden_act")
    if found not in ACTIVATIONS:
        _refuse(source, "CTranslate2 does not compute this activation", found, ", ".join(ACTIVATIONS))
    return ACTIVATIONS[found]


# weights


def _weights(source: Source, family: Family, outputs: Mapping[str, OutputTensor], used: set[str]) -> Iterator[Weight]:
    edges: list[Part] = [Linear(EMBEDDING, ("token_embd",)), *family.edges]
    if not _tied(source, outputs):
        edges.append(Linear(HEAD, ("output",)))
    places = [(TOP, "", edges)]
    for index in range(source.architecture.hyper.n_layer):
        places.append((f"{TOP}/layer_{index}", f"blk.{index}.", list(family.layer)))
    for scope, prefix, parts in places:
        for part in parts:
            for weight in _variables(scope, prefix, part, outputs):
                used.update(piece.source for piece in weight.output.pieces)
                yield weight


def _variables(scope: str, prefix: str, part: Part, outputs: Mapping[str, OutputTensor]) -> Iterator[Weight]:
    name = f"{scope}/{part.name}"
    if isinstance(part, Linear):
        weights = [outputs[f"{prefix}{one}.weight"] for one in part.sources]
        yield Weight(_joined(f"{name}/weight", weights, part), True, bool(prefix))
        biases = [outputs[f"{prefix}{one}.bias"] for one in part.sources if f"{prefix}{one}.bias" in outputs]
        if len(biases) == len(weights):
            yield Weight(_joined(f"{name}/bias", biases, part), False, False)
        return
    found = outputs[f"{prefix}{part.source}.weight"]
    plain = Linear(part.name, (part.source,))
    if isinstance(part, Table):
        yield Weight(_joined(name, [found], plain), False, False)
        return
    yield Weight(_joined(f"{name}/gamma", [found], plain), False, False)
    bias = outputs.get(f"{prefix}{part.source}.bias")
    if bias is not None:
        yield Weight(_joined(f"{name}/beta", [bias], plain), False, False)


def _joined(name: str, tensors: list[OutputTensor], part: Linear) -> OutputTensor:
    """``tensors`` one after the other, rows as ``part`` wants them."""
    pieces = [_piece(piece, part) for tensor in tensors for piece in tensor.pieces]
    index, parts = part.part
    if parts > 1:
        rows = tensors[0].shape[0] // parts
        pieces = [replace(piece, start=piece.start + index * rows, count=rows) for piece in pieces]
        return OutputTensor(name, (rows, *tensors[0].shape[1:]), tuple(pieces))
    along = sum(tensor.shape[0] for tensor in tensors)
    return OutputTensor(name, (along, *tensors[0].shape[1:]), tuple(pieces))


def _piece(piece: Piece, part: Linear) -> Piece:
    return replace(piece, add=0.0) if part.ordered else replace(piece, order=None, columns=None, add=0.0)


def _tied(source: Source, outputs: Mapping[str, OutputTensor]) -> bool:
    """Whether the head is the embedding; a checkpoint may hold a head of its own, whatever its configuration says."""
    head, table = outputs.get("output.weight"), outputs["token_embd.weight"]
    return source.architecture.hyper.tied and (head is None or head.pieces[0].source == table.pieces[0].source)


# numbers


def _scalar(name: str, dtype: str, value: float) -> Variable:
    number = value if dtype == "float32" else int(value)
    return Variable(name, dtype, (), struct.pack(FORMS[dtype], number))


def _scalars(source: Source, family: Family) -> Iterator[Variable]:
    architecture = source.architecture
    hyper = architecture.hyper
    numbers: dict[str, tuple[str, float]] = {
        "activation": ("int8", _activation(source)),
        "alignment_heads": ("int16", 1),
        "alignment_layer": ("int16", -1),
        "num_heads": ("int16", hyper.n_head),
        "pre_norm": ("int8", 1),
        "scale_embeddings": ("int8", family.scaled),
        "start_from_zero_embedding": ("int8", 0),
        **{name: ("int8", name in family.flags) for name in ("alibi", "alibi_use_positive_positions", "scale_alibi")},
    }
    if (window := _window(source, family)) is not None:
        numbers["sliding_window"] = ("int32", window)
    for name, (dtype, value) in numbers.items():
        yield _scalar(f"{TOP}/{name}", dtype, value)
    norms = [(TOP, part) for part in family.edges if isinstance(part, Norm)]
    for index in range(hyper.n_layer):
        scope = f"{TOP}/layer_{index}"
        norms += [(scope, part) for part in family.layer if isinstance(part, Norm)]
        for name, (dtype, value) in _attention(source, family, index).items():
            yield _scalar(f"{scope}/self_attention/{name}", dtype, value)
    for scope, part in norms if family.residual else ():
        yield _scalar(f"{scope}/{part.name}/layer_norm_use_residual", "int8", 1)


def _window(source: Source, family: Family) -> int | None:
    if family.window in ("", "none") or source.architecture.config.get("sliding_window") is None:
        return None
    return source.architecture.config.integer("sliding_window", low=0)


def _attention(source: Source, family: Family, index: int) -> dict[str, tuple[str, float]]:
    architecture, found = source.architecture, dict[str, tuple[str, float]]()
    hyper, rope = architecture.hyper, architecture.rope
    if hyper.n_head_kv != hyper.n_head:
        found["num_heads_kv"] = ("int32", hyper.n_head_kv)
    if family.head_dim:
        found["head_dim"] = ("int32", hyper.head_dim)
    slides = family.window == "each" and architecture.sliding[index]
    if (window := _window(source, family)) is not None:
        found["sliding_window"] = ("int32", window if slides or family.window == "all" else 0)
    for name, usual in family.contexts.items():
        found[name] = ("int32", architecture.config.integer(name, default=usual))
    if rope is None or family.rope is None:
        return found
    theta = rope.local_theta if slides and rope.local_theta is not None else rope.theta
    sizes = {"all": 0, "head": hyper.head_dim, "share": int(rope.share * hyper.head_dim)}
    found |= {
        "rotary_base": ("float32", theta),
        "rotary_dim": ("int32", sizes[family.rotary]),
        "rotary_interleave": ("int8", 0),
    }
    if rope.kind in SCALINGS and not slides:
        found["rotary_scaling_type"] = ("int8", SCALINGS[rope.kind])
        for key, (name, dtype) in SCALING_NUMBERS.items():
            if key in rope.scaling and (rope.kind == "llama3" or key == "factor"):
                found[name] = (dtype, architecture.config.checked_number(key, rope.scaling[key], positive=True))
    return found


SCALING_NUMBERS = {
    "factor": ("rotary_scaling_factor", "float32"),
    "low_freq_factor": ("rotary_low_freq_factor", "float32"),
    "high_freq_factor": ("rotary_high_freq_factor", "float32"),
    "original_max_position_embeddings": ("original_max_position_embeddings", "int32"),
}
"""What the runtime reads of a scaling. Of Llama 3's the converter writes the two in the middle alone, and the runtime
then computes with a factor of 1: as if there were no scaling."""
