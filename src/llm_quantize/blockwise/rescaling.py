"""A block rescaled before its matrices are quantized: scales found, applied, and what they change written.

The scales of a block follow from the inputs of its matrices, as the quantized stream gives them, before any of them is
quantized; so they come out the same when a killed run comes back to an unfinished block. Of a finished block only the
changed floats are needed again, and those are in the artifact. The source's own stream is never rescaled: its inputs
are divided by s where the two are compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llm_quantize.architectures.rows import unit_ranges
from llm_quantize.architectures.scaling import ScaleGroup, scale_groups
from llm_quantize.artifacts.origin import source_hash
from llm_quantize.blockwise.inputs import collect
from llm_quantize.errors import NumericPolicyError
from llm_quantize.plan import MatrixPlan, TensorPlan, unit_key
from llm_quantize.streams.hidden import Activations
from llm_quantize.streams.network import Block, Tap
from llm_quantize.streams.passes import Pass
from llm_quantize.transforms.applying import apply_all, readers, settle
from llm_quantize.transforms.awq import Seen
from llm_quantize.transforms.table import Transform

if TYPE_CHECKING:
    from llm_quantize.blockwise.gram import Gram
    from llm_quantize.blockwise.run import Matrices

_STORED = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def held(matrices: Matrices, index: int) -> list[TensorPlan]:
    """The tensors of block ``index``, stored as floats, that the run writes because scales change them."""
    plan = matrices.target.plan
    names = {name for group in scale_groups(matrices.source, index) for name in group.tensors} if plan.held else set()
    return [plan.tensors[number] for number in sorted(plan.held) if plan.tensors[number].output.name in names]


def held_units(tensors: Sequence[TensorPlan]) -> Iterator[tuple[TensorPlan, tuple[int, int], str]]:
    """(tensor, rows, unit) of every part of them."""
    for tensor in tensors:
        for start, stop in unit_ranges(tensor.output.shape):
            yield tensor, (start, stop), unit_key(tensor.name, start, stop)


def restore(matrices: Matrices, tensors: Sequence[TensorPlan], block: Block) -> None:
    """Give a finished block the floats that the artifact holds."""
    for tensor in tensors:
        parts = [matrices.target.output.read(unit) for _, _, unit in held_units([tensor])]
        stored = torch.frombuffer(bytearray(b"".join(parts)), dtype=_STORED[tensor.qtype])
        block.replace(tensor.output.name, stored.reshape(tensor.output.shape).float())


def rescale(
    matrices: Matrices,
    index: int,
    block: Block,
    taps: Sequence[Tap],
    hidden: Activations,
    way: Pass,
    *,
    transform: Transform,
    feedback: bool,
    windows: int,
) -> dict[str, Tensor]:
    """Find and apply the scales of block ``index``: in ``matrices.changed``, in ``block``, and, for floats, in the
    artifact. ``feedback``: the codes will be chosen with error feedback; ``windows``: so many of ``hidden`` are
    calibrated on. Returns {tap: s (columns,)} of taps of a single matrix."""
    homes = {name: tap for tap in taps for name in tap.tensors}
    groups = [group for group in scale_groups(matrices.source, index) if _all_quantized(matrices, group, homes)]
    if not groups:
        _write(matrices, held(matrices, index))
        return {}
    weights = matrices.weights
    tensors = {name: weights.read(name) for group in groups for name in group.tensors}
    for name, values in tensors.items():
        _refuse_nonfinite(matrices, name, values)
    used = {homes[group.seen_at].name for group in groups}
    wanted = [tap for tap in taps if tap.name in used]
    grams = collect(way, wanted, hidden, block, None, windows=windows, samples=transform.samples)

    def find(number: int) -> tuple[int, Tensor]:
        group = groups[number]
        tap = homes[group.seen_at]
        return number, _scales(matrices, group, tap, tensors, grams, transform, feedback=feedback)

    found = dict(way.pool.each(find, range(len(groups))))
    scales = [found[number] for number in range(len(groups))]
    changed = apply_all(groups, scales, tensors)
    floats = {part.name for group in groups for part in (*group.divided, *group.multiplied) if part.float_stored}
    for name in floats:
        changed[name] = changed[name].to(tensors[name].dtype).float()
    for name, values in changed.items():
        matrices.changed[name] = values.numpy()
        block.replace(name, values)
    _write(matrices, held(matrices, index))
    single = [tap for tap in taps if tap.matrices == 1]
    return {
        tap.name: own
        for group, own in zip(groups, scales, strict=True)
        for tap in single
        if any(part.name in tap.tensors for part in group.multiplied)
    }


def _refuse_nonfinite(matrices: Matrices, name: str, values: Tensor) -> None:
    """Raise NumericPolicyError, naming the weight, before its NaN is met as one of an activation."""
    if bool(torch.isfinite(values).all()):
        return
    places = torch.nonzero(~torch.isfinite(values))
    raise NumericPolicyError(
        "a weight is NaN or infinite",
        file=matrices.policy.files.get(name),
        tensor=name,
        expected="finite weights",
        found=f"{len(places)} such values, the first at {places[0].tolist()}",
        remedy="check the source; --nonfinite=zero --overwrite replaces them by zero",
    )


def _all_quantized(matrices: Matrices, group: ScaleGroup, homes: dict[str, Tap]) -> bool:
    """Whether every matrix of the group is quantized by this run: one that is only copied cannot be changed."""
    planned = {piece.source for matrix in matrices.target.plan.matrices for piece in matrix.weight.pieces}
    written = {matrices.target.plan.tensors[number].output.name for number in matrices.target.plan.held}
    parts = (*group.divided, *group.multiplied)
    return group.seen_at in homes and all(part.name in (written if part.float_stored else planned) for part in parts)


def _scales(
    matrices: Matrices,
    group: ScaleGroup,
    tap: Tap,
    tensors: dict[str, Tensor],
    grams: dict[tuple[str, int], Gram],
    transform: Transform,
    *,
    feedback: bool,
) -> Tensor:
    matrix = tap.tensors[group.seen_at]
    if matrix is None:
        matrix = group.expert or 0
    gram = grams.get((tap.name, matrix))
    if gram is None:  # an expert that no token reached
        return torch.ones(group.columns)
    reader = _reader(matrices, group)
    kind = matrices.store.grid_type(reader.qtype)
    if kind is None:
        raise ValueError("scales are searched for number grids")
    weights = [weight.to(gram.hessian.device) for weight in readers(group, tensors)]
    spread = None if group.spread is None else torch.from_numpy(group.spread)
    seen = Seen(gram.hessian, gram.tokens, gram.rows, gram.largest, matrices.store.inputs(reader))
    found = transform.scales(weights, seen, kind, feedback=feedback, spread=spread)
    return settle(group, found.scales.cpu(), tensors)


def _reader(matrices: Matrices, group: ScaleGroup) -> MatrixPlan:
    """The first matrix that reads what the group scales: those of one group mostly share their grid."""
    homes = {piece.source: matrix for matrix in matrices.target.plan.matrices for piece in matrix.weight.pieces}
    return next(homes[part.name] for part in group.multiplied if part.name in homes)


def _write(matrices: Matrices, tensors: Sequence[TensorPlan]) -> None:
    output = matrices.target.output
    for tensor, (start, stop), unit in held_units(tensors):
        values = torch.from_numpy(matrices.present(tensor.output.name).reshape(-1, tensor.output.shape[-1])[start:stop])
        raw = values.to(_STORED[tensor.qtype]).contiguous().view(torch.uint8).numpy().reshape(-1).data
        output.write(tensor.span(start, stop), 0, raw)
        origin = source_hash(matrices.source.checkpoint, tensor.output, start, stop)
        facts = {"sha256": hashlib.sha256(raw).hexdigest(), "source_sha256": origin}
        output.record(unit, facts | (matrices.replaced(tensor.output) if start == 0 else {}))
