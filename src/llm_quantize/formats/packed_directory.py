"""The packed integer formats as rows of the table: a model directory whose matrices are codes, scales and zero points.

Packed modules become the fields of their format; every other tensor of the checkpoint, whatever GGUF would do with
it, is kept in the type it is stored in (FP8 as BF16 and without its scales, F64 as F32).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_quantize.architectures.base import OutputTensor
from llm_quantize.errors import UnsupportedError, UsageError
from llm_quantize.formats.base import Importance, Packed, Scheme, SchemeOptions, Store, mixture_of, scheme_of
from llm_quantize.formats.card import PackedFacts, about_packed, transformers_caution
from llm_quantize.formats.directory import KEPT_TYPES, Contents, Group, Stored, plain_config, plan_files, whole
from llm_quantize.formats.modules import Module, Selection, coverage, select
from llm_quantize.formats.small_files import need_small_files
from llm_quantize.plan import ArtifactPlan
from llm_quantize.qtypes.codebook import IN_COMMON, CodebookType
from llm_quantize.qtypes.integer import WHOLE_ROW

if TYPE_CHECKING:
    from llm_quantize.models.opening import Source
    from llm_quantize.options import MethodOptions, Options

_TOO_LARGE = "leave this matrix as it is, from the start: --ignore '^TENSOR' --overwrite"
_SPLIT_BY_COLUMNS = ("o_proj", "down_proj", "w2", "dense", "fc2", "c_proj", "out_proj", "dense_4h_to_h")


@dataclass(frozen=True)
class PackedFormat:
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
    def default(self) -> str | None:
        return self.form.DEFAULT

    @property
    def transform(self) -> str:
        return self.form.TRANSFORM

    def plan(
        self, source: Source, levels: Sequence[str], stem: str, importance: Importance | None, options: Options
    ) -> list[ArtifactPlan]:
        """See ``Format``. Raises UsageError (no such level, sizes that the grid or the words do not divide, nothing
        left to pack, a bad --ignore, options of GGUF), UnsupportedError (matrices stored (in, out); experts without
        names of their own; a model without tokenizer files)."""
        need_small_files(source.checkpoint)
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

    def calibrated(self, level: str) -> bool:
        """See ``Format``."""
        return True

    def store(self, plan: ArtifactPlan) -> Store:
        """See ``Format``."""
        from llm_quantize.formats.packed_store import DirectoryStore

        return DirectoryStore(self.form, scheme_of(plan), plan.matrices)

    def texts_of(self, path: Path) -> Sequence[str] | None:
        """See ``Format``: text goes through the model itself, no importance is collected."""
        return None

    def _plan(
        self, source: Source, level: str, stem: str, importance: Importance | None, options: Options
    ) -> ArtifactPlan:
        """The artifact STEM-LABEL (LABEL: GPTQ-4bit, AWQ-4bit, W4A16, ...)."""
        form, method = self.form, options.method
        found = select(source, method.ignore, edges=form.EDGES)
        if not found.packed:
            raise UsageError(
                "nothing is left to pack", found=f"{len(found.ignored)} modules ignored", remedy="see --ignore"
            )
        scheme = form.scheme(
            level,
            SchemeOptions(
                method.group_size,
                method.symmetric,
                _scale_type(source, found),
                method.double_quant,
                method.compute_dtype,
            ),
        )
        transform = method.transform_of(self.name)
        if transform.rounded and form.inputs(scheme) is None:
            raise UsageError(
                f"--transform {transform.name} is for levels that round activations, and {scheme.level} does not",
                expected="a level whose runtime rounds the inputs of its matrices, as W8A8 of compressed-tensors",
                found=f"{self.name} {scheme.level}",
                remedy="--transform awq, or no --transform",
            )
        _refuse_uncalibrated(form, scheme, options)
        form.refuse(source, [module.name for module in found.modules])
        if not form.PACKS_EXPERTS:
            _refuse_experts(form, found.modules)
        label = _label(form, scheme)
        groups = _groups(source, found, form, scheme)
        caution = transformers_caution(form) if source.architecture.hyper.n_expert else None
        warnings = [*found.warnings, *_warnings(form, scheme, found, method), *([caution] if caution else [])]
        own = form.config(scheme, coverage(source, found))
        config = form.configured(source, plain_config(source.checkpoint.config), own)
        facts = self._facts(source, found, scheme, groups, f"{stem}-{label}", importance, options)
        contents = Contents(
            format=form.NAME,
            label=label,
            name=f"{stem}-{label}",
            groups=groups,
            config=config,
            about=about_packed(facts),
            weights=facts.weights,
            identity=self._identity(scheme, importance, options),
            shard_size=method.shard_size,
            include=method.include,
            qtype=scheme.qtype.name,
            measured=options.statistics is None and method.stages(self.name).correction > 0,
            warnings=warnings,
            too_large=_TOO_LARGE,
            dropped=found.dropped,
        )
        plan = plan_files(source, contents)
        floats = transform.changes(source)
        held = frozenset(index for index, tensor in enumerate(plan.tensors) if tensor.name in floats)
        return replace(plan, held=held)

    def _identity(self, scheme: Scheme, importance: Importance | None, options: Options) -> dict[str, Any]:
        """What decides the codes, JSON-ready."""
        text = {} if importance is None else {"text": importance.sha256}
        return {
            "scheme": scheme.to_dict(),
            "ignore": list(options.method.ignore),
            **options.method.identity(self.name),
            "nonfinite": options.nonfinite,
            **text,
        }

    def _facts(
        self,
        source: Source,
        found: Selection,
        scheme: Scheme,
        groups: Sequence[Group],
        name: str,
        importance: Importance | None,
        options: Options,
    ) -> PackedFacts:
        """What the model card tells."""
        packed = (source.checkpoint.tensors[tensor] for tensor in found.packed)
        return PackedFacts(
            form=self.form,
            scheme=scheme,
            name=name,
            matrices=len(found.modules),
            packed=sum(group.nbytes for group in groups if group.module is not None),
            kept=sum(group.nbytes for group in groups if group.module is None),
            weights=sum(info.elements for info in (*packed, *found.kept)),
            method=options.method.words(self.name, () if importance is None else importance.datasets),
            ignored=tuple(found.ignored),
            tensor_parallel=_tensor_parallel(scheme, found.modules),
            experts=source.architecture.hyper.n_expert > 0,
        )


def _refuse_uncalibrated(form: Packed, scheme: Scheme, options: Options) -> None:
    """Raise UsageError where the scales of inputs would have to be calibrated, and no text is read."""
    if form.input_fields(scheme) and (options.statistics is not None or not options.method.calibrates(form.NAME)):
        raise UsageError(
            f"{scheme.level} holds calibrated scales of activations, and without text there are none",
            expected="a method that reads text, or a level with dynamic activations",
            found="--statistics" if options.statistics is not None else "--method rtn",
            remedy="leave the option out (--method gptq calibrates), or take FP8_DYNAMIC, FP8_BLOCK, MXFP4 or NVFP4A16",
        )


def _refuse_experts(form: Packed, modules: Sequence[Module]) -> None:
    packed = [module.name for module in modules if mixture_of(module.name) != module.name]
    if packed:
        raise UnsupportedError(
            f"experts stored as {form.TITLE} are read by nothing: Transformers keeps those of a layer in one tensor",
            tensor=packed[0],
            found=f"{len(packed)} such matrices",
            remedy=r"--ignore '\.experts\.' leaves them as they are; compressed-tensors and gguf pack them",
        )


def _scale_type(source: Source, found: Selection) -> str:
    """How scales are stored where the format leaves that to the checkpoint: as its weights, in 16 bit."""
    stored = [source.checkpoint.tensors[name].dtype for name in found.packed]
    return "bfloat16" if stored.count("BF16") + stored.count("F8_E4M3") > len(stored) / 2 else "float16"


def _label(form: Packed, scheme: Scheme) -> str:
    """The end of the artifact's name: the level, and what differs from its default."""
    group = scheme.qtype.group_size
    label = form.LABEL.format(level=scheme.level)
    if isinstance(scheme.qtype, CodebookType) and scheme.qtype.nested in IN_COMMON:
        return label
    if group not in (form.DEFAULT_GROUP, WHOLE_ROW) or (group == WHOLE_ROW and form.DEFAULT_GROUP == 128):
        label += "-channel" if group == WHOLE_ROW else f"-g{group}"
    if form.SYMMETRIC is not None and scheme.qtype.symmetric != form.SYMMETRIC:
        label += "-sym" if scheme.qtype.symmetric else "-asym"
    return label


def _groups(source: Source, found: Selection, form: Packed, scheme: Scheme) -> list[Group]:
    """What stands in the files, in the order of the checkpoint."""
    kept = {info.name for info in found.kept}
    groups = []
    for name, info in source.checkpoint.tensors.items():
        for module in found.packed.get(name, ()):
            rows, columns = module.weight.shape
            fields = form.fields(scheme, rows, columns, name=module.name)
            stored = [Stored(OutputTensor(f"{module.name}.{f.suffix}", f.shape), f.dtype) for f in fields]
            groups.append(Group(tuple(stored), module))
        if name in kept:
            groups.append(whole(info, KEPT_TYPES.get(info.dtype, "f32")))
    return groups


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


def _warnings(form: Packed, scheme: Scheme, found: Selection, method: MethodOptions) -> list[str]:
    """What is legal but may surprise."""
    warnings: list[str] = []
    if form.RUNTIME is not None:
        return warnings
    refusal = form.vllm_refusal(scheme)
    if refusal is not None:
        return [*warnings, f"vLLM will not load this artifact: {refusal}"]
    modules = found.modules
    for places, step in form.VLLM_STEPS:
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
