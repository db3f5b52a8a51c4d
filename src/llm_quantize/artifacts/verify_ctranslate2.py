"""Verification of a CTranslate2 model: its variables, each by its name in model.bin."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from llm_quantize.architectures.rows import chunk_ranges, matrix_shape
from llm_quantize.artifacts.compared import Compared
from llm_quantize.artifacts.decoded_ctranslate2 import DecodedCTranslate2
from llm_quantize.artifacts.deviation import Made, judge_kept, judge_part, told
from llm_quantize.artifacts.immense import refuse_long_rows
from llm_quantize.artifacts.subject import Checks, Keeps, Manifest, Notes
from llm_quantize.artifacts.verification import StoredTensor
from llm_quantize.errors import LlmQuantizeError
from llm_quantize.formats.ctranslate2.levels import CODES, VARIABLE_TYPES
from llm_quantize.formats.directory import KEPT_TYPES
from llm_quantize.formats.directory_check import compare_files, compare_names, compare_small_files
from llm_quantize.io.ctranslate2_file import Entry
from llm_quantize.models.ctranslate2 import GRIDS, CTranslate2Directory
from llm_quantize.models.opening import Source


class CTranslate2Subject:
    """The directory ``path``."""

    def __init__(self, path: Path) -> None:
        self.path, self.unmarked = path, Made(True)
        self._files = CTranslate2Directory(path)
        self._variables = self._files.variables
        self.total = sum(entry.nbytes for entry in self._variables.values())
        self._decoded: DecodedCTranslate2 | None = None
        self._found: dict[str, tuple[Compared, Made, bool]] = {}
        refuse_long_rows((name, self._files.file.path, entry.shape) for name, entry in self._variables.items())

    def structure(self, manifest: Manifest | None) -> Iterator[str]:
        if manifest is not None:
            yield from compare_files(self.path, manifest)
            yield from compare_names(self._variables, manifest)

    def stored(self) -> Iterator[StoredTensor]:
        for name, entry in self._variables.items():
            rows = matrix_shape(entry.shape)[0]
            yield StoredTensor(name, self._type(entry), self._files.file.path, entry.offset, entry.nbytes, rows)

    def _type(self, entry: Entry) -> str:
        """As the manifest has it."""
        if entry.dtype in CODES.values() or self._files.is_scale(entry.name):
            return entry.dtype
        return GRIDS.get(entry.dtype, entry.dtype)

    def against(self, source: Source, manifest: Manifest | None, stack: ExitStack) -> Iterator[str]:
        yield from compare_small_files(self.path, source, manifest)
        try:
            self._decoded = DecodedCTranslate2(source, self.path)
        except LlmQuantizeError as error:
            facts = f": expected {error.expected}, found {error.found}" if error.expected is not None else ""
            yield f"{error.what} ({error.tensor}){facts}" if error.tensor else f"{error.what}{facts}"
        else:
            stack.callback(self._decoded.close)
            yield from self._decoded.differs

    def values(self, checks: Checks, source: Source | None, made: Made, poisoned: dict[str, int]) -> Iterator[int]:
        outputs = {} if self._decoded is None else {w.output.name: w.output for w in self._decoded.network.weights}
        aliased = {self._files.file.aliases.get(name, name): output for name, output in outputs.items()}
        for name, entry in self._variables.items():
            check, compared = checks[name], None
            if source is not None and name in aliased:
                compared = Compared(source, aliased[name], rescaled=False)
                stored = KEPT_TYPES.get(source.checkpoint.tensors[aliased[name].pieces[0].source].dtype)
                self._found[name] = compared, made, stored == check.type
            self._check_scales(entry, check.problems)
            for _, start, stop in chunk_ranges(entry.shape, 0, matrix_shape(entry.shape)[0]):
                values = self._files.rows(name, start, stop)
                check.nonfinite += int(values.size - np.count_nonzero(np.isfinite(values)))
                if compared is not None:
                    compared.add(start, values)
            if compared is not None:
                compared.tell(check)
                poisoned[name] = compared.poisoned
            yield entry.nbytes

    def _check_scales(self, entry: Entry, problems: list[str]) -> None:
        rows = matrix_shape(entry.shape)[0]
        scales = self._files.scales(entry, 0, rows)
        if scales is None:
            if entry.dtype not in VARIABLE_TYPES.values():
                problems.append(f"codes of {entry.dtype} have no scale")
            return
        if len(scales) not in (1, rows):
            problems.append(f"{len(scales)} scales for {rows} rows")
        elif bad := int(np.count_nonzero((scales == 0) | ~np.isfinite(scales))):
            problems.append(f"{bad} scales are zero, infinite or NaN")

    def judge(self, checks: Checks, keeps: Keeps) -> Notes:
        return told(self._judged(checks, keeps))

    def _judged(self, checks: Checks, keeps: Keeps) -> Iterator[str]:
        for name, (compared, made, same) in self._found.items():
            for deviation in compared.found.values():
                if same:
                    yield judge_kept(checks[name], deviation, False, is_vector=len(self._variables[name].shape) < 2)
                else:
                    kind = self._variables[name].dtype
                    yield judge_part(checks[name], deviation, GRIDS.get(kind, kind), made, keeps)
