"""Sums of products of the inputs of one matrix: what error feedback knows of a layer.

Inputs x (n,) as the quantized model gives them, y (n,) as the source model does:

    hessian = sum w x x^T (n, n)        cross = sum w (y - x) x^T (n, n)

over tokens x, y with weights w (``token_weights``). Both are cut into tiles that are added up independently, window
after window, so that they do not depend on the number of threads; of the symmetric one only the upper tiles are
computed. The hessian is a float32 product even of bfloat16 inputs (kernels/gram.py), as a Cholesky factor needs its
small eigenvalues. The cross product is taken in the network's own dtype: it is a regression target, and its rounding
(2^-9 of one chunk of windows, at random) is below the noise of sampling.

Some inputs may be held back at first (``hold``): kept as they are, to judge by them what the sums of the others say;
then they are added as well (``release``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from llm_quantize.kernels.gram import add_gram, serves

CAP = 4.0
"""Medians of the mean squares of tokens: what a token has more counts as this."""

TILE = 512
AT_ONCE = 1024
SIDE = 384
"""Of a tile of the hessian where the inputs are bfloat16."""


class Gram:
    """The sums of one matrix with ``columns`` inputs. ``cross`` is None where it was not asked for; ``tokens`` so far.

    ``hessian`` is whole only after ``finish``. ``largest`` (columns,): of the inputs; ``rows`` (k, columns): those that
    were kept as they are (``look``). ``held``: (inputs, those of the source, how much each token counts) of each chunk
    that is held back.
    """

    def __init__(self, columns: int, *, cross: bool, device: torch.device | str = "cpu") -> None:
        self.largest = torch.zeros(columns, dtype=torch.float32, device=device)
        self._rows: list[Tensor] = []
        self.held: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self.columns, self.tokens = columns, 0
        self.hessian = torch.zeros((columns, columns), dtype=torch.float32, device=device)
        self.cross = torch.zeros_like(self.hessian) if cross else None

    def jobs(self, inputs: Tensor, full: Tensor | None = None) -> list[Callable[[], None]]:
        """The work of adding ``inputs`` (tokens, columns) and, for the cross product, the source model's (the same
        tokens): pieces that may run at the same time, all of them before those of the next call."""
        self.tokens += inputs.shape[0]
        return self._sums(self.hessian, inputs, full, token_weights(inputs))

    def _sums(
        self, hessian: Tensor, inputs: Tensor, full: Tensor | None, weights: Tensor | None
    ) -> list[Callable[[], None]]:
        return [*self._products(hessian, inputs, weights), *self._crosses(inputs, full, weights)]

    def _products(self, hessian: Tensor, inputs: Tensor, weights: Tensor | None) -> Iterator[Callable[[], None]]:
        side, add = (SIDE, add_gram) if serves(inputs) else (TILE, _add_product)
        for top in range(0, self.columns, side):
            rows = slice(top, min(top + side, self.columns))
            for left in range(top, self.columns, side):
                yield partial(add, hessian, inputs, weights, rows, slice(left, min(left + side, self.columns)))

    def _crosses(self, inputs: Tensor, full: Tensor | None, weights: Tensor | None) -> Iterator[Callable[[], None]]:
        if self.cross is None or full is None:
            return
        for top in range(0, self.columns, TILE):
            rows = slice(top, min(top + TILE, self.columns))
            yield partial(_add_cross, self.cross[rows], inputs, full[:, rows], weights, rows)

    def hold(self, inputs: Tensor, full: Tensor) -> None:
        """Hold back what ``jobs`` would add."""
        self.held.append((inputs, full, token_weights(inputs)))

    def release(self, hessian: Tensor) -> Iterator[list[Callable[[], None]]]:
        """The jobs of adding what is held back, chunk after chunk: to the cross product, and to another ``hessian``
        (n, n), of the upper triangle; ``join`` adds that as well."""
        while self.held:
            yield self._sums(hessian, *self.held.pop(0))

    def join(self, hessian: Tensor, tokens: int) -> None:
        """Add the sums of ``tokens`` more inputs."""
        self.hessian += hessian
        self.tokens += tokens

    def look(self, inputs: Tensor, keep: int) -> None:
        """Note how large ``inputs`` (tokens, columns) are, and keep ``keep`` of them, at even distances."""
        torch.maximum(self.largest, inputs.abs().amax(dim=0).float(), out=self.largest)
        count = min(keep, len(inputs))
        index = torch.arange(count, device=inputs.device) * len(inputs) // max(1, count)
        self._rows.append(inputs[index].float())

    @property
    def rows(self) -> Tensor:
        """What ``look`` kept, float32 (k, columns)."""
        return torch.cat(self._rows) if self._rows else self.largest.new_empty((0, self.columns))

    def finite(self) -> bool:
        """Whether every input so far was: one that is not makes its mean square so."""
        found = bool(torch.isfinite(self.hessian.diagonal()).all())
        return found and (self.cross is None or bool(torch.isfinite(self.cross.diagonal()).all()))

    def finish(self) -> None:
        """Complete the lower triangle."""
        complete(self.hessian)


def complete(matrix: Tensor) -> None:
    """Make ``matrix`` (n, n) symmetric: its lower triangle that of the upper one, in place."""
    for top in range(0, len(matrix), TILE):
        rows = slice(top, top + TILE)
        corner = matrix[rows, rows]
        corner.copy_(torch.triu(corner) + torch.triu(corner, 1).T)
        matrix[top + TILE :, rows] = matrix[rows, top + TILE :].T


def token_weights(inputs: Tensor) -> Tensor | None:
    """How much each of ``inputs`` (tokens, n) counts: float32 (tokens,), as bfloat16 holds it; None: once each.

    Published models have a few tokens, the first of a text above all, whose inputs to some matrices are thousands of
    times larger than the others' (Sun et al. 2024, "Massive Activations in Large Language Models"). Summed up plainly,
    such a sum knows of nothing else. So a token of a mean square above CAP medians counts as if it had CAP medians.
    """
    parts = [part.float().square().mean(dim=1) for part in torch.split(inputs, AT_ONCE)]
    squares = torch.cat(parts) if parts else inputs.new_empty(0, dtype=torch.float32)
    living = squares[squares > 0]
    if not living.numel():
        return None
    most = CAP * living.median()
    large = (squares > most) & squares.isfinite()  # what is not finite is to be seen in the sums
    if not bool(large.any()):
        return None
    return torch.where(large, most / squares, 1.0).to(torch.bfloat16).float()


def _add_product(hessian: Tensor, inputs: Tensor, weights: Tensor | None, rows: slice, columns: slice) -> None:
    with torch.inference_mode():
        left = inputs[:, rows].float()
        left = left if weights is None else left * weights[:, None]
        hessian[rows, columns].addmm_(left.T, inputs[:, columns].float())


def _add_cross(target: Tensor, inputs: Tensor, full: Tensor, weights: Tensor | None, rows: slice) -> None:
    with torch.inference_mode():
        away = full - inputs[:, rows]  # rounded once, to the dtype of both
        away = away if weights is None else (away * weights[:, None]).to(away.dtype)
        target += (away.T @ inputs).float()
