"""llm-compressor's one-shot GPTQ on a model directory; run by the interpreter of its environment.

python run_llmcompressor.py MODEL TOKENS.json OUTPUT --scheme W4A16
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
    options = parser.parse_args()
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    windows = json.loads(options.tokens.read_text())
    rows = {"input_ids": windows, "attention_mask": [[1] * len(window) for window in windows]}
    with Phase() as phase:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        oneshot(
            model=model,
            tokenizer=tokenizer,
            dataset=Dataset.from_dict(rows),
            recipe=GPTQModifier(targets="Linear", scheme=options.scheme, ignore=["lm_head", "re:.*mlp.gate$"]),
            max_seq_length=len(windows[0]),
            num_calibration_samples=len(windows),
            shuffle_calibration_samples=False,
        )
        model.save_pretrained(options.output, save_compressed=True)
        tokenizer.save_pretrained(options.output)
    report(phase, options.output, ["llmcompressor", "compressed-tensors", "torch", "transformers"])


if __name__ == "__main__":
    main()
