"""The error of every tensor of an artifact against its source, worst first, in bounded memory.

    relative   ||Q - W|| / ||W||, root of summed squares (Frobenius)
    weighted   the same with each column's square error times its importance, sqrt(sum h e^2 / sum h w^2): to first
               order how much of the layer's output is noise; only where statistics have a row for the tensor
    largest    max |Q - W|, in units of the tensor's RMS weight

Tensors are compared as the artifact stores them, row ranges at a time; sums are float64 in fixed order, so that the
figures do not depend on the number of threads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_quantize import events, memory
from llm_quantize.architectures.base import OutputTensor
from llm_quantize.architectures.rows import read_output_rows, to_float32, unit_ranges, weights_of
from llm_quantize.artifacts.decoded import Decoded, Stored
from llm_quantize.engine import in_order, stop_on_signals
from llm_quantize.errors import UsageError
from llm_quantize.events import EventSink, ignore
from llm_quantize.models.opening import Source

_LAYER = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")

Importance = Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class TensorLoss:
    """One tensor of the artifact, under its name there. ``layer`` None: not part of a layer; ``role``: the GGUF name
    without layer and suffix ("attn_q", "ffn_down", "token_embd"). ``nonfinite``: values that are NaN or infinite in one
    of the two and are in no sum. ``relative``, ``weighted`` and ``largest`` as above; ``weighted`` None: no statistics
    for it."""

    name: str
    layer: int | None
    role: str
    qtype: str
    weights: int
    bits_per_weight: float
    relative: float
    weighted: float | None
    largest: float
    nonfinite: int

    def to_dict(self) -> dict[str, Any]:
        """The same facts, JSON-ready."""
        return asdict(self)


def tensor_errors(
    source: Source,
    artifact: Decoded,
    *,
    importance: Importance | None = None,
    threads: int | None = None,
    on_event: EventSink = ignore,
) -> list[TensorLoss]:
    """Every tensor of ``artifact`` that comes from the source's weights, the worst first: by ``weighted`` where all
    that can have it do, else by ``relative``.

    ``importance``: {GGUF name: float32 (matrices, columns)}, as ``Statistics.importance`` gives it. ``threads``: None
    means all CPUs; each holds some MB. Raises UsageError (importance of another shape), StoppedError after a signal,
    and what reading raises.
    """
    known = {o.name: artifact.stored(o) for o in source.tensors.outputs if o.constant is None}
    held = {name: stored for name, stored in known.items() if stored is not None}
    outputs = [output for output in source.tensors.outputs if output.name in held]
    rows = {output.name: _importance_of(output, importance) for output in outputs}
    jobs = [(output, start, stop) for output in outputs for start, stop in unit_ranges(output.shape)]
    total, done = sum(weights_of(output.shape) for output in outputs), 0
    sums = {output.name: _Sums() for output in outputs}
    with stop_on_signals() as asked:
        work = partial(_compare, source, artifact, rows)
        results = in_order(work, jobs, threads=threads or memory.available_cpus(), stop=asked, resumable=None)
        for (output, start, stop), found in zip(jobs, results, strict=True):
            sums[output.name].add(found)
            done += (stop - start) * (output.shape[-1] if output.shape else 1)
            on_event(events.Measure(done=done, total=total))
    losses = [_loss(output, held[output.name], sums[output.name]) for output in outputs]
    key = _by_weighted if any(loss.weighted is not None for loss in losses) else _by_relative
    return sorted(losses, key=key, reverse=True)


@dataclass
class _Sums:
    error: float = 0.0
    norm: float = 0.0
    weighted_error: float = 0.0
    weighted_norm: float = 0.0
    largest: float = 0.0
    nonfinite: int = 0
    has_weighted: bool = False

    def add(self, other: _Sums) -> None:
        self.error += other.error
        self.norm += other.norm
        self.weighted_error += other.weighted_error
        self.weighted_norm += other.weighted_norm
        self.largest = max(self.largest, other.largest)
        self.nonfinite += other.nonfinite
        self.has_weighted |= other.has_weighted


def _importance_of(output: OutputTensor, importance: Importance | None) -> npt.NDArray[np.float64] | None:
    found = None if importance is None else importance.get(output.name)
    if found is None:
        return None
    matrices = output.shape[0] if len(output.shape) == 3 else 1
    if found.shape != (matrices, output.shape[-1]):
        raise UsageError(
            "the statistics are of another model: they do not fit this tensor",
            tensor=output.name,
            expected=f"importance of shape {(matrices, output.shape[-1])}",
            found=found.shape,
        )
    return found.astype(np.float64)


def _compare(
    source: Source,
    artifact: Decoded,
    importance: Mapping[str, npt.NDArray[np.float64] | None],
    job: tuple[OutputTensor, int, int],
) -> _Sums:
    output, start, stop = job
    rows = importance[output.name]
    per_matrix = output.shape[-2] if len(output.shape) > 1 else 1
    sums = _Sums(has_weighted=rows is not None)
    for first, values in artifact.stored_rows(output.name, start, stop):
        exact = to_float32(read_output_rows(source.checkpoint, output, first, first + len(values)))
        wanted = exact.astype(np.float64)
        with np.errstate(invalid="ignore"):
            off = values - wanted
        finite = np.isfinite(off)
        lost = off.size - int(np.count_nonzero(finite))
        if lost:
            sums.nonfinite += lost
            off, wanted = np.where(finite, off, 0), np.where(finite, wanted, 0)
        square, norm = (off * off).sum(axis=0), (wanted * wanted).sum(axis=0)
        sums.error += float(square.sum())
        sums.norm += float(norm.sum())
        sums.largest = max(sums.largest, float(np.abs(off).max(initial=0.0)))
        if rows is not None:
            sums.weighted_error += float(square @ rows[first // per_matrix])
            sums.weighted_norm += float(norm @ rows[first // per_matrix])
    return sums


def _loss(output: OutputTensor, stored: Stored, sums: _Sums) -> TensorLoss:
    weights = weights_of(output.shape)
    layer, role = place(output.name)
    return TensorLoss(
        name=stored.name,
        layer=layer,
        role=role,
        qtype=stored.qtype,
        weights=weights,
        bits_per_weight=8 * stored.nbytes / weights,
        relative=_root_ratio(sums.error, sums.norm),
        weighted=_root_ratio(sums.weighted_error, sums.weighted_norm) if sums.has_weighted else None,
        largest=sums.largest / math.sqrt(sums.norm / weights) if sums.norm > 0 else sums.largest,
        nonfinite=sums.nonfinite,
    )


def _root_ratio(error: float, norm: float) -> float:
    """sqrt(error / norm); where the source is all zeros, 0 for no error and infinity for any."""
    if norm > 0:
        return math.sqrt(error / norm)
    return math.inf if error > 0 else 0.0


def place(name: str) -> tuple[int | None, str]:
    """(layer, role) of a GGUF tensor: (3, "attn_q") of "blk.3.attn_q.weight", (None, "output") of "output.weight"; a
    bias keeps its suffix."""
    found = _LAYER.fullmatch(name)
    if found is None:
        return None, name.removesuffix(".weight")
    return int(found[1]), found[2] if found[3] == "weight" else f"{found[2]}.bias"


def _by_weighted(loss: TensorLoss) -> tuple[float, float]:
    return (-1.0 if loss.weighted is None else loss.weighted, loss.relative)


def _by_relative(loss: TensorLoss) -> tuple[float, float]:
    return (loss.relative, loss.largest)


def worst(losses: Sequence[TensorLoss], count: int) -> list[TensorLoss]:
    """The first ``count`` that are not exact."""
    return [loss for loss in losses if loss.relative > 0 or loss.nonfinite][:count]
