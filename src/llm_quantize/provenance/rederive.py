"""An artifact made again from what its manifest records, and held against what it is, byte by byte.

The same path as ``pipeline.quantize``, with the artifact in the place of the output (artifacts/compared_output.py):
nothing of it is written, and no statistics that an earlier run kept are believed.

The manifest may be a stranger's. It chooses no file of this machine (made.py), and its source is opened only where
the user gives it, where it is the built-in model, or at a commit of the hub. Its expressions are tried out in a process
with few seconds before they are searched in names here.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import llm_quantize
from llm_quantize import events, memory
from llm_quantize.artifacts import preflight
from llm_quantize.artifacts.compared_output import ComparedOutput, Held, Place, places_of
from llm_quantize.artifacts.manifest import SEAL, adapters_told, read_manifest
from llm_quantize.artifacts.origin import FIELDS, alike, source_hash, stamped
from llm_quantize.artifacts.output import DTYPES, refuse_changed, sealed_manifest, source_times
from llm_quantize.artifacts.rederivation import Dependency, Difference, Rederivation
from llm_quantize.artifacts.rounding import Target
from llm_quantize.artifacts.verdict import MEASURED
from llm_quantize.calibration import choose
from llm_quantize.data import demo_model
from llm_quantize.engine import ENGINES, stop_on_signals
from llm_quantize.engine.limited import LimitedProcess
from llm_quantize.errors import MalformedInputError, UnsupportedError, UsageError, printable
from llm_quantize.events import EventSink, ignore
from llm_quantize.formats.modules import EDGES, select
from llm_quantize.io.artifact_paths import hidden_directory, manifest_path
from llm_quantize.io.cache import kept_hashes
from llm_quantize.io.content import contents
from llm_quantize.io.journal import canonical_json
from llm_quantize.io.leftovers import discard_hidden, hold_hidden
from llm_quantize.made import Given, Recorded, inputs_of, made_of, recorded, version_of, with_inputs
from llm_quantize.models.base import Merge, Model
from llm_quantize.models.hub.locate import BUILT_IN
from llm_quantize.models.identity import SMALL_FILES
from llm_quantize.models.opening import Source, open_source
from llm_quantize.models.weight_sets import ADAPTER
from llm_quantize.options import Options
from llm_quantize.pipeline import fill, plan_source
from llm_quantize.plan import ARITHMETIC, ArtifactPlan

_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)
_HUB_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*/[A-Za-z0-9_.-]+", re.ASCII)
_SECONDS = 10
_MEMORY = 2 << 30
_OF_THE_VERSION = frozenset(("version", "layout_sha256"))
"""Keys of an identity that another version of this package alone makes others."""


@dataclass(frozen=True)
class Ready:
    """What is needed to make ``artifact`` again, and is there: its ``manifest``, what that records (``found``), the
    ``options`` with the user's files, and the ``source`` to open, at ``revision``."""

    artifact: Path
    manifest: dict[str, Any]
    found: Recorded
    options: Options
    source: str
    revision: str | None


def ready(
    artifact: Path, *, source: str | None = None, revision: str | None = None, given: Given | None = None
) -> Ready:
    """``artifact`` to be made again from ``source`` (None: what the manifest records, where that is the built-in model
    or a commit of the hub) with the files ``given``. No tensor is read.

    Raises UnsupportedError where nothing is recorded, UsageError where a source or file must be given, IntegrityError
    where one given is another, MalformedInputError for a manifest of no sense.
    """
    manifest = read_manifest(manifest_path(artifact))
    if manifest is None or "made" not in manifest:
        raise _unrecorded(artifact, manifest)
    found = recorded(manifest["made"], manifest_path(artifact))
    options = with_inputs(found, given or Given())
    place, at = _source_of(manifest, source, revision, manifest_path(artifact))
    return Ready(artifact, manifest, found, options, place, at)


