"""The plan of a model directory that Transformers and vLLM load: every byte of it, from headers alone.

    config.json                       the source's, with quantization_config
    model.safetensors                 or model-0000i-of-0000n.safetensors and model.safetensors.index.json
    tokenizer files, generation_config.json, chat template, licence: byte for byte
    README.md                         the model card
    manifest.json                     (written at the end of the run)

Packed modules become the fields of their format; every other tensor of the checkpoint, whatever GGUF would do with
it, is kept in the type it is stored in (FP8 as BF16 and without its scales, F64 as F32).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import llm_quantize
from llm_quantize.architectures.base import OutputTensor, Piece
from llm_quantize.errors import UsageError
from llm_quantize.formats.base import (
    SAFETENSORS_TYPES,
    Importance,
    Packed,
    Scheme,
    SchemeOptions,
    Store,
    scheme_of,
)
from llm_quantize.formats.card import CardFacts, card, room, transformers_caution
from llm_quantize.formats.gguf.metadata import read_card
from llm_quantize.formats.modules import Module, Selection, coverage, select
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
from llm_quantize.models.base import itemsize
from llm_quantize.plan import ArtifactPlan, CardPlan, MatrixPlan, TensorPlan
from llm_quantize.qtypes.integer import WHOLE_ROW

if TYPE_CHECKING:
    from llm_quantize.models.opening import Source
    from llm_quantize.options import Options

_KEPT = {"BF16": "bf16", "F16": "f16", "F32": "f32", "F64": "f32", "F8_E4M3": "bf16"}
_WORDS = {"bf16": "BF16", "f16": "F16", "f32": "F32"}
_METADATA = {"format": "pt"}
_DEFAULT_GROUP = 128
_SPLIT_BY_COLUMNS = ("o_proj", "down_proj", "w2", "dense", "fc2", "c_proj", "out_proj", "dense_4h_to_h")


@dataclass(frozen=True)
class _Stored:
    """A tensor of the artifact before it has a place: ``qtype`` as in TensorPlan."""

    output: OutputTensor
    qtype: str

    @property
    def spec(self) -> TensorSpec:
        word = _WORDS.get(self.qtype) or SAFETENSORS_TYPES[self.qtype]
        return TensorSpec(self.output.name, word, self.output.shape)


@dataclass(frozen=True)
class _Group:
    """Tensors that stand in one file: the fields of ``module``, or one kept tensor (None)."""

    tensors: tuple[_Stored, ...]
    module: Module | None

    @property
    def nbytes(self) -> int:
        return sum(tensor.spec.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class DirectoryOptions:
    """What a user may choose beside format and level; None leaves it to them.

    ``ignore``: regular expressions of modules that stay as they are. ``shard_size``: bytes of data of a file.
    ``desc_act`` changes no byte (see gptq.py). ``identity``: whatever else decides the codes, JSON-ready; ``method``:
    the same as words for the model card. ``measured``: whether the run will tell what was lost, for the card.
    """

    group_size: int | None = None
    symmetric: bool | None = None
    desc_act: bool = False
    ignore: tuple[str, ...] = ()
    shard_size: int = 5_000_000_000
    identity: Mapping[str, Any] = field(default_factory=dict)
    method: Mapping[str, Any] = field(default_factory=dict)
    measured: bool = False


@dataclass(frozen=True)
class Directory:
    """A directory format as a row of the table: ``form`` says what its packed matrices look like."""

    form: Packed
    method: str = "gptq"
    weighs: bool = False

    @property
    def name(self) -> str:
        return self.form.NAME

    @property
    def levels(self) -> Sequence[str]:
        return self.form.LEVELS

    @property
    def example(self) -> str:
        return self.form.EXAMPLE

    @property
    def transform(self) -> str:
        return self.form.TRANSFORM

    def plan(
        self, source: Source, levels: Sequence[str], stem: str, importance: Importance | None, options: Options
    ) -> list[ArtifactPlan]:
        """See ``Format``. Raises UsageError (no such level, sizes that the grid or the words do not divide, nothing
        left to pack, a bad --ignore, options of GGUF), UnsupportedError (matrices stored (in, out); experts without
        names of their own)."""
        if options.overrides.given or options.split_max_size is not None:
            raise UsageError(
                f"types of single tensors, recipes and --split-max-size belong to gguf, not to {self.name}",
                remedy="use --group-size, --sym or --asym, --ignore and --output-shard-size",
            )
        found = [self._plan(source, level, stem, importance, options) for level in levels]
        return list({plan.name: plan for plan in found}.values())

    def needs_importance(self, source: Source, level: str, options: Options) -> bool:
        """See ``Format``: a directory is rounded without any."""
        return False

    def store(self, plan: ArtifactPlan) -> Store:
        """See ``Format``."""
        from llm_quantize.formats.directory_store import DirectoryStore

        return DirectoryStore(self.form, scheme_of(plan))

    def _plan(
        self, source: Source, level: str, stem: str, importance: Importance | None, options: Options
    ) -> ArtifactPlan:
        method = options.method
        identity = {**method.identity(self.name), "nonfinite": options.nonfinite}
        if importance is not None:
            identity["text"] = importance.sha256
        chosen = DirectoryOptions(
            group_size=method.group_size,
            symmetric=method.symmetric,
            desc_act=method.desc_act,
            ignore=method.ignore,
            shard_size=method.shard_size,
            identity=identity,
            method=method.words(self.name, () if importance is None else importance.datasets),
            measured=options.statistics is None and method.stages(self.name).correction > 0,
        )
        plan = plan_directory(source, self.form, level, name=stem, options=chosen)
        floats = method.transform_of(self.name).changes(source)
        held = frozenset(index for index, tensor in enumerate(plan.tensors) if tensor.name in floats)
        return replace(plan, held=held)


def plan_directory(
    source: Source, form: Packed, level: str, *, name: str, options: DirectoryOptions | None = None
) -> ArtifactPlan:
    """The artifact NAME-LABEL (LABEL: GPTQ-4bit, AWQ-4bit, W4A16, ...) of ``source``. Reads no weights.

    Raises UsageError (no such level, sizes that the grid or the words do not divide, nothing left to pack, a bad
    --ignore), UnsupportedError (matrices stored (in, out); experts without names of their own).
    """
    options = options or DirectoryOptions()
    if options.shard_size < 1:
        raise UsageError("--output-shard-size must be positive", found=options.shard_size)
    found = select(source, options.ignore)
    if not found.packed:
        raise UsageError(
            "nothing is left to pack", found=f"{len(found.ignored)} modules ignored", remedy="see --ignore"
        )
    choice = SchemeOptions(options.group_size, options.symmetric, _scale_type(source, found))
    scheme = form.scheme(level, choice)
    label = _label(form, scheme)
    groups = _groups(source, found, form, scheme)
    shards = split_shards([group.nbytes for group in groups], options.shard_size)
    files, tensors, matrices = _lay_out(groups, shards, scheme)
    warnings = [*found.warnings, *_warnings(form, scheme, found, options)]
    caution = transformers_caution(form) if source.architecture.hyper.n_expert else None
    warnings += [caution] if caution else []
    files += _other_files(source, found, form, scheme, f"{name}-{label}", groups, options, warnings)
    room_left = None
    if options.measured:  # its figures are no part of what the artifact is
        room_left = CardPlan(len(files) - 1, files[-1].header)
        files[-1] = OutputFile(files[-1].name, files[-1].size, b"")
    identity = _identity(source, scheme, label, options, files)
    return ArtifactPlan(
        level=label,
        name=f"{name}-{label}",
        files=tuple(files),
        tensors=tuple(tensors),
        weights=_weights(source, found),
        identity=identity,
        warnings=tuple(warnings),
        source_itemsize=max(itemsize(info.dtype) for info in source.checkpoint.tensors.values()),
        format=form.NAME,
        matrices=tuple(matrices),
        card=room_left,
    )


def _scale_type(source: Source, found: Selection) -> str:
    """How scales are stored where the format leaves that to the checkpoint: as its weights, in 16 bit."""
    stored = [source.checkpoint.tensors[name].dtype for name in found.packed]
    return "bfloat16" if stored.count("BF16") + stored.count("F8_E4M3") > len(stored) / 2 else "float16"


def _label(form: Packed, scheme: Scheme) -> str:
    """The end of the artifact's name: the level, and what differs from its default."""
    group = scheme.qtype.group_size
    label = form.LABEL.format(level=scheme.level)
    if group != _DEFAULT_GROUP:
        label += "-channel" if group == WHOLE_ROW else f"-g{group}"
    if form.SYMMETRIC is not None and scheme.qtype.symmetric != form.SYMMETRIC:
        label += "-sym" if scheme.qtype.symmetric else "-asym"
    return label


