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
from llm_quantize.evaluation.allocation import Choice, Preset, Target, allocate
from llm_quantize.evaluation.sensitivity import Candidate, Profile
from llm_quantize.formats.base import Scheme, mixture_of, scheme_of
from llm_quantize.formats.gguf.levels import Overrides
from llm_quantize.formats.packed_formats import PACKED
from llm_quantize.formats.packed_recipe import together
from llm_quantize.formats.recipe import Recipe
from llm_quantize.formats.table import FORMATS
from llm_quantize.methods.sizes import factor_bytes
from llm_quantize.options import MethodOptions, Options
from llm_quantize.pipeline import plan_source
from llm_quantize.plan import ArtifactPlan, MatrixPlan
from llm_quantize.qtypes.integer import WHOLE_ROW, integer_type

if TYPE_CHECKING:
    import torch

    from llm_quantize.io.imatrix_file import Imatrix
    from llm_quantize.models.opening import Source
    from llm_quantize.streams.pool import Pool

Hold = Callable[[Candidate], "dict[str, torch.Tensor]"]

_USUAL, _SMALLER = "int4_g128", (64, 32)
_SPARE = 64  # bytes
_FITS = 8  # times that a recipe is planned until all of its files together are small enough


@dataclass(frozen=True)
class DirectoryLadder:
    """A format of packed integers (``evaluation/ladders.py`` says what is asked of it). ``widths``: bits of the plain
    levels that a recipe is compared with."""

    form: str
    default_types: Sequence[str]
    presets: Mapping[str, Preset]
    level: str = "W{bits}A16"
    widths: Sequence[int] = (2, 3, 4, 5, 6, 8)
    feeds_back: bool = True

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
                found.append(Candidate(name, outputs, qtype, self._bytes(scheme_of(base), matrices, qtype)))
        return found

    def _base(self, source: Source) -> ArtifactPlan:
        """A plan with all matrices, whatever their sizes."""
        options = Options(method=MethodOptions(method="rtn", group_size=WHOLE_ROW))
        level = FORMATS[self.form].example
        (plan,) = plan_source(source, self.form, levels=[level], name=None, options=options, importance=None)
        return plan

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
        base = self._base(source)
        known = units(base)
        unmeasured = [unit for unit in known if unit not in profile.by_tensor()]
        if unmeasured:
            raise UsageError("the profile does not know all matrices of this model", found=", ".join(unmeasured[:5]))
        rest = base.size - sum(
            self._bytes(scheme_of(base), matrices, base.matrices[0].qtype) for matrices in known.values()
        )
        if target.like is not None:
            limit = self._plan(source, target.like, None, _group(base)).size
        else:
            limit = target.size if target.size is not None else int((target.bpw or 0.0) * base.weights / 8)
        budget = limit - rest
        for attempt in range(_FITS):
            allocation = allocate(profile, budget, target.types, align=1)
            recipe = self._recipe(profile, allocation.types, known, name or target.name)
            size = self._plan(source, recipe.level, recipe, _group(base)).size
            if size <= limit:
                return Choice(recipe, allocation, size, self._levels(source, profile, known, _group(base)))
            budget -= size - limit + (_SPARE << attempt)  # config.json names the groups: its size follows the recipe
        raise ResourceError("no recipe is small enough", expected=f"at most {limit:,} bytes", found=f"{size:,} bytes")

    def _plan(self, source: Source, level: str, recipe: Recipe | None, group: int) -> ArtifactPlan:
        options = Options(overrides=Overrides(recipe=recipe), method=MethodOptions(method="rtn", group_size=group))
        (plan,) = plan_source(source, self.form, levels=[level], name=None, options=options, importance=None)
        return plan

    def _recipe(
        self, profile: Profile, types: Mapping[str, str], known: Mapping[str, Sequence[MatrixPlan]], name: str
    ) -> Recipe:
        tensors = {mixture_of(matrix.name): types[unit] for unit, found in known.items() for matrix in found}
        weights = {unit: sum(weights_of(matrix.weight.shape) for matrix in found) for unit, found in known.items()}
        mean = sum(integer_type(types[unit]).bits * weights[unit] for unit in known) / sum(weights.values())
        level = self.level.format(bits=min(8, max(2, round(mean))))
        return Recipe(name=name, level=level, tensors=tensors, model=profile.model, form=self.form)

    def _levels(
        self, source: Source, profile: Profile, known: Mapping[str, Sequence[MatrixPlan]], group: int
    ) -> dict[str, tuple[int, float]]:
        figures = {(row.tensor, row.qtype): row.kld for row in profile.rows}
        found = {}
        for bits in self.widths:
            level = self.level.format(bits=bits)
            plan = self._plan(source, level, None, group)
            pairs = [(unit, plan.matrices[0].qtype) for unit in known]
            if all(pair in figures for pair in pairs):
                found[level] = (plan.size, sum(figures[pair] for pair in pairs))
        return found


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


def _group(plan: ArtifactPlan) -> int:
    """The largest of the usual groups that divides all rows: a plain level's."""
    return integer_type(_fitting(_USUAL, [matrix.weight.shape[-1] for matrix in plan.matrices])).group_size


def _fitting(qtype: str, columns: Sequence[int]) -> str:
    """``qtype``, with smaller groups where its own do not divide all rows."""
    grid = integer_type(qtype)
    sizes = (grid.group_size, *(size for size in _SMALLER if size < grid.group_size))
    fitting = next((size for size in sizes if size > 0 and not any(row % size for row in columns)), WHOLE_ROW)
    return replace(grid, group_size=fitting if grid.group_size != WHOLE_ROW else WHOLE_ROW).name