def rederive(
    begun: Ready,
    *,
    lora: Sequence[str] = (),
    threads: int | None = None,
    max_ram: int | None = None,
    digests: bool = False,
    on_event: EventSink = ignore,
) -> Rederivation:
    """Make the artifact of ``begun`` again, adapters ``lora`` merged into its source, and say whether its bytes are the
    same. ``digests``: hash the files that it was made from, too.

    Holds in memory what ``quantize`` does, and on disk what that keeps on its way (statistics, hidden states), beside
    the artifact and gone at the end.

    Raises UsageError where the adapters are others, and what ``quantize`` raises.
    """
    artifact, manifest, found = begun.artifact, begun.manifest, begun.found
    options = replace(begun.options, threads=threads, max_ram=max_ram, checkpoints=True)
    calibration = replace(options.calibration, threads=threads, max_ram=max_ram)
    options = replace(options, calibration=calibration)
    before = memory.before_libraries()
    target = artifact.with_name(f"{artifact.name}.rederived")
    with ExitStack() as stack:
        known = _called(manifest)
        model = open_source(begun.source, revision=begun.revision, lora=lora, on_event=on_event, called=known)
        stack.callback(model.checkpoint.close)
        _check_adapters(manifest, model, manifest_path(artifact))
        _try_expressions(model, options, manifest_path(artifact))
        plan, importance = _planned(model, found, manifest, options, target, before, on_event)
        cautions = list(_cautions(manifest, found, plan))
        for text in cautions:
            on_event(events.Caution(text))
        held, changed, left = _compared(
            model, plan, importance, options, artifact, target, manifest, found, before, on_event
        )
        dependencies = _dependencies(model, manifest["made"], on_event) if digests else ()
    told = _told(artifact, manifest, plan, held, changed, cautions)
    return replace(told, left=left, dependencies=dependencies)


def _unrecorded(artifact: Path, manifest: Mapping[str, Any] | None) -> UnsupportedError:
    if manifest is None:
        what, remedy = (
            "nothing is recorded of how this was made: it has no manifest",
            "--rederive is for artifacts of ours",
        )
    else:
        what = "the manifest does not say how its artifact was made: an earlier version wrote it"
        remedy = "make the artifact again; without --rederive, --source compares its values with the source"
    return UnsupportedError(what, file=artifact, remedy=remedy)


@contextmanager
def _workspace(target: Path) -> Iterator[Path]:
    """A directory beside ``target`` for statistics, held by this process: what one that was killed left is removed
    first, and all of it at the end. Raises BusyError, AccessError, ResourceError."""
    place = target.with_name(f"{target.name}.statistics")
    descriptor = hold_hidden(place)
    try:
        _empty(hidden_directory(place))
        yield hidden_directory(place)
    finally:
        _empty(hidden_directory(place))
        with suppress(OSError):  # whatever lies there is not ours
            hidden_directory(place).rmdir()
        os.close(descriptor)


def _empty(directory: Path) -> None:
    """Remove what a calibration leaves in ``directory``."""
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            discard_hidden(path.with_name(path.name.removesuffix(".hidden")))
        else:
            path.unlink()


# the source


def _source_of(
    manifest: Mapping[str, Any], source: str | None, revision: str | None, file: Path
) -> tuple[str, str | None]:
    """The model to open, and its revision. Raises UsageError where the user must give it."""
    if source is not None:
        return source, revision
    name, commit = str(manifest["identity"].get("source")), manifest["identity"].get("source_revision")
    if name == demo_model().name and commit is None:
        return BUILT_IN, None
    on_hub = isinstance(commit, str) and _COMMIT.fullmatch(commit) and _HUB_ID.fullmatch(name)
    if on_hub and not Path(name).exists():
        return name, str(commit)
    raise UsageError(
        "the artifact was made from a model of another place"
        if not on_hub
        else "a directory here has the name of the hub's model that the artifact was made from",
        file=file,
        expected=printable(name, 120),
        remedy="give it: --source MODEL",
    )


