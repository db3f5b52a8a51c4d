"""The packed integer formats as rows of the table: a model directory whose matrices are codes, scales and zero points.

Packed modules become the fields of their format; every other tensor of the checkpoint, whatever GGUF would do with
it, is kept in the type it is stored in (FP8 as BF16 and without its scales, F64 as F32).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_quantize.architectures.base import OutputTensor
from llm_quantize.architectures.rows import weights_of
from llm_quantize.errors import UnsupportedError, UsageError
from llm_quantize.formats.base import Importance, Mixes, Packed, Scheme, SchemeOptions, Store, scheme_of
from llm_quantize.formats.card import PackedFacts, about_packed, transformers_caution
from llm_quantize.formats.directory import (
    Contents,
    Group,
    Stored,
    kept_type,
    plain_config,
    plan_files,
    whole,
)
from llm_quantize.formats.idle_options import OF_DIRECTORIES, OF_GRIDS, refuse_idle
from llm_quantize.formats.keeping import Kept, float_of, holding_of, is_act_order, keeping, most_held, scale_of
from llm_quantize.formats.kv_cache import holders
from llm_quantize.formats.modules import EDGES, HEAD, Module, Selection, coverage, head_of, select, spellings
from llm_quantize.formats.packed_recipe import as_far_as_both, bits_per_weight, by_grid, named, types_of
from llm_quantize.formats.packing import mixture_of, odd_groups
from llm_quantize.formats.recipe import Recipe, no_recipes
from llm_quantize.plan import ArtifactPlan
from llm_quantize.qtypes.codebook import IN_COMMON, CodebookType
from llm_quantize.qtypes.holding import NEVER
from llm_quantize.qtypes.inputs import InputGrid
from llm_quantize.qtypes.integer import WHOLE_ROW, IntegerType, dividing
from llm_quantize.qtypes.packed import packed_type

if TYPE_CHECKING:
    from llm_quantize.models.opening import Source
    from llm_quantize.options import Options

_TOO_LARGE = "leave this matrix as it is, from the start: --ignore '^TENSOR' --overwrite"
_OF_BLOCKS = " of the decoder's blocks"
_WITH_HEAD = f"{_OF_BLOCKS}, and the output matrix"
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

    @property
    def act_order(self) -> bool:
        return self.form.ACT_ORDER

    def plan(
        self, source: Source, levels: Sequence[str], stem: str, importance: Importance | None, options: Options
    ) -> list[ArtifactPlan]:
        """See ``Format``. Raises UsageError (no such level, sizes that the grid or the words do not divide, nothing
        left to pack, a bad --ignore, options of GGUF), UnsupportedError (matrices stored (in, out); experts without
        names of their own; a model without tokenizer files)."""
        recipe = options.overrides.recipe
        takes = OF_DIRECTORIES | OF_GRIDS | {"--method", "--recipe", *self.form.OPTIONS}
        refuse_idle(self.name, options, takes, "use --group-size, --sym or --asym, --ignore and --output-shard-size")
        if recipe is not None:
            recipe.check_use(source, self.name, levels, self.recipe_level)
        found = [self._plan(source, level, stem, importance, options) for level in levels]
        return list({plan.name: plan for plan in found}.values())

    def needs_importance(self, source: Source, level: str, options: Options) -> bool:
        """See ``Format``: a directory is rounded without any."""
        return False

    def calibrated(self, level: str) -> bool:
        """See ``Format``."""
        return True

    def recipe_level(self, text: str) -> str:
        """See ``Format``."""
        return self._mixes.recipe_level(text)

    def recipe_type(self, text: str) -> str:
        """See ``Format``."""
        return self._mixes.recipe_type(text)

    @property
    def _mixes(self) -> Mixes:
        """Raises UsageError where all matrices have one grid."""
        if self.form.MIXES is None:
            raise no_recipes(self.name)
        return self.form.MIXES

    def check_text(self, levels: Sequence[str], options: Options) -> None:
        """See ``Format``."""
        for level in levels:
            _refuse_uncalibrated(self.form, level, options)

    def keeping(self, source: Source, level: str | None, options: Options) -> Kept | None:
        """See ``Format``."""
        return keeping(self.form, source, level, options, EDGES if self.form.EDGES else ())

    def labels(self, source: Source) -> Collection[str]:
        """See ``Format``: those of levels on the grid of most weights, which are of the kind that the source says."""
        return [label for label in _labels(self.form, source) if label.startswith(source.checkpoint.kind)]

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
        recipe = options.overrides.recipe
        edges = EDGES if form.EDGES else self._edges(source, recipe)
        found, unlike = select(source, method.ignore, edges=edges), dict[str, tuple[str, ...]]()
        if recipe is not None and recipe.origin is not None:
            recipe.origin.refuse_unlike(source.architecture.gguf_name, source.architecture.hyper.n_layer)
            recipe, kept, unlike = as_far_as_both(recipe, found.modules)
            ignore = (*method.ignore, *(f"^{re.escape(name)}$" for name in kept))
            found = select(source, ignore, edges=edges)
        if not found.packed:
            raise UsageError(
                "nothing is left to pack", found=f"{len(found.ignored)} modules ignored", remedy="see --ignore"
            )
        asked = SchemeOptions(
            method.group_size,
            method.symmetric,
            _scale_type(source, found, keeps=method.method_of(self.name).keeps, exact=options.exact),
            method.double_quant,
            method.compute_dtype,
        )
        form.refuse(source, [module.name for module in found.modules])
        if not form.PACKS_EXPERTS:
            _refuse_experts(form, found.modules)
        taken = {} if recipe is None else named(recipe)
        left = [one for one in found.modules if one.name not in taken and mixture_of(one.name) not in taken]
        scheme, why = _fitting(form, level, asked, left)
        transform = method.transform_of(self.name)
        if transform.rounded and form.inputs(scheme) is None:
            raise UsageError(
                f"--transform {transform.name} is for levels that round activations, and {scheme.level} does not",
                expected="a level whose runtime rounds the inputs of its matrices, as W8A8 of compressed-tensors",
                found=f"{self.name} {scheme.level}",
                remedy="--transform awq, or no --transform",
            )
        cache = _cache(source, found, form, options)
        types = types_of(recipe, found.modules, scheme.qtype.name)
        scheme = replace(scheme, act_order=self._has_act_order(source, found.modules, types, options))
        groups = _groups(source, found, form, scheme, types, cache, exact=options.exact)
        label = _label(form, scheme)
        ending = f"-kv-{method.kv_cache}" if cache.scales else ""
        name, mixed = f"{stem}-{label}{ending}", dict[str, list[str]]()
        if recipe is not None:
            grids = by_grid(types)
            mixed = {qtype: grids[qtype] for qtype in self._mixes.order(grids)}
            scheme = replace(scheme.on(next(iter(mixed))), level=self._mixes.mixed_level(mixed))
            sizes = ((one.nbytes, weights_of(one.module.weight.shape)) for one in groups if one.module is not None)
            label, name = f"{scheme.level} ({bits_per_weight(sizes):.1f} bits)", f"{stem}-{recipe.name}{ending}"
        caution = transformers_caution(form) if source.architecture.hyper.n_expert else None
        warnings = [*found.warnings, *_warnings(form, scheme, found, types), *([caution] if caution else [])]
        if method.method_of(self.name).keeps:
            warnings += _not_held(source, f"{form.TITLE} {scheme.level}", found.modules, types)
        cautions = () if form.MIXES is None or not mixed else tuple(form.MIXES.cautions(mixed))
        spelled = {qtype: spellings(source, names) for qtype, names in mixed.items()}
        own = form.config(scheme, replace(coverage(source, found), mixed=spelled, cache=cache.grid))
        config = form.configured(source, plain_config(source.checkpoint.config), own)
        facts = self._facts(source, found, scheme, groups, name, importance, options, types, cautions)
        contents = Contents(
            format=form.NAME,
            label=label + ending,
            name=name,
            groups=groups,
            config=config,
            about=about_packed(replace(facts, cache=cache.grid)),
            weights=facts.weights,
            identity=self._identity(source, scheme, importance, options, mixed),
            shard_size=method.shard_size,
            judged=options.judged,
            include=method.include,
            qtype=scheme.qtype.name,
            measured=options.statistics is None and method.pairs(self.name),
            warnings=[*warnings, *cautions, *unlike],
            notes=(*(() if recipe is None else recipe.notes()), *why),
            too_large=_TOO_LARGE,
            dropped=found.dropped,
        )
        plan = plan_files(source, contents)
        floats = transform.changes(source)
        held = frozenset(index for index, tensor in enumerate(plan.tensors) if tensor.name in floats)
        return replace(plan, held=held, details={**plan.details, **unlike})

    def _has_act_order(
        self, source: Source, modules: Sequence[Module], types: Mapping[str, str], options: Options
    ) -> bool:
        """Whether the groups of a matrix that keeps its codes do not stand side by side."""
        return (
            self.act_order
            and options.method.method_of(self.name).keeps
            and any(
                is_act_order(source, module.weight)
                and holding_of(source, module.weight, types[module.name], act_order=True) != NEVER
                for module in modules
            )
        )

    def _edges(self, source: Source, recipe: Recipe | None) -> tuple[str, ...]:
        """The output matrix, where a recipe names it. Raises UsageError for a type that heads cannot have."""
        qtype = None if recipe is None else named(recipe).get(head_of(source) or "")
        if recipe is None or qtype is None:
            return ()
        self._mixes.check_head(recipe, qtype)
        return (HEAD,)

    def _identity(
        self,
        source: Source,
        scheme: Scheme,
        importance: Importance | None,
        options: Options,
        mixed: Mapping[str, Sequence[str]],
    ) -> dict[str, Any]:
        """What decides the codes, JSON-ready; of a recipe its hash, and how many matrices have which grid; of a GGUF
        file whether its floats stay as they are."""
        text: dict[str, Any] = {} if importance is None else {"text": importance.sha256}
        recipe = options.overrides.recipe
        if recipe is not None:
            text |= {"recipe": recipe.sha256, "grids": {name: len(modules) for name, modules in mixed.items()}}
        return {
            "scheme": scheme.to_dict(),
            "ignore": list(options.method.ignore),
            **options.method.identity(self.name),
            "nonfinite": options.nonfinite,
            **({"exact": True} if options.exact and source.checkpoint.metadata is not None else {}),
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
        types: Mapping[str, str],
        cautions: tuple[str, ...],
    ) -> PackedFacts:
        """What the model card tells."""
        recipe = options.overrides.recipe
        chosen = None if recipe is None else recipe.fit
        packed = (source.checkpoint.tensors[tensor] for tensor in found.packed)
        return PackedFacts(
            form=self.form,
            scheme=scheme,
            name=name,
            matrices=len(found.modules),
            packed=sum(group.nbytes for group in groups if group.module is not None),
            kept=sum(group.nbytes for group in groups if group.module is None),
            weights=sum(info.elements for info in (*packed, *found.kept)),
            method={
                **options.method.words(self.name, () if importance is None else importance.datasets),
                **({} if chosen is None else chosen.words()),
            },
            ignored=tuple(found.ignored),
            tensor_parallel=_tensor_parallel(scheme, found.modules, types),
            experts=source.architecture.hyper.n_expert > 0,
            grids={qtype: len(names) for qtype, names in by_grid(types).items()},
            cautions=cautions,
            vllm_note=_vllm_note(self.form, scheme, found, types),
            auto=source.architecture.family.auto,
            packed_of=_OF_BLOCKS if all(module.seen for module in found.modules) else _WITH_HEAD,
        )


@dataclass(frozen=True)
class _Cache:
    """``grid``: what keys and values are kept as; None: as they come. ``scales``: {module: the names of the scales that
    are found with it}, of ``dtype``."""

    grid: InputGrid | None = None
    scales: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    dtype: str = ""


def _cache(source: Source, found: Selection, form: Packed, options: Options) -> _Cache:
    """What ``--kv-cache`` asks for. Raises UsageError where the format has no such thing, or no text is read;
    UnsupportedError for a family whose attention has no scales."""
    asked = options.method.kv_cache
    if asked is None:
        return _Cache()
    grid = form.CACHES[asked]
    if options.statistics is not None or not options.method.calibrates(form.NAME):
        raise UsageError(
            "--kv-cache stores calibrated scales of keys and values, and without text there are none",
            expected="a method that reads text",
            found="--statistics" if options.statistics is not None else "--method rtn",
            remedy="leave the option out (--method gptq calibrates), or leave --kv-cache out",
        )
    dtypes = [source.checkpoint.tensors[name].dtype for name in found.packed]
    exact = dtypes.count("F32") + dtypes.count("F64") > len(dtypes) / 2
    return _Cache(grid, holders(source, found), "float32" if exact else _scale_type(source, found))


def _fitting(
    form: Packed, level: str, options: SchemeOptions, modules: Sequence[Module]
) -> tuple[Scheme, tuple[str, ...]]:
    """The scheme of ``level``; where nobody asks for a group, on the largest of the form's that every matrix is whole
    groups of, and why that is not the usual one. Raises UsageError naming the first matrix that none divides."""
    scheme = form.scheme(level, options)
    choice = form.groups(scheme) if options.group_size is None else ()
    if not choice:
        return scheme, ()
    widths = sorted({module.weight.shape[1] for module in modules})
    group = dividing(choice, widths)
    if group is None:
        odd = next(module for module in modules if module.weight.shape[1] % choice[-1])
        raise odd_groups(scheme, choice, odd.weight.shape[1], odd.name)
    if group == choice[0]:
        return scheme, ()
    unlike = " and ".join(str(columns) for columns in widths if columns % choice[0])
    told = f"groups of {group}: rows of {unlike} are not divisible by {choice[0]}"
    return form.scheme(level, replace(options, group_size=group)), (told,)


def _refuse_uncalibrated(form: Packed, level: str, options: Options) -> None:
    """Raise UsageError where the scales of inputs would have to be calibrated, and no text is read."""
    told = {
        "--method rtn": not options.method.calibrates(form.NAME),
        "--statistics": options.statistics is not None,
        "--no-calibration": options.calibrate is False,
    }
    found = [option for option, given in told.items() if given]
    if found and form.input_fields(form.scheme(level, SchemeOptions())):
        raise UsageError(
            f"{level} holds calibrated scales of activations, and without text there are none",
            expected="a method that reads text, or a level with dynamic activations",
            found=", ".join(found),
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


def _scale_type(source: Source, found: Selection, *, keeps: bool = False, exact: bool = False) -> str:
    """How scales are stored where the format leaves that to the checkpoint: as its weights, in 16 bit; with ``keeps``
    as its scales, so that they stay what they are (``scale_of``)."""
    if keeps:
        kept = scale_of(source, found.modules, exact=exact) or float_of(source, [info.name for info in found.kept])
        if kept is not None:
            return kept
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


def _not_held(source: Source, label: str, modules: Sequence[Module], types: Mapping[str, str]) -> Iterator[str]:
    """Of a source that mixes grids, which of its matrices ``label`` has no grid for; the order of columns is another
    matter (``keeping.out_of_order``)."""
    stored = {one.name: {source.checkpoint.held(piece.source) for piece in one.weight.pieces} for one in modules}
    given = [one for one in modules if None not in stored[one.name]]
    lost = [one for one in given if holding_of(source, one.weight, types[one.name], act_order=True) == NEVER]
    if 0 < len(lost) < len(given):
        grids = sorted({grid.qtype for one in lost for grid in stored[one.name] if grid is not None})
        yield (
            f"{len(lost):,} of {len(given):,} matrices are stored on grids that {label} does not hold "
            f"({', '.join(grids)}): they are rounded"
        )


def _labels(form: Packed, source: Source) -> Iterator[str]:
    """The labels of all levels of ``form`` that are on the grid which most matrices of ``source`` are on."""
    qtype = most_held(source)
    if qtype is None:
        return
    grid = packed_type(qtype)
    symmetric = grid.symmetric if isinstance(grid, IntegerType) else None
    nested = True if isinstance(grid, CodebookType) and grid.nested == "dq" else None
    for level in form.LEVELS:
        try:
            scheme = form.scheme(level, SchemeOptions(grid.group_size, symmetric, double_quant=nested))
        except UsageError:  # no such grid of this level
            continue
        if scheme.qtype.name == qtype:
            yield _label(form, scheme)


def _groups(
    source: Source,
    found: Selection,
    form: Packed,
    scheme: Scheme,
    types: Mapping[str, str],
    cache: _Cache,
    *,
    exact: bool,
) -> list[Group]:
    """What stands in the files, in the order of the checkpoint. ``types``: {module: its grid}; ``exact``: what is kept
    stays in its own type (``kept_type``)."""
    kept = {info.name for info in found.kept}
    groups = []
    for name, info in source.checkpoint.tensors.items():
        for module in found.packed.get(name, ()):
            rows, columns = module.weight.shape
            fields = form.fields(scheme.on(types[module.name]), rows, columns, name=module.name)
            stored = [Stored(OutputTensor(f"{module.name}.{f.suffix}", f.shape), f.dtype) for f in fields]
            scales = cache.scales.get(module.name, ())
            stored += [Stored(OutputTensor(scale, (1,)), cache.dtype) for scale in scales]
            groups.append(Group(tuple(stored), module, types[module.name], cache.grid if scales else None))
        if name in kept:
            groups.append(whole(info, kept_type(source, info.dtype, exact=exact)))
    return groups


def _tensor_parallel(scheme: Scheme, modules: Sequence[Module], types: Mapping[str, str]) -> int:
    """Over how many devices, at most 8, vLLM can split the matrices: each gets whole groups of the columns of some,
    and multiples of 32 rows of the others, or of all rows that have scales in common."""
    for devices in (8, 4, 2):
        if all(_splits(scheme.on(types[module.name]), module, devices) for module in modules):
            return devices
    return 1


def _splits(scheme: Scheme, module: Module, devices: int) -> bool:
    rows, columns = module.weight.shape
    if module.name.rpartition(".")[2] in _SPLIT_BY_COLUMNS:
        step = 32 if scheme.qtype.group_size == WHOLE_ROW else max(32, scheme.qtype.group_size)
        return columns % (devices * step) == 0
    blocks = IN_COMMON.get(scheme.qtype.nested, 0) if isinstance(scheme.qtype, CodebookType) else 0
    return rows % (devices * max(32, blocks)) == 0


def _whole(module: Module, step: tuple[int, int]) -> bool:
    """Whether rows and columns are whole multiples of ``step``."""
    return not any(size % one for size, one in zip(module.weight.shape, step, strict=True))


def _sized(module: Module) -> str:
    return f"{module.name} {tuple(module.weight.shape)}"


def _vllm_note(form: Packed, scheme: Scheme, found: Selection, types: Mapping[str, str]) -> str | None:
    """See ``Packed.vllm_caution``."""
    head = not all(module.seen for module in found.modules)
    return form.vllm_caution([scheme.on(qtype) for qtype in by_grid(types)], head=head)


def _warnings(form: Packed, scheme: Scheme, found: Selection, types: Mapping[str, str]) -> list[str]:
    """What is legal but may surprise. ``types``: {module: its grid}."""
    warnings: list[str] = []
    if form.RUNTIME is not None:
        return warnings
    refusal = form.vllm_refusal(scheme)
    if refusal is not None:
        return [*warnings, f"vLLM will not load this artifact: {refusal}"]
    caution = _vllm_note(form, scheme, found, types)
    warnings += [caution] if caution else []
    modules = found.modules
    odd = {places: [m for m in modules if not _whole(m, step)] for places, step in form.VLLM_STEPS}
    nowhere = [m for m in modules if form.VLLM_STEPS and not any(_whole(m, step) for _, step in form.VLLM_STEPS)]
    if nowhere:
        wanted = "; ".join(f"{places}: rows a multiple of {n}, columns of {k}" for places, (n, k) in form.VLLM_STEPS)
        warnings.append(
            f"{len(nowhere)} of {len(modules)} matrices have sizes for which no kernel of vLLM is known ({wanted}), "
            f"the first {_sized(nowhere[0])}"
        )
    for places, step in () if nowhere else form.VLLM_STEPS:
        if odd[places]:
            warnings.append(
                f"{len(odd[places])} of {len(modules)} matrices do not have the sizes that vLLM's {places} kernels "
                f"want (rows a multiple of {step[0]}, columns of {step[1]}), the first {_sized(odd[places][0])}"
            )
            break
    if _tensor_parallel(scheme, modules, types) == 1:
        whole = next(module for module in modules if not _splits(scheme.on(types[module.name]), module, 2))
        warnings.append(f"vLLM cannot split this artifact over several devices, because of {whole.name}")
    return warnings
