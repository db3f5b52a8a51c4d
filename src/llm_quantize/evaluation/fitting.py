"""The best artifact of a size: sensitivities, the types that lose least in the bytes, and a trial of the nearest.

    windows of text → sensitivities (by gradients, or measured; kept) → allocation → neighbours of it and the plain
    level, tried on other windows → the recipe

Figures are kept in the cache under the hashes of all that decides them, and so is the recipe: the same call finds both,
one with another size measures nothing again, and a stopped one goes on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import llm_quantize
from llm_quantize import events
from llm_quantize.architectures.rows import weights_of
from llm_quantize.calibration import choose
from llm_quantize.calibration.cache import prepare_directory
from llm_quantize.calibration.text import load_texts
from llm_quantize.calibration.tokens import TextTokenizer
from llm_quantize.calibration.windows import sample_windows
from llm_quantize.engine import stop_on_signals
from llm_quantize.errors import ResourceError
from llm_quantize.evaluation.allocation import Choice, Target
from llm_quantize.evaluation.ladders import Ladder, ladder_of
from llm_quantize.evaluation.profile import (
    ProfilePlan,
    identity_of,
    known_figures,
    measure_profile,
    plan_profile,
    scratch_of,
)
from llm_quantize.evaluation.sensitivity import FLOATS, KEPT, Candidate, Profile, Sensitivity
from llm_quantize.events import EventSink, ignore
from llm_quantize.formats.recipe import AS_FOUND, ESTIMATED, FLAT, Fit, Recipe
from llm_quantize.formats.recipe_file import read_recipe, recipe_bytes, write_recipe
from llm_quantize.io.cache import cache_directory
from llm_quantize.io.imatrix_file import Imatrix, read_imatrix
from llm_quantize.io.journal import canonical_json
from llm_quantize.measures.amounts import bytes_text, time_text
from llm_quantize.models.opening import Source
from llm_quantize.options import Options
from llm_quantize.qtypes.rates import rounding_seconds

if TYPE_CHECKING:
    from llm_quantize.measures.perplexity import Tokens

CONTEXT = 512
WINDOWS = 8
"""Of CONTEXT tokens, that sensitivities are found on."""

TRIED_WINDOWS = 4
"""After those, on which recipes are tried."""

FEW_BITS = 3.7
"""Bits per weight below which types of few bits are looked at, where there is importance for them."""

FLATTER = 0.8
"""The power of the figures that a neighbour is chosen by: it trusts differences between tensors less."""

_UNITS = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"))
_VERSION = {"version": llm_quantize.__version__}


@dataclass(frozen=True)
class Asked:
    """What is to fit. ``limit``: bytes of the weight files; ``facts``: of ``Fit``, beside what is found here (size,
    file, context, kv, beside). ``exact``: sensitivities are measured one by one, not found by gradients."""

    limit: int
    facts: Mapping[str, Any]
    exact: bool = False
    name: str | None = None

    @property
    def called(self) -> str:
        """The recipe's name."""
        size = int(self.facts["size"])
        unit, word = next((unit for unit in _UNITS if size >= unit[0]), _UNITS[-1])
        return self.name or f"fit-{size / unit:.4g}{word}"


@dataclass(frozen=True)
class Range:
    """What can be said of a size before there are sensitivities: bytes of the smallest artifact (``least``) and of the
    largest that fits (``limit``), the ``types`` to choose from, and what finding them takes, in words."""

    least: int
    limit: int
    types: tuple[str, ...]
    cost: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"least": self.least, "limit": self.limit, "types": list(self.types), "cost": self.cost}

    @property
    def text(self) -> str:
        """In one sentence."""
        return (
            f"the types will be chosen of {', '.join(self.types)}, so that the file has between "
            f"{bytes_text(self.least)} and {bytes_text(self.limit)}; the sensitivities are not known yet: {self.cost}"
        )


@dataclass(frozen=True)
class _Job:
    """One fit on its way: what it is of, the ``windows`` of both kinds, and where its figures are kept."""

    source: Source
    ladder: Ladder
    asked: Asked
    options: Options
    imatrix: Imatrix | None
    statistics: Path | None
    types: tuple[str, ...]
    wanted: tuple[Candidate, ...]
    windows: Tokens
    other: Tokens
    texts: tuple[str, ...]
    identity: Mapping[str, Any]

    @property
    def journal(self) -> Path:
        """The figures."""
        return _directory() / f"{_digest({**self.identity, **_VERSION})}.journal"

    @property
    def kept(self) -> Path:
        """The recipe."""
        told = {
            **self.identity,
            **_VERSION,
            "types": list(self.types),
            "asked": dict(self.asked.facts),
            "name": self.asked.called,
        }
        return _directory() / f"{_digest(told)}.recipe.json"


