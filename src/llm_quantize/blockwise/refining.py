"""All codes of a block moved together by gradient steps on its output.

Error feedback makes each matrix as good as it can be by itself. Here all matrices of a block that have codes move
together (methods/refine.py) down the gradient of

    L = mean over tokens and channels of c (y - y')^2

with y' what leaves the block of the source on the source's own stream, y what leaves this block on the quantized one,
and c the weights of tokens (``gram.token_weights`` of y'): a token of massive activations counts no more than others.
A step sees BATCH tokens, whole windows drawn with a fixed seed; how long steps are (PACES) is found out by TRIAL of
them. One window of BACK is held back from the steps: the block is taken
as it is then, decoded from what the file will store, if L of those windows is lower than it was; else its matrices
stay as they were. Dense twin: tests/oracles/dense_refinement.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm_quantize.architectures.rows import Arrays, read_output_rows, to_float32
from llm_quantize.blockwise.gram import token_weights
from llm_quantize.blockwise.refining_sizes import PACES, TRIAL, batch_of, refinement_held
from llm_quantize.errors import NumericPolicyError
from llm_quantize.methods.refine import Moving
from llm_quantize.streams.hidden import Activations
from llm_quantize.streams.network import Block
from llm_quantize.streams.pool import Pool

__all__ = ["Outcome", "Part", "Refinement", "drawn"]

Floats = npt.NDArray[np.float32]
SEED = 20261


@dataclass(frozen=True)
class Part:
    """Rows [start, start + the rows of ``moving``) of the matrix ``name``, whose weight is ``weight``."""

    name: str
    weight: Any
    start: int
    moving: Moving

    @property
    def rows(self) -> slice:
        """Its rows."""
        return slice(self.start, self.start + len(self.moving.places))


@dataclass(frozen=True)
class Outcome:
    """``before``, ``after``: L of the ``windows`` held back. ``kept``: whether the block is as the steps left it."""

    before: float
    after: float
    steps: int
    windows: int
    pace: float = 1.0

    @property
    def kept(self) -> bool:
        """Whether the block is better than it was."""
        return self.after < self.before

    def facts(self) -> dict[str, Any]:
        """As the manifest has it."""
        facts = {"before": self.before, "after": self.after, "kept": self.kept}
        return {"steps": self.steps, "pace": self.pace, **facts, "held_back": self.windows}


@dataclass(frozen=True)
class Refinement:
    """The refinement of one ``block``, in which the quantized values are. ``entering``: the quantized stream before it;
    ``target``: the source's after it; the first ``windows`` of both. ``put``: {matrix: float32 (rows, columns)} into
    the block. ``advance`` hears of windows that went through the block, or came back."""

    block: Block
    entering: Activations
    target: Activations
    windows: int
    pool: Pool
    put: Callable[[Mapping[str, Floats]], None]
    advance: Callable[[int], None]

    @property
    def held(self) -> range:
        """The windows held back."""
        return range(self.windows - refinement_held(self.windows), self.windows)

    def run(
        self, begin: Callable[[float], Sequence[Part]], were: Mapping[str, Floats], steps: int
    ) -> tuple[Sequence[Part], float]:
        """Move the parts of all matrices that ``begin`` makes for a pace, in ``steps`` steps. ``were``: {matrix: what
        its codes decode to}; rows that no part holds stay. Returns the parts and their pace: the first of PACES at
        which L of the windows of the first step is no larger after TRIAL steps, else the last.

        Raises NumericPolicyError where a gradient is not finite, StoppedError after a signal.
        """
        fit = self.windows - len(self.held)
        batches = list(drawn(fit, batch_of(fit, self.entering.shape[1]), steps, self.block.index))
        first = self.loss(batches[0])
        for pace in PACES:
            parts, values = begin(pace), {name: np.array(value) for name, value in were.items()}
            told = self if pace == PACES[0] else replace(self, advance=lambda _: None)  # no step counts twice
            told._move(parts, values, batches[:TRIAL])
            if pace == PACES[-1] or told.loss(batches[0]) <= first:
                break
            self.put(were)
        self._move(parts, values, batches[TRIAL:])
        return parts, pace

    def _move(self, parts: Sequence[Part], values: dict[str, Floats], batches: Sequence[Sequence[int]]) -> None:
        for chosen in batches:
            gradients = self._gradients(chosen)

            def step(part: Part, gradients: Mapping[str, Floats] = gradients) -> None:
                rows = part.rows
                found = to_float32(read_output_rows(Arrays(gradients.__getitem__), part.weight, rows.start, rows.stop))
                part.moving.step(torch.from_numpy(np.ascontiguousarray(found)).to(part.moving.places.device))
                values[part.name][rows] = part.moving.values().cpu().numpy()

            for _ in self.pool.each(step, parts):
                pass
            self.put(values)

    def loss(self, windows: Sequence[int]) -> float:
        """L of ``windows`` with the block as it is: a mean over them, float64 sums in their order."""

        def one(window: int) -> float:
            away, counts = self._away(self.block(self.entering.read(window)), window)
            return float((away.square().mean(1) * counts).to(torch.float64).mean())

        total = 0.0
        for found in self.pool.in_order(one, windows):
            self.advance(1)
            total += found
        return total / len(windows)

    def _away(self, values: Tensor, window: int) -> tuple[Tensor, Tensor]:
        """y - y' float32 (tokens, channels), and how much each token counts, on the device of ``values``."""
        target = self.target.read(window).to(values.device).float()
        counts = token_weights(target)
        return values.float() - target, target.new_ones(len(target)) if counts is None else counts

    def _gradients(self, windows: Sequence[int]) -> dict[str, Floats]:
        """{source tensor: dL/dvalue of ``windows``, float32 in its shape}, summed in the order of the windows."""

        def one(window: int) -> dict[str, Tensor]:
            def choose(values: Tensor) -> Tensor:
                away, counts = self._away(values, window)
                return away * counts[:, None] * (2 / (away.numel() * len(windows)))

            return self.block.pull_back_from(self.entering.read(window), choose)

        total: dict[str, Tensor] = {}
        for found in self.pool.in_order(one, windows):
            self.advance(3)
            for name, gradient in found.items():
                total[name] = gradient.float() if name not in total else total[name].add_(gradient)
        for name, gradient in total.items():
            if not bool(torch.isfinite(gradient).all()):
                raise NumericPolicyError(
                    f"a gradient of block {self.block.index} is not finite",
                    tensor=name,
                    remedy="leave --refine out; finished blocks are kept",
                )
        return {name: gradient.numpy() for name, gradient in total.items()}


def drawn(windows: int, batch: int, steps: int, block: int) -> Iterator[list[int]]:
    """``batch`` of ``windows`` for each of ``steps``: every window once before any comes again, in an order drawn with
    the number of the block."""
    draw, order = np.random.Generator(np.random.PCG64([SEED, block])), list[int]()
    for _ in range(steps):
        while len(order) < batch:
            order += draw.permutation(windows).tolist()
        yield order[:batch]
        del order[:batch]
