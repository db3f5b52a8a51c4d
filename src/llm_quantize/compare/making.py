"""How a variant of a comparison is made again by itself: what stands behind ``llm-quantize quantize MODEL``."""

from __future__ import annotations

from collections.abc import Sequence

from llm_quantize.options import CalibrationOptions, Options


def lora_words(lora: Sequence[str]) -> list[str]:
    """Adapters as words of a shell."""
    return [word for text in lora for word in ("--lora", text)]


def make_words(
    format: str,
    level: str,
    options: Options,
    revision: str | None,
    *,
    lora: Sequence[str] = (),
    weighed: bool = False,
) -> tuple[str, ...]:
    """Format, level, and each option of a comparison that changes the bytes of what it makes, as words of a shell.
    ``weighed``: it was made with an importance matrix, as all levels of a format are where one of them needs it."""
    words = [format, "-q", level, *lora_words(lora)]
    for name, file in (("--imatrix", options.imatrix), ("--statistics", options.statistics)):
        words += [] if file is None else [name, str(file)]
    calibration, usual = options.calibration, CalibrationOptions()
    for text in calibration.data:
        words += ["--calibration-data", text]
    if calibration.data or options.imatrix is not None or options.statistics is not None:
        wanted = None
    else:
        wanted = True if weighed else options.calibrate
    words += [] if wanted is None else ["--calibrate" if wanted else "--no-calibration"]
    words += [] if calibration.samples is None else ["--calibration-samples", str(calibration.samples)]
    words += [] if calibration.length == usual.length else ["--sequence-length", str(calibration.length)]
    words += [] if calibration.device == usual.device else ["--device", calibration.device]
    words += ["--chat"] if calibration.chat else []
    return (*words, *(["--revision", revision] if revision else []))
