"""GGUF as a row of the table of formats: from levels to exact plans. What llama.cpp cannot run is refused here."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf.constants import Keys

import llm_quantize
from llm_quantize.architectures.base import OutputTensor
from llm_quantize.architectures.rows import matrix_shape, weights_of
from llm_quantize.errors import MissingExtraError, UsageError
from llm_quantize.formats.base import Importance, Store
from llm_quantize.formats.gguf import held
from llm_quantize.formats.gguf import metadata as gguf_format
from llm_quantize.formats.gguf.describe import describe, warnings_of
from llm_quantize.formats.gguf.importance import gaps_digest, silent, uncovered
from llm_quantize.formats.gguf.levels import (
    BEST,
    FED,
    LEVELS,
    TRAINED,
    Assignment,
    TensorShape,
    assign,
    check_recipe,
    is_quantizable,
    needs_importance,
    parse_level,
    parse_qtype,
    unlike,
)
from llm_quantize.formats.gguf.scales import beside
from llm_quantize.formats.idle_options import OF_GGUF, refuse_idle
from llm_quantize.formats.keeping import Kept, holding_of
from llm_quantize.io.artifact_files import first_file
from llm_quantize.io.gguf_file import MetaValue, layout_gguf, read_gguf
from llm_quantize.io.output import OutputFile
from llm_quantize.measures.amounts import counted
from llm_quantize.plan import ArtifactPlan, MatrixPlan, Substitution, TensorPlan, substituted_text
from llm_quantize.qtypes import QTYPES

if TYPE_CHECKING:
    from llm_quantize.models.opening import Source
    from llm_quantize.options import Options

NAME = "gguf"
FLOAT_LEVELS = ("F32", "F16", "BF16")
TOO_LARGE_FLOAT = "use BF16 or F32, which hold larger magnitudes: -q BF16"
TOO_LARGE = "keep this tensor in BF16, from the start: --tensor-type '^TENSOR$=bf16' --overwrite"

_FLOATS_AS_STORED = "Q8_0"  # a level whose unquantized tensors are what they are in the source
_TAKES = OF_GGUF | {"--method", "--recipe"}


class Gguf:
    """The row."""

    name = NAME
    levels: Sequence[str] = tuple(LEVELS)
    example = "Q4_K_M"
    default: str | None = None
    method = "rtn"
    transform = "none"
    weighs = True
    act_order = False

    def plan(
        self, source: Source, levels: Sequence[str], stem: str, importance: Importance | None, options: Options
    ) -> list[ArtifactPlan]:
        """See ``Format``. Raises UnsupportedError where llama.cpp cannot run the model or read its tokenizer."""
        describe(source)
        refuse_idle(
            NAME, options, _TAKES, "GGUF's types fix their groups; --tensor-type keeps single tensors in another type"
        )
        _refuse_modelfile(options)
        recipe = options.overrides.recipe
        if recipe is not None:
            recipe.check_use(source, NAME, levels, self.recipe_level)
            check_recipe(recipe, tensor_shapes(source, recipe.level))
            if recipe.origin is not None:
                recipe.origin.refuse_unlike(*_shape_of(source))
        names = list(dict.fromkeys(parse_level(level).name for level in levels))
        return [_plan_level(source, level, stem, importance, options) for level in names]

    def needs_importance(self, source: Source, level: str, options: Options) -> bool:
        """See ``Format``."""
        hyper, arch = source.architecture.hyper, source.architecture.gguf_name
        shapes = tensor_shapes(source, level)
        return bool(needs_importance(level, shapes, hyper, arch=arch, overrides=options.overrides))

    def calibrated(self, level: str) -> bool:
        """See ``Format``."""
        return True

    def check_text(self, levels: Sequence[str], options: Options) -> None:
        """See ``Format``: every level can be made without text."""

    def recipe_level(self, text: str) -> str:
        """See ``Format``."""
        return parse_level(text).name

    def recipe_type(self, text: str) -> str:
        """See ``Format``."""
        return parse_qtype(text)

    def keeping(self, source: Source, level: str | None, options: Options) -> Kept | None:
        """See ``Format``: the level of its floats, or a recipe of the types that hold each tensor; a level that is
        named is taken as it is."""
        if level is not None or options.overrides.given:
            return None
        shapes = tensor_shapes(source, _FLOATS_AS_STORED)
        floats = held.float_level(source)
        if floats is not None:
            return Kept(floats, options, sum(weights_of(output.shape) for output in source.tensors.outputs))
        found = held.recipe_of(source, {shape.name: shape.unquantized for shape in shapes})
        if found is None:
            return None
        recipe, weights = found
        return Kept(recipe.level, replace(options, overrides=replace(options.overrides, recipe=recipe)), weights)

    def labels(self, source: Source) -> Collection[str]:
        """See ``Format``: a GGUF file has a name without its level already."""
        return ()

    def store(self, plan: ArtifactPlan) -> Store:
        """See ``Format``."""
        from llm_quantize.formats.gguf.store import GgufStore

        return GgufStore()

    def texts_of(self, path: Path) -> Sequence[str] | None:
        """See ``Format``. Raises what reading the file raises."""
        entry = read_gguf(first_file(path)).metadata.get(gguf_format.TEXTS)
        return str(entry.value).split(gguf_format.TEXTS_JOINED) if entry is not None else None


def _refuse_modelfile(options: Options) -> None:
    """Raise where a Modelfile is asked for and cannot be: UsageError for files in parts, of which Ollama takes none,
    MissingExtraError without Jinja, which says what the template does."""
    if options.modelfile and options.split_max_size is not None:
        raise UsageError(
            "Ollama takes a model in one file",
            found="--export-ollama with --split-max-size",
            remedy="leave one of them out",
        )
    if options.modelfile and find_spec("jinja2") is None:
        raise MissingExtraError("rendering this model's chat template", "llamacpp")


def _plan_level(source: Source, name: str, stem: str, importance: Importance | None, options: Options) -> ArtifactPlan:
    outputs = source.tensors.outputs
    assigned = assign(
        name,
        tensor_shapes(source, name),
        source.architecture.hyper,
        arch=source.architecture.gguf_name,
        importance_names=None if importance is None else importance.names,
        overrides=options.overrides,
    )
    assigned, at_most = _settled(source, assigned, importance, options)
    recipe = options.overrides.recipe
    called = name if recipe is None else recipe.name
    rounded = [
        (output, qtype)
        for output, qtype in zip(outputs, assigned.qtypes, strict=True)
        if not (options.method.method_of(NAME).reads_text and _solved(output, qtype))
    ]
    quiet = {} if importance is None else silent(importance, rounded)
    keeps = options.method.method_of(NAME).keeps
    stored, qtypes = held.with_scales(source, outputs, assigned.qtypes) if keeps else (outputs, assigned.qtypes)
    plan = plan_artifact(
        level=called,
        name=f"{stem}-{called}",
        outputs=stored,
        qtypes=qtypes,
        metadata=_metadata(source, name, called, assigned.qtypes, importance, options),
        source_identity=_source_identity(source),
        options=_chosen(importance, options) | gaps_digest(quiet),
        split_max_bytes=options.split_max_size,
        source_itemsize=source.itemsize,
        warnings=[
            *warnings_of(source),
            *assigned.warnings,
            *_advice(source, name, assigned.qtypes, importance, options),
        ],
    )
    matrices = tuple(_matrices(plan)) if options.method.method_of(NAME).reads_text else ()
    if keeps:
        matrices = tuple(
            matrix for matrix in _matrices(plan, blocks=False) if holding_of(source, matrix.weight, matrix.qtype)
        )
    too_large = TOO_LARGE_FLOAT if name in FLOAT_LEVELS else TOO_LARGE
    scratch = source.checkpoint.scratch
    notes = (*(() if recipe is None else recipe.notes()), *at_most)
    plan = replace(plan, matrices=matrices, silent=quiet, too_large=too_large, source_scratch=scratch, notes=notes)
    if recipe is not None:
        told = unlike(recipe, tensor_shapes(source, name))
        plan = replace(plan, warnings=(*plan.warnings, *told), details={**plan.details, **told})
    return _with_silence(_with_substitutions(plan, assigned.substituted))


def _shape_of(source: Source) -> tuple[str, int]:
    """Architecture and number of blocks, as a GGUF file says them."""
    arch = source.architecture.gguf_name
    return arch, int(describe(source)[Keys.LLM.BLOCK_COUNT.format(arch=arch)].value)


def _settled(
    source: Source, assigned: Assignment, importance: Importance | None, options: Options
) -> tuple[Assignment, tuple[str, ...]]:
    """``assigned`` with the fallbacks that the user asked for, and a note where they cannot be told yet."""
    if options.overrides.fallback != BEST or not assigned.substituted:
        return assigned, ()
    from llm_quantize.formats.gguf import fallback

    if not fallback.is_known(source, importance):
        count = counted(len(assigned.substituted), "tensor")
        return assigned, (
            f"--fallback best: the types of {count} are chosen when weights and importance are at hand; the file is at "
            "most as large as this",
        )
    found = fallback.best(source, source.tensors.outputs, assigned.substituted, importance)
    taken = {one.tensor: one.taken for one in found}
    names = (output.name for output in source.tensors.outputs)
    qtypes = [taken.get(name, qtype) for name, qtype in zip(names, assigned.qtypes, strict=True)]
    return replace(assigned, qtypes=qtypes, substituted=found), ()


def _with_silence(plan: ArtifactPlan) -> ArtifactPlan:
    """``plan``, which says in one sentence for each kind of which tensors the importance says nothing."""
    told = {f"{counted(len(names), 'tensor')}: {text} (-v lists them)": names for text, names in plan.silent.items()}
    return replace(plan, warnings=(*plan.warnings, *told), details={**plan.details, **told})


def _with_substitutions(plan: ArtifactPlan, substituted: Sequence[Substitution]) -> ArtifactPlan:
    """``plan``, which says in one sentence which of its tensors have not the type of the level."""
    if not substituted:
        return plan
    quantizable = (is_quantizable(TensorShape(tensor.name, tensor.output.shape)) for tensor in plan.tensors)
    text = substituted_text(substituted, sum(quantizable), plan)
    lines = tuple(one.line for one in substituted)
    return replace(
        plan,
        warnings=(*plan.warnings, text),
        details={**plan.details, text: lines},
        substituted=tuple(substituted),
    )


def _metadata(
    source: Source,
    name: str,
    called: str,
    qtypes: Sequence[str],
    importance: Importance | None,
    options: Options,
) -> dict[str, MetaValue]:
    """What stands at the front of the file: of the model, of its level (``called``: the recipe's name, if there is
    one), of the importance and of the method."""
    level, method = parse_level(name), options.method.method_of(NAME)
    metadata = dict(describe(source))
    metadata |= gguf_format.recipe_metadata(
        file_type=held.file_type(level, source.tensors.outputs, qtypes) if method.keeps else level.file_type,
        quantized=name not in FLOAT_LEVELS,
        level=called,
        version=llm_quantize.__version__,
    )
    if source.checkpoint.adapters:
        merged = "; ".join(merge.words for merge in source.checkpoint.adapters)
        metadata[f"{gguf_format.PROVENANCE}.adapters"] = gguf_format.text(merged)
    origin = None if options.overrides.recipe is None else options.overrides.recipe.origin
    if origin is not None:
        metadata |= gguf_format.origin_metadata(origin.file, origin.sha256)
    if importance is not None:
        metadata |= gguf_format.importance_metadata(
            file=importance.file,
            datasets=importance.datasets,
            entries=len(importance.names),
            chunks=importance.chunks,
        )
    if method.reads_text:
        metadata[f"{gguf_format.PROVENANCE}.method"] = gguf_format.text(method.name)
    return metadata


def _source_identity(source: Source) -> dict[str, Any]:
    """Which model it is, for the artifact's identity."""
    checkpoint = source.checkpoint
    return {
        "source": checkpoint.name,
        "source_revision": checkpoint.revision,
        "source_metadata_sha256": hashlib.sha256(layout_gguf(describe(source), []).header).hexdigest(),
        "source_files": [[fact.name, fact.size, fact.header_sha256] for fact in checkpoint.fingerprint()],
        **({"source_kind": checkpoint.kind} if checkpoint.kind else {}),
        **({"adapters": [merge.facts for merge in checkpoint.adapters]} if checkpoint.adapters else {}),
    }


