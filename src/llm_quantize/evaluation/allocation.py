"""From measured sensitivities to a recipe: which type each tensor gets so that the model fits and loses least.

    minimise  sum over tensors t of KLD(t, q_t)   subject to   sum of bytes(t, q_t) <= budget

Divergences of small changes add up (each is a quadratic form of its own perturbation, and errors of different tensors
are nearly independent), so the sum stands for the whole. Each tensor's choices are cut down to the lower convex hull of
(bytes, KLD); then the step that gains most per byte is taken, again and again, over all tensors: the Lagrangian
solution, optimal at every budget at which it stops exactly. What is left of the budget goes to single steps that fit.
From there the optimum is searched, with the gain per byte at which the steps stopped (evaluation/knapsack.py).

Presets are sizes that people know and types to choose from:

    quality    the bytes of Q5_K_M     any measured type
    balanced   the bytes of Q4_K_M     any measured type
    speed      the bytes of Q4_K_S     types that llama.cpp computes fastest on CPUs: q4_0, q4_k, q5_k, q6_k, q8_0
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gguf.constants import GGUF_DEFAULT_ALIGNMENT

from llm_quantize.architectures.rows import matrix_shape, weights_of
from llm_quantize.errors import ResourceError, UsageError
from llm_quantize.evaluation.knapsack import knapsack
from llm_quantize.evaluation.sensitivity import Candidate, Profile, Sensitivity
from llm_quantize.formats.gguf.levels import (
    LEVELS,
    TensorShape,
    assign,
    is_quantizable,
    needs_importance,
    parse_level,
)
from llm_quantize.formats.gguf.plan import tensor_shapes
from llm_quantize.formats.recipe import Recipe
from llm_quantize.formats.table import FORMATS
from llm_quantize.models.opening import Source
from llm_quantize.options import Options
from llm_quantize.pipeline import plan_source
from llm_quantize.qtypes import QTYPES

FAST_TYPES = ("q8_0", "q6_k", "q5_k", "q4_k", "q4_0")


@dataclass(frozen=True)
class Preset:
    """A size, as the level that has it, and the types to choose from (none: all that were measured)."""

    like: str
    types: tuple[str, ...] = ()


PRESETS: Mapping[str, Preset] = {
    "quality": Preset("Q5_K_M"),
    "balanced": Preset("Q4_K_M"),
    "speed": Preset("Q4_K_S", FAST_TYPES),
}


@dataclass(frozen=True)
class Allocation:
    """``types``: tensor -> qtype. ``nbytes``: of these tensors, padding included, at most ``budget``. ``kld``: the
    sum of their measured divergences, nats; ``kld_sem`` its standard error, as if they were independent."""

    types: Mapping[str, str]
    nbytes: int
    budget: int
    kld: float
    kld_sem: float


ALIGNMENT = int(GGUF_DEFAULT_ALIGNMENT)


def padded(nbytes: int, align: int = ALIGNMENT) -> int:
    """Bytes of a tensor in the file, with the zeros after it."""
    return nbytes + -nbytes % align


def hull(figures: Sequence[Sensitivity], align: int = ALIGNMENT) -> list[Sensitivity]:
    """The choices worth taking, smallest first: each step up costs more bytes, loses less, and gains less per byte
    than the step before it."""
    best: dict[int, Sensitivity] = {}
    for row in sorted(figures, key=lambda row: (row.kld, row.qtype), reverse=True):
        best[padded(row.nbytes, align)] = row
    found: list[Sensitivity] = []
    for row in (best[size] for size in sorted(best)):
        if found and row.kld >= found[-1].kld:
            continue
        while len(found) > 1 and _gain(found[-2], found[-1], align) <= _gain(found[-2], row, align):
            found.pop()
        found.append(row)
    return found


def _gain(low: Sensitivity, high: Sensitivity, align: int) -> float:
    """Divergence saved per byte spent."""
    return (low.kld - high.kld) / (padded(high.nbytes, align) - padded(low.nbytes, align))


_BELOW = {"gguf": " (those below q2_k want --statistics)"}


def allocate(profile: Profile, budget: int, types: Sequence[str] = (), *, align: int = ALIGNMENT) -> Allocation:
    """The types that lose least in ``budget`` bytes (of the profiled tensors, padding included).

    ``types``: those to choose from, none: all measured; a tensor that was measured in none of them keeps all its own.
    Raises ResourceError where even the smallest choice of every tensor is too large, UsageError where none of ``types``
    was measured. ``align``: what tensors are padded to in the file.
    """
    measured = {row.qtype for row in profile.rows}
    if types and not measured & set(types):
        raise UsageError(
            "the profile has none of the types to choose from",
            expected=", ".join(types),
            found=", ".join(sorted(measured)),
            remedy="measure them: add --overwrite",
        )
    choices = {}
    for name, figures in profile.by_tensor().items():
        allowed = [row for row in figures if not types or row.qtype in types] or figures
        choices[name] = (hull(allowed, align), allowed)
    chosen = {name: steps[0] for name, (steps, _) in choices.items()}
    spent = sum(padded(row.nbytes, align) for row in chosen.values())
    if spent > budget:
        raise ResourceError(
            "the model does not fit this size in the types that were measured",
            expected=f"at least {spent:,} bytes for its matrices",
            found=f"{max(0, budget):,} bytes",
            remedy=f"allow a larger size, or smaller types with --types{_BELOW.get(profile.form, '')}",
        )
    heap = [(-_gain(steps[0], steps[1], align), name, 1) for name, (steps, _) in choices.items() if len(steps) > 1]
    heapq.heapify(heap)
    stopped = 0.0
    while heap:
        gain, name, index = heapq.heappop(heap)
        steps = choices[name][0]
        more = padded(steps[index].nbytes, align) - padded(chosen[name].nbytes, align)
        if spent + more > budget:
            stopped = stopped or -gain
            continue
        chosen[name], spent = steps[index], spent + more
        if index + 1 < len(steps):
            heapq.heappush(heap, (-_gain(steps[index], steps[index + 1], align), name, index + 1))
    every = {name: allowed for name, (_, allowed) in choices.items()}
    spent = _fill(chosen, every, spent, budget, align)
    better = _search(chosen, every, budget, stopped, align)
    if better is not None:
        chosen = better
        spent = sum(padded(row.nbytes, align) for row in chosen.values())
    return Allocation(
        types={name: row.qtype for name, row in chosen.items()},
        nbytes=spent,
        budget=budget,
        kld=sum(row.kld for row in chosen.values()),
        kld_sem=math.hypot(*(row.kld_sem for row in chosen.values())),
    )


def _search(
    chosen: Mapping[str, Sensitivity],
    choices: Mapping[str, Sequence[Sensitivity]],
    budget: int,
    price: float,
    align: int,
) -> dict[str, Sensitivity] | None:
    """Choices of a smaller sum than ``chosen``, the smallest there is; None where there is none. ``price``: the gain
    per byte at which the steps stopped, 0 where all were taken."""
    if price <= 0:
        return None
    names = list(chosen)
    found = knapsack(
        [[(padded(row.nbytes, align), row.kld) for row in choices[name]] for name in names],
        budget,
        price,
        sum(row.kld for row in chosen.values()),
    )
    return None if found is None else {name: choices[name][at] for name, at in zip(names, found, strict=True)}


def _fill(
    chosen: dict[str, Sensitivity],
    choices: Mapping[str, Sequence[Sensitivity]],
    spent: int,
    budget: int,
    align: int,
) -> int:
    """Spend what is left on the single changes that gain most, hull or not, until none fits. Returns bytes spent."""
    while True:
        steps = [
            (now.kld - row.kld, name, row)
            for name, now in chosen.items()
            for row in choices[name]
            if row.kld < now.kld and spent + padded(row.nbytes, align) - padded(now.nbytes, align) <= budget
        ]
        if not steps:
            return spent
        _, name, row = max(steps, key=lambda step: (step[0], step[1]))
        spent += padded(row.nbytes, align) - padded(chosen[name].nbytes, align)
        chosen[name] = row


def level_types(source: Source, level: str, covered: Sequence[str] = ()) -> dict[str, str]:
    """What a plain level gives to every tensor that may be quantized. ``covered``: tensors with importance."""
    shapes = tensor_shapes(source, level)
    names = set(covered) | set(
        needs_importance(level, shapes, source.architecture.hyper, arch=source.architecture.gguf_name)
    )
    found = assign(
        level,
        shapes,
        source.architecture.hyper,
        arch=source.architecture.gguf_name,
        importance_names=names or None,
    )
    return {
        shape.name: qtype
        for shape, qtype in zip(shapes, found.qtypes, strict=True)
        if is_quantizable(TensorShape(shape.name, shape.shape))
    }


def bytes_of(source: Source, types: Mapping[str, str]) -> int:
    """Bytes of tensors at these types, padding included."""
    total = 0
    for output in source.tensors.outputs:
        if output.name in types:
            rows, columns = matrix_shape(output.shape)
            total += padded(rows * QTYPES[types[output.name]].row_bytes(columns))
    return total


def nearest_level(bits: float) -> str:
    """The level to name in a recipe: of those with K-quants, the one whose base has about so many bits per weight. It
    decides what a program that reads general.file_type shows, and the types of tensors that are not named."""
    names = ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
    return min(names, key=lambda name: abs(QTYPES[LEVELS[name].base].bits_per_weight - bits))


@dataclass(frozen=True)
class Target:
    """How large the model may be; one of: the bytes of the level ``like``; ``size``, bytes of the whole file; ``bpw``,
    bits of the whole file per weight. ``types``: to choose from, none: all measured. ``form``: the format. Raises
    UsageError."""

    like: str | None = None
    size: int | None = None
    bpw: float | None = None
    types: tuple[str, ...] = ()
    form: str = "gguf"

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.like, self.size, self.bpw)) != 1:
            raise UsageError("a recipe needs one size: that of a level, bytes, or bits per weight")
        if self.like is not None:
            FORMATS[self.form].recipe_level(self.like)

    @property
    def name(self) -> str:
        """What a recipe for it is called."""
        if self.like is not None:
            return f"{FORMATS[self.form].recipe_level(self.like)}-profiled"
        return f"{self.bpw:g}bpw" if self.bpw is not None else f"{(self.size or 0) / 1e9:.3g}GB"


@dataclass(frozen=True)
class Choice:
    """A recipe and what it stands for. ``size``: of the whole file; ``levels``: plain levels whose tensors were all
    measured at their types, with (bytes of the file, summed KLD), to compare with ``allocation.kld``."""

    recipe: Recipe
    allocation: Allocation
    size: int
    levels: Mapping[str, tuple[int, float]]


HEADER_SLACK = 2048
"""Bytes for the names of recipe and importance matrix in the metadata."""

_COMPARED = ("Q2_K", "Q3_K_M", "IQ4_XS", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0")


def choose(source: Source, profile: Profile, target: Target, *, name: str | None = None) -> Choice:
    """The recipe for ``target``. ``name``: of the recipe, else made of the size. Raises as ``allocate``, UsageError for
    no such level."""
    rest = rest_of_file(source)
    if target.like is not None:
        like = parse_level(target.like).name
        budget = bytes_of(source, level_types(source, like))
    elif target.size is not None:
        budget = target.size - rest - HEADER_SLACK
    else:
        weights = sum(weights_of(output.shape) for output in source.tensors.outputs if output.constant is None)
        budget = int((target.bpw or 0.0) * weights / 8) - rest - HEADER_SLACK
    names = set(profile.by_tensor())
    if target.like is not None:
        unmeasured = {key: qtype for key, qtype in level_types(source, like).items() if key not in names}
        budget -= bytes_of(source, unmeasured)
    allocation = allocate(profile, budget, target.types)
    weights = sum(weights_of(output.shape) for output in source.tensors.outputs if output.name in names)
    level = like if target.like is not None else nearest_level(8 * allocation.nbytes / weights)
    recipe = Recipe(name=name or target.name, level=level, tensors=dict(allocation.types), model=profile.model)
    return Choice(recipe, allocation, rest + allocation.nbytes, _plain_levels(source, profile, rest))


def smallest(wanted: Sequence[Candidate]) -> dict[str, int]:
    """{tensor: bytes of the smallest of its types, padding included}."""
    found: dict[str, int] = {}
    for one in wanted:
        size = padded(one.nbytes)
        found[one.name] = min(size, found.get(one.name, size))
    return found


_HALF = {"F16": "f16", "BF16": "bf16"}


def lossless(source: Source, wanted: Sequence[Candidate]) -> list[Sensitivity]:
    """Tensors of ``wanted`` in the 16 bits in which ``source`` stores them."""
    found = []
    for name, outputs in {one.name: one.outputs for one in wanted}.items():
        stored = {source.checkpoint.tensors[piece.source].dtype for output in outputs for piece in output.pieces}
        qtype = _HALF.get(stored.pop()) if len(stored) == 1 else None
        if qtype is not None:
            weights = sum(weights_of(output.shape) for output in outputs)
            found.append(Sensitivity(name, qtype, 16.0, 2 * weights, 0.0, 0.0))
    return found


def plain_level(source: Source, wanted: Sequence[Candidate], limit: int, model: str) -> Choice | None:
    """The largest of the plain levels that fits ``limit`` bytes of the whole file, as a choice for the tensors of
    ``wanted``; None where none fits. ``model``: digest of the source."""
    names, rest = {one.name for one in wanted}, rest_of_file(source)
    types = {level: level_types(source, level) for level in _COMPARED}
    sizes = {level: rest + bytes_of(source, found) for level, found in types.items()}
    fitting = [level for level in _COMPARED if sizes[level] + HEADER_SLACK <= limit]
    if not fitting:
        return None
    level = max(fitting, key=lambda one: (sizes[one], one))
    own = {name: qtype for name, qtype in types[level].items() if name in names}
    recipe = Recipe(name=level, level=level, tensors=own, model=model)
    return Choice(recipe, Allocation(own, bytes_of(source, own), limit, 0.0, 0.0), sizes[level], {})


def rest_of_file(source: Source) -> int:
    """Bytes of the file that no recipe changes: header, norms, routers."""
    (plan,) = plan_source(source, "gguf", levels=["Q8_0"], name=None, options=Options(), importance=None)
    return plan.size - bytes_of(source, level_types(source, "Q8_0"))


def _plain_levels(source: Source, profile: Profile, rest: int) -> dict[str, tuple[int, float]]:
    figures = {(row.tensor, row.qtype): row.kld for row in profile.rows}
    found = {}
    for level in _COMPARED:
        types = level_types(source, level)
        if all(pair in figures for pair in types.items()):
            found[level] = (rest + bytes_of(source, types), sum(figures[pair] for pair in types.items()))
    return found
