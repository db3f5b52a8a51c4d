"""Verification of an artifact: structure, manifest hashes, finite values, and the error against the source.

Without a manifest (a file from elsewhere) the structure and the values are still checked, and every tensor can be
compared with a source.
"""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import Keys

from llm_quantize import kernels
from llm_quantize.assemble import chunk_ranges, matrix_shape, read_output_rows, to_float32, weights_of
from llm_quantize.errors import IntegrityError, UsageError
from llm_quantize.events import EventSink, ignore
from llm_quantize.io.artifact_paths import manifest_path
from llm_quantize.io.gguf_file import GgufFile, TensorEntry, read_gguf
from llm_quantize.io.output import HASH_CHUNK
from llm_quantize.io.paths import opened, pread_into
from llm_quantize.manifest import NONFINITE_FACTS, read_manifest
from llm_quantize.qtypes import QTYPES
from llm_quantize.source import Source, open_source

# Largest plausible relative error ||Q - W|| / ||W|| of a sound tensor, by type: about twice what heavy-tailed weights
# (Student's t of 2 to 4 degrees, outliers of 3 to 30 deviations, pruned rows) give, and below 1, which zeros give.
_ERROR_BOUNDS = {
    **{"f32": 0.0, "f16": 0.005, "bf16": 0.005, "q8_0": 0.03, "q6_k": 0.08},
    **{"q5_0": 0.15, "q5_1": 0.12, "q5_k": 0.12, "q4_0": 0.25, "q4_1": 0.22, "q4_k": 0.22, "iq4_nl": 0.22},
    **{"iq4_xs": 0.22, "mxfp4": 0.3, "q3_k": 0.4, "q2_k": 0.6, "tq1_0": 0.98, "tq2_0": 0.98},
    **{"iq3_s": 0.6, "iq3_xxs": 0.65, "iq2_s": 0.85, "iq2_xs": 0.85, "iq2_xxs": 0.95, "iq1_m": 0.98, "iq1_s": 0.98},
}


@dataclass
class TensorCheck:
    """One tensor: ``hash`` is "ok", "mismatch" or "unknown"; ``relative_error`` (RMS, over the values that are finite
    in both) and ``source_nonfinite`` (NaN and infinite weights) where a source was given. The three counts in the
    middle are what the manifest says of the source's NaN and infinite weights."""

    name: str
    type: str
    hash: str = "unknown"
    nonfinite: int = 0
    nonfinite_replaced: int = 0
    nonfinite_kept: int = 0
    nonfinite_lost: int = 0
    source_nonfinite: int | None = None
    relative_error: float | None = None
    problems: list[str] = field(default_factory=list)


