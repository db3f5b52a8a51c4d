"""A profile of a packed directory: what runtimes make one module, held at grids of integers, and recipes of them.

A candidate is all that runtimes join (queries, keys and values; gate and up; all experts of a layer) on one grid: the
one that fits the weights best, or, where the Hessians of its inputs are known, with codes chosen by error feedback as
the artifact's will be. Nothing here needs torch until something is held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_quantize.architectures.rows import matrix_shape, weights_of
from llm_quantize.errors import ResourceError, UsageError
from llm_quantize.evaluation.allocation import Allocation, Choice, Preset, Target, allocate
from llm_quantize.evaluation.sensitivity import KEPT, Candidate, Profile, Sensitivity
from llm_quantize.formats.base import Scheme, scheme_of
from llm_quantize.formats.compressed_mixed import HEAD_BITS
from llm_quantize.formats.gguf.levels import Overrides
from llm_quantize.formats.modules import head_of
from llm_quantize.formats.packed_formats import PACKED
from llm_quantize.formats.packed_recipe import together
from llm_quantize.formats.packing import mixture_of
from llm_quantize.formats.recipe import Recipe
from llm_quantize.formats.table import FORMATS
from llm_quantize.methods.sizes import factor_bytes
from llm_quantize.options import MethodOptions, Options
from llm_quantize.pipeline import plan_source
from llm_quantize.plan import ArtifactPlan, MatrixPlan
from llm_quantize.qtypes.integer import GROUPS, WHOLE_ROW, IntegerType, dividing
from llm_quantize.qtypes.packed import packed_type

if TYPE_CHECKING:
    import torch

    from llm_quantize.io.imatrix_file import Imatrix
    from llm_quantize.models.opening import Source
    from llm_quantize.streams.pool import Pool

Hold = Callable[[Candidate], "dict[str, torch.Tensor]"]

_WHOLE = "int8"
_WIDE = ("F32", "F64")  # kept in 32 bits, all else in 16
_SPARE = 64  # bytes
_TOLD = 1024  # bytes, more than the card tells of a size, and what was tried for it
_FITS = 8  # times that a recipe is planned until all of its files together are small enough


@dataclass(frozen=True)
class DirectoryLadder:
    """A format of packed integers (``evaluation/ladders.py`` says what is asked of it). ``widths``: bits of the plain
    levels that a recipe is compared with; ``head_bits``: those that what stands outside of blocks may have. ``keeps``:
    whether that is left as it is where a recipe does not name it; ``group``: of the plan that knows all matrices."""

    form: str
    default_types: Sequence[str]
    presets: Mapping[str, Preset]
    level: str = "W{bits}A16"
    widths: Sequence[int] = (2, 3, 4, 5, 6, 8)
    head_bits: Sequence[int] = HEAD_BITS
    keeps: bool = True
    group: int | None = WHOLE_ROW
    feeds_back: bool = True
    weighed_types: Sequence[str] = ()

    def least(self, source: Source, wanted: Sequence[Candidate]) -> int:
        """Bytes of all files with every unit of ``wanted`` on the smallest of its grids, or as it is where that may
        be and is smaller."""
        head = {one.name for one in wanted} & {head_of(source)}
        base = self._base(source, head=bool(head))
        size = base.size - sum(matrices_bytes(self, base).values())
        least: dict[str, int] = {}
        for one in wanted:
            least[one.name] = min(one.nbytes, least.get(one.name, one.nbytes))
        return size + _TOLD + sum(least.values())

    def lossless(self, source: Source, wanted: Sequence[Candidate]) -> list[Sensitivity]:
        """None: ``choose`` knows what may be left as it is."""
        return []

    def plain(self, source: Source, wanted: Sequence[Candidate], limit: int, model: str) -> Choice | None:
        """The widest level of at most ``limit`` bytes, its losses not said; None where none fits."""
        base = self._base(source, head=False)
        for bits in sorted(self.widths, reverse=True):
            plan = self._plan(source, self.level.format(bits=bits), None, self._usual(base))
            if plan.size + _TOLD > limit:
                continue
            own = units(plan)
            types = {unit: found[0].qtype for unit, found in own.items()}
            types |= {one.name: KEPT for one in wanted if one.name not in own}
            tensors = {mixture_of(matrix.name): matrix.qtype for matrix in plan.matrices}
            recipe = Recipe(plan.level, plan.level, tensors, model=model, form=self.form)
            nbytes = sum(matrices_bytes(self, plan).values())
            return Choice(recipe, Allocation(types, nbytes, limit, 0.0, 0.0), plan.size, {})
        return None

    def candidates(self, source: Source, types: Sequence[str], covered: Mapping[str, Any]) -> list[Candidate]:
        """Everything that gets one grid, at every type, in the order of the artifact. Where groups do not divide the
        rows, smaller ones are taken. Raises UsageError for no type, and what planning raises."""
        del covered
        if not types:
            raise UsageError("no type to measure", expected=", ".join(self.default_types))
        base = self._base(source)
        found = []
        for name, matrices in units(base).items():
            outputs = tuple(matrix.weight for matrix in matrices)
            columns = [output.shape[-1] for output in outputs]
            for qtype in dict.fromkeys(_fitting(qtype, columns) for qtype in types):
                if matrices[0].seen or packed_type(qtype).bits in self.head_bits:
                    found.append(Candidate(name, outputs, qtype, self._bytes(scheme_of(base), matrices, qtype)))
        return found

    def _base(self, source: Source, *, head: bool = True) -> ArtifactPlan:
        """A plan with all matrices that a recipe may name, whatever their sizes: with ``head`` the output matrix too,
        where it is not the embedding."""
        name = head_of(source) if head and self.keeps else None
        recipe = Recipe("all", self.level.format(bits=8), {} if name is None else {name: _WHOLE}, form=self.form)
        return self._plan(source, recipe.level, recipe if self.keeps else None, self.group)

    def _bytes(self, scheme: Scheme, matrices: Sequence[MatrixPlan], qtype: str) -> int:
        """Bytes of the fields of ``matrices`` on the grid ``qtype``."""
        form, one = PACKED[self.form], scheme.on(qtype)
        shapes = (matrix_shape(matrix.weight.shape) for matrix in matrices)
        return sum(field.nbytes for rows, columns in shapes for field in form.fields(one, rows, columns))

    def held_bytes(self, wanted: Sequence[Candidate], statistics: Path | None) -> int:
        """Bytes beside the model's that choosing codes takes: the largest matrix in float32 and as codes, and with
        ``statistics`` a Hessian and its factor."""
        outputs = {output.name: output for one in wanted for output in one.outputs}.values()
        largest = max((weights_of(output.shape) for output in outputs), default=0)
        widest = max((output.shape[-1] for output in outputs), default=0)
        return 10 * largest + (factor_bytes(widest) + 8 * widest * widest if statistics is not None else 0)

    @contextmanager
    def holding(self, source: Source, pool: Pool, imatrix: Imatrix | None, statistics: Path | None) -> Iterator[Hold]:
        """A function that holds a candidate: {tensor of the source: float32, its shape}. Raises what reading the
        statistics raises."""
        from llm_quantize.evaluation.held_matrices import Holder
        from llm_quantize.io.statistics_file import read_statistics

        del imatrix
        base = self._base(source)
        named = {matrix.weight.name: matrix for matrix in base.matrices}
        store = FORMATS[self.form].store(base)
        if statistics is None:
            yield Holder(source, named, store, pool, None).hold
            return
        with read_statistics(statistics) as found:
            yield Holder(source, named, store, pool, found).hold

    def choose(self, source: Source, profile: Profile, target: Target, *, name: str | None = None) -> Choice:
        """The recipe for ``target``, all files of the artifact counted. Raises as ``allocate``, UsageError."""
        measured = profile.by_tensor()
        base = self._base(source, head=head_of(source) in measured)
        known = units(base)
        unmeasured = [unit for unit in known if unit not in measured]
        if unmeasured:
            raise UsageError("the profile does not know all matrices of this model", found=", ".join(unmeasured[:5]))
        rest = base.size - sum(self._bytes(scheme_of(base), found, found[0].qtype) for found in known.values())
        if self.keeps:
            profile = replace(profile, rows=(*profile.rows, *_kept(source, known)))
        if target.like is not None:
            limit = self._plan(source, target.like, None, self._usual(base)).size
        else:
            limit = (target.size if target.size is not None else int((target.bpw or 0.0) * base.weights / 8)) - _TOLD
        budget = limit - rest
        for attempt in range(_FITS):
            allocation = allocate(profile, budget, target.types, align=1)
            recipe = self._recipe(profile, allocation.types, known, name or target.name)
            size = self._plan(source, recipe.level, recipe, self._usual(base)).size
            if size <= limit:
                return Choice(recipe, allocation, size, self._levels(source, profile, known, self._usual(base)))
            budget -= size - limit + (_SPARE << attempt)  # config.json names the groups: its size follows the recipe
        raise ResourceError("no recipe is small enough", expected=f"at most {limit:,} bytes", found=f"{size:,} bytes")

    def _plan(self, source: Source, level: str, recipe: Recipe | None, group: int | None) -> ArtifactPlan:
        options = Options(overrides=Overrides(recipe=recipe), method=MethodOptions(method="rtn", group_size=group))
        (plan,) = plan_source(source, self.form, levels=[level], name=None, options=options, importance=None)
        return plan

    def _usual(self, plan: ArtifactPlan) -> int | None:
        """A plain level's group: the largest of the usual ones that divides all rows; None where the format sees to
        that by itself."""
        if self.group is None:
            return None
        return dividing(GROUPS, [matrix.weight.shape[-1] for matrix in plan.matrices]) or WHOLE_ROW

    def _recipe(
        self, profile: Profile, types: Mapping[str, str], known: Mapping[str, Sequence[MatrixPlan]], name: str
    ) -> Recipe:
        chosen = {unit: found for unit, found in known.items() if types[unit] != KEPT}
        tensors = {mixture_of(matrix.name): types[unit] for unit, found in chosen.items() for matrix in found}
        weights = {unit: sum(weights_of(matrix.weight.shape) for matrix in found) for unit, found in chosen.items()}
        mean = sum(packed_type(types[unit]).bits * weights[unit] for unit in chosen) / sum(weights.values())
        level = self.level.format(bits=min(self.widths, key=lambda bits: abs(bits - mean)))
        return Recipe(name=name, level=level, tensors=tensors, model=profile.model, form=self.form)

    def _levels(
        self, source: Source, profile: Profile, known: Mapping[str, Sequence[MatrixPlan]], group: int | None
    ) -> dict[str, tuple[int, float]]:
        figures = {(row.tensor, row.qtype): row.kld for row in profile.rows}
        found = {}
        for bits in self.widths:
            level = self.level.format(bits=bits)
            plan = self._plan(source, level, None, group)
            pairs = [(unit, plan.matrices[0].qtype) for unit, held in known.items() if held[0].seen or not self.keeps]
            if all(pair in figures for pair in pairs):
                found[level] = (plan.size, sum(figures[pair] for pair in pairs))
        return found


def _kept(source: Source, known: Mapping[str, Sequence[MatrixPlan]]) -> list[Sensitivity]:
    """What may be left as it is, where it stands outside of blocks, without a loss."""
    found = []
    for unit, matrices in known.items():
        if not matrices[0].seen:
            stored = [source.checkpoint.tensors[one.weight.pieces[0].source] for one in matrices]
            nbytes = sum(info.elements * (4 if info.dtype in _WIDE else 2) for info in stored)
            found.append(Sensitivity(unit, KEPT, 8 * nbytes / sum(info.elements for info in stored), nbytes, 0.0, 0.0))
    return found


def matrices_bytes(ladder: DirectoryLadder, plan: ArtifactPlan) -> dict[str, int]:
    """{unit: bytes of its fields as ``plan`` has them}."""
    scheme = scheme_of(plan)
    return {name: ladder._bytes(scheme, found, found[0].qtype) for name, found in units(plan).items()}


def units(plan: ArtifactPlan) -> dict[str, list[MatrixPlan]]:
    """{what runtimes make one module: its matrices}, in the order of the artifact."""
    joined: dict[str, list[MatrixPlan]] = {}
    for matrix in plan.matrices:
        joined.setdefault(together(matrix.name), []).append(matrix)
    return {_unit_name(key, found): found for key, found in joined.items()}


def _unit_name(key: str, matrices: Sequence[MatrixPlan]) -> str:
    """model.layers.0.self_attn.k_proj+q_proj+v_proj, model.layers.0.mlp.experts, or the module's own name."""
    if len(matrices) == 1:
        return matrices[0].name
    if mixture_of(matrices[0].name) != matrices[0].name:
        return key
    parents, lasts = zip(*(matrix.name.rpartition(".")[::2] for matrix in matrices), strict=True)
    return f"{parents[0]}.{'+'.join(lasts)}"


def _fitting(qtype: str, columns: Sequence[int]) -> str:
    """``qtype``, with smaller groups where its own do not divide all rows."""
    grid = packed_type(qtype)
    sizes = [grid.group_size, *(size for size in GROUPS if size < grid.group_size)]
    found = None if grid.group_size == WHOLE_ROW else dividing(sizes, columns)
    if found is None and not isinstance(grid, IntegerType):
        return qtype  # what no group divides is refused by name
    return replace(grid, group_size=found or WHOLE_ROW).name
