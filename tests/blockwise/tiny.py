"""Runs through the blocks of tiny models, and what they leave."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llm_quantize.artifacts.manifest import read_manifest
from llm_quantize.artifacts.result import ArtifactResult
from llm_quantize.calibration.drawing import draw_windows
from llm_quantize.io.artifact_paths import manifest_path
from llm_quantize.methods.gptq_options import GptqOptions
from llm_quantize.models.opening import Source
from llm_quantize.options import CalibrationOptions, MethodOptions
from llm_quantize.pipeline import Options, quantize
from tests.hearing import into

WORDS = "the cat sat on a mat by the river, and the dog ran 12 miles; then the wind began to sing in the thin trees. "


def write_text(directory: Path) -> Path:
    """A calibration text of a few thousand tokens that do not repeat."""
    order = torch.randperm(26 * 26, generator=torch.Generator().manual_seed(7)).tolist()
    file = directory / "calibration.txt"
    file.write_text(" ".join(f"{WORDS[n % 40 :][: 30 + n % 50]} {chr(97 + n // 26)}{chr(97 + n % 26)}" for n in order))
    return file


def write_noise(file: Path, seed: int) -> Path:
    """A text of letters drawn at random, so that one seed's is as good a sample of it as another's."""
    letters = torch.randint(33, 127, (6000,), generator=torch.Generator().manual_seed(seed)).tolist()
    file.write_text("".join(map(chr, letters)))
    return file


def options(text: Path, *, samples: int = 2, length: int = 48, threads: int = 1, **more: Any) -> Options:
    """Options of a small run; ``more``: of MethodOptions, GptqOptions and Options, by their names."""
    stages = {name: more.pop(name) for name in list(more) if name in GptqOptions.__dataclass_fields__}
    method = {name: more.pop(name) for name in list(more) if name in MethodOptions.__dataclass_fields__}
    return Options(
        threads=threads,
        method=MethodOptions(**{"method": "gptq", **method}, gptq=GptqOptions(**stages)),
        calibration=CalibrationOptions(data=(str(text),), samples=samples, length=length),
        **more,
    )


def run(
    model: Path,
    out: Path,
    chosen: Options,
    format: str = "gguf",
    level: str = "Q4_0",
    events: list[dict[str, Any]] | None = None,
) -> tuple[ArtifactResult, dict[str, Any]]:
    """The artifact and its manifest. ``events``: takes what the run tells."""
    heard: list[dict[str, Any]] = [] if events is None else events
    (result,) = quantize(str(model), format, levels=[level], output_dir=out, options=chosen, on_event=into(heard))
    manifest = read_manifest(manifest_path(result.path))
    assert manifest is not None
    return result, manifest


def matrices(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What a manifest says of each matrix."""
    return {entry["name"]: entry for entry in manifest["matrices"]}


def ids_of(source: Source, chosen: Options) -> torch.Tensor:
    """The tokens of a run, int64 (windows, length)."""
    return torch.from_numpy(draw_windows(source, chosen.calibration, lambda _: None)[0].ids)


def left_behind(directory: Path, names: Sequence[str] = (".hidden", ".journal", ".partial")) -> list[str]:
    """Names of what an unfinished run keeps."""
    return [path.name for path in directory.rglob("*") if path.name.endswith(tuple(names))]
