"""A cell of the table of conversions: one source into one format, by ``convert`` itself, and what became of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_quantize import api
from llm_quantize.artifacts.manifest import read_manifest
from llm_quantize.artifacts.result import ArtifactResult
from llm_quantize.artifacts.verdict import EXACT
from llm_quantize.errors import LlmQuantizeError, UsageError
from llm_quantize.formats.table import FORMATS
from llm_quantize.io.artifact_paths import manifest_path
from llm_quantize.options import MethodOptions, Options
from tests.conversions.sources import Given

FILE = Path(__file__).parent / "cells.json"
ROUNDED_FLOATS = 2.0**-8
"""The relative error below which only floats were rounded, to 8 bits at the least: ``--exact`` may keep those."""
UNNAMED = "one must be named"
"""What is said where no level of the format holds the source."""

WHY = ("named", "asked", "numbers", "perhaps", "partly", "order")
"""Why a cell is rounded: scripts/generate_docs.py has the sentences."""

Cell = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """A column. ``level`` None: the one that ``convert`` chooses, or the format's example where none holds the
    source."""

    format: str
    level: str | None = None


TARGETS: Mapping[str, Target] = {
    "GGUF": Target("gguf"),
    "GGUF Q4_K_M": Target("gguf", "Q4_K_M"),
    "GPTQ": Target("gptq"),
    "AWQ": Target("awq"),
    "compressed-tensors": Target("compressed-tensors"),
    "bitsandbytes": Target("bitsandbytes"),
    "MLX": Target("mlx"),
    "CTranslate2": Target("ctranslate2"),
    "safetensors": Target("safetensors"),
    "safetensors F32": Target("safetensors", "F32"),
}
"""{column: what is asked of ``convert``}."""


def convert(source: Given, target: Target, place: Path, *, exact: bool) -> tuple[ArtifactResult, bool]:
    """The conversion, and whether a level had to be named. Raises what ``convert`` raises."""
    options = Options(threads=1, calibrate=False, exact=exact, method=MethodOptions(transform="none"))
    common: dict[str, Any] = {"output_dir": place, "name": "m", "lora": source.lora, "options": options}
    try:
        return api.convert(source.model, target.format, target.level, **common), False
    except UsageError as error:
        if UNNAMED not in str(error.remedy) + error.what:
            raise
    return api.convert(source.model, target.format, FORMATS[target.format].example, **common), True


def cell(source: Given, target: Target, place: Path) -> tuple[dict[str, Any], Path | None]:
    """What cells.json has of the cell, and what was made.

    {"verdict", "level", "tensors": {verdict: count}}; where it is rounded "error", the largest relative one in two
    digits, and "why", a key of WHY; "asked" where it is exact with ``--exact`` alone. Or {"refused": the class, "why":
    what it says}.
    """
    shutil.rmtree(place, ignore_errors=True)
    try:
        made, named = convert(source, target, place, exact=False)
    except LlmQuantizeError as error:
        assert not list(place.glob("*")), "what is refused leaves nothing behind"
        return {"refused": type(error).__name__, "why": error.what}, None
    found = _told(made)
    if found["verdict"] == EXACT:
        return found, made.path
    ordered = not any("g_idx" in text for text in made.plan.warnings)
    found["why"] = _why(target, named, _keeps(made.path)) if ordered else "order"
    if found["error"] > ROUNDED_FLOATS:
        return found, made.path
    again = place.with_name(f"{place.name} exact")
    shutil.rmtree(again, ignore_errors=True)
    try:
        made, named = convert(source, target, again, exact=True)
    except LlmQuantizeError:
        return found, made.path
    return {**_told(made), "asked": True}, made.path


def _why(target: Target, named: bool, kept: bool) -> str:
    """A word of WHY. ``named``: a level had to be; ``kept``: all matrices have the codes of the source."""
    if target.level is not None:
        return "asked"
    if named:
        return "perhaps" if kept else "named"
    return "numbers" if kept else "partly"


def _keeps(path: Path) -> bool:
    """Whether all matrices have the codes of the source."""
    manifest = read_manifest(manifest_path(path))
    matrices = [] if manifest is None else manifest.get("matrices", [])
    return bool(matrices) and all(entry.get("kept", False) for entry in matrices)


def _told(made: ArtifactResult) -> dict[str, Any]:
    assert made.conversion is not None
    found: dict[str, Any] = {"verdict": made.conversion["verdict"], "level": made.level}
    found["tensors"] = dict(sorted(made.conversion["tensors"].items()))
    if "worst" in made.conversion:
        found["error"] = float(f"{made.conversion['worst']['relative_error']:.1e}")
    return found


def stored() -> dict[str, dict[str, Cell]]:
    """{source: {column: cell}}, as committed."""
    return json.loads(FILE.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
