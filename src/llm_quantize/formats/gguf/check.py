"""What can be wrong with a GGUF artifact beside its tensors' values: parts, headers, names, the bytes in between."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from gguf.constants import Keys

from llm_quantize.architectures.base import OutputTensor
from llm_quantize.io.files_at import HASH_CHUNK
from llm_quantize.io.gguf_file import GgufFile
from llm_quantize.io.paths import read_range


def compare_parts(files: Sequence[GgufFile]) -> list[str]:
    """Parts of a split model that are missing, doubled or of another model."""
    keys = (Keys.Split.LLM_KV_SPLIT_NO, Keys.Split.LLM_KV_SPLIT_COUNT, Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT)
    declared = [tuple(getattr(file.metadata.get(key), "value", None) for key in keys) for file in files]
    if len(files) == 1 and declared[0][1] in (None, 0, 1):
        return []
    tensors = sum(len(file.tensors) for file in files)
    wanted = [(number, len(files), tensors) for number in range(len(files))]
    if declared == wanted:
        return []
    return [
        f"parts of a split model are missing or mixed: {file.path.name} is {_part_text(found)}, "
        f"where {_part_text(expected)} should be"
        for file, found, expected in zip(files, declared, wanted, strict=True)
        if found != expected
    ][:3]


def _part_text(declared: tuple[Any, ...]) -> str:
    """What a file says of itself: its number, the parts and the tensors of the whole."""
    number, parts, tensors = declared
    if number is None:
        return "no part of a split model"
    return f"part {number + 1 if isinstance(number, int) else number} of {parts} with {tensors} tensors in all"


def compare_plan(files: Sequence[GgufFile], manifest: Mapping[str, Any]) -> list[str]:
    """Files, sizes, headers and the padding between tensors against what the plan fixed."""
    problems = []
    planned = [(entry["name"], entry["size"]) for entry in manifest["files"]]
    found = [(file.path.name, file.file_size) for file in files]
    if [size for _, size in planned] != [size for _, size in found]:
        problems.append(f"files differ from the manifest: expected {planned}, found {found}")
    headers = hashlib.sha256()
    for file in files:
        headers.update(read_range(file.path, 0, file.data_start))
    if headers.hexdigest() != manifest["identity"].get("layout_sha256"):
        ends = ", ".join(f"{file.path.name} bytes 0 to {file.data_start}" for file in files)
        problems.append(f"the metadata at the front ({ends}) does not match the manifest's hash")
    for file in files:
        problems += _check_padding(file)
    names = {tensor.name for file in files for tensor in file.tensors}
    planned_names = {entry["name"] for entry in manifest["tensors"]}
    problems += [f"tensor {name} is in the manifest but not in the file" for name in sorted(planned_names - names)]
    problems += [f"tensor {name} is in the file but not in the manifest" for name in sorted(names - planned_names)]
    return problems


def _check_padding(file: GgufFile) -> list[str]:
    """Ranges between tensors and at the end that are not zeros."""
    problems = []
    at = file.data_start
    spans = sorted((tensor.offset, tensor.nbytes) for tensor in file.tensors)
    for offset, nbytes in [*spans, (file.file_size, 0)]:
        for start in range(at, offset, HASH_CHUNK):
            stop = min(start + HASH_CHUNK, offset)
            if any(read_range(file.path, start, stop - start)):
                problems.append(f"{file.path.name}: bytes {start} to {stop} between tensors are not zeros")
        at = max(at, offset + nbytes)
    return problems


def compare_names(
    files: Sequence[GgufFile], outputs: Sequence[OutputTensor], *, beside: Collection[str] = ()
) -> list[str]:
    """Tensors that the source's map has and the files have not, the reverse, and those of another shape. ``beside``:
    the scales of matrices, which are part of these."""
    problems = []
    wanted = {output.name: output.shape or (1,) for output in outputs}
    found = {tensor.name: tensor.shape for file in files for tensor in file.tensors if tensor.name not in beside}
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            problems.append(f"tensor {name} of the source is missing from the artifact")
        elif name not in wanted:
            problems.append(f"tensor {name} is not in the source")
        elif squeezed(found[name]) != squeezed(wanted[name]):
            problems.append(f"tensor {name} has shape {found[name]}, the source gives {wanted[name]}")
    return problems


def squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """GGUF does not keep leading dimensions of 1."""
    return tuple(size for size in shape if size != 1)
