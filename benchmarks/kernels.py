"""Million weights per CPU-second of each type, our kernels beside ggml's, in one run and on one thread.

    python benchmarks/kernels.py [--types q4_k,q6_k] [--seconds 0.4] [--levels] [--json FILE]

ggml is the one in the installed xllamacpp wheel (``ggml_quantize_chunk``). Both get the same heavy-tailed float32 rows;
the bytes are compared on the way. The two are timed in turns and the best turn of each counts, so that a busy machine
disturbs the ratio less. An aim of 0 means that none was set. What both need at first use of an I-quant (ggml some
CPU-seconds, we some milliseconds) is not counted.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in place of this folder, whose gguf.py would hide the package gguf

from llm_quantize import kernels
from llm_quantize.qtypes import QTYPES
from tests.oracles import ggml

AIMS = {
    **dict.fromkeys(("q8_0", "q4_0"), (4.0, 0.0)),
    **dict.fromkeys(("q2_k", "q3_k", "q5_k"), (0.0, 8.0)),
    **{"q4_k": (10.0, 8.0), "q6_k": (8.0, 8.0)},
    **dict.fromkeys(("iq4_nl", "iq4_xs"), (3.0, 3.0)),
    **dict.fromkeys(("iq3_s", "iq3_xxs", "iq2_s"), (4.0, 4.0)),
    **dict.fromkeys(("iq2_xs", "iq2_xxs", "iq1_s"), (0.0, 4.0)),
    **{"iq1_m": (4.0, 4.0)},
}


def best_seconds(actions: list[Callable[[], object]], seconds: float) -> list[float]:
    """CPU seconds of the fastest run of each action, the actions taking turns."""
    best = [float("inf")] * len(actions)
    for action in actions:
        action()
    spent = 0.0
    while spent < seconds * len(actions):
        for index, action in enumerate(actions):
            start = time.thread_time()
            action()
            taken = time.thread_time() - start
            best[index] = min(best[index], taken)
            spent += taken
    return best


def measure(qtype: str, rows: np.ndarray, importance: np.ndarray | None, args: argparse.Namespace) -> dict[str, object]:
    """One line of the table."""
    out = np.empty((len(rows), QTYPES[qtype].row_bytes(rows.shape[1])), np.uint8)
    levels = kernels.simd_levels() if args.levels else kernels.simd_levels()[-1:]

    def ours(level: str) -> None:
        kernels.set_simd_level(level)
        kernels.quantize(qtype, rows, importance, out=out)

    def theirs() -> np.ndarray:
        return ggml.quantize(qtype, rows, importance)

    actions: list[Callable[[], object]] = [theirs, *(lambda level=level: ours(level) for level in levels)]
    peer, *native = [rows.size / s / 1e6 for s in best_seconds(actions, args.seconds)]
    ours(levels[-1])
    aim = AIMS.get(qtype, (0.0, 0.0))[importance is not None]
    return {
        "qtype": qtype,
        "imatrix": importance is not None,
        "ggml": peer,
        "native": dict(zip(levels, native, strict=True)),
        "ratio": native[-1] / peer,
        "aim": aim,
        "same_bytes": bool((out == theirs()).all()),
    }


def show(row: dict[str, object], levels: list[str]) -> str:
    """The line for people."""
    native = row["native"]
    assert isinstance(native, dict)
    rates = "".join(f"{native[level]:>12.1f}" for level in levels)
    aim = f"{row['aim']:.0f}x" if row["aim"] else "-"
    same = "yes" if row["same_bytes"] else "NO"
    kind = "imatrix" if row["imatrix"] else "plain"
    return f"{row['qtype']:<8}{kind:<9}{row['ggml']:>10.2f}{rates}{row['ratio']:>9.1f}x{aim:>7}{same:>7}"


def main() -> int:
    """Prints the table; 1 if some bytes differ from ggml's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default=",".join(QTYPES), help="comma-separated")
    parser.add_argument("--seconds", type=float, default=0.4, help="CPU seconds for each measurement")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--levels", action="store_true", help="every SIMD level, not only the fastest")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    args = parser.parse_args()

    rng = np.random.default_rng(2026)
    rows = (rng.standard_t(5, (args.rows, args.columns)) * 0.02).astype(np.float32)
    weights = (rng.standard_exponential(args.columns) + 0.01).astype(np.float32)
    levels = kernels.simd_levels() if args.levels else kernels.simd_levels()[-1:]
    print("Million weights per CPU-second, one thread")
    print(
        f"{'type':<8}{'':<9}{'ggml':>10}{''.join(f'{level:>12}' for level in levels)}{'ratio':>10}{'aim':>7}{'same':>7}"
    )
    table = []
    for qtype in args.types.split(","):
        row = QTYPES[qtype]
        for importance in [None] * (not row.needs_importance) + [weights] * row.uses_importance:
            table.append(measure(qtype, rows, importance, args))
            print(show(table[-1], levels), flush=True)
    if args.json:
        shape = {"rows": args.rows, "columns": args.columns}
        machine = {"processor": platform.processor() or platform.machine(), "levels": kernels.simd_levels()}
        args.json.write_text(json.dumps({"machine": machine, "shape": shape, "types": table}, indent=1) + "\n")
    return 0 if all(row["same_bytes"] for row in table) else 1


if __name__ == "__main__":
    raise SystemExit(main())
