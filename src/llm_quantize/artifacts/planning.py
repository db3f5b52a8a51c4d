"""From an opened source and the user's options to exact plans: imatrix, recipe, metadata, layout."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import llm_quantize
from llm_quantize import memory
from llm_quantize.architectures.base import OutputTensor
from llm_quantize.architectures.rows import matrix_shape
from llm_quantize.architectures.scaling import changed_floats
from llm_quantize.artifacts.plan import ArtifactPlan, MatrixPlan, plan_artifact
from llm_quantize.artifacts.rounding import NONFINITE_POLICIES, Importance
from llm_quantize.blockwise.estimate import estimate, rounding_sizes
from llm_quantize.calibration.identity import model_digest
from llm_quantize.calibration.options import CalibrationOptions
from llm_quantize.calibration.statistics import collecting_sizes
from llm_quantize.errors import IntegrityError, UnsupportedError, UsageError
from llm_quantize.formats.gguf import metadata as gguf_format
from llm_quantize.formats.gguf.levels import Overrides, Recipe, TensorShape, assign, parse_level
from llm_quantize.io.gguf_file import layout_gguf
from llm_quantize.io.imatrix_file import Imatrix
from llm_quantize.io.safetensors_file import DTYPE_BITS
from llm_quantize.models.opening import Source
from llm_quantize.options import MethodOptions
from llm_quantize.qtypes import QTYPES
from llm_quantize.streams.sizes import from_headers

_EXAMPLES = {"gguf": "Q4_K_M", "gptq": "4bit", "awq": "4bit", "compressed-tensors": "W4A16"}
FORMATS = tuple(_EXAMPLES)
_SELDOM_COVERED = ("token_embd.weight", "output.weight")
FLOAT_LEVELS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Options:
    """What a user may set beside model and levels. Sizes in bytes.

    ``calibrate``: True calibrates, False never does, None does where a level needs importance and no file gives it.
    """

    threads: int | None = None
    max_ram: int | None = None
    overrides: Overrides = field(default_factory=Overrides)
    split_max_size: int | None = None
    imatrix: Path | None = None
    statistics: Path | None = None
    calibrate: bool | None = None
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    method: MethodOptions = field(default_factory=MethodOptions)
    nonfinite: str = "refuse"
    checkpoints: bool = True
    checkpoint_dir: Path | None = None
    overwrite: bool = False
    ignore_space: bool = False


def plan_source(
    source: Source,
    format: str,
    *,
    levels: Sequence[str],
    name: str | None,
    options: Options,
    imatrix: Imatrix | None,
) -> list[ArtifactPlan]:
    """``plan`` for an opened source and the importance that it will be quantized with."""
    if format not in FORMATS:
        known = format.lower() if format.lower() in _EXAMPLES else "gguf"
        raise UnsupportedError(
            f"this version does not write the format {format[:40]!r}",
            expected=", ".join(FORMATS),
            found=format[:40],
            remedy=f"write {known}, for example: llm-quantize quantize MODEL {known} -q {_EXAMPLES[known]}",
        )
    if options.nonfinite not in NONFINITE_POLICIES:
        raise UsageError("unknown --nonfinite policy", expected=NONFINITE_POLICIES, found=options.nonfinite)
    if not levels:
        raise UsageError("no level given", remedy=f"name one or more with -q, for example -q {_EXAMPLES[format]}")
    stem = _file_stem(name or source.checkpoint.name)
    if format != "gguf":
        found = [_plan_directory(source, format, level, stem, imatrix, options) for level in levels]
        return _named(list({plan.name: plan for plan in found}.values()), stem, name)
    _refuse_directory_options(options.method)
    importance_rows(source, imatrix)
    _check_recipe(source, levels, options.overrides.recipe)
    names = list(dict.fromkeys(parse_level(level).name for level in levels))
    plans = [_plan_level(source, level, stem, imatrix, options) for level in names]
    return _named(plans, stem, name)


def _named(plans: list[ArtifactPlan], stem: str, name: str | None) -> list[ArtifactPlan]:
    """``plans``, with a warning where the user's name could not be kept."""
    if name is not None and stem != name:
        plans[0] = replace(plans[0], warnings=(f"the output is called {stem}, not {name[:80]!r}", *plans[0].warnings))
    return plans


def _plan_directory(
    source: Source, format: str, level: str, stem: str, imatrix: Imatrix | None, options: Options
) -> ArtifactPlan:
    """A directory for Transformers and vLLM: its scheme from the level, its codes by the method."""
    from llm_quantize.formats.directory import DirectoryOptions, plan_directory

    method, overrides = options.method, options.overrides
    if overrides != Overrides() or options.split_max_size is not None:
        raise UsageError(
            f"types of single tensors, recipes and --split-max-size belong to gguf, not to {format}",
            remedy="use --group-size, --sym or --asym, --ignore and --output-shard-size",
        )
    identity = {**method.identity(format), "nonfinite": options.nonfinite}
    if imatrix is not None:
        identity["text"] = imatrix.sha256
    chosen = DirectoryOptions(
        group_size=method.group_size,
        symmetric=method.symmetric,
        desc_act=method.desc_act,
        ignore=method.ignore,
        shard_size=method.shard_size,
        identity=identity,
        method=method.words(format, () if imatrix is None else imatrix.datasets),
        measured=options.statistics is None and method.stages(format).correction > 0,
    )
    plan = plan_directory(source, format, level, name=stem, options=chosen)
    held = frozenset[int]()
    if method.transform_of(format) == "awq":
        floats = changed_floats(source)
        held = frozenset(index for index, tensor in enumerate(plan.tensors) if tensor.name in floats)
    return _estimated(source, replace(plan, held=held), imatrix, options)