def _directory() -> Path:
    return cache_directory() / "sensitivities"


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(dict(facts))).hexdigest()[:32]


def fit_recipe(source: Source, form: str, asked: Asked, options: Options, on_event: EventSink = ignore) -> Recipe:
    """The recipe of the artifact in the format ``form`` that loses least in the bytes of ``asked``.

    Of ``options`` those count that say of which text, with which importance, and within which memory.

    Raises ResourceError where nothing fits, naming the smallest artifact there is; UsageError for a format without
    recipes and for options that contradict a size; MissingExtraError without torch; StoppedError after a signal
    (resumable); and what reading text and model, calibrating and measuring raise.
    """
    job = _open(source, form, asked, options, on_event)
    if job.kept.is_file():
        recipe = read_recipe(job.kept)
        on_event(events.Note("nothing is measured: this size was fitted before"))
        return recipe
    prepare_directory(_directory())
    finding, trying = events.parts(on_event, [4.0 * job.windows.size, 3.0 * job.other.size])
    plan = _plan(job, finding)
    if plan.groups:
        finding(events.Note(f"{plan.cost.sentence()}: about {time_text(_seconds(job, plan))} of CPU time"))
    profile = measure_profile(plan, journal=job.journal, on_event=finding)
    recipe = _chosen(job, plan, profile, trying)
    return write_recipe(job.kept, recipe, model_name=profile.name, replace=True)


def foresee_fit(
    source: Source, form: str, asked: Asked, options: Options, on_event: EventSink = ignore
) -> Recipe | Range:
    """The recipe where it or its sensitivities are known, else what can be said without them. Nothing is measured, and
    nothing written. Raises as ``fit_recipe``."""
    ladder = ladder_of(form)
    collects = options.calibrate is True or (_feeds_back(ladder, options) and options.statistics is None)
    if collects or source.checkpoint.temporary is not None:
        types = _types(source, ladder, asked, collects or _weighed(options))
        wanted = ladder.candidates(source, types, _all_names(source) if collects else {})
        least = _refuse_impossible(source, ladder, asked, wanted, options)
        return Range(least, asked.limit, types, "they are found when it is made")
    job = _open(source, form, asked, options, on_event)
    if job.kept.is_file():
        return read_recipe(job.kept)
    known = known_figures(job.journal, job.identity)
    if not all(one.key in known for one in job.wanted):
        least = ladder.least(source, job.wanted)
        cost = f"about {time_text(_foreseen_seconds(job))} of CPU time"
        return Range(least, asked.limit, job.types, cost)
    profile = _profile(job, known)
    choice = _choice(job, profile)
    return _with_fit(job, profile, choice, AS_FOUND, {}, 0)


def _open(source: Source, form: str, asked: Asked, options: Options, on_event: EventSink) -> _Job:
    """Everything that can be said, and refused, before a weight is read."""
    ladder = ladder_of(form)
    imatrix, statistics = _importance(source, ladder, options, on_event)
    types = _types(source, ladder, asked, imatrix is not None)
    wanted = tuple(ladder.candidates(source, types, {} if imatrix is None else imatrix.values))
    _refuse_impossible(source, ladder, asked, wanted, options)
    chosen = options.calibration
    length = min(CONTEXT, source.architecture.hyper.context_length)
    drawn = sample_windows(
        load_texts(chosen.data),
        TextTokenizer(source),
        samples=WINDOWS + TRIED_WINDOWS,
        length=length,
        seed=chosen.seed,
        chat=chosen.chat,
        on_event=on_event,
    )
    ids = drawn.ids.astype(np.int32)
    own = max(1, len(ids) - TRIED_WINDOWS) if len(ids) < WINDOWS + TRIED_WINDOWS else WINDOWS
    windows, other = ids[:own], ids[own:]
    identity = identity_of(source, windows, imatrix, statistics, form, chosen.device, not asked.exact, on_event)
    return _Job(
        *(source, ladder, asked, options, imatrix, statistics, types, wanted, windows, other),
        tuple(drawn.datasets),
        identity,
    )