def _check_adapters(manifest: Mapping[str, Any], model: Source, file: Path) -> None:
    """Raise UsageError unless the adapters merged into ``model`` are those of the artifact."""
    wanted = manifest["identity"].get("adapters", [])
    found = json.loads(json.dumps([merge.facts for merge in model.checkpoint.adapters]))
    if wanted != found:
        raise UsageError(
            "the adapters are not those that were merged into the artifact's source",
            file=file,
            expected=adapters_told(wanted),
            found=adapters_told(found),
            remedy="give the same ones in the same order: --lora DIR[=SCALE]",
        )


def _called(manifest: Mapping[str, Any]) -> tuple[str, str | None] | None:
    """The name and commit of the source as the manifest has them: they stand in the artifact, and where a copy lies is
    no part of what it is. That it is the same model is proved by what is made of it."""
    name, revision = (manifest["identity"].get(key) for key in ("source", "source_revision"))
    known = isinstance(name, str) and (revision is None or isinstance(revision, str))
    return (name, revision) if known else None


def _try_expressions(model: Source, options: Options, file: Path) -> None:
    """Raise MalformedInputError where the expressions of a manifest are none, or take too long on the model's names."""
    expressions = [*(one for one, _ in options.overrides.tensor_types), *options.method.ignore]
    if not expressions:
        return
    names = {output.name for output in model.tensors.outputs} | model.checkpoint.tensors.keys()
    if options.method.ignore:  # experts that are stored in one tensor have names of their own
        names |= {module.name for module in select(model, edges=EDGES).modules}
    process = LimitedProcess("llm_quantize.provenance.expressions_child", {"names": sorted(names)}, memory=_MEMORY)
    process.ask({"expressions": expressions}, cpu=_SECONDS)
    answer = process.answer(1 << 16)
    if answer is None or "wrong" in answer:
        raise MalformedInputError(
            "the manifest's expressions cannot be searched in the model's names",
            file=file,
            expected=f"regular expressions that are found or not in {_SECONDS} seconds",
            found=printable(str((answer or {}).get("wrong", "no end")), 120),
            remedy="do not trust this artifact; make it again by hand if you know what it should be",
        )


# making it again


def _planned(
    model: Source,
    found: Recorded,
    manifest: Mapping[str, Any],
    options: Options,
    target: Path,
    before: int,
    on_event: EventSink,
) -> tuple[ArtifactPlan, choose.Chosen | None]:
    """The one plan, with its importance collected anew. Raises as ``pipeline.quantize`` before its work."""
    form = str(manifest.get("format"))
    levels = [found.level] if options.overrides.recipe is None else [options.overrides.recipe.level]
    importance: choose.Chosen | None = choose.foresee(model, form, levels, options, on_event)
    (plan,) = plan_source(model, form, levels=levels, name=found.name, options=options, importance=importance)
    if plan.matrices:
        choose.need_torch("making this artifact again", "torch")
    preflight.fit([plan], threads=1, max_ram=options.max_ram, before=before)
    if isinstance(importance, choose.Foreseen):
        on_event(events.Note(plan.cost.text) if plan.cost is not None and plan.cost.text else events.Stage("calibrate"))
        with ExitStack() as stack:
            keeps = not options.method.calibrates(form)
            directory = stack.enter_context(_workspace(target)) if keeps else None
            importance = choose.collected(model, form, options, on_event, before=before, directory=directory)
        (plan,) = plan_source(model, form, levels=levels, name=found.name, options=options, importance=importance)
    dtype = manifest["identity"].get(ARITHMETIC)
    if ARITHMETIC in plan.identity and dtype in DTYPES:
        plan = replace(plan, identity={**plan.identity, ARITHMETIC: dtype})
    return plan, importance


def _cautions(manifest: Mapping[str, Any], found: Recorded, plan: ArtifactPlan) -> list[str]:
    """What may make the bytes others though nothing was changed."""
    told = []
    was = str(manifest["identity"].get("version"))
    if was != llm_quantize.__version__:
        told.append(
            f"made by llm-quantize {printable(was, 40)}, and this is {llm_quantize.__version__}: what stands at the "
            "front of files differs by that alone"
        )
    for package, then in sorted(found.versions.items()):
        now = version_of(package)
        if now is not None and now != then:
            told.append(f"made with {package} {printable(then, 40)}, and here is {now}: sums may be others")
    if "processor" in found.versions and plan.chained:
        import torch

        now = f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"
        if now != found.versions["processor"]:
            told.append(
                f"made with {printable(found.versions['processor'], 80)}, and here is {now}: sums may be others"
            )
    return told


