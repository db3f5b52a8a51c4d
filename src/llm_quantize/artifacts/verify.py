"""Verification of an artifact: structure, manifest hashes, finite values, and the error against the source.

Without a manifest (a file from elsewhere) the structure and the values are still checked, and every tensor can be
compared with a source.
"""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import Keys

from llm_quantize import kernels
from llm_quantize.architectures.rows import chunk_ranges, matrix_shape, read_output_rows, to_float32, weights_of
from llm_quantize.artifacts.manifest import NONFINITE_FACTS, read_manifest
from llm_quantize.artifacts.verification import (
    Deviation,
    Made,
    TensorCheck,
    Verification,
    check_hashes,
    error_bound,
    judge_nonfinite,
    made_how,
    read_bytes,
)
from llm_quantize.errors import UsageError
from llm_quantize.events import EventSink, ignore
from llm_quantize.io.artifact_paths import manifest_path
from llm_quantize.io.files_at import HASH_CHUNK
from llm_quantize.io.gguf_file import GgufFile, TensorEntry, read_gguf
from llm_quantize.models.opening import Source, open_source
from llm_quantize.models.quantized import is_packed_directory
from llm_quantize.qtypes import QTYPES

__all__ = ["TensorCheck", "Verification", "error_bound", "verify"]


def verify(
    artifact: str | Path, *, source: str | None = None, revision: str | None = None, on_event: EventSink = ignore
) -> Verification:
    """Check ``artifact`` (a GGUF file, the directory of a split one, or a quantized model directory), against
    ``source`` too if given.

    Raises UsageError or MalformedInputError where the artifact cannot be read at all; what is merely wrong is in the
    result (see ``raise_on_problems``).
    """
    if is_packed_directory(Path(artifact)):
        return _verify_directory(Path(artifact), source, revision, on_event)
    path, files = _open_artifact(Path(artifact))
    manifest = read_manifest(manifest_path(path))
    problems = _compare_parts(files)
    if manifest is not None:
        problems += _compare_plan(files, manifest)
    known = {entry["name"]: entry for entry in (manifest or {}).get("tensors", [])}
    made = made_how(manifest)
    model = open_source(source, revision=revision, on_event=on_event) if source is not None else None
    try:
        if model is not None:
            problems += _compare_names(files, model)
        entries = [(file, tensor) for file in files for tensor in file.tensors]
        total = sum(weights_of(tensor.shape) for _, tensor in entries)
        checks: list[TensorCheck] = []
        done = 0
        for file, tensor in entries:
            checks.append(_check_tensor(file, tensor, known.get(tensor.name), model, made))
            done += weights_of(tensor.shape)
            on_event({"event": "progress", "done": done, "total": total})
    finally:
        if model is not None:
            model.checkpoint.close()
    return Verification(path, manifest is not None, model is not None, checks, problems)


def _verify_directory(path: Path, source: str | None, revision: str | None, on_event: EventSink) -> Verification:
    from llm_quantize.artifacts.verify_directory import verify_directory

    manifest = read_manifest(manifest_path(path))
    with ExitStack() as stack:
        model = None
        if source is not None:
            model = open_source(source, revision=revision, on_event=on_event)
            stack.callback(model.checkpoint.close)
        return verify_directory(path, manifest, model, on_event)


def _open_artifact(path: Path) -> tuple[Path, list[GgufFile]]:
    if not path.exists():
        raise UsageError("no such artifact", file=path, remedy="check the path")
    part = re.fullmatch(r"(.+)-\d{5}-of-\d{5}\.gguf", path.name)
    if part is not None and (path.parent / "manifest.json").is_file():
        return _open_artifact(path.parent)
    if path.is_dir():
        names = sorted(path.glob("*.gguf"))
    elif part is not None:
        names = sorted(path.parent.glob(f"{glob.escape(part[1])}-*-of-{path.name[-10:-5]}.gguf"))
    else:
        names = [path]
    if not names:
        raise UsageError("no GGUF file in this directory", file=path, remedy="give the path of the artifact")
    return path, [read_gguf(name) for name in names]


def _compare_parts(files: list[GgufFile]) -> list[str]:
    """Parts of a split model that are missing, doubled or of another model."""
    keys = (Keys.Split.LLM_KV_SPLIT_NO, Keys.Split.LLM_KV_SPLIT_COUNT, Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT)
    declared = [tuple(getattr(file.metadata.get(key), "value", None) for key in keys) for file in files]
    if len(files) == 1 and declared[0][1] in (None, 0, 1):
        return []
    tensors = sum(len(file.tensors) for file in files)
    wanted = [(number, len(files), tensors) for number in range(len(files))]
    if declared == wanted:
        return []
    return [f"parts of a split model are missing or mixed: (number, parts, tensors) {declared}, expected {wanted}"]