def _chosen(importance: Importance | None, options: Options) -> dict[str, object]:
    """What the user chose that decides the bytes, for the artifact's identity."""
    overrides = options.overrides
    recipe = {} if overrides.recipe is None else {"recipe": overrides.recipe.sha256}
    method = options.method.identity(NAME) if options.method.method_of(NAME).reads_text else {}
    return {
        "version": llm_quantize.__version__,
        "imatrix": None if importance is None else importance.sha256,
        "output_type": overrides.output_type,
        "embedding_type": overrides.embedding_type,
        "tensor_types": [list(pair) for pair in overrides.tensor_types],
        "pure": overrides.pure,
        "split_max_size": options.split_max_size,
        "nonfinite": options.nonfinite,
        **({"fallback": overrides.fallback} if overrides.fallback == BEST else {}),
        **recipe,
        **method,
    }


def _advice(
    source: Source, level: str, qtypes: Sequence[str], importance: Importance | None, options: Options
) -> list[str]:
    """What is legal but probably not what the user thinks it is."""
    outputs = source.tensors.outputs
    advice = []
    if level == "MXFP4_MOE" and "mxfp4" not in qtypes:
        advice.append("MXFP4_MOE: this model has no expert tensors, so nothing is stored as mxfp4; this is Q8_0")
    if level in TRAINED:
        fed = level in FED and options.method.method_of(NAME).reads_text
        loses = "much, though errors are fed back" if fed else "nearly everything"
        advice.append(f"{level} is for models trained with {TRAINED[level]}; any other model loses {loses}")
    if "nvfp4" in qtypes and not options.method.method_of(NAME).keeps:
        advice.append(
            f"nvfp4 is written without a scale for whole tensors ({qtypes.count('nvfp4')} here): groups of 16 whose "
            "largest weight is below 0.006 become zeros, and small ones are coarse"
        )
    lost = held.ignored(source, outputs) if options.method.method_of(NAME).keeps else []
    if lost:
        advice.append(
            f"llama.cpp ignores the scales beside the feed-forward matrices of {source.architecture.gguf_name}: "
            f"{counted(len(lost), 'tensor')} in NVFP4 here cannot stay so"
        )
    limit = options.split_max_size
    if limit is not None:
        size, largest = max(
            (QTYPES[qtype].row_bytes(output.shape[-1]) * matrix_shape(output.shape)[0], output.name)
            for output, qtype in zip(outputs, qtypes, strict=True)
        )
        if size > limit:
            advice.append(f"--split-max-size {limit}: {largest} alone takes {size} bytes; its file is larger")
    if importance is not None:
        advice += uncovered(importance, outputs, qtypes)
    return advice


