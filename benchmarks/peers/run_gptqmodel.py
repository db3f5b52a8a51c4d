"""GPTQModel on a model directory: GPTQ or AWQ, group 128, its defaults; run by the interpreter of its environment.

python run_gptqmodel.py MODEL TOKENS.json OUTPUT --method gptq --bits 4
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(len(os.sched_getaffinity(0))))

from measured import Phase, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--method", choices=["gptq", "awq", "gptaq"], default="gptq")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--mse", type=float, default=0.0)
    options = parser.parse_args()
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.quantization.config import FORMAT, METHOD, GPTAQConfig

    settings = {"bits": options.bits, "group_size": options.group_size}
    if options.method == "awq":
        settings |= {"method": METHOD.AWQ, "format": FORMAT.GEMM, "sym": False}
    else:
        settings |= {"mse": options.mse} if options.mse else {}
        settings |= {"gptaq": GPTAQConfig()} if options.method == "gptaq" else {}
    windows = json.loads(options.tokens.read_text())
    examples = [{"input_ids": window, "attention_mask": [1] * len(window)} for window in windows]
    with Phase() as phase:
        model = GPTQModel.load(str(options.model), QuantizeConfig(**settings), device="cpu")
        model.quantize(examples, batch_size=1)
        model.save(str(options.output))
    report(phase, options.output, ["gptqmodel", "torch", "transformers"])


if __name__ == "__main__":
    main()
