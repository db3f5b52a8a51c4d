"""What can be wrong with a model directory beside its tensors' values: files, headers, names, the tokenizer."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llm_quantize.io.paths import read_range
from llm_quantize.io.safetensors_file import TensorInfo

_COPIED = re.compile(r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\..*|merges\.txt|.*\.model|"
                     r"chat_template\..*|generation_config\.json")  # fmt: skip

CARD = "README.md"


def compare_files(path: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Files, sizes, and whatever of them holds no tensor, against the manifest."""
    problems = []
    planned = {entry["name"]: entry["size"] for entry in manifest["files"]}
    for name, size in planned.items():
        file = path / name
        if not file.is_file():
            problems.append(f"{name} is in the manifest but not in the directory")
        elif file.stat().st_size != size:
            problems.append(f"{name} has {file.stat().st_size} bytes, the manifest says {size}")
    present = {entry.name for entry in path.iterdir()}
    stray = sorted(name for name in present - planned.keys() if name.endswith((".safetensors", ".index.json")))
    problems += [f"{name} is in the directory but not in the manifest" for name in stray]
    if problems:
        return problems
    fronts = hashlib.sha256()
    for entry in manifest["files"]:
        name = entry["name"]
        front = _front(path / name, entry["size"])
        if name == CARD and "card_sha256" in manifest:
            if hashlib.sha256(front).hexdigest() != manifest["card_sha256"]:
                problems.append(f"{name} does not match the manifest's hash")
            front = b""
        elif entry.get("front_sha256") not in (None, hashlib.sha256(front).hexdigest()):
            what = "the header of " if name.endswith(".safetensors") else ""
            problems.append(f"{what}{name} does not match the manifest's hash")
        fronts.update(name.encode() + b"\0" + len(front).to_bytes(8, "little") + front)
    if not problems and fronts.hexdigest() != manifest["identity"].get("layout_sha256"):
        names = ", ".join(entry["name"] for entry in manifest["files"])
        problems.append(f"a header or a small file does not match the manifest's hash (one of {names})")
    return problems


def _front(file: Path, size: int) -> bytes:
    """A safetensors file's header; any other file whole."""
    if file.suffix != ".safetensors":
        return read_range(file, 0, size)
    return read_range(file, 0, min(size, 8 + int.from_bytes(read_range(file, 0, min(8, size)), "little")))


def compare_tensors(tensors: Mapping[str, TensorInfo], manifest: Mapping[str, Any]) -> Iterator[str]:
    """Names and files of tensors against the manifest."""
    known = {entry["name"]: entry for entry in manifest["tensors"]}
    names = [entry["name"] for entry in manifest["files"]]
    for name in sorted(known.keys() - tensors.keys()):
        yield f"tensor {name} is in the manifest but not in the files"
    for name in sorted(tensors.keys() - known.keys()):
        yield f"tensor {name} is in the files but not in the manifest"
    for name, info in tensors.items():
        number = known.get(name, {}).get("file")
        if type(number) is int and not (0 <= number < len(names) and names[number] == info.file.name):
            yield f"tensor {name} is in {info.file.name}, not where the manifest says"


def compare_tokenizer(path: Path, source: Path, *, exact: bool) -> list[str]:
    """Files of the tokenizer, template and generation settings against the source's."""
    problems = []
    if not exact:
        own, theirs = (_vocabulary(folder / "tokenizer.json") for folder in (path, source))
        return ["tokenizer.json has another vocabulary than the source's"] if own != theirs else []
    for file in sorted(source.iterdir()):
        if not file.is_file() or not _COPIED.fullmatch(file.name):
            continue
        copy = path / file.name
        if not copy.is_file():
            problems.append(f"{file.name} of the source is missing from the artifact")
        elif copy.read_bytes() != file.read_bytes():
            problems.append(f"{file.name} is not the source's, byte for byte")
    return problems


def _vocabulary(file: Path) -> Any:
    """What the ids of a tokenizer mean; None where there is no such file."""
    if not file.is_file():
        return None
    try:
        read = json.loads(file.read_bytes())
        return read["model"]["vocab"], [(one["id"], one["content"]) for one in read.get("added_tokens", [])]
    except (ValueError, LookupError, TypeError):
        return file.read_bytes()
