"""Verification of an artifact: structure, manifest hashes, finite values, and the error against the source.

One walk for every kind of artifact (``verify``); a ``Subject`` says what its kind stores and what its numbers are.
Without a manifest (an artifact from elsewhere) hashes are not known; structure and values are still checked, and every
tensor can be compared with a source. Of a directory's tokenizer only the vocabulary is held against the source's then,
as other tools write its files anew.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from llm_quantize import events
from llm_quantize.architectures.base import OutputTensor, Piece
from llm_quantize.architectures.rows import (
    chunk_ranges,
    chunk_rows,
    matrix_shape,
    weights_of,
)
from llm_quantize.artifacts.compared import Compared
from llm_quantize.artifacts.decoded_directory import DecodedDirectory
from llm_quantize.artifacts.deviation import (
    Deviation,
    Made,
    error_bound,
    judge_kept,
    judge_part,
    judge_whole,
    made_how,
    told,
)
from llm_quantize.artifacts.immense import FLOATS, nonfinite, refuse_large_matrices, refuse_long_rows
from llm_quantize.artifacts.manifest import adapters_told, read_manifest
from llm_quantize.artifacts.promise import MovedScales, Promises
from llm_quantize.artifacts.subject import Checks, Floats, Keeps, Manifest, Notes, Subject
from llm_quantize.artifacts.verdict import EXACT, ROUNDED
from llm_quantize.artifacts.verification import StoredTensor, TensorCheck, Verification, check_stored, judge_nonfinite
from llm_quantize.artifacts.verify_ctranslate2 import CTranslate2Subject
from llm_quantize.errors import IntegrityError, LlmQuantizeError, NumericPolicyError, UsageError
from llm_quantize.events import EventSink, ignore
from llm_quantize.formats.directory_check import compare_files, compare_small_files, compare_tensors
from llm_quantize.formats.gguf.check import compare_names, compare_parts, compare_plan, squeezed
from llm_quantize.formats.gguf.scales import Scales, decode
from llm_quantize.formats.kv_cache import contradictions
from llm_quantize.formats.packed import ALIGNED, PackedMatrix, group_index
from llm_quantize.io.artifact_paths import manifest_path
from llm_quantize.io.gguf_file import GgufFile, TensorEntry, read_gguf
from llm_quantize.io.paths import read_range
from llm_quantize.io.safetensors_file import TensorInfo
from llm_quantize.models.ctranslate2 import is_ctranslate2
from llm_quantize.models.opening import Source, open_source
from llm_quantize.models.quantized import PackedDirectory, is_packed_directory, is_stored_directory
from llm_quantize.models.stored import StoredDirectory
from llm_quantize.qtypes import QTYPES

__all__ = ["TensorCheck", "Verification", "error_bound", "located", "verify"]

_NAMES = {
    **{"U8": "uint8", "F8_E4M3": "float8_e4m3", "F8_E8M0": "float8_e8m0", "I8": "int8", "I16": "int16"},
    **{"I32": "int32", "U32": "uint32", "I64": "int64"},
}
_SLACK = 1e-6  # of sums in another order
_SCALES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


def verify(
    artifact: str | Path,
    *,
    source: str | None = None,
    revision: str | None = None,
    lora: Sequence[str] = (),
    on_event: EventSink = ignore,
) -> Verification:
    """Check ``artifact`` (a GGUF file, the directory of a split one, or a model directory), against ``source`` too if
    given.

    Raises UsageError or MalformedInputError where the artifact cannot be read at all; what is merely wrong is in the
    result (see ``raise_on_problems``).
    """
    with ExitStack() as stack:
        subject = _open(Path(artifact), stack)
        manifest = read_manifest(manifest_path(subject.path))
        problems = list(subject.structure(manifest))
        model = None
        if source is not None:
            model = open_source(source, revision=revision, lora=lora, on_event=on_event)
            stack.callback(model.checkpoint.close)
            _tell_adapters(manifest, model, on_event)
            problems += subject.against(model, manifest, stack)
        known = {entry["name"]: entry for entry in (manifest or {}).get("tensors", [])}
        checks = {stored.name: check_stored(stored, known.get(stored.name)) for stored in subject.stored()}
        poisoned: dict[str, int] = {}
        done = 0
        for part in subject.values(checks, model, made_how(manifest, subject.unmarked), poisoned):
            done += part
            on_event(events.Progress(done=done, total=subject.total))
        for name, check in checks.items():
            judge_nonfinite(check, poisoned.get(name, 0), has_manifest=name in known)
        promises = Promises(manifest, model)
        notes = subject.judge(checks, promises.keeps)
        _hold_to_verdicts(manifest, checks)
    return Verification(
        subject.path, manifest is not None, model is not None, list(checks.values()), problems, list(notes)
    )


def located(artifact: str | Path) -> Path:
    """Where the artifact lies that ``artifact`` is, or is a part of. Raises what ``verify`` raises before it reads a
    tensor."""
    with ExitStack() as stack:
        return _open(Path(artifact), stack).path


def _hold_to_verdicts(manifest: Manifest | None, checks: Checks) -> None:
    """Problems where a tensor is further from the source than the conversion said that made it."""
    fields = {str(entry["fields"][0]): entry for entry in (manifest or {}).get("matrices", []) if entry["fields"]}
    for entry in (manifest or {}).get("tensors", []):
        name = str(entry["name"])
        said = fields.get(name, entry)
        check, word = checks.get(name), said.get("verdict")
        if check is None or check.relative_error is None or word not in (EXACT, ROUNDED):
            continue
        limit = 0.0 if word == EXACT else float(said.get("relative_error", 0.0)) * (1 + _SLACK)
        if not check.relative_error <= limit:
            check.problems.append(
                f"relative error {check.relative_error:.4g}, but the manifest says {word}"
                + (f" ({said['relative_error']:.4g})" if word == ROUNDED else "")
            )


def _tell_adapters(manifest: Manifest | None, model: Source, on_event: EventSink) -> None:
    """Say where the artifact was made with other adapters than are merged into ``model``: its values are others then,
    unless ``model`` has them in its own weights."""
    merged = adapters_told([merge.facts for merge in model.checkpoint.adapters])
    wanted = merged if manifest is None else adapters_told(manifest["identity"].get("adapters", []))
    if wanted != merged:
        text = f"the artifact says that adapters were merged into its source: {wanted}; here, with --lora: {merged}"
        on_event(events.Caution(text))


def _open(path: Path, stack: ExitStack) -> Subject:
    if is_ctranslate2(path):
        return CTranslate2Subject(path)
    if is_packed_directory(path):
        return _PackedDirectory(path, stack.enter_context(PackedDirectory(path)))
    if is_stored_directory(path):
        return _Directory(path, stack.enter_context(StoredDirectory(path)))
    return _Gguf(*_open_gguf(path))


@dataclass
class _Gguf:
    """The file or files of a GGUF artifact."""

    path: Path
    files: list[GgufFile]
    unmarked: Made = field(default_factory=Made)
    _found: dict[str, tuple[Compared, Made]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._entries = [(file, tensor) for file in self.files for tensor in file.tensors]
        self._scales = Scales.of_files(self.files)
        self.total = sum(weights_of(tensor.shape) for _, tensor in self._entries)
        refuse_long_rows((tensor.name, file.path, tensor.shape) for file, tensor in self._entries)
        self.unmarked = Made(weighed=any("quantize.imatrix.file" in file.metadata for file in self.files))

    def structure(self, manifest: Manifest | None) -> Iterator[str]:
        yield from compare_parts(self.files)
        if manifest is not None:
            yield from compare_plan(self.files, manifest)

    def stored(self) -> Iterator[StoredTensor]:
        for file, tensor in self._entries:
            rows, kind = matrix_shape(tensor.shape)[0], tensor.type.name.lower()
            yield StoredTensor(tensor.name, kind, file.path, tensor.offset, tensor.nbytes, rows)

    def against(self, source: Source, manifest: Manifest | None, stack: ExitStack) -> list[str]:
        return compare_names(self.files, source.tensors.outputs, beside=self._scales.weights)

    def values(self, checks: Checks, source: Source | None, made: Made, poisoned: dict[str, int]) -> Iterator[int]:
        outputs = {} if source is None else {output.name: output for output in source.tensors.outputs}
        for file, tensor in self._entries:
            check, output = checks[tensor.name], outputs.get(tensor.name)
            per_matrix = tensor.shape[-2] if len(tensor.shape) > 1 else 1
            if check.type not in QTYPES:
                text = f"type {check.type} cannot be decoded by this version; values were not checked"
                check.problems.append(text)
            elif self._scale_is_right(tensor.name, checks):
                compared = None
                if source is not None and output is not None and squeezed(output.shape) == squeezed(tensor.shape):
                    compared = Compared(source, output, rescaled=made.rescaled and per_matrix > 1)
                    self._found[tensor.name] = compared, made
                for start, values in _decoded(file, tensor, self._scales):
                    check.nonfinite += int(values.size - np.count_nonzero(np.isfinite(values)))
                    if compared is not None:
                        compared.add(start, values, start // per_matrix)
                if compared is not None:
                    compared.tell(check)
                    poisoned[tensor.name] = compared.poisoned
            yield weights_of(tensor.shape)

    def _scale_is_right(self, name: str, checks: Checks) -> bool:
        """Whether the scale of a matrix, if it has one, is a number that its values can be multiplied with."""
        try:
            self._scales.of(name)
        except NumericPolicyError as error:
            checks[str(error.tensor)].problems.append(f"{error.what}: {error.found}, not {error.expected}")
            return False
        return True

    def judge(self, checks: Checks, keeps: Keeps) -> Notes:
        return told(
            judge_whole(checks[name], list(compared.found.values()), made, keeps)
            for name, (compared, made) in self._found.items()
        )


def _open_gguf(path: Path) -> tuple[Path, list[GgufFile]]:
    if not path.exists():
        raise UsageError("no such artifact", file=path, remedy="check the path")
    part = re.fullmatch(r"(.+)-\d{5}-of-\d{5}\.gguf", path.name)
    if part is not None and (path.parent / "manifest.json").is_file():
        return _open_gguf(path.parent)
    if path.is_dir():
        names = sorted(path.glob("*.gguf"))
    elif part is not None:
        names = sorted(path.parent.glob(f"{glob.escape(part[1])}-*-of-{path.name[-10:-5]}.gguf"))
    else:
        names = [path]
    if not names:
        raise UsageError("no GGUF file in this directory", file=path, remedy="give the path of the artifact")
    return path, [read_gguf(name) for name in names]


def _decoded(file: GgufFile, tensor: TensorEntry, scales: Scales) -> Iterator[tuple[int, Floats]]:
    """(first row, float32 values) of a tensor, chunk by chunk."""
    rows, columns = matrix_shape(tensor.shape)
    row_bytes = tensor.nbytes // rows
    for _, start, stop in chunk_ranges(tensor.shape, 0, rows):
        data = read_range(file.path, tensor.offset + start * row_bytes, (stop - start) * row_bytes)
        packed = np.frombuffer(data, np.uint8).reshape(stop - start, row_bytes)
        factors = scales.of_rows(tensor.name, tensor.shape, start, stop - start)
        yield start, decode(tensor.type.name.lower(), packed, columns, factors)


@dataclass
class _Directory:
    """A model directory. ``files``: as it is stored; of a plain one every tensor is compared as it stands."""

    path: Path
    files: StoredDirectory
    _decoded: DecodedDirectory | None = None
    _found: list[tuple[Deviation, str, bool]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.total = sum(info.nbytes for info in self.files.tensors.values())
        self.unmarked = self._made = Made(True, self.files.rescales)

    def structure(self, manifest: Manifest | None) -> Iterator[str]:
        if manifest is not None:
            yield from compare_files(self.path, manifest)
            yield from compare_tensors(self.files.tensors, manifest)

    def stored(self) -> Iterator[StoredTensor]:
        for name, info in self.files.tensors.items():
            kind = _NAMES.get(info.dtype)
            kind = kind or (info.dtype.lower() if name in self.files.plain else _SCALES[info.dtype])
            yield StoredTensor(name, kind, info.file, info.offset, info.nbytes, matrix_shape(info.shape)[0])

    def against(self, source: Source, manifest: Manifest | None, stack: ExitStack) -> Iterator[str]:
        refuse_long_rows((name, info.file, info.shape) for name, info in self.files.plain.items())
        yield from compare_small_files(self.path, source, manifest)
        try:
            self._decoded = DecodedDirectory(source, self.path)
        except LlmQuantizeError as error:
            what = f"{error.what} ({error.tensor})" if error.tensor else error.what
            yield what if error.expected is None else f"{what}: expected {error.expected}, found {error.found}"
        else:
            stack.callback(self._decoded.close)
            yield from (f"config.json: {text}" for text in self._decoded.differs)

    def values(self, checks: Checks, source: Source | None, made: Made, poisoned: dict[str, int]) -> Iterator[int]:
        for name, info in self.files.plain.items():
            self._check_plain(name, info, checks[name])
        if source is not None and self._decoded is not None:
            self._made = made
            for name, output, compared in self._compared(source, self._decoded):
                compared.tell(checks[self._main(name).name])
                if name in self.files.plain:
                    poisoned[name] = poisoned.get(name, 0) + compared.poisoned
                in_block = output.name.startswith("blk.")
                self._found += [(deviation, name, in_block) for deviation in compared.found.values()]
        yield sum(info.nbytes for info in self.files.plain.values())

    def _check_plain(self, name: str, info: TensorInfo, check: TensorCheck) -> None:
        if info.dtype not in FLOATS:
            if self._is_weight(name):
                check.problems.append(f"type {info.dtype} is no weight's; its values were not checked")
            return
        check.nonfinite += nonfinite(info)

    def _is_weight(self, name: str) -> bool:
        """Whether a plain tensor must be one: other models hold buffers of integers too."""
        return self.files.floats.is_readable(name)

    def _compared(self, source: Source, decoded: DecodedDirectory) -> Iterator[tuple[str, OutputTensor, Compared]]:
        """(tensor, what it is in the source, the two compared) of every tensor of the map, and of whatever the source
        has beside them under the same name (vision towers). What the map puts through a curve is compared as it is
        stored where it can be: errors are others behind it, and verdicts are of those before."""
        seen = set()
        for output in source.tensors.outputs:
            curved = any(piece.curve for piece in output.pieces)
            for name, first, count in decoded.parts(output.name):
                if curved and self._stands(source, name):
                    continue
                seen.add(name)
                yield (
                    name,
                    output,
                    self._compare(source, output, decoded.stored_rows(output.name, first, first + count)),
                )
        for name, info in self.files.plain.items():
            if name not in seen and self._stands(source, name):
                output = OutputTensor(name, info.shape, (Piece(name),))
                yield name, output, self._compare(source, output, self._rows_of(name, info))

    def _stands(self, source: Source, name: str) -> bool:
        """Whether the tensor is floats here, and of the same name and shape in the source."""
        info, known = self.files.plain.get(name), source.checkpoint.tensors.get(name)
        same = info is not None and known is not None and known.shape == info.shape and info.dtype in FLOATS
        return same and source.checkpoint.is_readable(name)

    def _rows_of(self, name: str, info: TensorInfo) -> Iterator[tuple[int, Floats]]:
        for _, first, last in chunk_ranges(info.shape, 0, matrix_shape(info.shape)[0]):
            yield first, self.files.rows(name, first, last)

    def _compare(self, source: Source, output: OutputTensor, rows: Iterable[tuple[int, Floats]]) -> Compared:
        rescaled, one_row = self._made.rescaled, matrix_shape(output.shape)[0] == 1
        scale = None
        if rescaled and one_row and len(output.shape) > 1 and self._decoded is not None:
            scale = MovedScales(source, self._decoded).of(output)
        compared = Compared(source, output, rescaled=rescaled and not one_row, scale=scale)
        for start, values in rows:
            compared.add(start, values)
        return compared

    def _main(self, name: str) -> TensorInfo:
        matrix = self.files.matrices.get(name)
        return self.files.plain[name] if matrix is None else matrix.main

    def judge(self, checks: Checks, keeps: Keeps) -> Notes:
        return told(self._judged(checks, keeps))

    def _judged(self, checks: Checks, keeps: Keeps) -> Iterator[str]:
        known = {} if self._decoded is None else self._decoded.reference
        for deviation, name, in_block in self._found:
            main, matrix = self._main(name), self.files.matrices.get(name)
            check = checks[main.name]
            if matrix is not None:
                yield judge_part(check, deviation, matrix.qtype, self._made, keeps)
            elif name in known and known[name].dtype == main.dtype:
                yield judge_kept(check, deviation, self._made.rescaled and in_block, is_vector=len(main.shape) < 2)
            else:
                qtype = check.type if check.type != "f64" else "f32"
                yield judge_part(check, deviation, qtype, Made(False, self._made.rescaled), keeps)


@dataclass
class _PackedDirectory(_Directory):
    """A quantized model directory."""

    files: PackedDirectory

    def structure(self, manifest: Manifest | None) -> Iterator[str]:
        refuse_large_matrices(self.files.matrices.values(), self.files.scratch)
        yield from super().structure(manifest)
        yield from self.files.format.check_settings(self.files.settings, self.files.matrices)
        modules = [name.removesuffix(".weight") for name in (*self.files.matrices, *self.files.plain)]
        yield from contradictions(self.files.settings.values.get("kv_cache_scheme"), self.files.caches, modules)

    def values(self, checks: Checks, source: Source | None, made: Made, poisoned: dict[str, int]) -> Iterator[int]:
        for name in self.files.caches:
            scales = self.files.cache_scales(name)
            if not (np.isfinite(scales) & (scales > 0)).all():
                checks[name].problems.append("a scale of keys, values or queries is not a positive number")
        yield sum(info.nbytes for info in self.files.caches.values())
        for matrix in self.files.matrices.values():
            self._check_numbers(matrix, checks)
            yield matrix.nbytes
        yield from super().values(checks, source, made, poisoned)

    def _is_weight(self, name: str) -> bool:
        """No integers but those of matrices are expected."""
        return True

    def _check_numbers(self, matrix: PackedMatrix, checks: Checks) -> None:
        """Scales, zero points and the order of columns of one matrix."""
        named = {suffix: checks[info.name] for suffix, info in matrix.fields.items()}
        main, scale = checks[matrix.main.name], named[matrix.layout.scales]
        main.type = matrix.qtype
        try:
            fields = self.files.fields(matrix)
        except IntegrityError as error:
            main.problems.append(f"{error.what}: {error.tensor} at offset {error.offset} has {error.found}")
            return
        format, index = self.files.format, group_index(matrix, fields)
        step, lost = max(ALIGNED, chunk_rows(matrix.columns) // ALIGNED * ALIGNED), 0
        for first in range(0, matrix.rows, step):
            rows = (matrix, fields, first, min(matrix.rows, first + step))
            scales = format.scales(*rows)
            scale.nonfinite += int(scales.size - np.count_nonzero(np.isfinite(scales)))
            for suffix, text in format.check(matrix, self.files.settings, *rows[1:]):
                named[suffix].problems.append(text)
            if (scales == 0).any():
                codes, zeros = format.codes(*rows), format.zeros(*rows)
                away = codes if zeros is None else codes - zeros[:, index]
                lost += int(np.count_nonzero((away != 0) & (scales == 0)[:, index]))
        if lost:
            scale.problems.append(f"{lost} codes that are not zero stand under a scale of zero")
