"""From an opened source and the user's options to exact plans: the format's own, and what the run will take."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from llm_quantize.blockwise.estimate import estimate, rounding_bytes
from llm_quantize.errors import UnsupportedError, UsageError
from llm_quantize.formats.base import Importance
from llm_quantize.formats.table import FORMATS
from llm_quantize.models.opening import Source
from llm_quantize.options import Options
from llm_quantize.plan import ArtifactPlan


def plan_source(
    source: Source,
    format: str,
    *,
    levels: Sequence[str],
    name: str | None,
    options: Options,
    importance: Importance | None,
) -> list[ArtifactPlan]:
    """``plan`` for an opened source and the importance that it will be quantized with."""
    if format not in FORMATS:
        known = FORMATS.get(format.lower()) or next(iter(FORMATS.values()))
        raise UnsupportedError(
            f"this version does not write the format {format[:40]!r}",
            expected=", ".join(FORMATS),
            found=format[:40],
            remedy=f"write {known.name}, for example: llm-quantize quantize MODEL {known.name} -q {known.example}",
        )
    form = FORMATS[format]
    if not levels:
        raise UsageError("no level given", remedy=f"name one or more with -q, for example -q {form.example}")
    stem = _file_stem(name or source.checkpoint.name)
    plans = form.plan(source, levels, stem, importance, options)
    return _named([_estimated(source, plan, importance, options) for plan in plans], stem, name)


def _named(plans: list[ArtifactPlan], stem: str, name: str | None) -> list[ArtifactPlan]:
    """``plans``, with a warning where the user's name could not be kept."""
    if name is not None and stem != name:
        plans[0] = replace(plans[0], warnings=(f"the output is called {stem}, not {name[:80]!r}", *plans[0].warnings))
    return plans


def _estimated(source: Source, plan: ArtifactPlan, importance: Importance | None, options: Options) -> ArtifactPlan:
    """``plan`` with what a method that runs text through the model will take, in memory and in time."""
    if importance is None or not options.method.calibrates(plan.format):
        return replace(plan, method_bytes=rounding_bytes(plan))
    need = estimate(source, plan, options.method, importance.chunks, options.calibration.length)
    minutes = need.operations / 100e9 / 60
    length = min(options.calibration.length, source.architecture.hyper.context_length)
    told = (
        f"{importance.chunks} windows of {length} tokens run through the model, one block in memory at a time: about "
        f"{need.operations / 1e12:,.1f} TFLOP, {max(1, round(minutes)):,} minutes at 100 GFLOP/s, and "
        f"{need.memory / 1e9:.1f} GB of memory (this needs the extra [torch])"
    )
    warnings = plan.warnings if importance.sha256 else (*plan.warnings, told)
    return replace(plan, warnings=warnings, method_bytes=need.memory)


def _file_stem(name: str) -> str:
    stem = re.sub(r"[^\w.+-]+", "-", name.rsplit("/", 1)[-1]).strip("-.") or "model"
    if len(stem.encode()) > 180:
        raise UsageError("the output name is too long", found=len(stem.encode()), expected="at most 180 bytes")
    return stem
