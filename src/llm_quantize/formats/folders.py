"""Folders beside the weights that carry meaning: named chat templates, and the modules that sentence-transformers puts
behind the model. Only what those two read is known, one folder deep."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import GGUFValueType, Keys, PoolingType

from llm_quantize.errors import AccessError, MalformedInputError, printable
from llm_quantize.io.gguf_file import MetaValue
from llm_quantize.io.json_file import read_json, read_json_object
from llm_quantize.io.paths import inside

TEMPLATES = "additional_chat_templates"
MODULES = "modules.json"
PROMPTS = "config_sentence_transformers.json"
MODULE_FILES = ("config.json", "model.safetensors")
_LIMIT = 1 << 20
_FOLDER = re.compile(r"[0-9]{1,2}_[A-Za-z0-9_]{1,64}", re.ASCII)

_POOLING: Mapping[str, tuple[str, PoolingType]] = {
    "pooling_mode_mean_tokens": ("mean", PoolingType.MEAN),
    "pooling_mode_cls_token": ("cls", PoolingType.CLS),
    "pooling_mode_lasttoken": ("lasttoken", PoolingType.LAST),
}
"""What 1_Pooling/config.json says, in the words of old and new files, and what llama.cpp has for it."""

_PART_OF_LLAMA_CPP = ("Transformer", "Pooling", "Normalize")
"""Modules that llama.cpp computes, or does unless it is told otherwise (Normalize)."""


@dataclass(frozen=True)
class Module:
    """A module of sentence-transformers: its kind ("Pooling") and its folder, "" for the model's own directory."""

    kind: str
    folder: str


def is_known_file(name: str) -> bool:
    """Whether FOLDER/FILE is one that ``folder_files`` may take."""
    folder, _, file = name.partition("/")
    if folder == TEMPLATES:
        return file.endswith(".jinja") and "/" not in file
    return _FOLDER.fullmatch(folder) is not None and not folder.startswith("0_") and file in MODULE_FILES


def folder_files(directory: Path) -> tuple[list[tuple[str, Path]], list[str]]:
    """([(FOLDER/FILE, where it is)] by name, warnings about what is left out) of a model's ``directory``: additional
    chat templates, and the files of the modules that modules.json names.

    Raises MalformedInputError for a modules.json that breaks its form.
    """
    names = [f"{TEMPLATES}/{path.name}" for path in sorted((directory / TEMPLATES).glob("*.jinja"))]
    for module in read_modules(directory):
        if module.folder and module.kind != "Transformer":
            names += [f"{module.folder}/{file}" for file in MODULE_FILES]
    found, warnings = [], []
    for name in sorted(set(names)):
        try:
            path = inside(directory, name, declared_in=directory / MODULES)
        except AccessError as error:
            warnings.append(f"{printable(name, 80)!r} is not copied: {error.what}")
            continue
        if path.is_file():
            found.append((name, path))
    return found, warnings


def read_modules(directory: Path) -> list[Module]:
    """The modules of sentence-transformers, in their order; none where there is no modules.json.

    Raises MalformedInputError for one that is no list of objects with type and path.
    """
    path = inside(directory, MODULES)
    if not path.is_file():
        return []
    listed = read_json(path, limit_bytes=_LIMIT)
    found = []
    for entry in listed if isinstance(listed, list) else [None]:
        kind, folder = (entry.get("type"), entry.get("path", "")) if isinstance(entry, dict) else (None, None)
        if not isinstance(kind, str) or not isinstance(folder, str) or (folder and not _FOLDER.fullmatch(folder)):
            raise MalformedInputError(
                "modules.json of sentence-transformers has the wrong form",
                file=path,
                expected='[{"idx": 1, "name": "1", "path": "1_Pooling", "type": "..."}, ...]',
                found=printable(repr(entry), 120),
                remedy="fetch it again, or remove it if the model is not used for embeddings",
            )
        found.append(Module(kind.rpartition(".")[2], folder))
    return found


def pooling_metadata(directory: Path, arch: str, note: Callable[[str], None]) -> dict[str, MetaValue]:
    """``ARCH.pooling_type`` of a model of sentence-transformers in ``directory``, under GGUF's key, as llama.cpp's
    converter sets it; empty where there is no such model, or a pooling that llama.cpp has not.

    ``note`` is told of what the GGUF file cannot say. Raises MalformedInputError for files that break their form.
    """
    modules = read_modules(directory)
    if not modules:
        return {}
    for module in modules:
        if module.kind not in _PART_OF_LLAMA_CPP:
            note(
                f"the module {module.kind} of sentence-transformers ({module.folder or MODULES}) is not in the GGUF "
                "file: embeddings of llama.cpp are those that come into it"
            )
    _tell_prompts(directory, note)
    pooling = next((module for module in modules if module.kind == "Pooling" and module.folder), None)
    if pooling is None:
        return {}
    path = inside(directory, f"{pooling.folder}/config.json", declared_in=directory / MODULES)
    if not path.is_file():
        note(f"{MODULES} names {pooling.folder}/config.json, which is not there: the GGUF file names no pooling")
        return {}
    said = read_json_object(path, limit_bytes=_LIMIT)
    modes = _modes(said)
    if len(modes) == 1 and modes[0] in dict(_POOLING.values()):
        value = MetaValue(GGUFValueType.UINT32, int(dict(_POOLING.values())[modes[0]]))
        return {Keys.LLM.POOLING_TYPE.format(arch=arch): value}
    named = printable(" and ".join(modes), 100) or "none"
    note(f"{pooling.folder}/config.json asks for a pooling that llama.cpp has not ({named}): the GGUF file names none")
    return {}


def _tell_prompts(directory: Path, note: Callable[[str], None]) -> None:
    """Tell of prompts that sentence-transformers puts before texts."""
    path = inside(directory, PROMPTS)
    prompts = read_json_object(path, limit_bytes=_LIMIT).get("prompts") if path.is_file() else None
    named = [name for name, text in prompts.items() if text] if isinstance(prompts, dict) else []
    if named:
        words = printable(", ".join(map(str, named)), 100)
        note(f"the prompts of {PROMPTS} ({words}) are not in the GGUF file: put them before the texts yourself")


def _modes(said: Mapping[str, Any]) -> list[str]:
    """The poolings that a configuration asks for, side by side."""
    value = said.get("pooling_mode")
    named = (
        [value]
        if isinstance(value, str)
        else [one for one in value if isinstance(one, str)]
        if isinstance(value, list)
        else []
    )
    old = [key for key, on in said.items() if key.startswith("pooling_mode_") and on is True]
    return list(dict.fromkeys([*named, *(_POOLING[key][0] if key in _POOLING else key for key in old)]))
