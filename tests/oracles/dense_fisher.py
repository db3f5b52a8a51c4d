"""The dense twin of evaluation/fisher.py: the whole model of transformers, its own autograd over all weights at once.

Tokens are drawn anew from the same random numbers (PCG64 of [20260, window, first position of 128]), by a cumulative
sum in float64; scores are squared window by window (in the head: by 128 positions), and a change costs
½ Σ (Q - W)² F / N; of the embedding ½ Σ_t Σ_j (change of what enters block 0)² (its gradient)² / N.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

CHUNK = 128
SEED = 20260


def drawn(logits: np.ndarray, window: int) -> np.ndarray:
    """A token for each of the logits (n, vocabulary)."""
    wide = logits.astype(np.float64)
    share = np.exp(wide - wide.max(-1, keepdims=True))
    tokens = []
    for start in range(0, len(share), CHUNK):
        rows = share[start : start + CHUNK]
        numbers = np.random.Generator(np.random.PCG64([SEED, window, start])).random(len(rows))
        summed = rows.cumsum(-1)
        tokens += [int(np.searchsorted(sums, number * sums[-1])) for sums, number in zip(summed, numbers, strict=True)]
    return np.array(tokens)


class DenseFisher:
    """``squares``: {parameter of transformers' model: the sum of the windows' squared scores}; ``head``: that of the
    output matrix by itself; ``entering``: the squared gradients of what the embedding gives, (windows, length, width),
    and ``embedded`` that itself. ``positions``: N."""

    def __init__(self, model: Any, windows: np.ndarray) -> None:
        self.squares: dict[str, torch.Tensor] = {}
        self.head: torch.Tensor | None = None
        self.positions = int(windows.size)
        entering, embedded = [], []
        matrices = {name: value for name, value in model.named_parameters() if value.ndim > 1}
        for value in matrices.values():
            value.requires_grad_(True)
        output = model.get_output_embeddings()
        seen: list[torch.Tensor] = []
        output.register_forward_hook(lambda _module, given, _result: seen.append(given[0]))
        for number, row in enumerate(windows):
            ids = torch.from_numpy(row.astype(np.int64))[None]
            given = model.get_input_embeddings()(ids).detach().requires_grad_(True)
            seen.clear()
            logits = model(inputs_embeds=given, use_cache=False).logits[0].float()
            tokens = torch.from_numpy(drawn(logits.detach().numpy(), number))
            loss = torch.nn.functional.cross_entropy(logits, tokens, reduction="none")
            others = {name: value for name, value in matrices.items() if value is not output.weight}
            found = torch.autograd.grad(
                loss.sum(), [given, *others.values()], retain_graph=True, allow_unused=True, materialize_grads=True
            )
            entering.append(found[0][0].square())
            embedded.append(given.detach()[0])
            for name, gradient in zip(others, found[1:], strict=True):
                self.squares[name] = self.squares.get(name, 0) + gradient.square()
            for start in range(0, len(row), CHUNK):
                (part,) = torch.autograd.grad(loss[start : start + CHUNK].sum(), [output.weight], retain_graph=True)
                self.head = part.square() if self.head is None else self.head + part.square()
        self.entering, self.embedded = torch.stack(entering), torch.stack(embedded)

    def cost(self, changes: dict[str, torch.Tensor]) -> float:
        """Of ``changes``, {parameter: Q - W}, in blocks."""
        total = sum(float((change.double() ** 2 * self.squares[name]).sum()) for name, change in changes.items())
        return total / (2 * self.positions)

    def head_cost(self, change: torch.Tensor) -> float:
        """Of a change of the output matrix."""
        assert self.head is not None
        return float((change.double() ** 2 * self.head).sum()) / (2 * self.positions)

    def embedding_cost(self, embedded: torch.Tensor) -> float:
        """Of other values (windows, length, width) that the embedding gives."""
        change = (embedded - self.embedded).double()
        return float((change**2 * self.entering).sum()) / (2 * self.positions)
