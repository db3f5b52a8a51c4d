"""What each stage of the optimiser is worth: one switch at a time, mean KL divergence on text it was not calibrated on.

Every setting differs from the defaults in one thing. Artifacts of one model and level are compared with the one made by
the defaults, token by token (paired). CPU-seconds are those of making the artifact, one thread, its text included.
Results are written after every group, and what a JSON file already holds is not run again.

    python benchmarks/ablation.py --directory /scratch --json benchmarks/results/ablation.json
    python benchmarks/ablation.py --table benchmarks/results/ablation.json
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

HERE = Path(__file__).resolve().parent
# This folder has a file called like the gguf package: it must not come first on the import path.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]

LENGTH = 256
"""Tokens of a window, of calibration as of measurement: what the models were trained on."""

HELD_OUT = 32
"""Windows measured on, at even distances over the built-in evaluation text; second halves are scored."""

GROUP = 6
"""Artifacts measured in one pass, besides that of the defaults."""


@dataclass(frozen=True)
class Setting:
    """What differs from the defaults: fields of GptqOptions and MethodOptions, and windows of calibration text (None:
    as many as the run itself would take). ``signed``: symmetric scales of directories may be negative (no user may set
    it). ``formats``: those it means something for (none: all)."""

    gptq: Mapping[str, Any] = field(default_factory=dict)
    method: Mapping[str, Any] = field(default_factory=dict)
    samples: int | None = None
    signed: bool = True
    formats: tuple[str, ...] = ()


DEFAULTS = "defaults"
DIRECTORIES = ("gptq", "awq", "compressed-tensors")
SETTINGS: dict[str, Setting] = {
    DEFAULTS: Setting(),
    "plain rounding": Setting(method={"method": "rtn"}),
    "no correction": Setting(gptq={"correction": 0.0}),
    "correction 0.25": Setting(gptq={"correction": 0.25}),
    "correction 0.5": Setting(gptq={"correction": 0.5}),
    "correction 0.75": Setting(gptq={"correction": 0.75}),
    "no refined grid": Setting(gptq={"refine": False}),
    "no feedback": Setting(gptq={"feedback": False}),
    "natural order": Setting(gptq={"order": "natural"}),
    "no sweeps": Setting(gptq={"sweeps": 0}),
    "1 sweep": Setting(gptq={"sweeps": 1}),
    "no refit": Setting(gptq={"refit": False}),
    "2 refits": Setting(gptq={"alternations": 2}),
    "no comparison": Setting(gptq={"compare": False}),
    "no shrinkage": Setting(gptq={"shrink": False}),
    "damp 0.001": Setting(gptq={"damp": 0.001}),
    "damp 0.05": Setting(gptq={"damp": 0.05}),
    "positive scales": Setting(signed=False, formats=("gptq", "compressed-tensors")),
    "inputs: block": Setting(method={"inputs": "block"}),
    "inputs: source": Setting(method={"inputs": "source"}),
    "transform: awq": Setting(method={"transform": "awq"}, formats=("gptq", "compressed-tensors")),
    "transform: none": Setting(method={"transform": "none"}, formats=("awq",)),
    "4 tokens per input": Setting(samples=12),
    "8 tokens per input": Setting(samples=24),
    "32 tokens per input": Setting(samples=96),
    "64 tokens per input": Setting(samples=192),
}


def models() -> dict[str, Path]:
    """The models trained by scripts/train_demo_model.py, by name."""
    from llm_quantize.data import demo_model

    return {"demo-llama": demo_model()} | {name: HERE / "models" / name for name in ("demo-qwen3", "demo-qwen3-moe")}


@contextmanager
def positive_scales(active: bool) -> Iterator[None]:
    """While ``active``, directories are made as if a symmetric scale could not be negative."""
    from llm_quantize.formats.packed_store import DirectoryStore

    signed = DirectoryStore.grid_type

    def unsigned(store: DirectoryStore, qtype: str) -> Any:
        return replace(signed(store, qtype), signed=False)  # type: ignore[type-var]

    with patch.object(DirectoryStore, "grid_type", unsigned) if active else nullcontext():
        yield


def make(model: Path, target: str, setting: Setting, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The artifact, and what it took. ``target``: FORMAT:LEVEL."""
    from llm_quantize.methods.gptq_options import GptqOptions
    from llm_quantize.options import CalibrationOptions, MethodOptions
    from llm_quantize.pipeline import Options, quantize

    format, level = target.split(":")
    method = MethodOptions(**{"method": "gptq", **setting.method}, gptq=GptqOptions(**setting.gptq))
    rounding = method.method == "rtn" and format == "gguf"
    options = Options(
        method=method,
        calibrate=True if rounding else None,
        calibration=CalibrationOptions(samples=setting.samples, length=LENGTH, threads=1),
        overwrite=True,
        threads=1,
    )
    cpu, wall = time.process_time(), time.monotonic()
    with positive_scales(not setting.signed):
        (made,) = quantize(str(model), format, levels=[level], output_dir=folder, options=options)
    return made.path, {
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "wall_seconds": round(time.monotonic() - wall, 2),
        "bytes": made.size,
    }


