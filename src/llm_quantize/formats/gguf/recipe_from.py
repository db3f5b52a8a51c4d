"""A recipe as a GGUF file has it: the types of its tensors, for another model of the same shape."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gguf.constants import Keys

from llm_quantize.architectures.rows import weights_of
from llm_quantize.errors import MalformedInputError, UnsupportedError, UsageError, printable
from llm_quantize.formats.gguf.check import compare_parts
from llm_quantize.formats.gguf.levels import LEVELS, TENSOR_TYPES, TensorShape, is_quantizable
from llm_quantize.formats.recipe import Origin, Recipe
from llm_quantize.formats.recipe_file import recipe_bytes
from llm_quantize.io.gguf_file import GgufFile, TensorEntry
from llm_quantize.io.paths import read_range

_PART = re.compile(r"-\d{5}-of-\d{5}$")
_LEVEL = re.compile(
    r"(?:^|[-._])((?:UD-)?(?:I?Q\d|TQ\d|MXFP4|NVFP4|BF16|F16|F32)[A-Za-z0-9_]{0,32})$", re.ASCII | re.IGNORECASE
)
_IMPORTANCE = {
    "file": "quantize.imatrix.file",
    "dataset": "quantize.imatrix.dataset",
    "entries": "quantize.imatrix.entries_count",
    "chunks": "quantize.imatrix.chunks_count",
}
_SHOWN = 6


def recipe_of(files: Sequence[GgufFile]) -> Recipe:
    """The recipe of a GGUF model in ``files``, all parts in order. Of the tensors it names those that a level may
    change; its level is what ``general.file_type`` says, else the one of its usual type.

    Raises MalformedInputError (parts that do not belong together, no architecture), UnsupportedError (no language
    model), UsageError for types that this version does not write, naming tensors.
    """
    first = files[0]
    problems = compare_parts(files)
    if problems:
        raise MalformedInputError(problems[0], file=first.path, remedy="give the first part, with all others beside it")
    if _value(files, Keys.General.TYPE) not in (None, "model"):
        raise UnsupportedError(
            "this GGUF file holds no language model",
            file=first.path,
            expected="general.type = model",
            found=printable(str(_value(files, Keys.General.TYPE)), 80),
        )
    architecture = _value(files, Keys.General.ARCHITECTURE)
    blocks = _value(files, Keys.LLM.BLOCK_COUNT.format(arch=architecture))
    if not isinstance(architecture, str) or type(blocks) is not int:
        raise MalformedInputError(
            "the file does not say which model it holds",
            file=first.path,
            expected=f"{Keys.General.ARCHITECTURE}, and how many blocks it has",
            found=printable(f"{architecture}, {blocks}", 80),
        )
    tensors = [tensor for file in files for tensor in file.tensors]
    chosen = [tensor for tensor in tensors if is_quantizable(TensorShape(tensor.name, tensor.shape))]
    _refuse_unwritten(first.path, chosen)
    level = _level_of(files, chosen)
    origin = Origin(
        printable(_PART.sub("", first.path.stem), 115) + first.path.suffix,
        _headers_sha256(files),
        printable(architecture, 80),
        blocks,
        {key: _told(found) for key, name in _IMPORTANCE.items() if (found := _value(files, name)) is not None},
    )
    recipe = Recipe(
        _name_of(first.path, level), level, {tensor.name: tensor.type.name.lower() for tensor in chosen}, origin=origin
    )
    return replace(recipe, sha256=hashlib.sha256(recipe_bytes(recipe)).hexdigest())


def _value(files: Sequence[GgufFile], key: str) -> Any:
    entry = files[0].metadata.get(key)
    return None if entry is None or entry.item is not None else entry.value


def _told(value: Any) -> str | int:
    return value if type(value) is int else printable(Path(str(value)).name, 120)


def _refuse_unwritten(path: Path, tensors: Sequence[TensorEntry]) -> None:
    odd: dict[str, list[str]] = {}
    for tensor in tensors:
        if tensor.type.name.lower() not in TENSOR_TYPES:
            odd.setdefault(tensor.type.name.lower(), []).append(tensor.name)
    if odd:
        names = [f"{name} {kind}" for kind, held in odd.items() for name in held]
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise UsageError(
            "the file has tensors of types that are not written here",
            file=path,
            expected=", ".join(TENSOR_TYPES),
            found=", ".join(names[:_SHOWN]) + more,
            remedy="write its recipe with `llm-quantize info FILE --recipe`, change these types, and give it with "
            "--recipe",
        )


def _level_of(files: Sequence[GgufFile], tensors: Sequence[TensorEntry]) -> str:
    """The level that the file says it has; else one whose usual type most of the weights have."""
    said = _value(files, Keys.General.FILE_TYPE)
    named = next((level.name for level in LEVELS.values() if type(said) is int and level.file_type == said), None)
    if named is not None:
        return named
    weights: Counter[str] = Counter()
    for tensor in tensors:
        weights[tensor.type.name.lower()] += weights_of(tensor.shape)
    bases: Mapping[str, str] = {level.base: level.name for level in reversed(list(LEVELS.values()))}
    return next((bases[qtype] for qtype, _ in weights.most_common() if qtype in bases), "F16")


def _name_of(path: Path, level: str) -> str:
    """What artifacts of the recipe are called after the model: the end of the file's own name, where that is a level,
    as UD-Q4_K_XL; else ``level``."""
    found = _LEVEL.search(_PART.sub("", path.stem))
    return found[1] if found else level


def _headers_sha256(files: Sequence[GgufFile]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(read_range(file.path, 0, file.data_start))
    return digest.hexdigest()
