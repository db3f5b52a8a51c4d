"""How an artifact was made, as its manifest says it under "made": enough to make it again, and nothing of where.

{"level": "Q4_K_M", "name": "tiny",                 what was asked for; the artifact is called NAME-LEVEL
 "options": {"method": {"method": "gptq"}},         those that decide bytes and are not the default (options.Options)
 "texts": [{"name": "general", "built_in": true, "sha256": "...", "weight": 0.3},
           {"name": "notes.txt", "sha256": "...", "weight": 1.0}],    what it was calibrated on
 "files": {"imatrix": {"name": "m.gguf", "sha256": "..."}},           or "statistics"
 "recipe": {...},                                   the whole recipe, as its file would have it, and its "sha256"
 "versions": {"torch": "2.9.0", ...}}               of what else computed, where text was run through the model

Files are recorded by name and hash, never by path. A manifest may come from a stranger: what it says is taken as
numbers and words of the options that it may set, and it can name no file of this machine.
"""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from llm_quantize.artifacts.rounding import Target
from llm_quantize.calibration.choose import Chosen
from llm_quantize.calibration.text import BUILT_IN, text_items
from llm_quantize.data import calibration_file
from llm_quantize.errors import IntegrityError, MalformedInputError, UnsupportedError, UsageError, printable
from llm_quantize.formats.gguf.levels import Overrides, parse_qtype
from llm_quantize.formats.recipe_file import parse_recipe, recipe_bytes
from llm_quantize.io.output_file import file_sha256
from llm_quantize.options import Options

OF_THE_RUN = frozenset(
    ("threads", "max_ram", "checkpoints", "checkpoint_dir", "overwrite", "ignore_space", "engine", "modelfile")
)
"""Options that decide how a run goes, and no byte."""

APART = frozenset(("measurement", "imatrix", "statistics", "data", "recipe"))
"""Options that are recorded in other ways, or (what is measured) not at all."""

FILES = ("imatrix", "statistics")
_PACKAGES = ("torch", "transformers", "numpy")
_MOST = {"sweeps": 1000, "alternations": 1000, "refinement": 100_000}
_LEAST = {"group_size": -1}
_LARGEST = 1 << 53


@dataclass(frozen=True)
class Recorded:
    """What a manifest says of how its artifact was made. ``texts`` and ``files`` as they stand there; ``options``
    without them."""

    level: str
    name: str
    options: Options
    texts: tuple[Mapping[str, Any], ...] | None
    files: Mapping[str, Mapping[str, Any]]
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Given:
    """The files of the user that an artifact is to be made again with: texts to calibrate on, importance,
    statistics."""

    texts: tuple[str, ...] = ()
    imatrix: Path | None = None
    statistics: Path | None = None


def inputs_of(options: Options, importance: Chosen | None) -> dict[str, Any]:
    """What of the record is read from the user's files, at the time when a run uses them: "texts" and "files".

    Raises what reading them raises."""
    files = {
        key: {"name": path.name, "sha256": file_sha256(path)}
        for key in FILES
        if isinstance(path := getattr(options, key), Path)
    }
    if importance is None or files:
        return {"files": files} if files else {}
    texts = [
        {
            "name": Path(name).name,
            **({"built_in": True} if built_in else {}),
            "sha256": file_sha256(calibration_file(name) if built_in else Path(name)),
            "weight": weight,
        }
        for name, built_in, weight in text_items(options.calibration.data)
    ]
    return {"texts": texts}