def measure(model: Path, artifacts: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Divergence of each, and its ratio to the one of the defaults, by name."""
    from llm_quantize.calibration.tokens import TextTokenizer
    from llm_quantize.evaluation.quality import measure_quality
    from llm_quantize.evaluation.texts import evaluation_text
    from llm_quantize.models.opening import open_source

    source = open_source(str(model))
    with source.checkpoint:
        windows = evaluation_text(TextTokenizer(source), context=LENGTH, limit=HELD_OUT).windows
        names = list(artifacts)
        found = measure_quality(source, [artifacts[name] for name in names], windows, threads=1)
    results = {}
    for number, (name, one) in enumerate(zip(names, found.artifacts, strict=True)):
        d = one.divergence
        results[name] = {
            "kld": d.kld,
            "kld_sem": d.kld_sem,
            "clusters": d.clusters,
            "kld_99.9": d.kld_999,
            "same_top": d.same_top,
            "acceptance": d.acceptance,
        }
        if number:
            (paired,) = (pair for pair in found.pairs if (pair.first, pair.second) == (0, number))
            results[name] |= {
                "ratio": 1 / paired.kld_ratio,
                "ratio_sem": paired.kld_ratio_sem / paired.kld_ratio**2,
            }
        else:
            results[name] |= {"ratio": 1.0, "ratio_sem": 0.0}
    return results


def run(
    model: Path, target: str, settings: Mapping[str, Setting], folder: Path, known: dict[str, Any], save: Any
) -> None:
    """Make and measure every setting that ``known`` has no figures for, group by group."""
    format = target.split(":")[0]
    todo = [name for name, one in settings.items() if name not in known and format in (one.formats or (format,))]
    while todo:
        names, todo = todo[:GROUP], todo[GROUP:]
        names = [DEFAULTS, *(name for name in names if name != DEFAULTS)]
        paths, costs = {}, {}
        for name in names:
            place = folder / name.replace(" ", "-").replace(":", "").replace(",", "")
            kept = place / "cost.json"
            if name == DEFAULTS and kept.is_file():
                costs[name] = json.loads(kept.read_text())
                paths[name] = Path(costs[name]["path"])
                continue
            paths[name], costs[name] = make(model, target, SETTINGS.get(name) or settings[name], place)
            kept.write_text(json.dumps({**costs[name], "path": str(paths[name])}))
            print(f"{model.name} {target} {name}: {costs[name]['cpu_seconds']} CPU-s", flush=True)
        for name, figures in measure(model, paths).items():
            known.setdefault(name, {key: value for key, value in costs[name].items() if key != "path"} | figures)
            print(f"{model.name} {target} {name}: KLD {figures['kld']:.5f}, ratio {figures['ratio']:.3f}", flush=True)
        save()
        for name in names:
            if name != DEFAULTS:
                shutil.rmtree(folder / name.replace(" ", "-").replace(":", "").replace(",", ""))


def table(models: Mapping[str, Any]) -> str:
    """Markdown: a row for each setting, a column for each model and level: ratio to the defaults, CPU-seconds."""
    columns = [(model, target) for model, targets in models.items() for target in targets]
    names = list(dict.fromkeys(name for model, target in columns for name in models[model][target]))
    names.sort(key=lambda name: list(SETTINGS).index(name) if name in SETTINGS else len(SETTINGS))
    lines = ["| setting | " + " | ".join(f"{model} {target.replace(':', ' ')}" for model, target in columns) + " |"]
    lines.append("| --- |" + " ---: |" * len(columns))
    for name in names:
        cells = []
        for model, target in columns:
            row, base = models[model][target].get(name), models[model][target].get(DEFAULTS)
            if row is None or base is None:
                cells.append("")
            elif name == DEFAULTS:
                cells.append(f"KLD {row['kld']:.5f}, {row['cpu_seconds']:.0f} s")
            else:
                cells.append(f"{row['ratio']:.3f} ± {row['ratio_sem']:.3f}, {row['cpu_seconds']:.0f} s")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tables(results: Mapping[str, Any]) -> str:
    """Every table of a results file: of the defaults as they are, and of runs with others ("earlier"), if there are."""
    found = [table(results["models"])]
    for one in results.get("earlier", ()):
        found += [f"Defaults then: {one['defaults']}", table(one["models"])]
    return "\n\n".join(found)


def main(arguments: Sequence[str] | None = None) -> int:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="where artifacts are made")
    parser.add_argument("--models", nargs="+", default=["demo-llama", "demo-qwen3"])
    parser.add_argument("--targets", nargs="+", default=["gguf:Q4_K_S", "gguf:Q2_K", "gptq:4bit", "gptq:2bit"])
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--json", type=Path, help="results, added to those it holds")
    parser.add_argument("--table", type=Path, help="only print the table of such a file")
    options = parser.parse_args(arguments)
    if options.table:
        print(tables(json.loads(options.table.read_text())))
        return 0
    if not options.directory:
        parser.error("--directory is needed")
    for module in ("torch", "transformers"):  # loaded before any clock is started
        import_module(module)
    chosen = {name: SETTINGS[name] for name in options.settings}
    results = json.loads(options.json.read_text()) if options.json and options.json.is_file() else {"models": {}}
    results |= {"length": LENGTH, "held_out_windows": HELD_OUT}
    results["settings"] = {name: asdict(one) for name, one in SETTINGS.items()}

    def save() -> None:
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n")

    for name in options.models:
        model = models()[name]
        for target in options.targets:
            known = results["models"].setdefault(name, {}).setdefault(target, {})
            run(model, target, chosen, options.directory / name / target.replace(":", "-"), known, save)
    print(tables(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
