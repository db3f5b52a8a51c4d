"""Any candidate's weights in transformers' own model, float32, on the same windows: the same judge for everybody.

No part of llm-quantize decodes or runs anything here; its ``Comparison`` only does the statistics, and every candidate
keeps one score per token, so that ratios of two candidates are paired.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llm_quantize.measures.divergence import Comparison, Predicted, candidate_like
from llm_quantize.measures.perplexity import scored

Weights = Mapping[str, npt.NDArray[np.float32]]
EMBEDDING, TIED = "model.embed_tokens.weight", "lm_head.weight"
_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight$")


class Judge:
    """The source model over ``windows`` (n, length), and candidates against it."""

    def __init__(self, source: Path, weights: Weights, windows: npt.NDArray[np.integer]) -> None:
        config = AutoConfig.from_pretrained(source)
        self._model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
        self._windows = [np.asarray(window, np.int64) for window in windows]
        self._names = set(weights)
        self._load(weights)
        self._reference = [Predicted.of(logits) for logits in self._logits()]

    def measure(self, weights: Weights) -> Comparison:
        """Scores of a candidate. Raises ValueError where it lacks a weight of the source, or has another."""
        if TIED not in self._names and TIED in weights and np.array_equal(weights[TIED], weights[EMBEDDING]):
            weights = {name: value for name, value in weights.items() if name != TIED}
        if set(weights) != self._names:
            raise ValueError(f"not the weights of the source: {sorted(set(weights) ^ self._names)[:8]}")
        self._load(weights)
        comparison = Comparison()
        for window, reference, logits in zip(self._windows, self._reference, self._logits(), strict=True):
            targets = scored(window)[1]
            comparison.add_scores(reference.score(candidate_like(reference, logits, targets), targets))
        return comparison

    def _load(self, weights: Weights) -> None:
        state: dict[str, Any] = {}
        experts: dict[tuple[str, str], dict[int, npt.NDArray[np.float32]]] = {}
        for name, value in weights.items():
            match = _EXPERT.match(name)
            if match:
                experts.setdefault((match[1], match[3]), {})[int(match[2])] = value
            else:
                state[name] = torch.from_numpy(np.ascontiguousarray(value))
        for (stack, part), values in experts.items():
            if part != "up_proj":
                ordered = [values[i] for i in range(len(values))]
                if part == "gate_proj":
                    up = experts[stack, "up_proj"]
                    ordered = [np.concatenate([gate, up[i]]) for i, gate in enumerate(ordered)]
                key = f"{stack}.{'gate_up_proj' if part == 'gate_proj' else part}"
                state[key] = torch.from_numpy(np.stack(ordered))
        state.setdefault(TIED, state[EMBEDDING])
        self._model.load_state_dict(state, strict=True)

    def _logits(self) -> Any:
        """float32 (scored positions, vocabulary) of each window."""
        for window in self._windows:
            where, _ = scored(window)
            with torch.inference_mode():
                yield self._model(torch.from_numpy(window)[None]).logits[0, where].numpy()
