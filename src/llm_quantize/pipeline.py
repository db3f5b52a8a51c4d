"""The main path: open → calibrate → plan → preflight → quantize → finish. All else is a room it walks through."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from llm_quantize import events, memory
from llm_quantize.artifacts import preflight
from llm_quantize.artifacts.manifest import fallbacks, nonfinite_counts
from llm_quantize.artifacts.modelfile import with_modelfile
from llm_quantize.artifacts.output import (
    already_complete,
    as_begun,
    discard_inexact,
    finish_card,
    open_output,
    refuse_changed,
    refuse_other,
    sealed_manifest,
    source_times,
    target_path,
)
from llm_quantize.artifacts.recheck import Recheck, recorded_units, settle
from llm_quantize.artifacts.result import ArtifactResult, complete_result
from llm_quantize.artifacts.rounding import (
    Policy,
    Rounding,
    Target,
    conversion_of,
    matrix_records,
    missing_units,
    unit_records,
    unit_weights,
)
from llm_quantize.artifacts.vouched import Vouched
from llm_quantize.blockwise import effort, solve_matrices
from llm_quantize.blockwise.estimate import estimate
from llm_quantize.calibration import choose
from llm_quantize.engine import ENGINES, stop_on_signals
from llm_quantize.errors import UsageError
from llm_quantize.events import EventSink, ignore
from llm_quantize.formats.base import Format, Importance
from llm_quantize.formats.keeping import out_of_order
from llm_quantize.formats.table import ACT_ORDER, FORMATS, format_name, levels_of
from llm_quantize.io.cache import cache_directory
from llm_quantize.io.leftovers import allocated_bytes
from llm_quantize.made import inputs_of, made_of
from llm_quantize.measures.amounts import counted
from llm_quantize.models.opening import Source, open_source
from llm_quantize.models.shared import SharedModel
from llm_quantize.options import Options
from llm_quantize.plan import ARITHMETIC, ArtifactPlan, spoken

__all__ = ["ArtifactResult", "Options", "Source", "fill", "open_source", "plan", "plan_source", "quantize"]

Pool = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]


def plan(
    model: str,
    format: str = "gguf",
    *,
    levels: Sequence[str],
    name: str | None = None,
    revision: str | None = None,
    lora: Sequence[str] = (),
    options: Options | None = None,
    on_event: EventSink = ignore,
) -> list[ArtifactPlan]:
    """Exact plans for each level, from headers alone; no weight is read (or fetched) and nothing is written."""
    options, format = options or Options(), format_name(format)
    _refuse_other_recipe(format, options)
    source = open_source(model, revision=revision, lora=lora, on_event=on_event, headers_only=True)
    with source.checkpoint:
        importance = choose.foresee(source, format, levels, options)
        return plan_source(source, format, levels=levels, name=name, options=options, importance=importance)


def quantize(
    model: str,
    format: str = "gguf",
    *,
    levels: Sequence[str],
    output_dir: str | Path = ".",
    name: str | None = None,
    revision: str | None = None,
    lora: Sequence[str] = (),
    options: Options | None = None,
    on_event: EventSink = ignore,
) -> list[ArtifactResult]:
    """Quantize a model to every level in one read of the source; each artifact appears whole, under its final name.

    The same call after any interruption continues, and ends in the same bytes. Raises the error tree; StoppedError
    after SIGINT or SIGTERM (resumable).
    """
    options, format = options or Options(), format_name(format)
    _refuse_other_recipe(format, options)
    source = open_source(model, revision=revision, lora=lora, on_event=on_event)
    before, told = memory.before_libraries(), frozenset[str]()
    with source.checkpoint:
        if source.checkpoint.kind and not options.judged:
            text = "`llm-quantize convert` keeps the codes of a quantized model where another format holds them"
            on_event(events.Note(f"{text}, and says of every tensor what changed"))
        importance: choose.Chosen | None = choose.foresee(source, format, levels, options, on_event)
        plans = plan_source(source, format, levels=levels, name=name, options=options, importance=importance)
        costs = [effort.writing(artifact) for artifact in plans]
        collect, write = events.parts(on_event, [effort.collecting(source, importance, options), sum(costs)])
        if any(artifact.matrices for artifact in plans):
            method = options.method.method_of(format)
            choose.need_torch("keeping the codes of a model" if method.keeps else f"--method {method.name}", "torch")
        if isinstance(importance, choose.Foreseen):
            _refuse_early(source, plans, Path(output_dir), options, importance, before)
            told = _tell(plans, told, on_event)
            importance = choose.collected(source, format, options, collect, before=before)
            plans = plan_source(source, format, levels=levels, name=name, options=options, importance=importance)
        _tell(plans, told, on_event)
        paths = [target_path(Path(output_dir), artifact) for artifact in plans]
        plans = [as_begun(plan, path, options, on_event) for plan, path in zip(plans, paths, strict=True)]
        vouched = Vouched.of(source.checkpoint.files, source_times(source.checkpoint), cache_directory() / "complete")
        done = [
            already_complete(source, artifact, path, options, vouched, events.Part(write, 0.0, 0.0))
            for artifact, path in zip(plans, paths, strict=True)
        ]
        todo = [(artifact, path) for artifact, path, ready in zip(plans, paths, done, strict=True) if not ready]
        fitted = preflight.check(
            [artifact for artifact, _ in todo],
            Path(output_dir),
            threads=options.threads,
            max_ram=options.max_ram,
            before=before,
            already_allocated=sum(allocated_bytes(path) for _, path in todo),
            ignore_space=options.ignore_space,
            engine=options.engine,
        )
        stem = _file_stem(name or source.stem)
        written = _write_all(source, todo, importance, options, stem, fitted, vouched.times, write) if todo else {}
        for path in written:
            vouched.keep(path)
    results = []
    for artifact, path in zip(plans, paths, strict=True):
        result = written.get(path) or complete_result(artifact, path)
        if options.modelfile:
            result = with_modelfile(result, replace=options.overwrite, on_event=on_event)
        on_event(events.Finished(result.level, str(path), result.size, result.status))
        results.append(result)
    return results


def _refuse_other_recipe(format: str, options: Options) -> None:
    """Refuse a recipe for another format before anything is made of its level."""
    if options.overrides.recipe is not None:
        options.overrides.recipe.refuse_other_format(format)


def _refuse_early(
    source: Source,
    plans: Sequence[ArtifactPlan],
    directory: Path,
    options: Options,
    importance: choose.Foreseen,
    before: int,
) -> None:
    """Refuse what cannot succeed before hours of calibration, not after."""
    preflight.check(plans, directory, threads=1, max_ram=options.max_ram, before=before, ignore_space=True)
    for artifact in plans:
        refuse_other(source, artifact, target_path(directory, artifact), options, importance.datasets)


def _tell(plans: Sequence[ArtifactPlan], told: frozenset[str], on_event: EventSink) -> frozenset[str]:
    """Say what ``plans`` have to say beside what was ``told``; returns what is told by now."""
    said = spoken(plans)
    for kind, text, details in said:
        if text not in told:
            on_event((events.Caution if kind == "warning" else events.Note)(text, details or None))
    return told | {text for _, text, _ in said}


def plan_source(
    source: Source,
    format: str,
    *,
    levels: Sequence[str],
    name: str | None,
    options: Options,
    importance: Importance | None,
) -> list[ArtifactPlan]:
    """``plan`` for an opened source and the importance that it will be quantized with."""
    form = FORMATS[format_name(format)]
    levels = levels_of(form, levels)
    if not levels:
        raise UsageError(
            "no level given",
            expected=f"one or more of {', '.join(form.levels)}",
            remedy=f"name one or more with -q, for example -q {form.example}",
        )
    stem = _file_stem(name or source.stem)
    plans = _asked(form, source, levels, stem, importance, options)
    _refuse_refinement(plans, form, options)
    if isinstance(importance, choose.Text):
        # A level that no text makes (int16 of CTranslate2, beside int8) is the same file whatever the others need.
        typed = [replace(plan, identity={**plan.identity, ARITHMETIC: importance.dtype}) for plan in plans]
        plans = [new if plan.chained else plan for plan, new in zip(plans, typed, strict=True)]
    if options.judged:
        plans = [replace(plan, judged=True, identity={**plan.identity, "judged": True}) for plan in plans]
    if options.method.method_of(form.name).keeps:
        plans = [_with_order(source, plan, form) for plan in plans]
    return _named([_estimated(source, plan, importance, options) for plan in plans], stem, name)


def _refuse_refinement(plans: Sequence[ArtifactPlan], form: Format, options: Options) -> None:
    """Refuse --refine where there is no output of a block to go by: nothing runs, or only the source does."""
    method = options.method
    if not method.refinement:
        return
    chosen = method.method_of(form.name)
    lacks = [
        (not chosen.reads_text, f"--method {chosen.name} runs no text through the model", "--method gptq"),
        (options.statistics is not None, "with --statistics no text runs through the model", "leave it out"),
        (method.inputs == "source", "with --inputs source only the source runs", "--inputs sequential"),
        (not all(plan.observed for plan in plans), "this level has no codes that text chooses", "another level"),
    ]
    for refused, found, remedy in lacks:
        if refused:
            raise UsageError(
                "--refine needs the outputs of the quantized model's blocks",
                expected="error feedback on text, block after block",
                found=found,
                remedy=remedy,
            )


def _asked(
    form: Format, source: Source, levels: Sequence[str], stem: str, importance: Importance | None, options: Options
) -> list[ArtifactPlan]:
    """The plan of each level, with the level as the user named it: the first name, where several mean the same."""
    plans = form.plan(source, levels, stem, importance, options)
    if len(plans) == len(levels):
        return [replace(plan, asked=level) for plan, level in zip(plans, levels, strict=True)]
    names = {one.name: level for level in reversed(levels) for one in form.plan(source, [level], stem, None, options)}
    return [replace(plan, asked=names[plan.name]) for plan in plans]


def _named(plans: list[ArtifactPlan], stem: str, name: str | None) -> list[ArtifactPlan]:
    """``plans``, with a warning where the user's name could not be kept."""
    if name is not None and stem != name:
        plans[0] = replace(plans[0], warnings=(f"the output is called {stem}, not {name[:80]!r}", *plans[0].warnings))
    return plans


