"""A model directory that Transformers and vLLM load: every byte of it, from headers alone.

config.json                       the source's, with what a format has to say in it
model.safetensors                 or model-0000i-of-0000n.safetensors and model.safetensors.index.json
tokenizer files, generation_config.json, chat template, licence: byte for byte
README.md                         the model card
manifest.json                     (written at the end of the run)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import llm_quantize
from llm_quantize.architectures.base import OutputTensor, Piece
from llm_quantize.architectures.rope import DIVISORS
from llm_quantize.errors import UsageError
from llm_quantize.formats.base import SAFETENSORS_TYPES
from llm_quantize.formats.card import About, card, room, verdict_room
from llm_quantize.formats.gguf.metadata import read_card
from llm_quantize.formats.gguf.restored.files import restored
from llm_quantize.formats.modules import Module
from llm_quantize.formats.small_files import small_files
from llm_quantize.io.output import OutputFile
from llm_quantize.io.safetensors_file import TensorInfo
from llm_quantize.io.safetensors_writer import (
    TensorSpec,
    index_bytes,
    layout_safetensors,
    shard_names,
    split_shards,
)
from llm_quantize.plan import ArtifactPlan, CardPlan, MatrixPlan, TensorPlan
from llm_quantize.qtypes.inputs import InputGrid

if TYPE_CHECKING:
    from llm_quantize.models.opening import Source

KEPT_TYPES: Mapping[str, str] = {"BF16": "bf16", "F16": "f16", "F32": "f32", "F64": "f32", "F8_E4M3": "bf16"}
"""What a tensor is stored as that a format leaves alone, by its element type in the source."""

DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
"""What a configuration calls the types of floats."""
_WORDS = {"bf16": "BF16", "f16": "F16", "f32": "F32"}
_METADATA = {"format": "pt"}
_TIED = "tie_word_embeddings"
_QUANTIZATION = ("quantization_config", "compression_config", "quantization")


@dataclass(frozen=True)
class Stored:
    """A tensor of the artifact before it has a place: ``qtype`` as in TensorPlan."""

    output: OutputTensor
    qtype: str

    @property
    def spec(self) -> TensorSpec:
        word = _WORDS.get(self.qtype) or SAFETENSORS_TYPES[self.qtype]
        return TensorSpec(self.output.name, word, self.output.shape)


@dataclass(frozen=True)
class Group:
    """Tensors that stand in one file: the fields of the matrix ``module``, or one tensor by itself (None).
    ``qtype``: the grid of the matrix, where it is not that of all; ``cache``: as in MatrixPlan."""

    tensors: tuple[Stored, ...]
    module: Module | None = None
    qtype: str = ""
    cache: InputGrid | None = None

    @property
    def nbytes(self) -> int:
        return sum(tensor.spec.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class Contents:
    """What a format puts into a directory called NAME.

    ``label``: the level as the artifact's name has it. ``groups``: the tensors, in order. ``qtype``: the grid of those
    that are matrices. ``config``: config.json, what it says or its very bytes. ``about``: the card. ``weights``: how
    many of the source it holds. ``identity``: what decides the bytes beside source, level and layout. ``include``:
    globs of further files of the source to copy. ``measured``, ``judged``: the card has room for what the run will
    tell, of its loss and of how exact it is. ``dropped``: {tensor of the source that is not taken over: why}.
    ``too_large``: as in the plan.
    """

    format: str
    label: str
    name: str
    groups: Sequence[Group]
    config: Mapping[str, Any] | bytes
    about: About
    weights: int
    identity: Mapping[str, Any]
    shard_size: int
    include: Sequence[str] = ()
    qtype: str = ""
    measured: bool = False
    judged: bool = False
    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()
    dropped: Mapping[str, str] = field(default_factory=dict)
    too_large: str = ArtifactPlan.too_large


def whole(info: TensorInfo, qtype: str) -> Group:
    """A tensor of the checkpoint, stored as ``qtype`` under its own name."""
    return Group((Stored(OutputTensor(info.name, info.shape, (Piece(info.name),)), qtype),))


def kept_type(source: Source, dtype: str, *, exact: bool = False) -> str:
    """What a tensor of the source's ``dtype`` is stored as that a format leaves alone: in its own type, or in float32
    where it is quantized. Of a GGUF file, which has norms in float32 whatever the model, in the type that the model is
    run in: all runtimes round to it, and some (bitsandbytes in Transformers) do not run a mixture; not so with
    ``exact``."""
    if exact or source.checkpoint.metadata is None:
        return KEPT_TYPES.get(dtype, "f32")
    return {word: kind for kind, word in DTYPES.items()}.get(str(source.checkpoint.config.get("dtype")), "f32")


def plan_files(source: Source, contents: Contents) -> ArtifactPlan:
    """The plan of ``contents``. Raises UsageError for a shard size that means nothing."""
    if contents.shard_size < 1:
        raise UsageError("--output-shard-size must be positive", found=contents.shard_size)
    shards = split_shards([group.nbytes for group in contents.groups], contents.shard_size)
    return plan_around(source, contents, *_lay_out(contents.groups, shards, contents.qtype))


def plan_around(
    source: Source,
    contents: Contents,
    files: list[OutputFile],
    tensors: Sequence[TensorPlan],
    matrices: Sequence[MatrixPlan],
) -> ArtifactPlan:
    """The plan of a directory that holds ``files`` of weights, and around them what every directory has."""
    warnings = list(contents.warnings)
    files += _other_files(source, contents, warnings)
    left_out = _left_out(contents.dropped)
    room_left = None
    if contents.measured or contents.judged:  # its figures are no part of what the artifact is
        room_left = CardPlan(len(files) - 1, files[-1].header)
        files[-1] = OutputFile(files[-1].name, files[-1].size, b"")
    return ArtifactPlan(
        level=contents.label,
        name=contents.name,
        files=tuple(files),
        tensors=tuple(tensors),
        weights=contents.weights,
        identity=_identity(source, contents, files),
        warnings=tuple(warnings),
        source_itemsize=source.itemsize,
        source_scratch=source.checkpoint.scratch,
        format=contents.format,
        matrices=tuple(matrices),
        card=room_left,
        too_large=contents.too_large,
        notes=(*contents.notes, *left_out),
        details=left_out,
    )


def _left_out(dropped: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """{a sentence for each reason why tensors are left out: the tensors}."""
    reasons: dict[str, list[str]] = {}
    for name, why in dropped.items():
        reasons.setdefault(why, []).append(name)
    return {
        f"{names[0]}{f' and {len(names) - 1:,} more' if len(names) > 1 else ''}: left out, {why}": tuple(names)
        for why, names in reasons.items()
    }


def _lay_out(
    groups: Sequence[Group], shards: Sequence[range], qtype: str
) -> tuple[list[OutputFile], list[TensorPlan], list[MatrixPlan]]:
    """Files of weights (and their index), the place of every tensor, and the matrices that the fields make up."""
    files: list[OutputFile] = []
    tensors: list[TensorPlan] = []
    matrices: list[MatrixPlan] = []
    weight_map: dict[str, str] = {}
    for number, (file, members) in enumerate(zip(shard_names(len(shards)), shards, strict=True)):
        specs = [tensor.spec for index in members for tensor in groups[index].tensors]
        layout = layout_safetensors(specs, _METADATA)
        files.append(OutputFile(file, layout.size, layout.header))
        for index in members:
            group, first = groups[index], len(tensors)
            for tensor in group.tensors:
                spec = tensor.spec
                weight_map[spec.name] = file
                place = layout.offsets[spec.name]
                tensors.append(TensorPlan(tensor.output, tensor.qtype, number, place, spec.nbytes))
            if group.module is not None:
                fields = tuple(range(first, len(tensors)))
                module = group.module
                grid = group.qtype or qtype
                matrices.append(MatrixPlan(module.name, module.weight, grid, fields, module.seen, group.cache))
    if len(shards) > 1:
        data = index_bytes(weight_map, sum(group.nbytes for group in groups))
        files.append(_file("model.safetensors.index.json", data))
    return files, tensors, matrices


def _file(name: str, data: bytes) -> OutputFile:
    return OutputFile(name, len(data), data)


def _other_files(source: Source, contents: Contents, warnings: list[str]) -> list[OutputFile]:
    """config.json, what is copied, and the model card; what could not be copied is added to ``warnings``."""
    checkpoint = source.checkpoint
    beside, front = _beside(source, contents.include, warnings)
    config = contents.config
    if not isinstance(config, bytes):
        found = _config_of_files(source, config, contents, warnings)
        config = json.dumps(found, indent=2, ensure_ascii=False).encode() + b"\n"
    text = card(
        contents.about,
        name=contents.name,
        source=checkpoint.name,
        revision=checkpoint.revision,
        front=front,
        measured=room() if contents.measured else None,
        judged=verdict_room() if contents.judged else None,
    )
    return [
        _file("config.json", config),
        *beside,
        _file("README.md", text.encode()),
    ]


def _beside(source: Source, include: Sequence[str], warnings: list[str]) -> tuple[list[OutputFile], Mapping[str, Any]]:
    """The small files, copied, or made of what a GGUF file says; and what the source's card says of itself."""
    checkpoint = source.checkpoint
    if checkpoint.metadata is not None:
        if include:
            raise UsageError(
                "--include copies files of a model directory, and this model is a GGUF file",
                file=checkpoint.config_file,
                found=", ".join(include),
                remedy="leave the option out, and copy them yourself",
            )
        made = restored(source)
        warnings += made.warnings
        return [_file(name, data) for name, data in made.files], made.front
    copied, problems = small_files(checkpoint.directory, include)
    warnings += problems
    front = read_card(checkpoint.directory, warnings.append)
    return [OutputFile(name, file.size, b"", file) for name, file in copied], front


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what it says of the source's own quantization (FP8), and nothing else changed but for the
    rotary divisors of a GGUF file, which follow from the other parameters."""
    found = {key: value for key, value in config.items() if key not in _QUANTIZATION}
    rotary = found.get("rope_parameters")
    if isinstance(rotary, dict) and DIVISORS in rotary:
        found["rope_parameters"] = {key: value for key, value in rotary.items() if key != DIVISORS}
    text = found.get("text_config")
    if isinstance(text, dict):
        found["text_config"] = {key: value for key, value in text.items() if key not in _QUANTIZATION}
    return found


def _config_of_files(
    source: Source, said: Mapping[str, Any], contents: Contents, warnings: list[str]
) -> dict[str, Any]:
    """The configuration ``said`` as the files are: a head that they hold is not called tied, as runtimes would then not
    read it. ``warnings`` are told where that changes what some of them compute.

    Where all runtimes tie the head of a family, a copy of the embedding in its place changes nothing.
    """
    config, architecture = dict(said), source.architecture
    stored = (tensor.output.name for group in contents.groups for tensor in group.tensors)
    head = architecture.head_of(stored) if architecture.hyper.tied else None
    copied = head in source.tensors.left_out
    if head is None or (copied and not architecture.family.output):
        return config
    config[_TIED] = False
    text = config.get("text_config")
    if isinstance(text, dict) and (architecture.family.nested or _TIED in text):
        config["text_config"] = text | {_TIED: False}
    if not copied:
        warnings.append(
            f"the source's config.json ties the head to the embedding, but {head} has values of its own: the "
            f"artifact's says {_TIED} false, so that every runtime reads them"
        )
    return config


def _identity(source: Source, contents: Contents, files: Sequence[OutputFile]) -> dict[str, Any]:
    headers = hashlib.sha256()
    for file in files:
        headers.update(file.name.encode() + b"\0" + file.known_bytes.to_bytes(8, "little"))
        for _, piece in file.known():
            headers.update(piece)
    return {
        "source": source.checkpoint.name,
        "source_revision": source.checkpoint.revision,
        "source_files": [[fact.name, fact.size, fact.header_sha256] for fact in source.checkpoint.fingerprint()],
        **({"source_kind": source.checkpoint.kind} if source.checkpoint.kind else {}),
        "format": contents.format,
        "level": contents.label,
        "version": llm_quantize.__version__,
        **contents.identity,
        "output_shard_size": contents.shard_size,
        "layout_sha256": headers.hexdigest(),
    }