def _refuse_directory_options(method: MethodOptions) -> None:
    """Raise UsageError for an option that GGUF has no use for."""
    idle = {
        "--group-size": method.group_size is not None,
        "--sym, --asym": method.symmetric is not None,
        "--desc-act": method.desc_act,
        "--ignore": bool(method.ignore),
        "--transform": method.transform not in (None, "none"),
    }
    named = [option for option, given in idle.items() if given]
    if named:
        raise UsageError(
            "options of other formats were given for gguf",
            found=", ".join(named),
            remedy="GGUF's types fix their groups; --tensor-type keeps single tensors in another type",
        )


def _text_advice(imatrix: Imatrix | None, options: Options) -> list[str]:
    """What a calibration that is still to be run will need, if there is one."""
    if imatrix is None or imatrix.sha256:
        return []
    return [
        f"quantize calibrates first: at most {imatrix.chunks} windows of {options.calibration.length} tokens run "
        "through the model, one block in memory at a time (this needs the extra [torch])"
    ]


def _estimated(source: Source, plan: ArtifactPlan, imatrix: Imatrix | None, options: Options) -> ArtifactPlan:
    """``plan`` with what a method that runs text through the model will take, in memory and in time."""
    if imatrix is None or not options.method.calibrates(plan.format):
        return replace(plan, phases=rounding_sizes(plan))
    need = estimate(source, plan, options, imatrix.chunks)
    height = memory.foreseen(need.sizes, threads=options.threads, max_ram=options.max_ram)
    minutes = need.operations / 100e9 / 60
    length = min(options.calibration.length, source.architecture.hyper.context_length)
    told = (
        f"{imatrix.chunks} windows of {length} tokens run through the model, one block in memory at a time: about "
        f"{need.operations / 1e12:,.1f} TFLOP, {max(1, round(minutes)):,} minutes at 100 GFLOP/s, and "
        f"{height / 1e9:.1f} GB of memory (this needs the extra [torch])"
    )
    warnings = plan.warnings if imatrix.sha256 else (*plan.warnings, told)
    return replace(plan, warnings=warnings, phases=(need.sizes,))


def _check_recipe(source: Source, levels: Sequence[str], recipe: Recipe | None) -> None:
    """Raise UsageError where the recipe does not fit the model or the levels, IntegrityError where it was made for
    another model (a source opened for its headers cannot tell)."""
    if recipe is None:
        return
    if [parse_level(level).name for level in levels] != [recipe.level]:
        raise UsageError("a recipe is a level of its own", expected=recipe.level, found=", ".join(levels))
    recipe.check(tensor_shapes(source, recipe.level))
    if recipe.model is None or source.checkpoint.headers_only:
        return
    found = model_digest(source.checkpoint)
    if found != recipe.model:
        raise IntegrityError(
            f"the recipe {recipe.name} was made for another model",
            expected=f"model {recipe.model}",
            found=f"model {found}",
            remedy='make one for this model with `llm-quantize analyze profile`, or take "model" out of the recipe',
        )


def _plan_level(source: Source, name: str, stem: str, imatrix: Imatrix | None, options: Options) -> ArtifactPlan:
    level = parse_level(name)
    outputs = source.tensors.outputs
    assigned = assign(
        name,
        tensor_shapes(source, name),
        source.architecture.hyper,
        arch=source.architecture.gguf_name,
        importance_names=None if imatrix is None else imatrix.values.keys(),
        overrides=options.overrides,
    )
    version = llm_quantize.__version__
    recipe = options.overrides.recipe
    called = name if recipe is None else recipe.name
    metadata = dict(source.metadata)
    quantized = name not in FLOAT_LEVELS
    metadata |= gguf_format.recipe_metadata(
        file_type=level.file_type, quantized=quantized, level=called, version=version
    )
    if imatrix is not None:
        metadata |= gguf_format.importance_metadata(
            file=imatrix.path.name,
            datasets=imatrix.datasets,
            entries=len(imatrix.values),
            chunks=imatrix.chunks,
        )
    overrides = options.overrides
    chosen: dict[str, object] = {
        "version": version,
        "imatrix": None if imatrix is None else imatrix.sha256,
        "output_type": overrides.output_type,
        "embedding_type": overrides.embedding_type,
        "tensor_types": [list(pair) for pair in overrides.tensor_types],
        "pure": overrides.pure,
        "split_max_size": options.split_max_size,
        "nonfinite": options.nonfinite,
    }
    if recipe is not None:
        chosen["recipe"] = recipe.sha256
    solved = options.method.method_of("gguf") != "rtn"
    if solved:
        chosen |= options.method.identity("gguf")
        metadata[f"{gguf_format.PROVENANCE}.method"] = gguf_format.text("gptq")
    files = [[fact.name, fact.size, fact.header_sha256] for fact in source.checkpoint.fingerprint()]
    plan = plan_artifact(
        level=called,
        name=f"{stem}-{called}",
        outputs=outputs,
        qtypes=assigned.qtypes,
        metadata=metadata,
        source_identity={
            "source": source.checkpoint.name,
            "source_revision": source.checkpoint.revision,
            "source_metadata_sha256": hashlib.sha256(layout_gguf(source.metadata, []).header).hexdigest(),
            "source_files": files,
        },
        options=chosen,
        split_max_bytes=options.split_max_size,
        source_itemsize=max((_itemsize(info.dtype) for info in source.checkpoint.tensors.values()), default=2),
        warnings=[*assigned.warnings, *_advice(source, name, assigned.qtypes, imatrix, options)],
    )
    if solved:
        return _estimated(source, replace(plan, matrices=_matrices(plan)), imatrix, options)
    return replace(plan, phases=_collecting(source, imatrix, options))