def _compare_plan(files: list[GgufFile], manifest: Mapping[str, Any]) -> list[str]:
    """Files, sizes, headers and the padding between tensors against what the plan fixed."""
    problems = []
    planned = [(entry["name"], entry["size"]) for entry in manifest["files"]]
    found = [(file.path.name, file.file_size) for file in files]
    if [size for _, size in planned] != [size for _, size in found]:
        problems.append(f"files differ from the manifest: expected {planned}, found {found}")
    headers = hashlib.sha256()
    for file in files:
        headers.update(read_bytes(file.path, 0, file.data_start))
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
            if any(read_bytes(file.path, start, stop - start)):
                problems.append(f"{file.path.name}: bytes {start} to {stop} between tensors are not zeros")
        at = max(at, offset + nbytes)
    return problems


def _compare_names(files: list[GgufFile], source: Source) -> list[str]:
    problems = []
    wanted = {output.name: output.shape or (1,) for output in source.tensors.outputs}
    found = {tensor.name: tensor.shape for file in files for tensor in file.tensors}
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            problems.append(f"tensor {name} of the source is missing from the artifact")
        elif name not in wanted:
            problems.append(f"tensor {name} is not in the source")
        elif _squeezed(found[name]) != _squeezed(wanted[name]):
            problems.append(f"tensor {name} has shape {found[name]}, the source gives {wanted[name]}")
    return problems


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """GGUF does not keep leading dimensions of 1."""
    return tuple(size for size in shape if size != 1)


def _check_tensor(
    file: GgufFile, tensor: TensorEntry, known: Mapping[str, Any] | None, source: Source | None, made: Made
) -> TensorCheck:
    check = TensorCheck(tensor.name, tensor.type.name.lower())
    if known is not None:
        check.nonfinite_replaced, check.nonfinite_kept, check.nonfinite_lost = (
            sum(unit.get(fact, 0) for unit in known["units"]) for fact in NONFINITE_FACTS[:3]
        )
        check_hashes(file.path, tensor.offset, tensor.nbytes, matrix_shape(tensor.shape)[0], known, check)
    if check.type not in QTYPES:
        check.problems.append(f"type {check.type} cannot be decoded by this version; values were not checked")
        return check
    output = None
    if source is not None:
        output = next((o for o in source.tensors.outputs if o.name == tensor.name), None)
        if output is not None and _squeezed(output.shape) != _squeezed(tensor.shape):
            output = None
    poisoned = 0
    per_matrix = tensor.shape[-2] if len(tensor.shape) > 1 else 1
    deviations: dict[int, Deviation] = {}
    for start, stop, values in _decoded(file, tensor):
        finite = np.isfinite(values)
        check.nonfinite += int(values.size - np.count_nonzero(finite))
        if output is not None and source is not None:
            exact = to_float32(read_output_rows(source.checkpoint, output, start, stop)).reshape(values.shape)
            known_values = np.isfinite(exact)
            check.source_nonfinite = (check.source_nonfinite or 0) + int(exact.size - np.count_nonzero(known_values))
            poisoned += int(np.count_nonzero(known_values & ~finite))
            wanted = np.where(known_values, exact, 0)
            deviation = deviations.setdefault(start // per_matrix, Deviation(rescaled=made.rescaled and per_matrix > 1))
            deviation.add(np.where(finite & known_values, values, wanted), wanted)
    judge_nonfinite(check, poisoned, has_manifest=known is not None)
    if output is not None:
        _judge_error(check, list(deviations.values()), made)
    return check


def _judge_error(check: TensorCheck, found: list[Deviation], made: Made) -> None:
    norm, error = sum(one.norm for one in found), sum(one.error for one in found)
    check.relative_error = float(np.sqrt(error / norm)) if norm > 0 else float(np.sqrt(error))
    bound = error_bound(check.type, feedback=made.feedback)
    if made.rescaled and not check.relative_error <= bound:
        if not any(one.rescaled_rows for one in found):
            return  # a vector that the transform divides: any factor is possible
        check.relative_error = max(one.rescaled for one in found)
        bound = max(bound, error_bound("bf16"))
    if not check.relative_error <= bound:
        check.problems.append(f"relative error {check.relative_error:.4g} is above {bound:.4g} for {check.type}")


def _decoded(file: GgufFile, tensor: TensorEntry) -> Iterator[tuple[int, int, npt.NDArray[np.float32]]]:
    """(first row, end row, float32 values) of a tensor, chunk by chunk."""
    rows, columns = matrix_shape(tensor.shape)
    row_bytes = tensor.nbytes // rows
    for _, start, stop in chunk_ranges(tensor.shape, 0, rows):
        data = read_bytes(file.path, tensor.offset + start * row_bytes, (stop - start) * row_bytes)
        packed = np.frombuffer(data, np.uint8).reshape(stop - start, row_bytes)
        with np.errstate(invalid="ignore", over="ignore"):
            yield start, stop, kernels.dequantize(tensor.type.name.lower(), packed, columns)