@dataclass
class Verification:
    """The outcome. ``problems`` are about the artifact as a whole; each tensor has its own."""

    path: Path
    has_manifest: bool
    compared: bool
    tensors: list[TensorCheck]
    problems: list[str]

    @property
    def ok(self) -> bool:
        return not self.problems and not any(tensor.problems for tensor in self.tensors)

    def all_problems(self) -> list[str]:
        """Every problem in one list, tensor names in front."""
        return self.problems + [f"{check.name}: {text}" for check in self.tensors for text in check.problems]

    def error(self) -> IntegrityError | None:
        """An error that names the first problem, if there is any."""
        problems = self.all_problems()
        if not problems:
            return None
        return IntegrityError(
            "the artifact is not what it should be",
            file=self.path,
            found=f"{problems[0]}" + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""),
            remedy="make it again with --overwrite, or copy it again",
        )

    def raise_on_problems(self) -> None:
        """Raise IntegrityError naming the first problem, if there is any."""
        error = self.error()
        if error is not None:
            raise error

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the outcome, and the facts of ``error()`` beside it where something is wrong."""
        error = self.error()
        return {
            "artifact": str(self.path),
            "ok": self.ok,
            "manifest": self.has_manifest,
            "compared_with_source": self.compared,
            "problems": self.all_problems(),
            "tensors": [vars(check) for check in self.tensors],
            **(error.to_dict() if error is not None else {}),
        }


def verify(
    artifact: str | Path, *, source: str | None = None, revision: str | None = None, on_event: EventSink = ignore
) -> Verification:
    """Check ``artifact`` (a GGUF file or the directory of a split one), against ``source`` too if given.

    Raises UsageError or MalformedInputError where the artifact cannot be read at all; what is merely wrong is in the
    result (see ``raise_on_problems``).
    """
    path, files = _open_artifact(Path(artifact))
    manifest = read_manifest(manifest_path(path))
    problems = _compare_parts(files)
    if manifest is not None:
        problems += _compare_plan(files, manifest)
    known = {entry["name"]: entry for entry in (manifest or {}).get("tensors", [])}
    model = open_source(source, revision=revision, on_event=on_event) if source is not None else None
    try:
        if model is not None:
            problems += _compare_names(files, model)
        entries = [(file, tensor) for file in files for tensor in file.tensors]
        total = sum(weights_of(tensor.shape) for _, tensor in entries)
        checks: list[TensorCheck] = []
        done = 0
        for file, tensor in entries:
            checks.append(_check_tensor(file, tensor, known.get(tensor.name), model))
            done += weights_of(tensor.shape)
            on_event({"event": "progress", "done": done, "total": total})
    finally:
        if model is not None:
            model.checkpoint.close()
    return Verification(path, manifest is not None, model is not None, checks, problems)


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
        headers.update(_read(file, 0, file.data_start))
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
            if any(_read(file, start, stop - start)):
                problems.append(f"{file.path.name}: bytes {start} to {stop} between tensors are not zeros")
        at = max(at, offset + nbytes)
    return problems


def _read(file: GgufFile, offset: int, nbytes: int) -> bytes:
    """Bytes of the artifact. Raises IntegrityError where it became shorter, ResourceError where the disk fails."""
    data = bytearray(nbytes)
    with opened(file.path) as descriptor:
        pread_into(descriptor, memoryview(data), offset, file.path)
    return bytes(data)


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
    file: GgufFile, tensor: TensorEntry, known: Mapping[str, Any] | None, source: Source | None
) -> TensorCheck:
    check = TensorCheck(tensor.name, tensor.type.name.lower())
    if known is not None:
        check.nonfinite_replaced, check.nonfinite_kept, check.nonfinite_lost = (
            sum(unit.get(fact, 0) for unit in known["units"]) for fact in NONFINITE_FACTS[:3]
        )
        _check_hashes(file, tensor, known, check)
    if check.type not in QTYPES:
        check.problems.append(f"type {check.type} cannot be decoded by this version; values were not checked")
        return check
    output = None
    if source is not None:
        output = next((o for o in source.tensors.outputs if o.name == tensor.name), None)
        if output is not None and _squeezed(output.shape) != _squeezed(tensor.shape):
            output = None
    poisoned = 0
    error = norm = 0.0
    for start, stop, values in _decoded(file, tensor):
        finite = np.isfinite(values)
        check.nonfinite += int(values.size - np.count_nonzero(finite))
        if output is not None and source is not None:
            exact = to_float32(read_output_rows(source.checkpoint, output, start, stop)).reshape(values.shape)
            known_values = np.isfinite(exact)
            check.source_nonfinite = (check.source_nonfinite or 0) + int(exact.size - np.count_nonzero(known_values))
            poisoned += int(np.count_nonzero(known_values & ~finite))
            wanted = np.where(known_values, exact, 0)
            off = np.where(finite & known_values, values, wanted) - wanted
            error += float(np.sum(np.square(off, dtype=np.float64)))
            norm += float(np.sum(np.square(wanted, dtype=np.float64)))
    _judge_nonfinite(check, poisoned, has_manifest=known is not None)
    if output is not None:
        check.relative_error = float(np.sqrt(error / norm)) if norm > 0 else float(np.sqrt(error))
        bound = error_bound(check.type)
        if not check.relative_error <= bound:
            check.problems.append(f"relative error {check.relative_error:.4g} is above {bound} for {check.type}")
    return check


def _judge_nonfinite(check: TensorCheck, poisoned: int, *, has_manifest: bool) -> None:
    """NaN and infinite values are right only where the manifest says that the source's were kept.

    ``poisoned``: how many stand where the source is finite.
    """
    if check.nonfinite != check.nonfinite_kept:
        kept = f", {check.nonfinite_kept} of the source were kept" if check.nonfinite_kept else ""
        lost = f", {check.nonfinite_lost} of the source were lost" if check.nonfinite_lost else ""
        check.problems.append(f"{check.nonfinite} values are NaN or infinite{kept}{lost}")
    elif poisoned:
        check.problems.append(f"{poisoned} values are NaN or infinite where the source is finite")
    recorded = check.nonfinite_replaced + check.nonfinite_kept + check.nonfinite_lost
    if has_manifest and check.source_nonfinite is not None and check.source_nonfinite != recorded:
        check.problems.append(
            f"{check.source_nonfinite} weights of the source are NaN or infinite, the manifest knows of {recorded}"
        )


def error_bound(qtype: str) -> float:
    """The relative error above which a tensor of this type is not taken for a quantization of its source."""
    return _ERROR_BOUNDS[qtype]


def _check_hashes(file: GgufFile, tensor: TensorEntry, known: Mapping[str, Any], check: TensorCheck) -> None:
    if known["type"] != check.type or known["bytes"] != tensor.nbytes or known["offset"] != tensor.offset:
        check.problems.append("type, size or offset differ from the manifest")
        check.hash = "mismatch"
        return
    rows = matrix_shape(tensor.shape)[0]
    row_bytes = tensor.nbytes // rows
    check.hash = "ok"
    done = 0
    for unit in known["units"]:
        start, stop = unit["rows"]
        if start != done or not start < stop <= rows:
            break
        first, end = tensor.offset + start * row_bytes, tensor.offset + stop * row_bytes
        digest = hashlib.sha256()
        for at in range(first, end, HASH_CHUNK):
            digest.update(_read(file, at, min(HASH_CHUNK, end - at)))
        if digest.hexdigest() != unit["sha256"]:
            check.hash = "mismatch"
            check.problems.append(f"bytes {first} to {end} of {file.path.name} do not match their hash")
        done = stop
    if done != rows:
        check.hash = "mismatch"
        check.problems.append(f"the manifest's hashes cover {done} of {rows} rows")


def _decoded(file: GgufFile, tensor: TensorEntry) -> Iterator[tuple[int, int, npt.NDArray[np.float32]]]:
    """(first row, end row, float32 values) of a tensor, chunk by chunk."""
    rows, columns = matrix_shape(tensor.shape)
    row_bytes = tensor.nbytes // rows
    for _, start, stop in chunk_ranges(tensor.shape, 0, rows):
        data = _read(file, tensor.offset + start * row_bytes, (stop - start) * row_bytes)
        packed = np.frombuffer(data, np.uint8).reshape(stop - start, row_bytes)
        with np.errstate(invalid="ignore", over="ignore"):
            yield start, stop, kernels.dequantize(tensor.type.name.lower(), packed, columns)