def _compared(
    model: Source,
    plan: ArtifactPlan,
    importance: choose.Chosen | None,
    options: Options,
    artifact: Path,
    target: Path,
    manifest: Mapping[str, Any],
    found: Recorded,
    before: int,
    on_event: EventSink,
) -> tuple[Held, list[str], int]:
    """What differs, the keys of the manifest that do, and how many matrices were not made again for it."""
    paths = [artifact / file.name for file in plan.files] if len(plan.files) > 1 else [artifact]
    absent = [path.name for path in paths if not path.is_file()]
    if absent:
        held = Held()
        for name in absent:
            held.of_file(name, None)
        return held, _unlike(manifest["identity"], plan.identity), 0
    threads, needed = preflight.fit([plan], threads=options.threads, max_ram=options.max_ram, before=before)
    fitted = preflight.Preflight(threads, needed, memory.memory_limit(options.max_ram), 0, 0, before)
    times = source_times(model.checkpoint)
    places = places_of(plan, manifest["tensors"])
    output = ComparedOutput(target, plan, paths, places, lambda text: on_event(events.Caution(text)))
    inputs = inputs_of(options, importance)
    with output, stop_on_signals() as stop:
        one = Target(plan, output)
        if not plan.chained:
            _compare_sources(model, plan, _of_older_kind(model, plan, places), output.held, on_event)
        pool = partial(ENGINES["threads"], threads=threads, stop=stop, resumable=False, hold=[])
        left = 0

        def goes_on(target: Target) -> bool:
            """Whole matrices follow from text that runs through the rest: where that or their weights in the source
            differ, so do they."""
            nonlocal left
            if plan.chained:
                _compare_sources(model, plan, places, output.held, on_event)
                left = 0 if output.held.same else len(target.plan.matrices)
            return not left

        fill(model, [one], importance, options, fitted, pool, stop, on_event, goes_on=goes_on)
        refuse_changed(model.checkpoint, times)
        output.finish(b"")
        changed = _unlike(manifest["identity"], plan.identity)
        if not left and output.held.same:
            made = made_of(one, options, found.name, inputs)
            again = read_sealed(sealed_manifest(model, one, made))
            before_it = _in_kinds_of(again, _made(manifest))
            changed += [key for key in _unlike(before_it, again) if key not in _COMPARED_APART]
    return output.held, changed, left


_COMPARED_APART = ("identity", "plan_sha256", "made")


