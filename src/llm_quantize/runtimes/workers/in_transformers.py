"""The child's side of runtimes/transformers.py: transformers in an interpreter that need not know llm_quantize."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from telling import common, refuse_unfilled, start, versions
from timing import one_by_one, resident, time_model


def load(directory: str, dtype: str, backend: str | None) -> Any:
    """The model in ``directory`` on the CPU. ``dtype``: a torch name or "auto"; ``backend``: None, the name of a
    kernel of GPTQModel, or "dequantize" for compressed-tensors."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    said = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
    config = _CONFIGS.get(str(said.get("quant_method")), _as_it_is)(said, backend)
    options = {} if config is None else {"quantization_config": config}
    read = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    causal = type(read) in AutoModelForCausalLM._model_mapping
    model, told = (AutoModelForCausalLM if causal else AutoModelForImageTextToText).from_pretrained(
        directory,
        dtype=dtype,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
        **options,
    )
    refuse_unfilled(told)
    return model.eval()


def _gptq(said: dict[str, Any], backend: str | None) -> Any:
    """GPTQModel's "auto" would compile a kernel for minutes; this one is plain torch."""
    from transformers import GPTQConfig

    return GPTQConfig(bits=said["bits"], backend=backend or "gptq_torch")


def _awq(said: dict[str, Any], backend: str | None) -> Any:
    """As ``_gptq``."""
    from transformers import AwqConfig

    return AwqConfig(bits=said["bits"], backend=backend or "torch_awq")


def _compressed_tensors(said: dict[str, Any], backend: str | None) -> Any:
    """Dequantized where it is asked for, and where transformers could not read it otherwise."""
    from transformers import CompressedTensorsConfig

    wanted = backend == "dequantize" or (backend is None and _has_zeros(said))
    return CompressedTensorsConfig(dequantize=True) if wanted else None


def _as_it_is(_said: dict[str, Any], _backend: str | None) -> Any:
    return None


_CONFIGS: dict[str, Callable[[dict[str, Any], str | None], Any]] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
}


def _has_zeros(config: dict[str, Any]) -> bool:
    """Zero points, which transformers 5.23 reads from a compressed-tensors file only by dequantizing it."""
    groups = config.get("config_groups") or {}
    return any(not (group.get("weights") or {}).get("symmetric", True) for group in groups.values())


def main(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Load, score the windows, continue the prompts; see runtimes/isolated.py."""
    started = time.monotonic()
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(request["threads"])
    windows = np.load(folder / "windows.npy", allow_pickle=False)
    empty = resident()
    model = load(request["directory"], request["dtype"], request["backend"])
    timed = None
    if request["timing"] is not None:
        timed = {**_timed(model, request["timing"], request["threads"]), "memory_empty": empty}
    loaded = time.monotonic()
    with torch.inference_mode():
        rows = []
        for window in windows:
            logits = model(input_ids=torch.from_numpy(window.astype(np.int64))[None]).logits[0]
            rows.append(torch.log_softmax(logits.float(), -1).numpy())
        if rows:
            np.save(folder / "logprobs.npy", np.stack(rows))
        scored = time.monotonic()
        answers = _continue(model, request)
    return {
        "texts": [text for text, _ in answers],
        "tokens": [tokens for _, tokens in answers],
        "versions": versions("transformers", "torch", "gptqmodel", "optimum", "compressed-tensors", "bitsandbytes"),
        "kernels": sorted({type(m).__name__ for m in model.modules() if _is_kernel(m)}),
        "timed": timed,
        "seconds": {"load": loaded - started, "score": scored - loaded, "generate": time.monotonic() - scored},
    }


def _timed(model: Any, asked: dict[str, int], threads: int) -> dict[str, float]:
    """As ``time_model``."""
    import torch

    cache: Any = None

    def read(ids: Sequence[int]) -> None:
        nonlocal cache
        cache = model(input_ids=torch.tensor([ids]), use_cache=True).past_key_values

    def advance(token: int, _position: int) -> None:
        model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)

    vocabulary = model.get_input_embeddings().weight.shape[0]
    with torch.inference_mode():
        found: dict[str, float] = time_model(
            read, one_by_one(read, advance), vocabulary=vocabulary, asked=asked, threads=threads
        )
    return found


def _is_kernel(module: Any) -> bool:
    return hasattr(module, "scales") or type(module).__module__.startswith("bitsandbytes.")


def _continue(model: Any, request: dict[str, Any]) -> list[tuple[str, list[int]]]:
    """Text and token ids that follow each prompt."""
    import torch

    if not request["prompts"]:
        return []
    tokenizer = _tokenizer(request)
    torch.manual_seed(request["seed"])
    answers = []
    for prompt in request["prompts"]:
        # A chat comes in its template, which writes the special tokens.
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not request["chat"])
        inputs.pop("token_type_ids", None)
        output = model.generate(**inputs, max_new_tokens=request["max_tokens"], **_sampling(request))
        answer = output[0, inputs["input_ids"].shape[1] :].tolist()
        answers.append((str(tokenizer.decode(answer, skip_special_tokens=True)), answer))
    return answers


def _tokenizer(request: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(request["directory"], local_files_only=True, trust_remote_code=False)


def _sampling(request: dict[str, Any]) -> dict[str, Any]:
    if request["temperature"] > 0:
        return {"do_sample": True, "temperature": request["temperature"], "top_p": request["top_p"]}
    return {"do_sample": False}


class Speaker:
    """See telling.py. Keys and values that prompts have in common are kept where all of a model's layers keep all of
    them; a layer that keeps a window, or a state, cannot go back."""

    def __init__(self, request: dict[str, Any]) -> None:
        import torch
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.set_num_threads(request["threads"])
        self.tokenizer = _tokenizer(request)
        self.model = load(request["directory"], request["dtype"], request["backend"])
        self.sampling = _sampling(request)
        self.trained: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self.cache: Any = None
        self.held: list[int] = []
        torch.manual_seed(request["seed"])

    def encode(self, text: str, special: bool) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def write(self, ids: list[int], most: int, put: Callable[[int], bool]) -> int:
        import torch

        kept = self._keep(ids)
        stream, given = _Stream(put), torch.tensor([ids])
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=most,
                streamer=stream,
                stopping_criteria=[stream.stop],
                **({} if self.cache is None else {"past_key_values": self.cache}),
                **self.sampling,
            )
        if self.cache is not None:
            self.held = output[0].tolist()[: self.cache.get_seq_length()]
        return kept

    def _keep(self, ids: list[int]) -> int:
        """Let the cache hold what it and ``ids`` begin with; how many tokens that are."""
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer

        kept: int = common(self.held, ids)
        held, self.held = len(self.held), []
        if kept:
            self.cache.crop(kept - held)  # below zero: so many of the last ones
            return kept
        cache = DynamicCache(config=self.model.config)
        self.cache = cache if all(type(layer) is DynamicLayer for layer in cache.layers) else None
        return 0


class _Stream:
    """A streamer for transformers' ``generate``, which hands over the prompt first, and its criterion to stop."""

    def __init__(self, put: Callable[[int], bool]) -> None:
        self._put, self._prompt, self._stopped = put, True, False

    def put(self, value: Any) -> None:
        if not self._prompt:
            self._stopped = any(self._put(int(token)) for token in value.flatten().tolist())
        self._prompt = False

    def end(self) -> None:
        """Nothing is held back here."""

    def stop(self, ids: Any, _scores: Any, **_more: Any) -> Any:
        import torch

        return torch.full((ids.shape[0],), self._stopped, dtype=torch.bool, device=ids.device)


if __name__ == "__main__":
    start(main, Speaker)
