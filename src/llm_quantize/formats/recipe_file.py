"""A recipe as a file: which tensor gets which qtype, for ``quantize --recipe``. JSON, written by us or by hand.

{"format": "llm-quantize-recipe", "format_version": 1,
 "for": "gguf",                                      optional: the format that it is for; "gguf" where it is absent
 "name": "Q4_K_M-profiled",                          the artifact is called MODEL-NAME
 "level": "Q4_K_M",                                  what tensors get that are not named
 "model": {"sha256": "...", "name": "..."},          optional: it is refused for any other model
 "tensors": {"blk.0.attn_v.weight": "q6_k", ...},    GGUF names; of a directory, the names of modules
 "from": {"file": "...", "sha256": "...", ...},      optional: the file whose types these are (recipe.Origin)
 "fit": {"size": 8000000000, ...},                   optional: the size that it was chosen for (recipe.Fit)
 "made": {...}}                                      optional: how it came about; not read
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from dataclasses import replace as replace_field
from pathlib import Path
from typing import Any

from llm_quantize.errors import MalformedInputError, UnsupportedError, UsageError, printable
from llm_quantize.formats.base import Format
from llm_quantize.formats.recipe import Fit, Origin, Recipe
from llm_quantize.formats.table import FORMATS
from llm_quantize.io.json_file import parse_json
from llm_quantize.io.paths import open_argument, pread_into
from llm_quantize.io.whole_file import write_file

FORMAT = "llm-quantize-recipe"
VERSION = 1
MAX_BYTES = 64 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+.-]{0,63}", re.ASCII)
_REQUIRED = {"format", "format_version", "name", "level", "tensors"}
_OPTIONAL = {"for", "model", "made", "from", "fit"}
_ORIGIN = {"file": str, "sha256": str, "architecture": str, "blocks": int}
_IMPORTANCE = {"file", "dataset", "entries", "chunks"}


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe; whether it fits a model is for ``Recipe.check``.

    Raises UsageError (no such file, no such level or qtype, naming the tensor), MalformedInputError (not a recipe),
    UnsupportedError (a later version), AccessError.
    """
    path = Path(path)
    return parse_recipe(_bytes(path), path)


def parse_recipe(data: bytes, path: Path) -> Recipe:
    """The recipe that stands in ``data``, read from ``path``. Raises as ``read_recipe``."""
    fields = parse_json(data, file=path)
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise _refuse(path, "this file is not a recipe", f'an object with "format": "{FORMAT}"', type(fields).__name__)
    if fields.get("format_version") != VERSION:
        raise UnsupportedError(
            "this recipe is of another version of the format",
            file=path,
            expected=VERSION,
            found=printable(repr(fields.get("format_version")), 80),
            remedy="make it again with this version",
        )
    odd = sorted((_REQUIRED - fields.keys()) | (fields.keys() - _REQUIRED - _OPTIONAL))
    if odd:
        raise _refuse(path, "the recipe has fields missing or too many", ", ".join(sorted(_REQUIRED)), ", ".join(odd))
    name, level, tensors = fields["name"], fields["level"], fields["tensors"]
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _refuse(path, "the recipe's name cannot be part of a file's name", "letters, digits, _ + . -", name)
    if not isinstance(level, str):
        raise _refuse(path, "the recipe's level is not a word", "for example Q4_K_M", level)
    form = fields.get("for", Recipe.form)
    if not isinstance(form, str) or form not in FORMATS:
        raise _refuse(path, "the recipe is for no format of this version", ", ".join(FORMATS), form)
    model = fields.get("model")
    if model is not None and (not isinstance(model, dict) or not isinstance(model.get("sha256"), str)):
        raise _refuse(path, "the recipe's model has no sha256", '{"sha256": "..."}', model)
    if not isinstance(tensors, dict) or not all(isinstance(qtype, str) for qtype in tensors.values()):
        raise _refuse(path, "the recipe's tensors are not an object of words", '{"name": "q4_k"}', tensors)
    return Recipe(
        name=name,
        level=FORMATS[form].recipe_level(level),
        tensors={tensor: _qtype(FORMATS[form], path, tensor, qtype) for tensor, qtype in tensors.items()},
        model=None if model is None else model["sha256"],
        sha256=hashlib.sha256(data).hexdigest(),
        form=form,
        origin=_origin(path, fields.get("from")),
        fit=parse_fit(path, fields.get("fit")),
    )


