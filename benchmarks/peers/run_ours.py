"""llm-quantize itself, measured as the peers are: imports of torch and transformers before the clock starts.

    python run_ours.py MODEL TOKENS.json OUTPUT FORMAT LEVEL [options of the command]

The windows of TOKENS.json are those that the command draws by itself from the built-in text; that they are the same is
checked by the caller. By default it takes the first of them, as many as it finds enough; --all-windows: all of them.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

from measured import Phase, report

import llm_quantize


def main() -> None:
    import torch
    import transformers  # noqa: F401  imports are not measured

    from llm_quantize.cli import run

    model, tokens, output, form, level, *rest = sys.argv[1:]
    windows = json.loads(Path(tokens).read_text())
    shape = ["--sequence-length", str(len(windows[0]))]
    if "--all-windows" in rest:
        rest.remove("--all-windows")
        shape += ["--calibration-samples", str(len(windows))]
    threads = ["--threads", str(torch.get_num_threads())]
    command = ["quantize", model, form, "-q", level, "-o", output, "--overwrite", *threads, *shape, *rest]
    # The command speaks on stdout; the last line there must be the report's.
    with contextlib.redirect_stdout(sys.stderr), Phase() as phase:
        code = run(command)
    if code not in (0, None):
        raise SystemExit(code)
    made = [entry for entry in Path(output).iterdir() if entry.suffix == ".gguf" or (entry / "config.json").is_file()]
    if len(made) != 1:
        raise SystemExit(f"one artifact was expected in {output}, found {sorted(entry.name for entry in made)}")
    report(phase, made[0], ["torch", "transformers"], llm_quantize=llm_quantize.__version__)


if __name__ == "__main__":
    main()