def _importance(
    source: Source, ladder: Ladder, options: Options, on_event: EventSink
) -> tuple[Imatrix | None, Path | None]:
    """What codes will be chosen with: an importance matrix, which is collected here where the options ask for one, or
    the Hessians of a file."""
    if ladder.feeds_back:
        if options.statistics is not None or not _feeds_back(ladder, options):
            return None, options.statistics
        from llm_quantize.calibration.collect import calibrate

        choose.need_torch("calibration", "torch", "transformers")
        wanted = replace(choose.calibration_of(source, ladder.form, options), collect=("imatrix", "hessian"))
        return None, calibrate(source, wanted, on_event=on_event).path
    if options.calibrate is True and not options.method.calibrates(ladder.form):
        found = choose.collected(source, ladder.form, _settled(options), on_event)
        return (found if isinstance(found, Imatrix) else None), None
    if options.imatrix is not None:
        return read_imatrix(options.imatrix), None
    if options.statistics is not None and not options.method.calibrates(ladder.form):
        return choose.from_statistics(options.statistics, source, on_event=on_event), None
    return None, None


def _feeds_back(ladder: Ladder, options: Options) -> bool:
    """Whether the artifact's codes are chosen by error feedback, and the ladder can hold a matrix so."""
    return ladder.feeds_back and options.method.method_of(ladder.form).reads_text


def _settled(options: Options) -> Options:
    return replace(options, calibration=options.calibration.settled())


def _types(source: Source, ladder: Ladder, asked: Asked, weighed: bool) -> tuple[str, ...]:
    """The types to choose from: the usual ones, and with importance those of few bits where the size asks for them."""
    few = weighed and asked.limit * 8 < FEW_BITS * _weights(source)
    return (*ladder.default_types, *(ladder.weighed_types if few else ()))


def _weights(source: Source) -> int:
    return sum(weights_of(output.shape) for output in source.tensors.outputs if output.constant is None)


def _refuse_impossible(
    source: Source, ladder: Ladder, asked: Asked, wanted: Sequence[Candidate], options: Options
) -> int:
    """Bytes of the smallest artifact. Raises ResourceError where that is too large, saying what it would be."""
    least = ladder.least(source, wanted)
    if least <= asked.limit:
        return least
    smallest: dict[str, Candidate] = {}
    for one in wanted:
        if one.name not in smallest or one.nbytes < smallest[one.name].nbytes:
            smallest[one.name] = one
    types = sorted({one.qtype for one in smallest.values()})
    raise ResourceError(
        "nothing that can be made of this model fits this size",
        expected=f"at least {least:,} bytes: every matrix in the smallest type that it can have ({', '.join(types)})",
        found=f"{asked.limit:,} bytes for the weight files",
        remedy=_remedy(source, ladder, wanted, least),
    )


def _remedy(source: Source, ladder: Ladder, wanted: Sequence[Candidate], least: int) -> str:
    """What can be done about an artifact that has ``least`` bytes at the least."""
    few = ladder.weighed_types
    if few and not any(one.qtype in few for one in wanted):
        types = (*ladder.default_types, *few)
        smaller = ladder.least(source, ladder.candidates(source, types, _all_names(source)))
        if smaller < least:
            return f"allow a larger --fit, or give importance (--calibrate): types of few bits make {smaller:,} bytes"
    return "allow a larger --fit, or take a smaller model"


def _plan(job: _Job, on_event: EventSink) -> ProfilePlan:
    options = job.options
    return plan_profile(
        job.source,
        job.windows,
        job.types,
        job.imatrix,
        texts=job.texts,
        journal=job.journal,
        threads=options.threads,
        max_ram=options.max_ram,
        device=options.calibration.device,
        form=job.ladder.form,
        statistics=job.statistics,
        estimated=not job.asked.exact,
        on_event=on_event,
    )


def _seconds(job: _Job, plan: ProfilePlan) -> float:
    """CPU seconds of what a plan lacks."""
    from llm_quantize.blockwise.estimate import forward_seconds

    left = [one for one in job.wanted if one.key not in plan.known]
    return forward_seconds(job.source, plan.cost.forwards * plan.cost.tokens) + _rounding(job, left)


def _foreseen_seconds(job: _Job) -> float:
    """CPU seconds of everything, before there is a plan."""
    from llm_quantize.blockwise.estimate import forward_seconds
    from llm_quantize.evaluation.profile import PASSES

    n_layer = job.source.architecture.hyper.n_layer
    passes = len(job.wanted) * (n_layer + 1) / (2 * n_layer) if job.asked.exact else PASSES
    return forward_seconds(job.source, passes * job.windows.size + 4 * job.other.size) + _rounding(job, job.wanted)


def _rounding(job: _Job, wanted: Sequence[Candidate]) -> float:
    weighed = job.imatrix is not None
    return sum(rounding_seconds(one.weights, one.qtype, weighted=weighed) for one in wanted)


