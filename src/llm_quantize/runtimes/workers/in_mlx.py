"""The child's side of runtimes/mlx.py: mlx_lm in an interpreter that need not know llm_quantize."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from telling import start, versions
from timing import one_by_one, resident, time_model


def main(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Load, score the windows, continue the prompts; see runtimes/isolated.py."""
    started = time.monotonic()
    import mlx.core as mx
    from mlx_lm.utils import load, load_model

    windows = np.load(folder / "windows.npy", allow_pickle=False)
    tokenizer = None
    empty = resident()
    if request["prompts"]:
        model, tokenizer = load(request["directory"])
    else:
        model, _ = load_model(Path(request["directory"]))
    if request["dtype"] != "auto":
        model.set_dtype(getattr(mx, request["dtype"]))
    timed = None
    if request["timing"] is not None:
        timed = {**_timed(model, request["timing"]), "memory_empty": empty}
    loaded = time.monotonic()
    rows = []
    for window in windows:
        logits = model(mx.array(window.astype(np.int32))[None])[0].astype(mx.float32)
        rows.append(np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True)))
    if rows:
        np.save(folder / "logprobs.npy", np.stack(rows))
    scored = time.monotonic()
    with (folder / "pieces").open("w", encoding="utf-8", newline="") as pieces:
        answers = _continue(model, tokenizer, request, pieces)
    return {
        "texts": [text for text, _ in answers],
        "tokens": [tokens for _, tokens in answers],
        "versions": versions("mlx", "mlx-lm", "transformers"),
        "kernels": sorted({type(module).__name__ for module in model.modules() if "scales" in module}),
        "timed": timed,
        "seconds": {"load": loaded - started, "score": scored - loaded, "generate": time.monotonic() - scored},
    }


def _timed(model: Any, asked: dict[str, int]) -> dict[str, float]:
    """As ``time_model``. On the CPU, MLX multiplies packed matrices in one thread; of Apple's GPU the share of the CPU
    says nothing, and is 1."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    cache: Any = None

    def read(ids: Sequence[int]) -> None:
        nonlocal cache
        cache = make_prompt_cache(model)
        mx.eval(model(mx.array([ids]), cache=cache))

    def advance(token: int, _position: int) -> None:
        mx.eval(model(mx.array([[token]]), cache=cache))

    vocabulary = model(mx.array([[0]])).shape[-1]
    found = time_model(read, one_by_one(read, advance), vocabulary=vocabulary, asked=asked, threads=1)
    return found if mx.default_device() == mx.cpu else {**found, "cpu_share": 1.0}


def _continue(model: Any, tokenizer: Any, request: dict[str, Any], pieces: TextIO) -> list[tuple[str, list[int]]]:
    """Text and token ids that follow each prompt; the first text goes to ``pieces`` as it is written."""
    import mlx.core as mx
    from mlx_lm.generate import stream_generate
    from mlx_lm.sample_utils import make_sampler

    mx.random.seed(request["seed"])
    sampler = make_sampler(temp=request["temperature"], top_p=request["top_p"] if request["top_p"] < 1 else 0.0)
    answers: list[tuple[str, list[int]]] = []
    for prompt in request["prompts"]:
        # A chat comes in its template, which writes the special tokens.
        ids = tokenizer.encode(prompt, add_special_tokens=not request["chat"])
        text, tokens = "", []
        for part in stream_generate(model, tokenizer, ids, request["max_tokens"], sampler=sampler):
            text += part.text
            tokens.append(int(part.token))
            if not answers:
                pieces.write(part.text)
                pieces.flush()
        answers.append((text, tokens))
    return answers


if __name__ == "__main__":
    start(main)
