"""AutoAWQ on a model directory: 4 bits, zero point, "gemm"; run by the interpreter of its environment.

Its stack is transformers 4.51, so it is given a copy of the model with that version's configuration keys.

AutoAWQ 0.2.9 was written for accelerators: before it tries scales it puts the weights aside with ``.cpu()``, which on a
CPU is no copy, and then scales them in place; so every layer it searched stays multiplied by the first scales tried
(mean KLD 0.15 instead of some 0.01). Here ``.cpu()`` copies, as it would from an accelerator.

    python run_autoawq.py MODEL TOKENS.json OUTPUT
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from measured import Phase, copy_for_transformers_4, report


def cpu_that_copies() -> None:
    """Let ``Tensor.cpu`` always give another tensor."""
    import torch

    original = torch.Tensor.cpu

    def cpu(self: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        found = original(self, *arguments, **options)
        return found.clone() if found.data_ptr() == self.data_ptr() else found

    torch.Tensor.cpu = cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--group-size", type=int, default=128)
    options = parser.parse_args()
    import torch
    from awq import AutoAWQForCausalLM
    from transformers import AutoTokenizer

    windows = json.loads(options.tokens.read_text())
    source = copy_for_transformers_4(options.model, options.output.with_name(options.output.name + "-source"))
    with Phase() as phase:
        model = AutoAWQForCausalLM.from_pretrained(str(source), device_map="cpu", torch_dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source)
        cpu_that_copies()
        model.quantize(
            tokenizer,
            quant_config={"zero_point": True, "q_group_size": options.group_size, "w_bit": 4, "version": "GEMM"},
            calib_data=windows,
            max_calib_samples=len(windows),
            max_calib_seq_len=len(windows[0]),
        )
        model.save_quantized(str(options.output))
    report(phase, options.output, ["autoawq", "torch", "transformers"])


if __name__ == "__main__":
    main()
