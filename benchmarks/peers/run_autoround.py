"""AutoRound on a model directory: its RTN (0 iterations) or tuned, as GPTQ layout or GGUF; run by its environment.

python run_autoround.py MODEL TOKENS.json OUTPUT --scheme W4A16 --iterations 200 --format auto_gptq
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from measured import Phase, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--scheme", default="W4A16")
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--format", default="auto_gptq")
    parser.add_argument("--group-size", type=int, help="instead of the scheme's")
    options = parser.parse_args()
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    windows = json.loads(options.tokens.read_text())
    ids = [torch.tensor([window]) for window in windows]
    examples = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    with Phase() as phase:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        rounding = AutoRound(
            model,
            tokenizer,
            scheme=options.scheme,
            **({} if options.group_size is None else {"group_size": options.group_size}),
            dataset=examples,
            iters=options.iterations,
            seqlen=len(windows[0]),
            nsamples=len(windows),
            device_map="cpu",
        )
        rounding.quantize_and_save(str(options.output), format=options.format)
    # It writes a folder named after the model and the scheme, or a GGUF file, below the one it is given.
    made = [path.parent for path in options.output.rglob("config.json")] or list(options.output.rglob("*.gguf"))
    report(phase, made[0], ["auto-round", "torch", "transformers"])


if __name__ == "__main__":
    main()
