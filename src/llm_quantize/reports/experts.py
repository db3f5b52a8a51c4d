"""A picture of how many tokens each expert of a mixture saw: layers from top to bottom, experts from left to right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_quantize.calibration import outcome
from llm_quantize.calibration.outcome import PICTURE
from llm_quantize.io.whole_file import write_file
from llm_quantize.reports.numbers import count_text
from llm_quantize.reports.templating import template_of
from llm_quantize.reports.wording import said

if TYPE_CHECKING:
    from llm_quantize.calibration.imatrix import TapCoverage
    from llm_quantize.calibration.outcome import Calibration
    from llm_quantize.models.opening import Source

_RAMP = ("#efe2ca", "#e9d2ab", "#e2bf8b", "#daa86c", "#cd8f51", "#ba723c", "#a0552d", "#803b23", "#5b251a")
_SHORT, _NONE = "#23607f", "#9fb8c6"
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 110, 60, 72
_WIDTH = 640
_LEGEND = 108


def export(result: Calibration, source: Source, target: Path, kind: str) -> None:
    """Write the statistics as ``kind``, a name of ``outcome.KINDS``, whole or not at all: the picture, or a file for
    programs. Raises AccessError or ResourceError."""
    if kind == PICTURE:
        text = picture(result.model, result.experts, result.expert_minimum)
        write_file(target, [text.encode()], replace=True)
    else:
        outcome.export(result, source, target, kind)


def picture(model: str, experts: Sequence[TapCoverage], minimum: int) -> str:
    """The SVG text. ``experts``: a row for each of one or more; ``minimum``: tokens below which an expert is marked."""
    most = max(max(row.tokens) for row in experts)
    count = max(len(row.tokens) for row in experts)
    wide = max(2.0, _WIDTH / count)
    tall = 18.0 if len(experts) <= 40 else max(8.0, 720 / len(experts))
    right, bottom = _LEFT + wide * count, _TOP + tall * len(experts)
    every = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128) if step * wide >= 24 or step == 128)
    gap = 1.0 if wide > 5 else 0.0
    return template_of("experts.svg.j2").render(
        title=said(f"{model}: tokens that each expert saw"),
        lead=said("a row for each layer; its least and most on the right"),
        rows=[_row(row, _TOP + number * tall, wide, most, minimum) for number, row in enumerate(experts)],
        ticks=[(_LEFT + (index + 0.5) * wide, str(index)) for index in range(0, count, every)],
        legend=[(_LEFT + number * _LEGEND, *entry) for number, entry in enumerate(_legend(most, minimum))],
        x_title=said("expert"),
        width=round(max(right + _RIGHT, _LEFT + 6 * _LEGEND)),
        height=round(bottom + _BOTTOM),
        **{"left": _LEFT, "right": right, "bottom": bottom, "tall": tall, "wide": wide - gap, "gap": gap},
    )


def _row(row: TapCoverage, y: float, wide: float, most: int, minimum: int) -> dict[str, Any]:
    cells = [
        {
            "x": _LEFT + index * wide,
            "fill": _fill(tokens, most, minimum),
            "title": said(f"layer {row.block}, expert {index}: {count_text(tokens)} tokens"),
        }
        for index, tokens in enumerate(row.tokens)
    ]
    told = f"{count_text(min(row.tokens))}–{count_text(max(row.tokens))}"
    return {"y": y, "layer": row.block, "cells": cells, "range": told}


def _fill(tokens: int, most: int, minimum: int) -> str:
    """Blue where an expert saw too little; else darker the more it saw, by powers from ``minimum`` to ``most``."""
    if tokens < minimum or tokens == 0:
        return _SHORT if tokens else _NONE
    low = max(1, minimum)
    share = math.log(tokens / low) / math.log(most / low) if most > low else 1.0
    return _RAMP[min(len(_RAMP) - 1, int(share * len(_RAMP)))]


def _legend(most: int, minimum: int) -> list[tuple[str, str]]:
    low = max(1, minimum)
    middle = round(math.sqrt(low * most)) if most > low else low
    shown = dict.fromkeys((low, middle, max(low, most)))
    return [
        (_NONE, said("none")),
        (_SHORT, f"< {count_text(minimum)}"),
        *((_fill(tokens, most, minimum), count_text(tokens)) for tokens in shown),
    ]