def _collecting(source: Source, imatrix: Imatrix | None, options: Options) -> tuple[memory.Sizes, ...]:
    """What a calibration that is still to be run will hold, if there is one."""
    if imatrix is None or imatrix.sha256:
        return ()
    chosen = options.calibration
    length = min(chosen.length, source.architecture.hyper.context_length)
    network = from_headers(source, chosen.device)
    return (collecting_sizes(network, chosen.collect, (imatrix.chunks, length), device=chosen.device),)


def _matrices(plan: ArtifactPlan) -> tuple[MatrixPlan, ...]:
    """The tensors of a GGUF artifact that a method quantizes as a whole: the quantized matrices of the blocks."""
    return tuple(
        MatrixPlan(tensor.name, tensor.output, tensor.qtype, (index,))
        for index, tensor in enumerate(plan.tensors)
        if is_block_matrix(tensor.output) and QTYPES[tensor.qtype].block_size > 1
    )


def is_block_matrix(output: OutputTensor) -> bool:
    """Whether an output is a matrix, or a stack of them, of a block: what calibration sees the inputs of."""
    named = re.fullmatch(r"blk\..*\.weight", output.name) and not output.name.endswith("_norm.weight")
    return bool(named) and len(output.shape) > 1 and output.constant is None


def _advice(source: Source, level: str, qtypes: Sequence[str], imatrix: Imatrix | None, options: Options) -> list[str]:
    """What is legal but probably not what the user thinks it is."""
    outputs = source.tensors.outputs
    advice = []
    if level == "MXFP4_MOE" and "mxfp4" not in qtypes:
        advice.append("MXFP4_MOE: this model has no expert tensors, so nothing is stored as mxfp4; this is Q8_0")
    if level.startswith("TQ"):
        advice.append(f"{level} is for models trained with ternary weights; any other model loses nearly everything")
    if options.method.method_of("gguf") == "rtn":
        advice += _text_advice(imatrix, options)
    limit = options.split_max_size
    if limit is not None:
        size, largest = max(
            (QTYPES[qtype].row_bytes(output.shape[-1]) * matrix_shape(output.shape)[0], output.name)
            for output, qtype in zip(outputs, qtypes, strict=True)
        )
        if size > limit:
            advice.append(f"--split-max-size {limit}: {largest} alone takes {size} bytes; its file is larger")
    if imatrix is not None:
        pairs = [(output.name, qtype) for output, qtype in zip(outputs, qtypes, strict=True)]
        using = [name for name, qtype in pairs if QTYPES[qtype].uses_importance and name not in _SELDOM_COVERED]
        left = [name for name in using if name not in imatrix.values]
        if left:
            covered = f"covers {len(using) - len(left)} of the {len(using)} tensors that could use it"
            advice.append(f"the importance matrix {covered}; the first without: {left[0]}")
        unknown = sorted(imatrix.values.keys() - {output.name for output in outputs})
        if unknown:
            advice.append(f"the importance matrix names {len(unknown)} tensors not in this model, such as {unknown[0]}")
    return advice


def _itemsize(dtype: str) -> int:
    return DTYPE_BITS[dtype] // 8


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


def importance_rows(source: Source, imatrix: Imatrix | None) -> Importance:
    """float32 (matrices, columns) for each output tensor that the matrix covers; a wrong shape is refused."""
    if imatrix is None:
        return {}
    found = {output.name: imatrix.rows(output.name, output.shape) for output in source.tensors.outputs}
    return {name: rows for name, rows in found.items() if rows is not None}


def _file_stem(name: str) -> str:
    stem = re.sub(r"[^\w.+-]+", "-", name.rsplit("/", 1)[-1]).strip("-.") or "model"
    if len(stem.encode()) > 180:
        raise UsageError("the output name is too long", found=len(stem.encode()), expected="at most 180 bytes")
    return stem