def _with_order(source: Source, plan: ArtifactPlan, form: Format) -> ArtifactPlan:
    """``plan``, with a warning where the source has matrices in an order of columns that the format does not have."""
    names = out_of_order(source, plan, form.act_order)
    if not names:
        return plan
    text = (
        f"{counted(len(names), 'matrix', 'matrices')} rounded anew: g_idx spreads the columns of each group over the "
        f"row (act-order), {form.name} has them side by side; {' and '.join(ACT_ORDER)} keeps them (-v lists them)"
    )
    return replace(plan, warnings=(*plan.warnings, text), details={**plan.details, text: names})


def _estimated(source: Source, plan: ArtifactPlan, importance: Importance | None, options: Options) -> ArtifactPlan:
    """``plan`` with what it will take, in memory and in time; where text is still to be run, a note says so."""
    phases, cost = estimate(source, plan, options, importance)
    told = None if importance is None or importance.sha256 else cost.text
    return replace(plan, notes=(*plan.notes, *filter(None, [told])), phases=phases, cost=cost)


def _file_stem(name: str) -> str:
    stem = re.sub(r"[^\w.+-]+", "-", name.rsplit("/", 1)[-1]).strip("-.") or "model"
    if len(stem.encode()) > 180:
        raise UsageError("the output name is too long", found=len(stem.encode()), expected="at most 180 bytes")
    return stem