def _profile(job: _Job, known: Mapping[tuple[str, str], Sensitivity]) -> Profile:
    """The figures that are kept, as ``measure_profile`` gives them."""
    rows = tuple(known[one.key] for one in job.wanted)
    checkpoint, identity = job.source.checkpoint, job.identity
    text = {"sha256": identity["windows"], "tokens": int(job.windows.size)}
    estimated = not job.asked.exact
    return Profile(checkpoint.name, identity["model"], text, identity["importance"], rows, job.ladder.form, estimated)


def _choice(job: _Job, profile: Profile, power: float = 1.0) -> Choice:
    """The allocation by figures to the ``power``; what the source stores in 16 bits may stay so."""
    rows = [replace(row, kld=row.kld**power) for row in profile.rows]
    rows += job.ladder.lossless(job.source, job.wanted)
    target = Target(size=job.asked.limit, form=job.ladder.form)
    return job.ladder.choose(job.source, replace(profile, rows=tuple(rows)), target, name=job.asked.called)


def _chosen(job: _Job, plan: ProfilePlan, profile: Profile, on_event: EventSink) -> Recipe:
    """The recipe: the one of the sensitivities, or a neighbour that loses less on other text."""
    found = {AS_FOUND: _choice(job, profile), FLAT: _choice(job, profile, FLATTER)}
    plain = job.ladder.plain(job.source, job.wanted, job.asked.limit, profile.model)
    if plain is not None:
        found[plain.recipe.level] = plain
    distinct: dict[str, Choice] = {}
    for name, choice in found.items():
        if not any(choice.allocation.types == other.allocation.types for other in distinct.values()):
            distinct[name] = choice
    if len(distinct) == 1 or not len(job.other):
        if not len(job.other):
            on_event(events.Note("the text is too short to try recipes on other text: sensitivities alone decide"))
        return _with_fit(job, profile, distinct[AS_FOUND], AS_FOUND, {}, 0)
    tried = _tried(job, plan, list(distinct.values()), on_event)
    klds = dict(zip(distinct, tried, strict=True))
    best = min(klds, key=lambda name: klds[name])
    length = job.other.shape[1]
    return _with_fit(job, profile, distinct[best], best, klds, len(job.other) * (length - 1 - length // 2))


def _tried(job: _Job, plan: ProfilePlan, choices: Sequence[Choice], on_event: EventSink) -> list[float]:
    """The mean KLD of each choice on the other windows."""
    from llm_quantize.evaluation.trial import try_recipes
    from llm_quantize.streams.pool import Pool

    types = {qtype for choice in choices for qtype in choice.allocation.types.values()}
    covered = {} if job.imatrix is None else job.imatrix.values
    known = {one.key: one for one in job.ladder.candidates(job.source, sorted(types - FLOATS - {KEPT}), covered)}
    recipes = [
        [known[pair] for pair in choice.allocation.types.items() if pair in known]  # the others stay as they are
        for choice in choices
    ]
    with scratch_of(plan) as scratch, stop_on_signals() as stop:
        pool = Pool(plan.threads, stop, resumable=True)
        with job.ladder.holding(job.source, pool, job.imatrix, job.statistics) as hold:
            return try_recipes(job.source, plan.network, job.other, recipes, hold, pool, scratch, on_event)


def _with_fit(
    job: _Job, profile: Profile, choice: Choice, chosen: str, tried: Mapping[str, float], tokens: int
) -> Recipe:
    """The recipe of ``choice`` with what is told of it."""
    figures = {(row.tensor, row.qtype): row.kld for row in profile.rows}
    kld = sum(figures.get(pair, 0.0) for pair in choice.allocation.types.items())
    fit = Fit(
        **job.asked.facts,
        reached=choice.size,
        bits=round(8 * choice.size / _weights(job.source), 4),
        way=ESTIMATED if profile.estimated else "measured",
        kld=float(f"{kld:.6g}"),
        chosen=chosen,
        tried={name: float(f"{value:.6g}") for name, value in tried.items()},
        tokens=tokens,
    )
    recipe = replace(choice.recipe, name=job.asked.called, fit=fit)
    return replace(recipe, sha256=hashlib.sha256(recipe_bytes(recipe, model_name=profile.name)).hexdigest())


def _all_names(source: Source) -> dict[str, None]:
    return {output.name: None for output in source.tensors.outputs}


def _weighed(options: Options) -> bool:
    return options.imatrix is not None or options.statistics is not None
