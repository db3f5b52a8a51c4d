"""llama.cpp's own quantizer (the cyllama wheel) with an importance matrix, on a 16-bit GGUF; run by our interpreter.

The matrix is a GGUF as llama-imatrix writes it. Wheels do not carry that tool; ``llm-quantize analyze importance`` sums
the same squares over the same tokens, and tests hold the two together.

    python run_llamacpp.py MODEL.gguf IMATRIX.gguf OUTPUT.gguf --level Q4_K_M
"""

from __future__ import annotations

import argparse
import resource
import sys
from pathlib import Path

import numpy as np
from gguf import GGUFReader, LlamaFileType
from measured import Phase, report

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests" / "oracles"))
import llama_quantize


def importance(path: Path) -> dict[str, np.ndarray]:
    """{tensor: mean square per input channel, flat over experts; ones for an expert that saw nothing}."""
    stored = {tensor.name: np.asarray(tensor.data, np.float32) for tensor in GGUFReader(path).tensors}
    found = {}
    for name, sums in stored.items():
        if name.endswith(".in_sum2"):
            place = name.removesuffix(".in_sum2")
            counts = stored[place + ".counts"].reshape(-1, 1)
            sums = sums.reshape(len(counts), -1)
            found[place] = np.where(counts > 0, sums / np.maximum(counts, 1), np.float32(1)).ravel()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("imatrix", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--level", default="Q4_K_M")
    options = parser.parse_args()
    file_type = LlamaFileType[f"MOSTLY_{options.level}"].value
    options.output = options.output.with_name(options.output.name + ".gguf")
    matrix = options.output.with_suffix(".npz")
    with Phase() as phase:
        stored = llama_quantize.save_importance(matrix, importance(options.imatrix))
        job = llama_quantize.Job(str(options.model), str(options.output), file_type, stored)
        (outcome,) = llama_quantize.run([job])
    matrix.unlink()
    if outcome.error:
        raise SystemExit(outcome.error)
    # The work is done by a child process: its memory is what counts.
    phase.rss_peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    report(phase, options.output, ["cyllama", "gguf"])


if __name__ == "__main__":
    main()
