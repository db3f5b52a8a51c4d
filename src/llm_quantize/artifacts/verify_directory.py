"""Verification of a quantized model directory: files, configuration, every stored number, and the error against the
source.

Without a manifest (a directory from elsewhere) hashes are not known, and of the tokenizer only the vocabulary is held
against the source's, as other tools write its files anew.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llm_quantize.architectures.rows import chunk_rows, matrix_shape, read_output_rows, to_float32
from llm_quantize.artifacts.decoded_directory import DecodedDirectory
from llm_quantize.artifacts.manifest import NONFINITE_FACTS
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
from llm_quantize.errors import IntegrityError, LlmQuantizeError
from llm_quantize.events import EventSink
from llm_quantize.formats.packed import ALIGNED, PackedMatrix, group_index
from llm_quantize.io.safetensors_file import TensorInfo
from llm_quantize.models.opening import Source
from llm_quantize.models.quantized import PackedDirectory

_FLOATS = ("F16", "BF16", "F32", "F64")
_NAMES = {"I8": "int8", "I32": "int32", "I64": "int64"}
_SCALES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
_COPIED = re.compile(r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\..*|merges\.txt|.*\.model|"
                     r"chat_template\..*|generation_config\.json")  # fmt: skip

CARD = "README.md"


def verify_directory(
    path: Path, manifest: Mapping[str, Any] | None, source: Source | None, on_event: EventSink
) -> Verification:
    """Check the quantized model in ``path``, against its ``manifest`` and ``source`` where there are any.

    Raises what opening the directory raises (``PackedDirectory``); what is merely wrong is in the result.
    """
    problems = [] if manifest is None else _compare_files(path, manifest)
    with PackedDirectory(path) as packed:
        known = {entry["name"]: entry for entry in (manifest or {}).get("tensors", [])}
        if manifest is not None:
            problems += _compare_tensors(packed, known, manifest)
        problems += packed.format.check_settings(packed.settings, packed.matrices)
        checks = {name: _checked(packed, name, info, known.get(name)) for name, info in packed.tensors.items()}
        total, done = sum(info.nbytes for info in packed.tensors.values()), 0
        for matrix in packed.matrices.values():
            _check_numbers(packed, matrix, checks)
            done += matrix.nbytes
            on_event({"event": "progress", "done": done, "total": total})
        for name, info in packed.plain.items():
            _check_plain(packed, name, info, checks[name])
    if source is not None:
        problems += _compare_tokenizer(path, source.checkpoint.directory, exact=manifest is not None)
        problems += _compare_source(path, manifest, source, checks)
    for name, check in checks.items():
        judge_nonfinite(check, 0, has_manifest=name in known)
    on_event({"event": "progress", "done": total, "total": total})
    return Verification(path, manifest is not None, source is not None, list(checks.values()), problems)


def _compare_files(path: Path, manifest: Mapping[str, Any]) -> list[str]:
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
        return read_bytes(file, 0, size)
    return read_bytes(file, 0, min(size, 8 + int.from_bytes(read_bytes(file, 0, min(8, size)), "little")))


def _compare_tensors(
    packed: PackedDirectory, known: Mapping[str, Mapping[str, Any]], manifest: Mapping[str, Any]
) -> Iterator[str]:
    names = [entry["name"] for entry in manifest["files"]]
    for name in sorted(known.keys() - packed.tensors.keys()):
        yield f"tensor {name} is in the manifest but not in the files"
    for name in sorted(packed.tensors.keys() - known.keys()):
        yield f"tensor {name} is in the files but not in the manifest"
    for name, info in packed.tensors.items():
        number = known.get(name, {}).get("file")
        if type(number) is int and not (0 <= number < len(names) and names[number] == info.file.name):
            yield f"tensor {name} is in {info.file.name}, not where the manifest says"


def _checked(packed: PackedDirectory, name: str, info: TensorInfo, known: Mapping[str, Any] | None) -> TensorCheck:
    """The check of one stored tensor, with its hashes."""
    kind = _NAMES.get(info.dtype) or (info.dtype.lower() if name in packed.plain else _SCALES[info.dtype])
    check = TensorCheck(name, kind)
    if known is not None:
        check.nonfinite_replaced, check.nonfinite_kept, check.nonfinite_lost = (
            sum(unit.get(fact, 0) for unit in known["units"]) for fact in NONFINITE_FACTS[:3]
        )
        check_hashes(info.file, info.offset, info.nbytes, matrix_shape(info.shape)[0], known, check)
    return check


def _check_numbers(packed: PackedDirectory, matrix: PackedMatrix, checks: Mapping[str, TensorCheck]) -> None:
    """Scales, zero points and the order of columns of one matrix."""
    named = {suffix: checks[info.name] for suffix, info in matrix.fields.items()}
    main, scale = checks[matrix.main.name], named[matrix.layout.scales]
    main.type = matrix.qtype
    try:
        fields = packed.fields(matrix)
    except IntegrityError as error:
        main.problems.append(f"{error.what}: {error.tensor} at offset {error.offset} has {error.found}")
        return
    format, index = packed.format, group_index(matrix, fields)
    lost = 0
    for first in range(0, matrix.rows, _step(matrix.columns)):
        rows = (matrix, fields, first, min(matrix.rows, first + _step(matrix.columns)))
        scales = format.scales(*rows)
        scale.nonfinite += int(scales.size - np.count_nonzero(np.isfinite(scales)))
        for suffix, text in format.check(matrix, packed.settings, *rows[1:]):
            named[suffix].problems.append(text)
        if (scales == 0).any():
            codes, zeros = format.codes(*rows), format.zeros(*rows)
            away = codes if zeros is None else codes - zeros[:, index]
            lost += int(np.count_nonzero((away != 0) & (scales == 0)[:, index]))
    if lost:
        scale.problems.append(f"{lost} codes that are not zero stand under a scale of zero")


def _check_plain(packed: PackedDirectory, name: str, info: TensorInfo, check: TensorCheck) -> None:
    if info.dtype not in _FLOATS:
        check.problems.append(f"type {info.dtype} is no weight's; its values were not checked")
        return
    rows, columns = matrix_shape(info.shape)
    for first in range(0, rows, chunk_rows(columns)):
        values = packed.rows(name, first, min(rows, first + chunk_rows(columns)))
        check.nonfinite += int(values.size - np.count_nonzero(np.isfinite(values)))


def _step(columns: int) -> int:
    return max(ALIGNED, chunk_rows(columns) // ALIGNED * ALIGNED)


def _compare_tokenizer(path: Path, source: Path, *, exact: bool) -> list[str]:
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


def _compare_source(
    path: Path, manifest: Mapping[str, Any] | None, source: Source, checks: Mapping[str, TensorCheck]
) -> list[str]:
    """Every tensor against the source's; problems of single tensors go into ``checks``."""
    try:
        decoded = DecodedDirectory(source, path)
    except LlmQuantizeError as error:
        facts = f": expected {error.expected}, found {error.found}" if error.expected is not None else ""
        return [f"{error.what} ({error.tensor}){facts}" if error.tensor else f"{error.what}{facts}"]
    try:
        _compare_values(decoded, manifest, source, checks)
    finally:
        decoded.close()
    return []


