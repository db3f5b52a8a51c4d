"""What statistics say of an artifact's tensors: importance rows, which experts saw too little, a summary. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_quantize.architectures.base import OutputTensor
from llm_quantize.errors import MalformedInputError, NumericPolicyError
from llm_quantize.io.statistics_file import StatisticsFile
from llm_quantize.measures.amounts import counted

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TensorStatistics:
    """The inputs of one tensor of the artifact: ``sums`` of squares, float32 (matrices, columns), and token ``counts``,
    float32 (matrices,): the two that an importance matrix file stores."""

    sums: Floats
    counts: Floats

    @property
    def importance(self) -> Floats:
        """sums / counts as llama-quantize divides, float32 by float32; ones for a matrix that saw no token."""
        seen = self.counts > 0
        found = self.sums.copy()
        found[seen] /= self.counts[seen, None]
        found[~seen] = 1.0
        return found

    @property
    def unreached(self) -> tuple[int, ...]:
        """The matrices that saw no token."""
        return tuple(int(matrix) for matrix in np.flatnonzero(self.counts <= 0))


def importance(statistics: StatisticsFile, outputs: Sequence[OutputTensor]) -> dict[str, Floats]:
    """Mean squares of the inputs of every output tensor that has them: GGUF name -> float32 (matrices, columns).

    The same values, to the bit, as reading back the importance matrix that ``io/imatrix_writer.py`` writes of them.
    Embedding and output appear only where their inputs were collected. Raises as ``tensor_statistics``.
    """
    return {name: found.importance for name, found in tensor_statistics(statistics, outputs).items()}


def tensor_statistics(statistics: StatisticsFile, outputs: Sequence[OutputTensor]) -> dict[str, TensorStatistics]:
    """Sums and counts for every output tensor whose inputs were collected, in the order of ``outputs``.

    Raises UsageError where the kind imatrix was not collected, MalformedInputError where the statistics do not fit the
    model, NumericPolicyError where a sum is beyond float32.
    """
    taps = {tensor: (tap.name, matrix) for tap in statistics.taps.values() for tensor, matrix in tap.tensors.items()}
    read: dict[str, tuple[Floats, Floats]] = {}
    found = {}
    for output in outputs:
        rows = _rows(statistics, output, taps)
        if rows is None:
            continue
        for tap, _ in rows:
            if tap not in read:
                read[tap] = _float32(statistics, tap)
        sums = np.concatenate([read[tap][0][matrix : matrix + 1] for tap, matrix in rows])
        if (order := output.pieces[0].columns) is not None:  # of one matrix, so of one piece
            sums = np.ascontiguousarray(sums[:, order])
        counts = np.asarray([read[tap][1][matrix] for tap, matrix in rows], np.float32)
        found[output.name] = TensorStatistics(sums, counts)
    return found


def _float32(statistics: StatisticsFile, tap: str) -> tuple[Floats, Floats]:
    wide = statistics.sum_squares(tap)
    if float(wide.max()) > float(np.finfo(np.float32).max):
        raise NumericPolicyError(
            "the sum of squares of an input is beyond float32",
            file=statistics.path,
            tensor=tap,
            found=f"{float(wide.max()):.3g}",
            remedy="calibrate with less text; if a few tokens cause it, the model's activations are broken",
        )
    return wide.astype(np.float32), statistics.counts(tap).astype(np.float32)


def _rows(
    statistics: StatisticsFile, output: OutputTensor, taps: Mapping[str, tuple[str, int | None]]
) -> list[tuple[str, int]] | None:
    """(tap, its matrix) for each matrix of ``output``; None where the inputs of one are unknown or not the same."""
    if len(output.shape) < 2 or not output.pieces or any(piece.source not in taps for piece in output.pieces):
        return None
    matrices = 1
    for size in output.shape[:-2]:
        matrices *= size
    rows: list[tuple[str, int]] = []
    if len(output.pieces) == 1:
        tap, matrix = taps[output.pieces[0].source]
        size = statistics.taps[tap].matrices
        rows = [(tap, index) for index in range(size)] if matrix is None else [(tap, matrix)]
    elif len(output.pieces) % matrices == 0:
        each = len(output.pieces) // matrices
        for index in range(matrices):
            pieces = output.pieces[index * each : (index + 1) * each]
            wanted = {_matrix(statistics, taps[piece.source], index) for piece in pieces}
            if len(wanted) != 1:
                return None
            rows.append(wanted.pop())
    if len(rows) != matrices or any(statistics.taps[tap].columns != output.shape[-1] for tap, _ in rows):
        tap = taps[output.pieces[0].source][0]
        stored = statistics.taps[tap]
        raise MalformedInputError(
            "the statistics do not belong to this model",
            file=statistics.path,
            tensor=output.name,
            expected=f"inputs of {matrices} x {output.shape[-1]}",
            found=f"{stored.name} has {stored.matrices} x {stored.columns}",
            remedy="give the statistics that were made from this model",
        )
    return rows


def _matrix(statistics: StatisticsFile, place: tuple[str, int | None], index: int) -> tuple[str, int]:
    """Which matrix a piece of output matrix ``index`` uses: the one it names, or its own of a tap of several."""
    tap, matrix = place
    if matrix is not None:
        return tap, matrix
    return tap, index if statistics.taps[tap].matrices > 1 else 0


@dataclass(frozen=True)
class TapCoverage:
    """A tap of experts: ``tokens[e]`` that expert e saw, and the experts that saw fewer than the minimum."""

    tap: str
    block: int
    tokens: tuple[int, ...]
    short: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"layer": self.block, "tokens": list(self.tokens), "short": list(self.short)}

    @property
    def sentence(self) -> str:
        """How many tokens the experts saw, in words."""
        half = sorted(self.tokens)[len(self.tokens) // 2]
        least = min(range(len(self.tokens)), key=lambda index: self.tokens[index])
        return (
            f"layer {self.block}: its {counted(len(self.tokens), 'expert')} saw {min(self.tokens):,} (expert {least}) "
            f"to {max(self.tokens):,} tokens, half of them at least {half:,}"
        )


def coverage(statistics: StatisticsFile, minimum: int) -> list[TapCoverage]:
    """How many tokens each expert of each tap saw, in file order; a tap without experts is not listed."""
    table = []
    for tap in statistics.taps.values():
        tokens = tuple(int(count) for count in statistics.counts(tap.name))
        short = tuple(index for index, count in enumerate(tokens) if count < minimum)
        if tap.matrices > 1:
            table.append(TapCoverage(tap.name, tap.block, tokens, short))
    return table


def summary(statistics: StatisticsFile, outputs: Sequence[OutputTensor], minimum: int = 1) -> dict[str, Any]:
    """A JSON-ready description: identities, kinds, and for each tensor of the artifact the mean and the largest mean
    square, the share of the sum that the top 1 % of channels have, dead channels, tokens, and experts that saw fewer
    than ``minimum``."""
    tensors = []
    for name, found in tensor_statistics(statistics, outputs).items():
        values = found.importance[found.counts > 0].astype(np.float64)
        tensors.append(
            {
                "name": name,
                "matrices": len(found.counts),
                "columns": found.sums.shape[1],
                "tokens": int(found.counts.astype(np.float64).sum()),
                "tokens_least": int(found.counts.min()),
                "mean_square": float(values.mean()) if values.size else 0.0,
                "mean_square_max": float(values.max()) if values.size else 0.0,
                "top_1_percent_share": _top_share(values),
                "dead_channels": int((found.sums[found.counts > 0] == 0).sum()),
                "short_matrices": [index for index, count in enumerate(found.counts) if count < minimum],
            }
        )
    identity = statistics.identity
    experts = coverage(statistics, minimum)
    return {
        "format_version": 1,
        "model": dict(identity.model),
        "text": dict(identity.text),
        "kinds": list(statistics.kinds),
        "minimum_tokens": minimum,
        "tensors": tensors,
        **({"experts": [entry.to_dict() for entry in by_layer(experts)]} if experts else {}),
    }


def by_layer(experts: Sequence[TapCoverage]) -> list[TapCoverage]:
    """One of the taps of each layer, all of which the same tokens reach."""
    return list({entry.block: entry for entry in reversed(experts)}.values())[::-1]


def _top_share(values: npt.NDArray[np.float64]) -> float:
    """The part of each row's sum that its largest hundredth of channels (at least one) has, averaged over rows."""
    if not values.size:
        return 0.0
    top = max(1, values.shape[1] // 100)
    ordered = np.sort(values, axis=1)
    whole = ordered.sum(axis=1)
    return float((ordered[:, -top:].sum(axis=1)[whole > 0] / whole[whole > 0]).mean()) if (whole > 0).any() else 0.0