def _groups(source: Source, found: Selection, form: Packed, scheme: Scheme) -> list[_Group]:
    """What stands in the files, in the order of the checkpoint."""
    kept = {info.name for info in found.kept}
    groups = []
    for name, info in source.checkpoint.tensors.items():
        for module in found.packed.get(name, ()):
            rows, columns = module.weight.shape
            fields = form.fields(scheme, rows, columns, name=module.name)
            stored = [_Stored(OutputTensor(f"{module.name}.{f.suffix}", f.shape), f.dtype) for f in fields]
            groups.append(_Group(tuple(stored), module))
        if name in kept:
            whole = OutputTensor(name, info.shape, (Piece(name),))
            groups.append(_Group((_Stored(whole, _KEPT.get(info.dtype, "f32")),), None))
    return groups


def _lay_out(
    groups: Sequence[_Group], shards: Sequence[range], scheme: Scheme
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
                matrices.append(MatrixPlan(group.module.name, group.module.weight, scheme.qtype.name, fields))
    if len(shards) > 1:
        data = index_bytes(weight_map, sum(group.nbytes for group in groups))
        files.append(_small("model.safetensors.index.json", data))
    return files, tensors, matrices


def _small(name: str, data: bytes) -> OutputFile:
    return OutputFile(name, len(data), data)


def _other_files(
    source: Source,
    found: Selection,
    form: Packed,
    scheme: Scheme,
    name: str,
    groups: Sequence[_Group],
    options: DirectoryOptions,
    warnings: list[str],
) -> list[OutputFile]:
    """config.json, what is copied, and the model card; what could not be copied is added to ``warnings``."""
    checkpoint = source.checkpoint
    copied, problems = small_files(checkpoint.directory)
    warnings += problems
    facts = CardFacts(
        name=name,
        source=checkpoint.name,
        revision=checkpoint.revision,
        card=read_card(checkpoint.directory, warnings.append),
        form=form,
        scheme=scheme,
        matrices=len(found.modules),
        packed=sum(group.nbytes for group in groups if group.module is not None),
        kept=sum(group.nbytes for group in groups if group.module is None),
        weights=_weights(source, found),
        version=llm_quantize.__version__,
        method=options.method,
        ignored=tuple(found.ignored),
        tensor_parallel=_tensor_parallel(scheme, found.modules),
        experts=source.architecture.hyper.n_expert > 0,
    )
    config = _config(checkpoint.config, form.config(scheme, coverage(source, found)))
    return [
        _small("config.json", config),
        *(_small(file, data) for file, data in copied),
        _small("README.md", card(facts, room() if options.measured else None).encode()),
    ]


def _config(source: Mapping[str, Any], quantization: Mapping[str, Any]) -> bytes:
    """The source's configuration with ``quantization`` in the place of its own (FP8), and nothing else changed."""
    config = {key: value for key, value in source.items() if key not in ("quantization_config", "compression_config")}
    text = config.get("text_config")
    if isinstance(text, dict):
        own = ("quantization_config", "compression_config")
        config["text_config"] = {key: value for key, value in text.items() if key not in own}
    config["quantization_config"] = dict(quantization)
    return json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"


def _weights(source: Source, found: Selection) -> int:
    """Weights of the source that the artifact holds, in whatever form."""
    packed = (source.checkpoint.tensors[name] for name in found.packed)
    infos: list[TensorInfo] = [*packed, *found.kept]
    return sum(info.elements for info in infos)


def _identity(
    source: Source, scheme: Scheme, label: str, options: DirectoryOptions, files: Sequence[OutputFile]
) -> dict[str, Any]:
    headers = hashlib.sha256()
    for file in files:
        headers.update(file.name.encode() + b"\0" + len(file.header).to_bytes(8, "little") + file.header)
    return {
        "source": source.checkpoint.name,
        "source_revision": source.checkpoint.revision,
        "source_files": [[fact.name, fact.size, fact.header_sha256] for fact in source.checkpoint.fingerprint()],
        **({"source_kind": source.checkpoint.kind} if source.checkpoint.kind else {}),
        "format": scheme.format,
        "level": label,
        "version": llm_quantize.__version__,
        "scheme": scheme.to_dict(),
        "ignore": list(options.ignore),
        "output_shard_size": options.shard_size,
        **options.identity,
        "layout_sha256": headers.hexdigest(),
    }


def _tensor_parallel(scheme: Scheme, modules: Sequence[Module]) -> int:
    """Over how many devices, at most 8, vLLM can split the matrices: each gets whole groups of the columns of some,
    and at least 64 rows' multiples of the others."""
    for devices in (8, 4, 2):
        if all(_splits(scheme, module, devices) for module in modules):
            return devices
    return 1


def _splits(scheme: Scheme, module: Module, devices: int) -> bool:
    rows, columns = module.weight.shape
    if module.name.rpartition(".")[2] in _SPLIT_BY_COLUMNS:
        step = 32 if scheme.qtype.group_size == WHOLE_ROW else max(32, scheme.qtype.group_size)
        return columns % (devices * step) == 0
    return rows % (devices * 32) == 0


def _warnings(form: Packed, scheme: Scheme, found: Selection, options: DirectoryOptions) -> list[str]:
    """What is legal but may surprise."""
    warnings = [f"{name} is left out: {reason}" for name, reason in found.dropped.items()]
    if options.desc_act:
        warnings.append(
            "--desc-act changes nothing: columns are visited in the order of their activations in any case, on grids "
            "fixed before, so the file needs no permutation and says desc_act false"
        )
    refusal = form.vllm_refusal(scheme)
    if refusal is not None:
        return [*warnings, f"vLLM will not load this artifact: {refusal}"]
    modules = found.modules
    for places, step in (("CPU", (32, 32)), ("CUDA (Marlin)", (64, 128))):
        odd = [m for m in modules if m.weight.shape[0] % step[0] or m.weight.shape[1] % step[1]]
        if odd:
            rows, columns = odd[0].weight.shape
            warnings.append(
                f"{len(odd)} of {len(modules)} matrices do not have the sizes that vLLM's {places} kernels want "
                f"(rows a multiple of {step[0]}, columns of {step[1]}), the first {odd[0].name} ({rows}, {columns})"
            )
            break
    if _tensor_parallel(scheme, modules) == 1:
        odd = [module for module in modules if not _splits(scheme, module, 2)]
        warnings.append(f"vLLM cannot split this artifact over several devices, because of {odd[0].name}")
    return warnings