def _compare_values(
    decoded: DecodedDirectory, manifest: Mapping[str, Any] | None, source: Source, checks: Mapping[str, TensorCheck]
) -> None:
    packed = decoded.packed
    made = Made(True, packed.format.RESCALES) if manifest is None else made_how(manifest)
    free = made.rescaled
    stored = source.checkpoint.tensors
    for output in source.tensors.outputs:
        for name, first, count in decoded.parts(output.name):
            matrix = packed.matrices.get(name)
            main = packed.plain[name] if matrix is None else matrix.main
            check = checks[main.name]
            found = Deviation(rescaled=free and matrix_shape(output.shape)[0] > 1)
            nonfinite = 0
            for start, values in decoded.stored_rows(output.name, first, first + count):
                rows = read_output_rows(source.checkpoint, output, start, start + len(values))
                exact = to_float32(rows).reshape(values.shape)
                known = np.isfinite(exact)
                nonfinite += int(exact.size - np.count_nonzero(known))
                wanted = np.where(known, exact, 0)
                found.add(np.where(np.isfinite(values) & known, values, wanted), wanted)
            check.source_nonfinite = (check.source_nonfinite or 0) + nonfinite
            if matrix is not None:
                _judge_error(check, found, matrix.qtype, free, made.feedback)
            elif name in stored and stored[name].dtype == main.dtype:
                inside = free and output.name.startswith("blk.")
                _judge_kept(check, found, inside, is_vector=len(main.shape) < 2)
            else:
                _judge_error(check, found, check.type if check.type != "f64" else "f32", free, False)


def _judge_error(check: TensorCheck, found: Deviation, qtype: str, free: bool, feedback: bool) -> None:
    bound = error_bound(qtype, feedback=feedback)
    error = found.relative
    if free and not error <= bound:
        error = found.rescaled
    check.relative_error = max(error, check.relative_error or 0.0)
    if not error <= bound:
        check.problems.append(f"relative error {error:.4g} is above {bound:.4g} for {qtype}")


def _judge_kept(check: TensorCheck, found: Deviation, free: bool, *, is_vector: bool) -> None:
    """A tensor that is not quantized is the source's, value for value, unless a transform moved scales."""
    check.relative_error = max(found.relative, check.relative_error or 0.0)
    if not found.unequal:
        return
    if not free:
        check.problems.append(f"{found.unequal} values are not the source's, and nothing says that they were changed")
    elif not is_vector:
        check.relative_error = found.rescaled
        if not found.rescaled <= error_bound("bf16"):
            check.problems.append(f"relative error {found.rescaled:.4g}, scales of rows and columns taken out")