def _made(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    """``manifest`` as the run left it: without what ``convert --measure`` added afterwards."""
    told = manifest.get("conversion")
    if not isinstance(told, dict):
        return manifest
    return {**manifest, "conversion": {key: value for key, value in told.items() if key != MEASURED}}


def _in_kinds_of(now: Mapping[str, Any], was: Mapping[str, Any]) -> Mapping[str, Any]:
    """The manifest ``was``, with the hashes of ``now`` for what sources were where its own are of an older kind: those
    were held against the source by themselves."""
    known = {
        (tensor["name"], *unit["rows"]): str(unit["source_sha256"])
        for tensor in now.get("tensors", [])
        for unit in tensor["units"]
    }

    def unit_of(name: str, unit: Mapping[str, Any]) -> Mapping[str, Any]:
        found = known.get((name, *unit["rows"]), "")
        return unit if not found or alike(found, unit["source_sha256"]) else {**unit, "source_sha256": found}

    tensors = [
        {**tensor, "units": [unit_of(tensor["name"], unit) for unit in tensor["units"]]} for tensor in was["tensors"]
    ]
    return {**was, "tensors": tensors}


def _of_older_kind(model: Source, plan: ArtifactPlan, places: Mapping[str, Place]) -> dict[str, Place]:
    """The units whose recorded hash of the source is of another kind than is made now."""
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    found = {}
    for unit, place in places.items():
        if place.source_sha256 and not place.source_sha256.startswith(FIELDS):
            output, _, _ = plan.origin(tensors[place.tensor], place.start, place.stop)
            if stamped(model.checkpoint, output):
                found[unit] = place
    return found


def _compare_sources(
    model: Source, plan: ArtifactPlan, places: Mapping[str, Place], held: Held, on_event: EventSink
) -> None:
    """Note the tensors of which the source's weights are not those that the artifact was made of: read before hours of
    work, not after."""
    known: dict[tuple[str, int, int], str] = {}
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    for number, place in enumerate(places.values()):
        if place.source_sha256 and place.tensor not in held.sources:
            output, start, stop = plan.origin(tensors[place.tensor], place.start, place.stop)
            key = (output.name, start, stop)
            if key not in known or not alike(known[key], place.source_sha256):
                known[key] = source_hash(model.checkpoint, output, start, stop, like=place.source_sha256)
            if known[key] != place.source_sha256:
                held.sources[place.tensor] = None
        on_event(events.Check("the source against what the artifact was made of", number + 1, len(places)))


def _dependencies(model: Source, made: Mapping[str, Any], on_event: EventSink) -> tuple[Dependency, ...]:
    """The files of the source and of the user that the artifact was made from, with their hashes."""
    checkpoint, merges = model.checkpoint, model.checkpoint.adapters
    whole = len(checkpoint.files) - len(merges)  # an adapter's one file comes after all of the model's
    files = sorted(checkpoint.files[:whole])
    if checkpoint.metadata is None:
        small = [checkpoint.directory / name for name in ("config.json", *SMALL_FILES)]
        files += [path for path in small if path.is_file()]
    owners: list[tuple[str, Model | Merge]] = [("source", checkpoint)] * len(files)
    for merge, weights in zip(merges, checkpoint.files[whole:], strict=True):
        files += [merge.directory / ADAPTER, weights]
        owners += [("adapter", merge)] * 2

    def told(done: int, total: int) -> None:
        on_event(events.Check("the files of the source", done, total))

    hashes = contents(files, kept=kept_hashes(), told=told)
    found = [
        Dependency(path.name, sha256, kind, owner.name, owner.revision)
        for path, sha256, (kind, owner) in zip(files, hashes, owners, strict=True)
    ]
    found += [Dependency(text["name"], text["sha256"], "text") for text in made.get("texts") or ()]
    found += [Dependency(one["name"], one["sha256"], kind) for kind, one in made.get("files", {}).items()]
    return tuple(found)


def read_sealed(data: bytes) -> dict[str, Any]:
    """The content of a manifest without its seal."""
    found: dict[str, Any] = json.loads(data)
    found.pop(SEAL)
    return found


def _unlike(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys in which two JSON objects differ."""
    return [key for key in sorted({*was, *now}) if canonical_json(was.get(key)) != canonical_json(now.get(key))]


def _told(
    artifact: Path,
    manifest: Mapping[str, Any],
    plan: ArtifactPlan,
    held: Held,
    changed: list[str],
    cautions: list[str],
) -> Rederivation:
    places = {tensor.name: number for number, tensor in enumerate(plan.tensors)}
    tensors = sorted(held.tensors.items(), key=lambda pair: places[pair[0]])  # threads find them in any order
    differences = [
        Difference(found.file, name, (found.first, found.last) if found.rows else None, found.rows, found.offset)
        for name, found in tensors
    ]
    differences += [Difference(found.file, "", None, 0, found.offset) for _, found in sorted(held.files.items())]
    other = str(manifest["identity"].get("version")) != llm_quantize.__version__
    return Rederivation(
        path=artifact,
        source=str(manifest["identity"].get("source")),
        differences=tuple(differences),
        sources=tuple(sorted(held.sources, key=lambda name: places[name])),
        changed=tuple(changed),
        cautions=tuple(cautions),
        tensors=len(plan.tensors),
        size=plan.size,
        other_version=other and set(changed) <= _OF_THE_VERSION,
    )
