"""Geometry of the error heat maps: layers from left to right, roles from top to bottom, one step of a shared scale
for each tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llm_quantize.reports.findings import TensorError, Variant
from llm_quantize.reports.numbers import significant

STEPS = 10
WIDTH = 480.0
_LABELS = 118.0
_FEW_LAYERS = 6

_ORDER = (
    "attn_qkv", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate_inp", "ffn_gate", "ffn_up", "ffn_down",
    "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """``step``: 0 to STEPS - 1, the least error to the largest. ``text``: shown inside where there is room."""

    x: float
    y: float
    width: float
    height: float
    step: int
    title: str
    text: str


@dataclass(frozen=True)
class HeatMap:
    """One variant. ``rows``: (baseline, role); ``columns``: (centre, layer number); ``outside``: tensors that are in
    no layer, with their errors."""

    label: str
    width: float
    height: float
    rows: tuple[tuple[float, str], ...]
    columns: tuple[tuple[float, str], ...]
    cells: tuple[Cell, ...]
    outside: tuple[tuple[str, str], ...]


def scale_of(variants: Sequence[Variant]) -> tuple[float, float] | None:
    """Least and largest error above 0 of all variants: the ends of the one scale they share; None without any."""
    errors = [entry.error for variant in variants for entry in variant.tensor_errors if _drawn(entry)]
    return (min(errors), max(errors)) if errors else None


def step_of(error: float, scale: tuple[float, float]) -> int:
    """The step of ``error`` on a logarithmic scale; 0 for no error, the last for one that is not finite."""
    low, high = scale
    if not error > 0:
        return STEPS - 1 if math.isnan(error) else 0
    if not high > low:
        return STEPS // 2
    share = (math.log(error) - math.log(low)) / (math.log(high) - math.log(low))
    return min(STEPS - 1, max(0, int(share * STEPS)))


def draw(variant: Variant, scale: tuple[float, float]) -> HeatMap | None:
    """The heat map of one variant; None if no tensor of a layer was compared."""
    entries = {(entry.role, entry.layer): entry for entry in variant.tensor_errors if entry.layer is not None}
    if not entries:
        return None
    layers = max(layer for _, layer in entries if layer is not None) + 1
    roles = sorted({role for role, _ in entries}, key=lambda role: (_rank(role), role))
    wide = (WIDTH - _LABELS) / layers
    tall, gap = 24.0, (2.0 if wide > 12 else 0.6)
    cells = []
    for row, role in enumerate(roles):
        for layer in range(layers):
            entry = entries.get((role, layer))
            if entry is None:
                continue
            cells.append(
                Cell(
                    _LABELS + layer * wide,
                    row * tall,
                    wide - gap,
                    tall - 2.0,
                    step_of(entry.error, scale),
                    f"{entry.name} ({entry.qtype}): {significant(entry.error)}",
                    significant(entry.error, 2) if layers <= _FEW_LAYERS else "",
                )
            )
    every = math.ceil(layers / 12)
    bottom = len(roles) * tall
    columns = tuple((_LABELS + (i + 0.5) * wide - gap / 2, str(i)) for i in range(0, layers, every))
    rows = tuple((row * tall + 0.5 * tall + 3.5, role) for row, role in enumerate(roles))
    outside = tuple((e.role, significant(e.error, 2)) for e in variant.tensor_errors if e.layer is None)
    return HeatMap(variant.label, WIDTH, bottom + 20, rows, columns, tuple(cells), outside)


def _rank(role: str) -> int:
    return _ORDER.index(role) if role in _ORDER else len(_ORDER)


def _drawn(entry: TensorError) -> bool:
    return entry.error > 0 and math.isfinite(entry.error)
