"""The child's side of runtimes/ctranslate2.py: CTranslate2 in an interpreter that need not know llm_quantize."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from telling import start, versions
from timing import resident, time_model


def main(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Load, score the windows, continue the prompts; see runtimes/isolated.py."""
    started = time.monotonic()
    import ctranslate2

    windows = np.load(folder / "windows.npy", allow_pickle=False)
    ctranslate2.set_random_seed(request["seed"])
    empty = resident()
    model = ctranslate2.Generator(request["directory"], device="cpu", intra_threads=request["threads"])
    timed = None
    if request["timing"] is not None:
        timed = {**_timed(model, request), "memory_empty": empty}
    loaded = time.monotonic()
    rows = [_scored(model, window) for window in windows]
    if rows:
        np.save(folder / "logprobs.npy", np.stack(rows))
    scored = time.monotonic()
    answers = _continue(model, request)
    return {
        "texts": [text for text, _ in answers],
        "tokens": [tokens for _, tokens in answers],
        "versions": versions("ctranslate2"),
        "kernels": [model.compute_type],
        "timed": timed,
        "seconds": {"load": loaded - started, "score": scored - loaded, "generate": time.monotonic() - scored},
    }


def _words(request: dict[str, Any]) -> list[str]:
    """The tokens of the vocabulary by their ids."""
    found: list[str] = json.loads((Path(request["directory"]) / "vocabulary.json").read_text(encoding="utf-8"))
    return found


def _timed(model: Any, request: dict[str, Any]) -> dict[str, float]:
    """As ``time_model``. A Generator keeps no cache between calls, so that tokens are timed where they are told: the
    first one ends the prompt."""
    words, asked = _words(request), request["timing"]

    def generate(ids: Sequence[int], count: int) -> list[float]:
        told: list[float] = []

        def tell(_result: Any) -> bool:
            told.append(time.perf_counter())
            return False

        model.generate_batch(
            [[words[index] for index in ids]], max_length=count, min_length=count, sampling_topk=1, callback=tell,
            include_prompt_in_result=False,
        )  # fmt: skip
        return told

    def read(ids: Sequence[int]) -> None:
        generate(ids, 1)

    def write(lead: Sequence[int], new: Sequence[int]) -> float:
        told = generate(lead, len(new) + 1)
        return told[-1] - told[0]

    found: dict[str, float] = time_model(read, write, vocabulary=len(words), asked=asked, threads=request["threads"])
    return found


def _scored(model: Any, window: Any) -> Any:
    """float32 (length, vocabulary): logits less the logarithm of the sum of their exponentials."""
    logits = np.array(model.forward_batch([window.tolist()]))[0].astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return (logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))).astype(np.float32)


def _continue(model: Any, request: dict[str, Any]) -> list[tuple[str, list[int]]]:
    """Text and token ids that follow each prompt."""
    if not request["prompts"]:
        return []
    tokenizer, words = _vocabulary(request)
    answers = []
    for prompt in request["prompts"]:
        # A chat comes in its template, which writes the special tokens.
        ids = tokenizer.encode(prompt, add_special_tokens=not request["chat"]).ids
        found = model.generate_batch(
            [[words[index] for index in ids]],
            max_length=request["max_tokens"],
            include_prompt_in_result=False,
            **_sampling(request),
        )
        answer = list(found[0].sequences_ids[0])
        answers.append((tokenizer.decode(answer, skip_special_tokens=True), answer))
    return answers


def _vocabulary(request: dict[str, Any]) -> tuple[Any, list[str]]:
    """The tokenizer, and the tokens by their ids as the runtime calls them."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(Path(request["directory"]) / "tokenizer.json")), _words(request)


def _sampling(request: dict[str, Any]) -> dict[str, Any]:
    if request["temperature"] > 0:
        warm = {"sampling_topp": request["top_p"], "sampling_temperature": request["temperature"]}
        return {"sampling_topk": 0, **warm}
    return {"sampling_topk": 1}


class Speaker:
    """See telling.py. Every prompt is read whole: the runtime keeps only the state of a prefix that never changes."""

    trained: int | None = None

    def __init__(self, request: dict[str, Any]) -> None:
        import ctranslate2

        self.tokenizer, self.words = _vocabulary(request)
        self.sampling = _sampling(request)
        ctranslate2.set_random_seed(request["seed"])
        self.model = ctranslate2.Generator(request["directory"], device="cpu", intra_threads=request["threads"])

    def encode(self, text: str, special: bool) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def write(self, ids: list[int], most: int, put: Callable[[int], bool]) -> int:
        prompt = [self.words[index] for index in ids]
        for step in self.model.generate_tokens(prompt, max_length=most, **self.sampling):
            if put(step.token_id):
                break
        return 0


if __name__ == "__main__":
    start(main, Speaker)
