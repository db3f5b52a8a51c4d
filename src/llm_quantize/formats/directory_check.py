"""What can be wrong with a model directory beside its tensors' values: files, headers, names, the tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_quantize.errors import AccessError, MalformedInputError, UnsupportedError, printable
from llm_quantize.formats.card import without_added
from llm_quantize.formats.folders import folder_files
from llm_quantize.formats.gguf.restored.files import restored
from llm_quantize.formats.gguf.vocabulary.json import LIMIT_BYTES
from llm_quantize.formats.small_files import is_vocabulary
from llm_quantize.io.ctranslate2_file import MODEL_FILE, read_model_file
from llm_quantize.io.json_file import read_json
from llm_quantize.io.output_file import file_sha256, read_pieces
from llm_quantize.io.paths import inside, read_limited, read_range
from llm_quantize.io.safetensors_file import MAX_HEADER_BYTES, TensorInfo

if TYPE_CHECKING:
    from llm_quantize.models.opening import Source

CARD = "README.md"
_MOST_CARD = 16 << 20


def compare_files(path: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Files, sizes, and whatever of them holds no tensor, against the manifest."""
    problems = []
    planned = {entry["name"]: entry["size"] for entry in manifest["files"]}
    for name, size in planned.items():
        try:
            file = inside(path, name)
        except AccessError as error:
            problems.append(f"the manifest names {printable(name, 100)!r}, which is not opened: {error.what}")
            continue
        if not file.is_file():
            problems.append(f"{name} is in the manifest but not in the directory")
        elif (found := _size(file, name)) != size:
            problems.append(f"{name} has {found} bytes, the manifest says {size}")
    present = {entry.name for entry in path.iterdir()}
    stray = sorted(name for name in present - planned.keys() if name.endswith((".safetensors", ".index.json")))
    problems += [f"{name} is in the directory but not in the manifest" for name in stray]
    if problems:
        return problems
    fronts = hashlib.sha256()
    for entry in manifest["files"]:
        name = entry["name"]
        file = path / name
        spans = _known_spans(file, entry["size"], whole="/" in name)
        size = sum(nbytes for _, nbytes in spans)
        measured = name == CARD and "card_sha256" in manifest
        wanted = manifest["card_sha256"] if measured else entry.get("front_sha256")
        fronts.update(name.encode() + b"\0" + (0 if measured else size).to_bytes(8, "little"))
        digest = hashlib.sha256()
        for piece in [_card(file)] if name == CARD else _pieces(file, spans):
            digest.update(piece)
            if not measured:
                fronts.update(piece)
        if wanted not in (None, digest.hexdigest()):
            problems.append(
                f"the header of {name} does not match the manifest's hash"
                if size < entry["size"]
                else f"{name} does not match the manifest's hash"
            )
    if not problems and fronts.hexdigest() != manifest["identity"].get("layout_sha256"):
        names = ", ".join(entry["name"] for entry in manifest["files"])
        problems.append(f"a header or a small file does not match the manifest's hash (one of {names})")
    return problems


def _card(file: Path) -> bytes:
    """The model card as it was made: what ``push`` added to its front matter is not ours to check."""
    return without_added(read_limited(file, _MOST_CARD))


def _size(file: Path, name: str) -> int:
    """Bytes of a file, of the card those that it was made with."""
    size = file.stat().st_size
    return len(_card(file)) if name == CARD and size <= _MOST_CARD else size


def _known_spans(file: Path, size: int, *, whole: bool) -> Sequence[tuple[int, int]]:
    """(offset, bytes) of what in a file holds no tensor: of most files, and of those in a folder, all of it."""
    kind = None if whole else _HOLDERS.get(file.suffix)
    return [(0, size)] if kind is None else kind(file, size)


def _safetensors_header(file: Path, size: int) -> Sequence[tuple[int, int]]:
    header = int.from_bytes(read_range(file, 0, min(8, size)), "little")
    return [(0, min(size, 8 + header, 8 + MAX_HEADER_BYTES))]