def _recheck(source: Source, targets: Sequence[Target], deep: bool, pool: Pool, on_event: EventSink) -> None:
    """Read back what an earlier run recorded, and tell how far that is: of a large model it takes minutes."""
    checks = recorded_units(targets, deep=deep)
    if not checks:
        return
    done, total = 0, sum(check.nbytes for check in checks)
    on_event(events.Resuming(units=len(checks), total=total))
    recheck = Recheck(SharedModel(source.checkpoint), tuple(target.output.opened for target in targets))
    for nbytes in settle(targets, pool(recheck, checks)):
        done += nbytes
        on_event(events.Check(what="finished parts", done=done, total=total))


def fill(
    source: Source,
    targets: Sequence[Target],
    importance: choose.Chosen | None,
    options: Options,
    fitted: preflight.Preflight,
    pool: Pool,
    stop: threading.Event,
    on_event: EventSink,
    *,
    goes_on: Callable[[Target], bool] = lambda _: True,
) -> None:
    """Quantize what is missing into the open outputs of ``targets``, in ``pool``: single tensors first, for all at
    once, then for each that ``goes_on`` lets what a method does with whole matrices."""
    plans = [target.plan for target in targets]
    costs = [sum(map(effort.rounding, plans)), *map(effort.solving, plans)]
    round_all, *solves = events.parts(on_event, costs)
    policy = Policy(SharedModel(source.checkpoint), options.nonfinite, source.files)
    units = list(missing_units(targets, choose.rows_of(source, importance)))
    total = sum(unit_weights(targets, unit) for unit in units)
    facts = {"total": total, "threads": fitted.threads, "memory_needed": fitted.memory_needed}
    on_event(events.Start(**facts, resumed_units=sum(len(target.output.records) for target in targets)))
    finished = 0
    opened = tuple(target.output.opened for target in targets)
    too_large, judged = (tuple(getattr(plan, name) for plan in plans) for name in ("too_large", "judged"))
    rounding = Rounding(policy, tuple(plan.tensors for plan in plans), opened, too_large, judged)
    for records in pool(rounding, units):
        for record in records:
            targets[record.artifact].keep(record)
            finished += record.weights
        round_all(events.Progress(done=finished, total=total))
    for target, solve in zip(targets, solves, strict=True):
        if not goes_on(target):
            continue
        if target.plan.matrices:
            began = time.process_time()
            solve_matrices(source, target, policy, importance, options, fitted, stop, solve)
            target.seconds += time.process_time() - began
        finish_card(target)


