"""The child's side of runtimes/mlx.py: mlx_lm in an interpreter that need not know llm_quantize."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from telling import common, start, versions
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
    answers = _continue(model, tokenizer, request)
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


def _continue(model: Any, tokenizer: Any, request: dict[str, Any]) -> list[tuple[str, list[int]]]:
    """Text and token ids that follow each prompt."""
    from mlx_lm.generate import stream_generate

    sampler = _sampler(request)
    answers: list[tuple[str, list[int]]] = []
    for prompt in request["prompts"]:
        # A chat comes in its template, which writes the special tokens.
        ids = tokenizer.encode(prompt, add_special_tokens=not request["chat"])
        parts = list(stream_generate(model, tokenizer, ids, request["max_tokens"], sampler=sampler))
        answers.append(("".join(part.text for part in parts), [int(part.token) for part in parts]))
    return answers


def _sampler(request: dict[str, Any]) -> Any:
    import mlx.core as mx
    from mlx_lm.sample_utils import make_sampler

    mx.random.seed(request["seed"])
    return make_sampler(temp=request["temperature"], top_p=request["top_p"] if request["top_p"] < 1 else 0.0)


class Speaker:
    """See telling.py. The cache goes back to what prompts have in common, where every layer's can."""

    def __init__(self, request: dict[str, Any]) -> None:
        from mlx_lm.utils import load

        self.model, self.tokenizer = load(request["directory"])
        self.sampler = _sampler(request)
        self.trained: int | None = getattr(self.model.args, "max_position_embeddings", None)
        self.cache: Any = None
        self.held: list[int] = []

    def encode(self, text: str, special: bool) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=special))

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def write(self, ids: list[int], most: int, put: Callable[[int], bool]) -> int:
        from mlx_lm.generate import stream_generate

        kept = self._keep(ids)
        answer: list[int] = []
        for part in stream_generate(
            self.model, self.tokenizer, ids[kept:], most, sampler=self.sampler, prompt_cache=self.cache
        ):
            # The last part has a token that was no text: the end.
            if part.finish_reason == "stop":
                break
            answer.append(int(part.token))
            if put(answer[-1]):
                break
        self.held = [*ids, *answer]
        return kept

    def _keep(self, ids: list[int]) -> int:
        """Let the cache hold what it and ``ids`` begin with; how many tokens that are."""
        from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

        kept: int = common(self.held, ids)
        if kept and can_trim_prompt_cache(self.cache):
            # It may hold a token that was computed ahead, and lack the last one.
            kept = min(kept, self.cache[0].offset)
            trim_prompt_cache(self.cache, self.cache[0].offset - kept)
            return kept
        self.cache = make_prompt_cache(self.model)
        return 0


if __name__ == "__main__":
    start(main, Speaker)