def _between_variables(file: Path, size: int) -> Sequence[tuple[int, int]]:
    try:
        return read_model_file(file).known
    except (MalformedInputError, UnsupportedError):
        return [(0, size)]  # the hash tells


_HOLDERS: Mapping[str, Callable[[Path, int], Sequence[tuple[int, int]]]] = {
    ".safetensors": _safetensors_header,
    Path(MODEL_FILE).suffix: _between_variables,
}
"""Files that hold tensors, by suffix: where they hold none."""


def _pieces(file: Path, spans: Sequence[tuple[int, int]]) -> Iterator[bytes]:
    if len(spans) == 1 and spans[0][0] == 0:
        yield from read_pieces(file, spans[0][1])
        return
    for at, nbytes in spans:
        yield read_range(file, at, nbytes)


def compare_tensors(tensors: Mapping[str, TensorInfo], manifest: Mapping[str, Any]) -> Iterator[str]:
    """Names and files of tensors against the manifest."""
    yield from compare_names(tensors, manifest)
    known = {entry["name"]: entry for entry in manifest["tensors"]}
    names = [entry["name"] for entry in manifest["files"]]
    for name, info in tensors.items():
        number = known.get(name, {}).get("file")
        if type(number) is int and not (0 <= number < len(names) and names[number] == info.file.name):
            yield f"tensor {name} is in {info.file.name}, not where the manifest says"


def compare_names(tensors: Collection[str], manifest: Mapping[str, Any]) -> Iterator[str]:
    """Names of tensors against the manifest."""
    known = {entry["name"] for entry in manifest["tensors"]}
    for name in sorted(known - set(tensors)):
        yield f"tensor {name} is in the manifest but not in the files"
    for name in sorted(set(tensors) - known):
        yield f"tensor {name} is in the files but not in the manifest"


def compare_small_files(path: Path, source: Source, manifest: Mapping[str, Any] | None) -> list[str]:
    """Files of the tokenizer, template and generation settings against the source's, or against what is made of a GGUF
    file, where the manifest says that this one is the source."""
    checkpoint = source.checkpoint
    if checkpoint.metadata is None:
        return compare_tokenizer(path, checkpoint.directory, exact=manifest is not None)
    facts = [[fact.name, fact.size, fact.header_sha256] for fact in checkpoint.fingerprint()]
    if manifest is None or manifest["identity"].get("source_files") != facts:
        return []
    problems = []
    for name, data in restored(source).files:
        copy = inside(path, name)
        if not copy.is_file():
            problems.append(f"{name}, which is made of the source, is missing from the artifact")
        elif file_sha256(copy) != hashlib.sha256(data).hexdigest():
            problems.append(f"{name} is not what is made of the source, byte for byte")
    return problems


def compare_tokenizer(path: Path, source: Path, *, exact: bool) -> list[str]:
    """Files of the tokenizer, template and generation settings against the source's."""
    problems = []
    if not exact:
        own, theirs = (_vocabulary(inside(folder, "tokenizer.json")) for folder in (path, source))
        return ["tokenizer.json has another vocabulary than the source's"] if own != theirs else []
    named = [file.name for file in sorted(source.iterdir()) if file.is_file() and is_vocabulary(file.name)]
    for name in (*named, *(name for name, _ in folder_files(source)[0])):
        copy, original = inside(path, name), inside(source, name)
        if not copy.is_file():
            problems.append(f"{name} of the source is missing from the artifact")
        elif copy.stat().st_size != original.stat().st_size or file_sha256(copy) != file_sha256(original):
            problems.append(f"{name} is not the source's, byte for byte")
    return problems


def _vocabulary(file: Path) -> Any:
    """What the ids of a tokenizer mean; None where there is no such file."""
    if not file.is_file():
        return None
    try:
        read = read_json(file, limit_bytes=LIMIT_BYTES)
        return read["model"]["vocab"], [(one["id"], one["content"]) for one in read.get("added_tokens", [])]
    except (MalformedInputError, LookupError, TypeError):
        return file_sha256(file)