def _matrices(plan: ArtifactPlan, *, blocks: bool = True) -> tuple[MatrixPlan, ...]:
    """The tensors of a GGUF artifact that a method quantizes as a whole: the quantized matrices of the blocks, or with
    ``blocks`` False those outside of them too."""
    scales = {tensor.name: index for index, tensor in enumerate(plan.tensors) if not tensor.output.pieces}
    return tuple(
        MatrixPlan(
            tensor.name,
            tensor.output,
            tensor.qtype,
            (index, *filter(None, [scales.get(beside(tensor.name))])),
        )
        for index, tensor in enumerate(plan.tensors)
        if _solved(tensor.output, tensor.qtype) or (not blocks and _is_packed(tensor))
    )


def _is_packed(tensor: TensorPlan) -> bool:
    """Whether a tensor is a matrix of codes."""
    return len(tensor.output.shape) > 1 and tensor.output.constant is None and QTYPES[tensor.qtype].block_size > 1


def _solved(output: OutputTensor, qtype: str) -> bool:
    """Whether a method that reads text quantizes this tensor as a whole."""
    return is_block_matrix(output) and QTYPES[qtype].block_size > 1


def is_block_matrix(output: OutputTensor) -> bool:
    """Whether an output is a matrix, or a stack of them, of a block: what calibration sees the inputs of."""
    named = re.fullmatch(r"blk\..*\.weight", output.name) and not output.name.endswith("_norm.weight")
    return bool(named) and len(output.shape) > 1 and output.constant is None