def made_of(target: Target, options: Options, name: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest of ``target`` says under "made", JSON-ready. ``name``: what the artifact is called without its
    level; ``inputs``: of ``inputs_of``."""
    chosen = _chosen(options)
    if "texts" in inputs:
        chosen["calibrate"] = True  # other levels of the run may have been the reason
    else:
        chosen.pop("calibration", None)
    recipe = options.overrides.recipe
    computes = bool(target.plan.matrices) or "texts" in inputs
    versions = {package: found for package in _PACKAGES if computes and (found := version_of(package))}
    if processor := target.output.notes.get("processor"):
        versions["processor"] = str(processor)
    return {
        "level": target.plan.asked,
        "name": name,
        **({"options": chosen} if chosen else {}),
        **inputs,
        **({} if recipe is None else {"recipe": {**json.loads(recipe_bytes(recipe)), "sha256": recipe.sha256}}),
        **({"versions": versions} if versions else {}),
    }


def version_of(package: str) -> str | None:
    """Of an installed package; None for what is none."""
    try:
        return version(package)
    except (PackageNotFoundError, ValueError):
        return None


def _chosen(settings: Any) -> dict[str, Any]:
    """The fields of ``settings`` that are not the default and decide bytes, JSON-ready."""
    plain = type(settings)()
    found: dict[str, Any] = {}
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.name in OF_THE_RUN | APART or value == getattr(plain, field.name):
            continue
        value = _chosen(value) if is_dataclass(value) else json.loads(json.dumps(value))
        if value != {}:
            found[field.name] = value
    return found


def recorded(made: Any, file: Path) -> Recorded:
    """What ``made`` of the manifest in ``file`` says. Raises MalformedInputError where it says nothing that this
    version could have written, UnsupportedError where a later one may have, UsageError for levels, types or values
    that there are not."""
    if not isinstance(made, dict) or not all(isinstance(made.get(key), str) for key in ("level", "name")):
        raise _malformed(file, "a level and a name", made)
    unknown = sorted(made.keys() - {"level", "name", "options", "texts", "files", "recipe", "versions"})
    if unknown:
        raise _later(file, ", ".join(unknown))
    options: Options = _filled(Options, made.get("options", {}), file, "options")
    options = replace(options, overrides=_with_types(options.overrides))
    if "recipe" in made:
        options = replace(options, overrides=_with_recipe(options.overrides, made["recipe"], file))
    texts, files, versions = made.get("texts"), made.get("files", {}), made.get("versions", {})
    if texts is not None and not (isinstance(texts, list) and all(_is_text(text) for text in texts)):
        raise _malformed(file, "texts by name, hash and weight", texts)
    if not isinstance(files, dict) or not files.keys() <= set(FILES) or not all(map(_is_file, files.values())):
        raise _malformed(file, f"files by name and hash: {', '.join(FILES)}", files)
    if not isinstance(versions, dict) or not all(isinstance(one, str) for one in versions.values()):
        raise _malformed(file, "versions in words", versions)
    return Recorded(
        made["level"], made["name"], options, None if texts is None else tuple(texts), files, dict(versions)
    )


def _is_file(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("name", "sha256"))


def _is_text(value: Any) -> bool:
    known = isinstance(value, dict) and isinstance(value.get("name"), str)
    weighed = known and type(value.get("weight")) in (int, float)
    return weighed and value.get("built_in", True) is True and isinstance(value.get("sha256"), str)


def _with_types(overrides: Overrides) -> Overrides:
    """``overrides`` with types that there are. Raises UsageError for another."""
    output, embedding = (
        None if name is None else parse_qtype(name) for name in (overrides.output_type, overrides.embedding_type)
    )
    pairs = tuple((expression, parse_qtype(name)) for expression, name in overrides.tensor_types)
    return replace(overrides, output_type=output, embedding_type=embedding, tensor_types=pairs)


def _with_recipe(overrides: Overrides, found: Any, file: Path) -> Overrides:
    sha256 = found.get("sha256") if isinstance(found, dict) else None
    if not isinstance(sha256, str):
        raise _malformed(file, "a recipe with its sha256", found)
    data = json.dumps({key: value for key, value in found.items() if key != "sha256"}).encode()
    return replace(overrides, recipe=replace(parse_recipe(data, file), sha256=sha256))


def _filled(kind: Any, found: Any, file: Path, where: str) -> Any:
    """A ``kind`` of options with the values ``found``; every one is proved to be of its type."""
    if not isinstance(found, dict):
        raise _malformed(file, f"an object of {where}", found)
    hints = get_type_hints(kind)
    known = {field.name for field in fields(kind)} - OF_THE_RUN - APART
    unknown = sorted(found.keys() - known)
    if unknown:
        raise _later(file, f"{where}: {', '.join(unknown)}")
    values = {}
    for key, value in found.items():
        hint = hints[key]
        if is_dataclass(hint):
            values[key] = _filled(hint, value, file, f"{where}.{key}")
            continue
        right, values[key] = _typed(value, hint)
        if not right or (isinstance(value, int) and not _LEAST.get(key, 0) <= value <= _MOST.get(key, _LARGEST)):
            raise _malformed(file, f"{where}.{key} as options are", value)
    return kind(**values)


def _typed(value: Any, hint: Any) -> tuple[bool, Any]:
    """(whether JSON ``value`` is of the type ``hint``, the value as that type)."""
    if get_origin(hint) in (Union, types.UnionType):
        found = [_typed(value, one) for one in get_args(hint)]
        return next((one for one in found if one[0]), (False, value))
    if get_origin(hint) is tuple:
        inner = get_args(hint)
        if not isinstance(value, list):
            return False, value
        wanted = [inner[0]] * len(value) if inner[1:] == (...,) else list(inner)
        items = [_typed(*pair) for pair in zip(value, wanted, strict=False)]
        return len(wanted) == len(value) and all(one[0] for one in items), tuple(one[1] for one in items)
    if hint is float:
        return type(value) in (int, float), value
    return (value is None if hint is type(None) else type(value) is hint), value


def with_inputs(found: Recorded, given: Given) -> Options:
    """The options of ``found`` with the files that the user has ``given``, each proved to be the recorded one.

    Raises UsageError where one is not given, or one too many; IntegrityError where it is another; what reading
    raises.
    """
    options, taken = found.options, dict[str, Path]()
    for key in FILES:
        path, wanted = getattr(given, key), found.files.get(key)
        if (path is None) != (wanted is None):
            raise _needs(f"--{key}", wanted, path)
        if path is not None and wanted is not None:
            _prove(path, wanted)
            taken[key] = path
    own = [text for text in found.texts or () if not text.get("built_in")]
    items = []
    left = {Path(item).name: Path(item) for item in given.texts}
    for text in found.texts or ():
        if text.get("built_in"):
            if text["name"] not in BUILT_IN:
                raise _later(Path(text["name"]), "a built-in text of another version")
            _prove(calibration_file(text["name"]), text)
            items.append(f"{text['name']}={text['weight']!r}")
            continue
        path = left.get(text["name"])
        if path is None:
            raise _needs("--calibration-data", text, None)
        _prove(path, text)
        items.append(f"{path}={text['weight']!r}")
    odd = sorted(left.keys() - {text["name"] for text in own})
    if odd:
        raise _needs("--calibration-data", None, left[odd[0]])
    calibration = replace(options.calibration, data=tuple(items))
    imatrix, statistics = taken.get("imatrix"), taken.get("statistics")
    return replace(options, calibration=calibration, imatrix=imatrix, statistics=statistics)


def _needs(option: str, wanted: Mapping[str, Any] | None, path: Path | None) -> UsageError:
    if wanted is None:
        return UsageError(
            f"{option} has no part in this artifact", found=path, remedy=f"leave {option} out: it was made without"
        )
    return UsageError(
        "the artifact was made with a file that is needed to make it again",
        expected=f"{printable(wanted['name'], 120)}, SHA-256 {printable(wanted['sha256'], 64)}",
        remedy=f"give that very file: {option} FILE (a text under the same name)",
    )


def _prove(path: Path, wanted: Mapping[str, Any]) -> None:
    sha256 = file_sha256(path)
    if sha256 != wanted["sha256"]:
        raise IntegrityError(
            "this is not the file that the artifact was made with",
            file=path,
            expected=f"SHA-256 {printable(wanted['sha256'], 64)}",
            found=sha256,
            remedy="give the file as it was then",
        )


def _malformed(file: Path, expected: str, found: object) -> MalformedInputError:
    return MalformedInputError(
        "the manifest does not say how its artifact was made",
        file=file,
        expected=expected,
        found=printable(str(found), 120),
        remedy="make the artifact again",
    )


def _later(file: Path, found: str) -> UnsupportedError:
    return UnsupportedError(
        "the manifest says things of how its artifact was made that this version does not know",
        file=file,
        found=printable(found, 120),
        remedy="use the version of llm-quantize that made it",
    )
