"""How a format takes over what a source stores quantized: the level and the options that hold the most of it as it is.

A plan's matter, so nothing here reads a weight: qtypes/holding.py says what grids hold by their names.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llm_quantize.architectures.base import OutputTensor, Piece
from llm_quantize.architectures.rows import weights_of
from llm_quantize.errors import UsageError
from llm_quantize.formats.base import Packed, SchemeOptions
from llm_quantize.formats.modules import Module, select
from llm_quantize.formats.packed_recipe import types_of
from llm_quantize.formats.recipe import Recipe
from llm_quantize.io.journal import canonical_json
from llm_quantize.qtypes import QTYPES
from llm_quantize.qtypes.codebook import OF_127, CodebookType
from llm_quantize.qtypes.held import Held, move_whole
from llm_quantize.qtypes.holding import CODES, NEVER, PERHAPS, SURELY, holds
from llm_quantize.qtypes.integer import WHOLE_ROW
from llm_quantize.qtypes.packed import packed_type

if TYPE_CHECKING:
    from llm_quantize.models.opening import Source
    from llm_quantize.options import Options
    from llm_quantize.plan import ArtifactPlan

PLAIN = ("f32", "f16", "bf16")
"""Types of tensors that are floats."""

_FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float32"}


@dataclass(frozen=True)
class Kept:
    """``level`` with ``options``, which hold ``weights`` of the source's quantized ones as they are, as far as names
    tell."""

    level: str
    options: Options
    weights: int


def holding_of(source: Source, output: OutputTensor, qtype: str, *, wide: bool = True, act_order: bool = False) -> int:
    """NEVER, PERHAPS, CODES or SURELY: whether the grid ``qtype`` holds all rows of ``output`` as the source stores
    them. ``wide``: scales that are floats are stored in float32. ``act_order``: of a format whose groups need not stand
    side by side."""
    blocks = {source.checkpoint.block_type(piece.source, transpose=piece.transpose) for piece in output.pieces}
    if blocks == {qtype}:
        return SURELY
    found = [held_of(source, piece) for piece in output.pieces]
    held = min((NEVER if one is None else _holds(qtype, one, act_order) for one in found), default=NEVER)
    narrow = not wide and qtype not in OF_127 and any(one is not None and one.qtype in OF_127 for one in found)
    return CODES if held == SURELY and narrow else held


def held_of(source: Source, piece: Piece) -> Held | None:
    """``Model.held`` of the rows of ``piece``, as ``held_output_rows`` gives them: None too where they are read by
    columns, or altered, or their columns are in an order that parts groups."""
    held = None if piece.altered else source.checkpoint.held(piece.source, transpose=piece.transpose)
    if held is None or piece.columns is None:
        return held
    if held.act_order or not (held.qtype in QTYPES or _is_known((held.qtype,))):
        return None
    size = QTYPES[held.qtype].block_size if held.qtype in QTYPES else packed_type(held.qtype).group_size
    return held if size == WHOLE_ROW or move_whole(piece.columns, size) else None


def _holds(qtype: str, held: Held, act_order: bool) -> int:
    return holds(qtype, held.qtype, powers=held.powers) if act_order or not held.act_order else NEVER


def is_act_order(source: Source, output: OutputTensor) -> bool:
    """Whether groups of ``output`` do not stand side by side where the source stores it."""
    found = (source.checkpoint.held(piece.source, transpose=piece.transpose) for piece in output.pieces)
    return any(one is not None and one.act_order for one in found)


def out_of_order(source: Source, plan: ArtifactPlan, act_order: bool) -> tuple[str, ...]:
    """What ``plan`` stores as codes though the source has it in groups that do not stand side by side, which its format
    cannot say (``act_order``: it can): the names of matrices, or of tensors."""
    if act_order:
        return ()
    rounded = [plan.tensors[index] for index in plan.rounded()]
    found = [(one.name, one.output) for one in rounded if one.qtype not in PLAIN]
    found += [(matrix.name, matrix.weight) for matrix in plan.matrices]
    return tuple(name for name, output in found if is_act_order(source, output))


def keeping(form: Packed, source: Source, level: str | None, options: Options, edges: Collection[str]) -> Kept:
    """The level of ``form`` (``level``, where that is named) that holds the most, and what must be asked with it: the
    source's groups and zero points, where the user asks for none, and that modules that are no codes in the source stay
    as they are. What an adapter changed is rounded to a level that is named.

    ``weights`` 0 where none holds anything. Raises what ``select`` raises."""
    method, levels = options.method, form.LEVELS if level is None else [level]
    found = select(source, method.ignore, edges=edges)
    held = {module.name: _held(source, module) for module in found.modules}
    given = {name: one for name, one in held.items() if one is not None}
    if not given:
        return Kept(levels[0], options, 0)
    merged = {name for one in source.checkpoint.adapters for name in one.changes} if level is not None else set()
    plain = [module for module in found.modules if held[module.name] is None]
    plain = [module for module in plain if not any(piece.source in merged for piece in module.weight.pieces)]
    options = _without(options, [module.name for module in plain])
    modules = [module for module in found.modules if module.name in given]
    mix = _mix(form, found.modules, given) if level is None else None
    if mix is not None:
        weights = sum(weights_of(module.weight.shape) for module in modules)
        return Kept(mix.level, replace(options, overrides=replace(options.overrides, recipe=mix)), weights)
    best = max(_candidates(form, levels, options, modules, given), key=lambda one: one[0], default=None)
    if best is None or best[0][:2] == (0, 0):
        return Kept(levels[0], options, 0)
    score, chosen, asked = best
    grid = form.scheme(chosen, asked).qtype.name
    edge = [one.name for one in modules if not one.seen and _holds(grid, given[one.name], form.ACT_ORDER) == NEVER]
    options = _without(options, edge)  # floats lose less there than a second rounding
    method = replace(
        options.method, group_size=asked.group_size, symmetric=asked.symmetric, double_quant=asked.double_quant
    )
    return Kept(chosen, replace(options, method=method), score[0])


def _without(options: Options, names: Sequence[str]) -> Options:
    """``options`` with the modules ``names`` left as floats."""
    if not names:
        return options
    left = f"^(?:{'|'.join(map(re.escape, names))})$"
    return replace(options, method=replace(options.method, ignore=(*options.method.ignore, left)))


def _mix(form: Packed, modules: Sequence[Module], given: Mapping[str, Held]) -> Recipe | None:
    """The recipe that gives each module its own grid of the source, where those are of several kinds; None where they
    are not, or the format has no such grids, mixes or orders, or no runtime would read this one."""
    grids = {name: held.qtype for name, held in given.items()}
    if form.MIXES is None or len(set(grids.values())) < 2 or (form.EDGES and len(given) < len(modules)):
        return None
    if not form.ACT_ORDER and any(held.act_order for held in given.values()):
        return None
    try:
        grids = {name: form.MIXES.recipe_type(qtype) for name, qtype in grids.items()}
    except UsageError:  # a grid that only another format has
        return None
    text = canonical_json(grids)
    name = form.MIXES.mixed_level(set(grids.values()))
    recipe = Recipe(name, form.EXAMPLE, grids, sha256=hashlib.sha256(text).hexdigest(), form=form.NAME)
    packed = [module for module in modules if module.name in given]
    try:
        types_of(recipe, packed, packed_type(next(iter(grids.values()))).name)
        for module in packed:
            if not module.seen:
                form.MIXES.check_head(recipe, grids[module.name])
    except UsageError:  # what runtimes make one is on several grids, or groups do not divide rows
        return None
    return recipe


def _held(source: Source, module: Module) -> Held | None:
    found = [source.checkpoint.held(piece.source) for piece in module.weight.pieces]
    return found[0] if len(set(found)) == 1 else None


Score = tuple[int, ...]


def _candidates(
    form: Packed, levels: Sequence[str], options: Options, modules: Sequence[Module], given: Mapping[str, Held]
) -> Iterator[tuple[Score, str, SchemeOptions]]:
    """(how good, level, options) of every grid of ``levels`` that divides all rows. Best: what holds most weights, in
    the fewest bits, in the source's own groups, with inputs as they come, and the least to ask for."""
    method = options.method
    weights: Counter[Held] = Counter()
    for module in modules:
        weights[given[module.name]] += weights_of(module.weight.shape)
    names = [held.qtype for held, _ in weights.most_common()]
    own = packed_type(names[0]).group_size if _is_known(names) else None
    groups = {None, *(packed_type(name).group_size for name in names if _is_known((name,)))}
    asked = (
        groups if method.group_size is None else {method.group_size},
        (None, True, False) if method.symmetric is None else (method.symmetric,),
        (None, True) if method.double_quant is None else (method.double_quant,),
    )
    order = itertools.product(sorted(asked[0], key=lambda size: size or 0), *asked[1:])
    for choice, (index, level) in itertools.product(list(order), enumerate(levels)):
        found = SchemeOptions(choice[0], choice[1], double_quant=choice[2])
        try:
            scheme = form.scheme(level, found)
        except UsageError:  # no such grid of this level
            continue
        size = scheme.qtype.group_size
        if size != WHOLE_ROW and any(module.weight.shape[-1] % size for module in modules):
            continue
        told = {held: _holds(scheme.qtype.name, held, form.ACT_ORDER) for held in weights}
        words = ((SURELY, CODES), (PERHAPS,))
        total, perhaps = (sum(weights[held] for held in told if told[held] in some) for some in words)
        plain, calibrated = form.inputs(scheme) is None, bool(form.input_fields(scheme))
        if calibrated and len(levels) > 1:
            continue
        least = -sum(one is not None for one in choice)
        yield (total, perhaps, -scheme.qtype.bits, int(size == own), int(plain), least, -index), level, found