def _origin(path: Path, found: Any) -> Origin | None:
    """What a recipe says of the file whose types it repeats. Raises MalformedInputError."""
    if found is None:
        return None
    right = isinstance(found, dict) and found.keys() <= {*_ORIGIN, "importance"}
    right = right and all(type(found.get(key)) is kind for key, kind in _ORIGIN.items())
    importance = found.get("importance", {}) if right else None
    if not isinstance(importance, dict) or not importance.keys() <= _IMPORTANCE:
        raise _refuse(path, "the recipe's origin is not what this version writes", ", ".join(_ORIGIN), found)
    told = {key: value if type(value) is int else printable(str(value), 120) for key, value in importance.items()}
    return Origin(
        printable(found["file"], 120), printable(found["sha256"], 64), found["architecture"], found["blocks"], told
    )


_COUNT, _FIGURE, _WORD = (int,), (int, float), (str,)
_FIT: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("size", "file", "reached", "tokens", "context", "beside"), _COUNT),
    **dict.fromkeys(("bits", "kld"), _FIGURE),
    **dict.fromkeys(("way", "chosen", "kv"), _WORD),
}
_ALWAYS = {"size", "file", "reached", "bits", "way", "kld"}
_MOST_TRIED = 16


def parse_fit(path: Path, found: Any) -> Fit | None:
    """What a recipe of ``path`` says of the size that it was chosen for; None where it says nothing. Raises
    MalformedInputError."""
    if found is None:
        return None
    given = dict(found) if isinstance(found, dict) else {}
    tried = given.pop("tried", {})
    right = _ALWAYS <= given.keys() <= _FIT.keys() and isinstance(tried, dict) and len(tried) <= _MOST_TRIED
    right = right and all(type(value) in _FIT[key] for key, value in given.items())
    if not right or not all(type(kld) in _FIGURE for kld in tried.values()):
        raise _refuse(path, "the recipe's size is not what this version writes", ", ".join([*_FIT, "tried"]), found)
    told: dict[str, Any] = {key: printable(value, 40) if type(value) is str else value for key, value in given.items()}
    return Fit(**told, tried={printable(str(name), 40): float(kld) for name, kld in tried.items()})


def _bytes(path: Path) -> bytes:
    descriptor, size = open_argument(path, "recipe")
    try:
        if size > MAX_BYTES:
            raise _refuse(path, "the file is larger than any recipe", f"at most {MAX_BYTES:,} bytes", f"{size:,} bytes")
        data = bytearray(size)
        pread_into(descriptor, memoryview(data), 0, path)
    finally:
        os.close(descriptor)
    return bytes(data)


def _refuse(path: Path, what: str, expected: str, found: object) -> MalformedInputError:
    return MalformedInputError(
        what,
        file=path,
        expected=expected,
        found=printable(str(found), 120),
        remedy="correct the file by hand, or make it with `llm-quantize analyze profile`",
    )


def _qtype(form: Format, path: Path, tensor: str, text: str) -> str:
    try:
        return form.recipe_type(text)
    except UsageError as error:
        raise UsageError(
            error.what, file=path, tensor=printable(tensor, 120), expected=error.expected, found=error.found
        ) from error


def write_recipe(
    path: str | Path,
    recipe: Recipe,
    *,
    model_name: str = "",
    made: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> Recipe:
    """Write ``recipe`` (its own sha256 is not looked at) and return it as ``read_recipe`` will. Raises as
    ``write_file``."""
    data = recipe_bytes(recipe, model_name=model_name, made=made)
    write_file(path, [data], replace=replace)
    return replace_field(recipe, sha256=hashlib.sha256(data).hexdigest())


def recipe_bytes(recipe: Recipe, *, model_name: str = "", made: Mapping[str, Any] | None = None) -> bytes:
    """The file of ``recipe``, whose own sha256 is not looked at."""
    fields: dict[str, Any] = {"format": FORMAT, "format_version": VERSION}
    if recipe.form != Recipe.form:
        fields["for"] = recipe.form
    fields |= {"name": recipe.name, "level": recipe.level}
    if recipe.model is not None:
        fields["model"] = {"sha256": recipe.model, "name": model_name}
    fields["tensors"] = dict(recipe.tensors)
    if recipe.origin is not None:
        fields["from"] = {key: value for key, value in asdict(recipe.origin).items() if value or key in _ORIGIN}
    if recipe.fit is not None:
        fields["fit"] = {key: value for key, value in asdict(recipe.fit).items() if value or key in _ALWAYS}
    if made:
        fields["made"] = dict(made)
    return json.dumps(fields, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"