def _write_all(
    source: Source,
    todo: Sequence[tuple[ArtifactPlan, Path]],
    importance: choose.Chosen | None,
    options: Options,
    stem: str,
    fitted: preflight.Preflight,
    times: list[list[Any]],
    on_event: EventSink,
) -> dict[Path, ArtifactResult]:
    """Quantize what is missing into every open output, then put each in place. ``stem``: what artifacts are called
    without their level; ``times``: of the source's files."""
    inputs = inputs_of(options, importance)
    plans_todo = [artifact for artifact, _ in todo]
    work = sum(effort.rounding(one) + effort.solving(one) for one in plans_todo)
    filling, finish = events.parts(on_event, [work, sum(map(effort.finishing, plans_todo))])
    with ExitStack() as stack, stop_on_signals() as stop:
        targets = [
            Target(artifact, stack.enter_context(open_output(artifact, path, options, on_event)))
            for artifact, path in todo
        ]
        held = [lock for target in targets for lock in target.output.locks]
        engine, threads = ENGINES[options.engine], fitted.threads
        pool = partial(engine, threads=threads, stop=stop, resumable=options.checkpoints, hold=held)
        deep = any(target.output.notes.get("source_times") != times for target in targets)
        _recheck(source, targets, deep, pool, events.Part(on_event, 0.0, 0.0))
        resumed = {path: len(target.output.records) for target, (_, path) in zip(targets, todo, strict=True)}
        for target in targets:
            target.output.note({"source_times": times})
        fill(source, targets, importance, options, fitted, pool, stop, filling)
        refuse_changed(source.checkpoint, times)
        finish(events.Stage("finish"))
        sound = not options.exact or all((conversion_of(target) or {}).get("worst") is None for target in targets)
        for target in targets if sound else ():
            made = made_of(target, options, stem, inputs)
            target.output.finish(sealed_manifest(source, target, made))
    for target, (_, path) in () if sound else zip(targets, todo, strict=True):
        error = discard_inexact(source, target, path, options)
        if error is not None:
            raise error
    results = {}
    for target, (artifact, path) in zip(targets, todo, strict=True):
        counts = nonfinite_counts(unit_records(target))
        told, measured = fallbacks(artifact.fallbacks(), matrix_records(target)), target.output.notes.get("measured")
        results[path] = ArtifactResult(
            *(artifact, path, "written", target.seconds, resumed[path], counts, told, measured),
            conversion=conversion_of(target),
        )
    return results
