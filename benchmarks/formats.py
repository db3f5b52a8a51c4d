"""Loss of every format that ``recommend`` knows, on the built-in model: what it shows where nobody has measured yours.

Each level is made by default (errors fed back on the built-in texts) and measured on the built-in evaluation text, of
which 24 windows are read, as ``llm-quantize compare`` does it. Levels whose runtime rounds the inputs of matrices are
also run in it, on the CPU, over 12 windows. What stands in the directory already is not made anew.

    python benchmarks/formats.py --directory .peers/formats --json benchmarks/results/formats.json
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
HERE = Path(__file__).resolve().parent
# This folder has a file called like the gguf package: it must not come first on the import path.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]

from llm_quantize.calibration.tokens import TextTokenizer
from llm_quantize.compare.comparison import compare, parse_variants, write_reports
from llm_quantize.data import demo_model
from llm_quantize.evaluation.quality import measure_quality
from llm_quantize.evaluation.texts import evaluation_text
from llm_quantize.models.opening import open_source
from llm_quantize.options import MeasurementOptions, Options

VARIANTS = (
    "gguf:Q4_K_M,gptq:8bit,gptq:4bit,awq:4bit,compressed-tensors:W8A16,compressed-tensors:W4A16,"
    "compressed-tensors:W8A8,compressed-tensors:FP8_DYNAMIC,compressed-tensors:NVFP4A16,compressed-tensors:MXFP4A16,"
    "bitsandbytes:INT8,bitsandbytes:NF4,bitsandbytes:FP4,ctranslate2:int8,"
    "mlx:8bit,mlx:6bit,mlx:5bit,mlx:4bit,mlx:3bit"
)
WINDOWS, RUNTIME_WINDOWS = 24, 12
ROUNDING = {
    ("compressed-tensors", "W8A8"): "transformers",
    ("compressed-tensors", "FP8_DYNAMIC"): "transformers",
    ("bitsandbytes", "INT8"): "transformers",
    ("ctranslate2", "int8"): "ctranslate2",
}


def in_runtime(artifact: Path, runtime: str | None, threads: int) -> dict[str, Any]:
    """Divergence from the source of what ``runtime`` predicts; nothing where None."""
    if runtime is None:
        return {}
    source = open_source(str(demo_model()))
    with source.checkpoint:
        windows = evaluation_text(TextTokenizer(source), context=512, limit=RUNTIME_WINDOWS).windows
        found = measure_quality(source, [artifact], windows, threads=threads, runtime=runtime).artifacts[0].runtime
    assert found is not None
    return {"runtime": runtime, "runtime_kld": found.divergence.kld, "runtime_kld_sem": found.divergence.kld_sem}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args(arguments)
    model, wanted = "builtin:demo-llama", parse_variants(VARIANTS)
    options = Options(threads=given.threads, measurement=MeasurementOptions(windows=WINDOWS, speed=False))
    result = compare(model, given.directory, variants=wanted, options=options)
    write_reports(result, given.directory)
    rows = [
        {
            "format": form,
            "level": level,
            "bits_per_weight": round(variant.bits_per_weight, 4),
            "kld": variant.divergence.kld,
            "kld_sem": variant.divergence.kld_sem,
            "clusters": variant.divergence.clusters,
            "same_top": variant.divergence.same_top,
            "acceptance": variant.divergence.acceptance,
            **in_runtime(Path(variant.path), ROUNDING.get((form, level)), given.threads),
        }
        for (form, level), variant in zip(wanted, result.variants, strict=True)
    ]
    command = ["llm-quantize", "compare", model, "--variants", VARIANTS, "--windows", str(WINDOWS), "--no-speed"]
    facts = {
        "command": shlex.join(command),
        "model": result.model.name,
        "weights": result.model.parameters,
        "tokens": result.text.tokens,
        "text": list(result.text.names),
        "versions": dict(result.versions),
        "rows": rows,
    }
    given.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