def _is_known(names: Collection[str]) -> bool:
    try:
        for name in names:
            packed_type(name)
    except UsageError:
        return False
    return True


def scale_of(source: Source, modules: Sequence[Module], *, exact: bool = False) -> str | None:
    """How most of the source's scales are stored that are floats; None where it has none, and of grids whose scales are
    float32 whatever the model is in, unless ``exact``. ``modules``: those that are packed."""
    counts: Counter[str] = Counter()
    for module in modules:
        held = _held(source, module)
        if held is not None and _is_known((held.qtype,)):
            kind = packed_type(held.qtype)
            always = isinstance(kind, CodebookType) and kind.codebook in OF_127
            if not isinstance(kind, CodebookType) or kind.scale_follows or (exact and always):
                counts[held.scale] += weights_of(module.weight.shape)
    return counts.most_common(1)[0][0] if counts else None


def most_held(source: Source) -> str | None:
    """The grid of directories that most quantized weights of ``source`` are on; None where there is none."""
    counts: Counter[str] = Counter()
    for name, info in source.checkpoint.tensors.items():
        held = source.checkpoint.held(name)
        if held is not None and _is_known((held.qtype,)):
            counts[held.qtype] += info.elements
    return counts.most_common(1)[0][0] if counts else None


def float_of(source: Source, names: Collection[str]) -> str | None:
    """The type of floats that most weights of the tensors ``names`` are stored in; None where none are."""
    counts: Counter[str] = Counter()
    for name in names:
        info = source.checkpoint.tensors[name]
        if info.dtype in _FLOATS:
            counts[_FLOATS[info.dtype]] += info.elements
    return counts.most_common(1)[0][0] if counts else None
