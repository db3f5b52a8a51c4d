"""mlx_lm's GPTQ on a model directory; run by the interpreter of an environment with mlx_lm (``make mlx-runtime``).

Its command fetches a text of its own, so its function is called with the tokens given. Embedding and head get as many
bits as the layers, as ``mlx_lm.convert`` gives them: its command takes 6.

python run_mlx_gptq.py MODEL TOKENS.json OUTPUT --bits 4
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
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    options = parser.parse_args()
    import mlx.core as mx
    from mlx_lm.quant.gptq import gptq_quantize
    from mlx_lm.utils import load, save

    windows = mx.array(json.loads(options.tokens.read_text()))
    size = (options.bits, options.group_size)
    with Phase() as phase:
        model, tokenizer, config = load(str(options.model), lazy=True, return_config=True)
        model, config["quantization"] = gptq_quantize(model, windows, *size, *size)
        save(str(options.output), str(options.model), model, tokenizer, config)
    report(phase, options.output, ["mlx", "mlx-lm", "transformers"])


if __name__ == "__main__":
    main()
