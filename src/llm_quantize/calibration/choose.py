"""Where a run takes its importance from: a file the user gave, or a calibration of its own where a level needs one."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llm_quantize.calibration.text import load_texts
from llm_quantize.calibration.tokens import need_tokenizer
from llm_quantize.calibration.windows import Windows
from llm_quantize.errors import MissingExtraError, UsageError
from llm_quantize.events import EventSink, ignore
from llm_quantize.formats.base import Format
from llm_quantize.formats.gguf.plan import is_block_matrix
from llm_quantize.formats.table import FORMATS, levels_of
from llm_quantize.io.imatrix_file import Imatrix, read_imatrix
from llm_quantize.io.journal import canonical_json
from llm_quantize.io.statistics_file import read_statistics, refuse_other_model
from llm_quantize.models.opening import Source
from llm_quantize.options import CalibrationOptions, Options
from llm_quantize.streams.sizes import block_matrices

LEAST_MEASURED = 3  # tokens of a window: one to begin with, one in the half that is read, one that is predicted
CALIBRATED_NAME = "calibration-{}.safetensors"

TOKENS_PER_COLUMN = 16
"""Tokens for each input of the widest matrix that are drawn unless the user says how many. Twice as many lowered the
divergence of a 2-bit file by 6 % for half as much time again (docs/concepts/methods.md)."""


CHARACTERS_OF_TOKEN = 3
"""About how many characters a token has, in a mix of languages and code."""

BYTES_OF_CHARACTER = 4
"""At most; and a token has at least a byte."""


@dataclass(frozen=True)
class Foreseen:
    """Importance that this run has still to collect: its tensors and its text are known, its values are not.
    ``chunks``: windows at most; ``tokens``: about how many the text has."""

    names: frozenset[str]
    datasets: tuple[str, ...]
    chunks: int
    tokens: int = 0
    file: str = CALIBRATED_NAME.format("0" * 16)
    sha256: str = ""

    def silence(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Not known yet."""
        return {}

    def rows(self, name: str, shape: tuple[int, ...]) -> None:
        """Not known yet."""


