"""Where a run takes its importance from: a file the user gave, or a calibration of its own where a level needs one."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llm_quantize.artifacts.planning import Options, is_block_matrix, tensor_shapes
from llm_quantize.blockwise.estimate import enough_windows
from llm_quantize.calibration.options import CalibrationOptions
from llm_quantize.calibration.text import load_texts
from llm_quantize.calibration.windows import Windows
from llm_quantize.errors import MissingExtraError, UsageError
from llm_quantize.events import EventSink
from llm_quantize.formats.gguf.levels import needs_importance
from llm_quantize.io.imatrix_file import Imatrix, read_imatrix
from llm_quantize.io.journal import canonical_json
from llm_quantize.io.statistics_file import read_statistics, refuse_other_model
from llm_quantize.models.opening import Source

CALIBRATED_NAME = "calibration-{}.safetensors"


def foresee(source: Source, format: str, levels: Sequence[str], options: Options) -> Imatrix | None:
    """The importance of this run: read from the user's file, or of the right names and shapes where it must be
    calibrated first (``is_foreseen``), or None.

    A plan made with foreseen values has the exact size; its identity is still open. Raises UsageError where options
    contradict each other, IntegrityError for statistics of another model, and what reading raises.
    """
    if options.method.calibrates(format):
        if options.statistics is not None:
            return _hessians(source, format, options)
        if options.calibrate is False:
            raise UsageError(
                f"--no-calibration cannot be used here: {format} made so runs text through the model",
                remedy="leave it out, or round to nearest: --method rtn --transform none",
            )
        _refuse_idle(options, f"--method {options.method.method_of(format)} runs the text through the model itself")
    elif format != "gguf":
        _refuse_idle(options, f"{format} with --method rtn needs no text")
        return None
    elif not _calibrates(source, levels, options):
        return _given(source, options)
    names = tuple(dataset.name for dataset in load_texts(options.calibration.data).datasets)
    path = Path(CALIBRATED_NAME.format("0" * 16))
    return Imatrix(path, _ones(source), names, calibration_of(source, format, options).settled().samples or 0, "")


def _ones(source: Source) -> dict[str, npt.NDArray[np.float32]]:
    """Importance of the right names and shapes: every matrix of the blocks."""
    return {
        output.name: np.broadcast_to(np.float32(1), (math.prod(output.shape[:-2]), output.shape[-1]))
        for output in source.tensors.outputs
        if is_block_matrix(output)
    }


def _hessians(source: Source, format: str, options: Options) -> Imatrix:
    """What statistics with Hessians stand for in plans. Raises UsageError where they cannot serve."""
    if options.method.inputs != "source" or options.method.transform_of(format) != "none":
        raise UsageError(
            "statistics tell the inputs of the source model, not of the model as it is quantized",
            found=f"--inputs {options.method.inputs}, --transform {options.method.transform_of(format)}",
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
    return from_statistics(statistics.path, source)


def _refuse_idle(options: Options, why: str) -> None:
    for option, given in (("--imatrix", options.imatrix), ("--statistics", options.statistics)):
        if given is not None:
            raise UsageError(f"{option} cannot be used here: {why}", found=given, remedy=f"leave {option} out")


def calibration_of(source: Source, format: str, options: Options) -> CalibrationOptions:
    """The calibration that ``options`` ask for, with as many windows as a method needs where they give no number."""
    if not options.method.calibrates(format):
        return options.calibration
    return options.calibration.settled(enough_windows(source, options.calibration.length))


def drawn(source: Source, format: str, options: Options, on_event: EventSink) -> tuple[Imatrix, Windows]:
    """The text that a method will run through the model itself, and the importance matrix that stands for it in plans:
    its names and shapes are right, its hash is that of the tokens, its values are nobody's.

    Raises MissingExtraError without torch, and what reading the text raises.
    """
    from llm_quantize.calibration.drawing import draw_windows
    from llm_quantize.streams.network import require_device

    need_torch("calibration", "torch", "transformers")
    require_device(options.calibration.device)
    windows, facts = draw_windows(source, calibration_of(source, format, options), on_event)
    digest = hashlib.sha256(canonical_json([facts, windows.sha256, options.calibration.device])).hexdigest()
    path = Path(CALIBRATED_NAME.format(digest[:16]))
    return Imatrix(path, _ones(source), tuple(facts["datasets"]), windows.samples, digest), windows


def need_torch(feature: str, *packages: str) -> None:
    """Raise MissingExtraError where one of ``packages``, which ``feature`` works with, is not installed."""
    if any(find_spec(name) is None for name in packages):
        raise MissingExtraError(feature, "torch")


def is_foreseen(imatrix: Imatrix | None) -> bool:
    """Whether these values are only foreseen: the run must calibrate."""
    return imatrix is not None and not imatrix.sha256


def calibrated(source: Source, options: Options, on_event: EventSink, *, before: int | None = None) -> Imatrix:
    """The importance from a calibration, which is kept and reused by every later run of the same model and text.

    Raises MissingExtraError without torch, and what ``calibration.collect.calibrate`` raises.
    """
    from llm_quantize.calibration.collect import calibrate

    return from_statistics(calibrate(source, options.calibration, before=before, on_event=on_event).path, source)


def from_statistics(path: Path, source: Source) -> Imatrix:
    """The importance matrix in a file of statistics: the values that llama.cpp would read from our imatrix of them.

    Its name and hash follow from the values alone, so that the artifact does not depend on where the file lies.
    Raises IntegrityError for statistics of another model (a source opened for its headers cannot tell), and what
    reading raises.
    """
    from llm_quantize.calibration.identity import model_digest
    from llm_quantize.calibration.imatrix import importance

    with read_statistics(path) as statistics:
        if not source.checkpoint.headers_only:
            refuse_other_model(statistics, model_digest(source.checkpoint))
        values = importance(statistics, source.tensors.outputs)
        text = statistics.identity.text
    digest = _digest(values)
    name = Path(CALIBRATED_NAME.format(digest[:16]))
    return Imatrix(name, values, tuple(text["datasets"]), int(text["windows"]), digest)


def _digest(values: Mapping[str, npt.NDArray[np.float32]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(values):
        digest.update(f"{name} {values[name].shape}".encode())
        digest.update(np.ascontiguousarray(values[name], "<f4").data)
    return digest.hexdigest()


def _given(source: Source, options: Options) -> Imatrix | None:
    if options.imatrix is not None:
        return read_imatrix(options.imatrix)
    if options.statistics is not None:
        return from_statistics(options.statistics, source)
    return None


def _calibrates(source: Source, levels: Sequence[str], options: Options) -> bool:
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
    hyper, arch = source.architecture.hyper, source.architecture.gguf_name
    return any(
        needs_importance(level, tensor_shapes(source, level), hyper, arch=arch, overrides=options.overrides)
        for level in levels
    )