def tensor_shapes(source: Source, level: str) -> list[TensorShape]:
    """Every output tensor as the recipe of ``level`` sees it."""
    outputs = source.tensors.outputs
    return [TensorShape(output.name, output.shape, _unquantized(source, output, level)) for output in outputs]


def _unquantized(source: Source, output: OutputTensor, level: str) -> str:
    """The qtype of a tensor that the recipe leaves alone: what the runtime wants in F32, all else at 16 bit."""
    if output.float32 or output.constant is not None or len(output.shape) < 2 or level == "F32":
        return "f32"
    if level in ("F16", "BF16"):
        return level.lower()
    stored = {str(source.checkpoint.stored_dtype(piece.source)) for piece in output.pieces}
    return {"float16": "f16", "uint16": "bf16"}.get(stored.pop() if len(stored) == 1 else "", "f32")


def plan_artifact(
    *,
    level: str,
    name: str,
    outputs: Sequence[OutputTensor],
    qtypes: Sequence[str],
    metadata: Mapping[str, MetaValue],
    source_identity: Mapping[str, Any],
    options: Mapping[str, Any],
    split_max_bytes: int | None,
    source_itemsize: int,
    warnings: Sequence[str] = (),
) -> ArtifactPlan:
    """Lay out one GGUF artifact. ``qtypes`` goes with ``outputs``; ``name`` is the file name without ``.gguf``;
    ``source_itemsize`` is the most bytes that the source stores a weight in."""
    triples = [
        (output.name, output.shape or (1,), QTYPES[qtype].ggml_type)
        for output, qtype in zip(outputs, qtypes, strict=True)
    ]
    groups = gguf_format.split_tensors(triples, split_max_bytes)
    if len(groups) > 65_535:
        raise UsageError("--split-max-size makes more than 65535 files", found=len(groups), remedy="give a larger size")
    files: list[OutputFile] = []
    tensors: list[TensorPlan] = []
    for number, indices in enumerate(groups):
        keys = dict(metadata) if number == 0 else {}
        file_name = f"{name}.gguf"
        if len(groups) > 1:
            keys |= gguf_format.split_metadata(number, len(groups), len(outputs))
            file_name = f"{name}-{number + 1:05d}-of-{len(groups):05d}.gguf"
        layout = layout_gguf(keys, [triples[index] for index in indices])
        files.append(OutputFile(file_name, layout.size, layout.header))
        for index, entry in zip(indices, layout.tensors, strict=True):
            tensors.append(TensorPlan(outputs[index], qtypes[index], number, entry.offset, entry.nbytes))
    headers = hashlib.sha256()
    for file in files:
        headers.update(file.header)
    weights = sum(weights_of(output.shape) for output in outputs if output.pieces)
    return ArtifactPlan(
        level=level,
        name=name,
        files=tuple(files),
        tensors=tuple(tensors),
        weights=weights,
        identity={**source_identity, "level": level, **options, "layout_sha256": headers.hexdigest()},
        warnings=tuple(warnings),
        source_itemsize=source_itemsize,
        alike=True,
    )