@dataclass(frozen=True)
class Text:
    """Text that a method runs through the model itself, in the place of an importance matrix. ``sha256``: of its tokens
    and of what else decides their inputs, but for ``dtype``, in which this machine computes them."""

    names: frozenset[str]
    datasets: tuple[str, ...]
    windows: Windows
    sha256: str
    dtype: str

    @property
    def file(self) -> str:
        """See ``formats.base.Importance``."""
        return CALIBRATED_NAME.format(self.sha256[:16])

    @property
    def chunks(self) -> int:
        """Windows."""
        return self.windows.samples

    def silence(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The method tells what became of each matrix."""
        return {}

    def rows(self, name: str, shape: tuple[int, ...]) -> None:
        """There are none."""

    @property
    def tokens(self) -> int:
        """See ``formats.base.Importance``."""
        return self.windows.tokens


Chosen = Imatrix | Foreseen | Text
"""The importance of a run: values, from a file or a calibration; what is still to be collected; or text alone."""


def foresee(
    source: Source, format: str, levels: Sequence[str], options: Options, on_event: EventSink = ignore
) -> Imatrix | Foreseen | None:
    """The importance of this run: read from the user's file, foreseen where it must be calibrated first, or None.

    A plan made with foreseen importance has the exact size; its identity is still open. Raises UsageError where options
    contradict each other, IntegrityError for statistics of another model, UnsupportedError for a format that there is
    not, and what reading raises.
    """
    form = FORMATS.get(format)
    if form is None:
        return None  # the plan refuses it
    method, levels = options.method.method_of(format), levels_of(form, levels)
    form.check_text(levels, options)
    if options.method.calibrates(format) and any(form.calibrated(level) for level in levels):
        if options.statistics is not None:
            return _hessians(source, format, options, on_event)
        if options.calibrate is False:
            raise UsageError(
                f"--no-calibration cannot be used here: {format} made so runs text through the model",
                remedy="leave it out, or round to nearest: --method rtn --transform none",
            )
        _refuse_idle(options, f"--method {method.name} runs the text through the model itself")
        _refuse_short(source, options)
    elif not form.weighs:
        _refuse_idle(options, f"{format} with --method {method.name} needs no text")
        return None
    elif not _calibrates(source, form, levels, options):
        return _given(source, options, on_event)
    need_tokenizer(source.checkpoint)
    return _foreseen(source, calibration_of(source, format, options).settled())


def _foreseen(source: Source, options: CalibrationOptions) -> Foreseen:
    """What can be told of the text before it is tokenized: no more tokens than bytes, and about a third of them."""
    found = load_texts(options.data).datasets
    size = sum(dataset.characters for dataset in found)
    length = min(options.length, source.architecture.hyper.context_length)
    windows = min(options.samples or 0, max(1, BYTES_OF_CHARACTER * size // length))
    return Foreseen(
        _matrices(source), tuple(one.name for one in found), windows, max(1, round(size / CHARACTERS_OF_TOKEN))
    )


def collected(
    source: Source,
    format: str,
    options: Options,
    on_event: EventSink,
    *,
    before: int | None = None,
    directory: Path | None = None,
) -> Imatrix | Text:
    """What was only foreseen: the values of a calibration, kept and reused by every later run of the same model and
    text (in ``directory``, None: the cache); or the text itself, where the method runs it through the model.

    Raises MissingExtraError without torch, and what reading the text and calibrating raises.
    """
    if options.method.calibrates(format):
        return _drawn(source, format, options, on_event)
    from llm_quantize.calibration.collect import calibrate

    need_torch("calibration", "torch", "transformers")
    found = calibrate(source, options.calibration, before=before, directory=directory, on_event=on_event)
    return from_statistics(found.path, source)


def rows_of(source: Source, importance: Chosen | None) -> dict[str, npt.NDArray[np.float32]]:
    """float32 (matrices, columns) for each tensor of the map that has values; a wrong shape is refused."""
    if not isinstance(importance, Imatrix):
        return {}
    found = {output.name: importance.rows(output.name, output.shape) for output in source.tensors.outputs}
    return {name: rows for name, rows in found.items() if rows is not None}


def _refuse_short(source: Source, options: Options) -> None:
    """Raise UsageError for windows of which nothing could be measured: the second half of each is predicted."""
    if min(options.calibration.length, source.architecture.hyper.context_length) < LEAST_MEASURED:
        raise UsageError(
            "windows as short as this leave nothing to measure the result on",
            expected=f"--sequence-length of {LEAST_MEASURED} or more",
            found=options.calibration.length,
            remedy="give a larger --sequence-length; a few hundred tokens are usual",
        )


def _matrices(source: Source) -> frozenset[str]:
    """Every matrix of the blocks."""
    return frozenset(output.name for output in source.tensors.outputs if is_block_matrix(output))


def _hessians(source: Source, format: str, options: Options, on_event: EventSink) -> Imatrix:
    """What statistics with Hessians stand for in plans. Raises UsageError where they cannot serve."""
    if options.method.inputs != "source" or options.method.transform_of(format).passes:
        raise UsageError(
            "statistics tell the inputs of the source model, not of the model as it is quantized",
            found=f"--inputs {options.method.inputs}, --transform {options.method.transform_of(format).name}",
            expected="--inputs source and --transform none",
            remedy="give those two, or leave --statistics out",
        )
    with read_statistics(options.statistics or "") as statistics:
        if "hessian" not in statistics.kinds:
            raise UsageError(
                "these statistics hold no Hessians",
                file=statistics.path,
                found=", ".join(statistics.kinds),
                remedy="collect them: llm-quantize analyze importance --collect imatrix,hessian",
            )
    return from_statistics(statistics.path, source, whole=True, on_event=on_event)


def _refuse_idle(options: Options, why: str) -> None:
    for option, given in (("--imatrix", options.imatrix), ("--statistics", options.statistics)):
        if given is not None:
            raise UsageError(f"{option} cannot be used here: {why}", found=given, remedy=f"leave {option} out")


def calibration_of(source: Source, format: str, options: Options) -> CalibrationOptions:
    """The calibration that ``options`` ask for, where they give no number with as many windows as a method needs:
    TOKENS_PER_COLUMN, at least 8 windows, at most 256."""
    if not options.method.calibrates(format):
        return options.calibration
    length = min(options.calibration.length, source.architecture.hyper.context_length)
    widest = max((output.shape[-1] for output in block_matrices(source.tensors.outputs)), default=1)
    return options.calibration.settled(min(256, max(8, math.ceil(TOKENS_PER_COLUMN * widest / length))))


def _drawn(source: Source, format: str, options: Options, on_event: EventSink) -> Text:
    """The text that a method will run through the model itself.

    Raises MissingExtraError without torch, and what reading the text raises.
    """
    from llm_quantize.calibration.collect import compute_dtype
    from llm_quantize.calibration.drawing import draw_windows
    from llm_quantize.streams.network import require_device

    need_torch("calibration", "torch", "transformers")
    require_device(options.calibration.device)
    windows, facts = draw_windows(source, calibration_of(source, format, options), on_event)
    digest = hashlib.sha256(canonical_json([facts, windows.sha256, options.calibration.device])).hexdigest()
    dtype = compute_dtype(source, options.calibration.device)
    return Text(_matrices(source), tuple(facts["datasets"]), windows, digest, dtype)


def need_torch(feature: str, *packages: str) -> None:
    """Raise MissingExtraError where one of ``packages``, which ``feature`` works with, is not installed."""
    if any(find_spec(name) is None for name in packages):
        raise MissingExtraError(feature, "torch")


def from_statistics(path: Path, source: Source, *, whole: bool = False, on_event: EventSink = ignore) -> Imatrix:
    """The importance matrix in a file of statistics: the values that llama.cpp would read from our imatrix of them.

    Its name and hash follow from the values alone, so that the artifact does not depend on where the file lies;
    ``whole``: from all values in the file, Hessians too. ``on_event`` hears how far the reading of the source is, where
    its hash is not known.
    Raises IntegrityError for statistics of another model (a source opened for its headers cannot tell), and what
    reading raises.
    """
    from llm_quantize.calibration.imatrix import tensor_statistics

    with read_statistics(path) as statistics:
        if not source.checkpoint.headers_only:
            refuse_other_model(statistics, source.content(on_event))
        known = tensor_statistics(statistics, source.tensors.outputs)
        text, content = statistics.identity.text, statistics.content_sha256
    values = {name: found.importance for name, found in known.items()}
    unreached = {name: found.unreached for name, found in known.items() if found.unreached}
    digest = content if whole else _digest(values)
    name = Path(CALIBRATED_NAME.format(digest[:16]))
    return Imatrix(name, values, tuple(text["datasets"]), int(text["windows"]), digest, unreached)


def _digest(values: Mapping[str, npt.NDArray[np.float32]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(values):
        digest.update(f"{name} {values[name].shape}".encode())
        digest.update(np.ascontiguousarray(values[name], "<f4").data)
    return digest.hexdigest()


def _given(source: Source, options: Options, on_event: EventSink) -> Imatrix | None:
    found = None
    if options.imatrix is not None:
        found = read_imatrix(options.imatrix)
    elif options.statistics is not None:
        found = from_statistics(options.statistics, source, on_event=on_event)
    rows_of(source, found)
    return found


def _calibrates(source: Source, form: Format, levels: Sequence[str], options: Options) -> bool:
    """Whether this run has to calibrate. Raises UsageError for options that contradict each other."""
    given = [
        option
        for option, value in (
            ("--imatrix", options.imatrix is not None),
            ("--statistics", options.statistics is not None),
            ("--calibration-data", options.calibrate is True),
            ("--no-calibration", options.calibrate is False),
        )
        if value
    ]
    if len(given) > 1 and given != ["--imatrix", "--no-calibration"] and given != ["--statistics", "--no-calibration"]:
        raise UsageError("only one of these can be given", found=" and ".join(given))
    if options.imatrix is not None or options.statistics is not None or options.calibrate is False:
        return False
    if options.calibrate is True:
        return True
    return any(form.needs_importance(source, level, options) for level in levels)
