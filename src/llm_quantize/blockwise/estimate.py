"""What a calibrated run will take, from sizes alone and without torch: text, memory, arithmetic.

A plan asks with the sizes that headers tell, the run again with those of its network, by the same formulas.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING

from llm_quantize.architectures.base import OutputTensor
from llm_quantize.architectures.rows import weights_of
from llm_quantize.blockwise.refining_sizes import (
    HELD_BYTES,
    KEPT_FOR_BACK,
    PACES,
    TRIAL,
    WEIGHT_BYTES,
    refinement_windows,
)
from llm_quantize.blockwise.stages import routers, stages
from llm_quantize.calibration.statistics import collecting_sizes
from llm_quantize.formats.base import Importance
from llm_quantize.formats.keeping import holding_of
from llm_quantize.formats.table import FORMATS
from llm_quantize.io.statistics_layout import TapLike
from llm_quantize.memory import TORCH_BYTES, Sizes, foreseen
from llm_quantize.methods.gptq_options import held_back
from llm_quantize.methods.sizes import WORKING_BYTES, factor_bytes, solve_bytes
from llm_quantize.models.opening import Source
from llm_quantize.options import MethodOptions
from llm_quantize.plan import ArtifactPlan, Cost
from llm_quantize.qtypes.rates import WORD_SECONDS, rounding_seconds
from llm_quantize.streams.sizes import NetworkSizes, block_matrices, from_headers

if TYPE_CHECKING:
    from llm_quantize.options import Options

CHUNK_TOKENS = 8192
"""Tokens whose inputs are held together; a constant, as sums in another order would be other sums."""

HELD_OUT_WINDOWS = 4
"""Further windows of the text that go along, are never calibrated on, and tell at the end what was lost."""

TORCH_ALONE_BYTES = 240 << 20


FEEDBACK_RATE = 120e9
"""Floating-point operations in a CPU second of error feedback: 131e9 in the run of docs/concepts/cost.md, where the
processor multiplies bfloat16 quickly."""

COLLECTING_RATE = 100e9
"""The same where importance is collected: 173e9 in benchmarks/results/calibration.json, where the processor multiplies
bfloat16 quickly, half of that or less elsewhere."""


STARTING = 2.0
"""CPU seconds until torch is there; as many again until transformers is."""

FITTING_RATE = 10e6
"""Weights per CPU second whose grids are fitted and that are rounded to them, in torch: 34e6 took 3.3 s."""

KEEPING_RATE = 125e6
"""Weights per CPU second whose codes are taken over, decoded and compared: benchmarks/results/convert.json."""

REFINING = 1.0
"""How much longer an operation of a gradient step takes than one of error feedback (docs/concepts/methods.md)."""

RESCALING = 1.5
"""How much longer error feedback takes where channels are rescaled first (docs/concepts/methods.md)."""


def estimate(
    source: Source, artifact: ArtifactPlan, options: Options, importance: Importance | None
) -> tuple[tuple[Sizes, ...], Cost]:
    """What making ``artifact`` will hold, phase by phase, beside the rounding of single tensors; and what it costs.

    ``importance``: what the run has, or will have. With statistics, whose Hessians are known, no text is run.
    """
    fed_back = options.method.calibrates(artifact.format)
    rounding = _rounding(artifact, weighted=importance is not None, fitting=not fed_back)
    if options.method.method_of(artifact.format).keeps:
        rounding = _keeping(source, artifact)
    if importance is None or (fed_back and not artifact.observed):
        return rounding_sizes(artifact), Cost(rounding)
    if fed_back:
        return _fed_back(source, artifact, options, importance, rounding)
    if importance.sha256:
        return rounding_sizes(artifact), Cost(rounding)
    chosen, length = options.calibration, _length(source, options)
    sizes = collecting_sizes(
        from_headers(source, chosen.device), chosen.collect, (importance.chunks, length), device=chosen.device
    )
    tokens = _tokens(importance, length)
    cost = Cost(
        rounding,
        windows=importance.chunks,
        length=length,
        tokens=tokens,
        collecting=_seconds(_forward(source, tokens), COLLECTING_RATE, chosen.device),
        memory=foreseen(sizes, threads=options.threads, max_ram=options.max_ram),
    )
    return (*rounding_sizes(artifact), sizes), cost


def _fed_back(
    source: Source, artifact: ArtifactPlan, options: Options, importance: Importance, rounding: float
) -> tuple[tuple[Sizes, ...], Cost]:
    """``estimate`` where errors are fed back."""
    method, length, device = options.method, _length(source, options), options.calibration.device
    paired = method.pairs(artifact.format)
    network = from_headers(source, device)
    known = options.statistics is not None
    if known:
        sizes = known_sizes(network, artifact)
    else:
        together = (importance.chunks + (HELD_OUT_WINDOWS if paired else 0), length)
        chosen = routers(source.tensors.outputs)
        sizes = feedback_sizes(network, artifact, method, together, chosen, paired=paired, device=device)
    tokens = 0 if known else _tokens(importance, length)
    operations = _operations(source, tokens, length, method, paired=paired)
    operations *= RESCALING if method.transform_of(artifact.format).passes else 1.0
    words = sum(weights_of(one.weight.shape) * WORD_SECONDS.get(one.qtype, 0.0) for one in artifact.matrices) / 1e6
    cost = Cost(
        rounding,
        windows=0 if known else importance.chunks,
        length=length,
        tokens=tokens,
        feedback=_seconds(operations + words * FEEDBACK_RATE, FEEDBACK_RATE, device),
        memory=foreseen(sizes, threads=options.threads, max_ram=options.max_ram),
    )
    return (sizes,), cost


def forward_seconds(source: Source, tokens: float) -> float:
    """CPU seconds in which ``tokens`` go through all blocks once, without what torch takes to start."""
    return _forward(source, tokens) / COLLECTING_RATE


def _forward(source: Source, tokens: float) -> float:
    """Floating-point operations of ``tokens`` in the matrices of all blocks."""
    return 2.0 * sum(_used_weights(source, output) for output in block_matrices(source.tensors.outputs)) * tokens


def _length(source: Source, options: Options) -> int:
    return min(options.calibration.length, source.architecture.hyper.context_length)


def _tokens(importance: Importance, length: int) -> int:
    """How many tokens the text of ``importance`` probably has, in at most so many windows."""
    return min(importance.chunks * length, importance.tokens or importance.chunks * length)


def _seconds(operations: float, rate: float, device: str) -> float | None:
    """CPU seconds, those that torch takes to start included; None on a graphics processor, whose speed is not known."""
    return 2 * STARTING + operations / rate if device == "cpu" else None


def _rounding(artifact: ArtifactPlan, *, weighted: bool, fitting: bool) -> float:
    """CPU seconds to round every tensor by itself, and (``fitting``) every matrix of a directory on a fitted grid."""
    rounded = sum(
        rounding_seconds(weights_of(tensor.output.shape), tensor.qtype, weighted=weighted)
        for tensor in artifact.tensors
    )
    fitted = sum(weights_of(matrix.weight.shape) for matrix in artifact.matrices) if fitting else 0
    return rounded + (STARTING + fitted / FITTING_RATE if fitted else 0.0)


def _keeping(source: Source, artifact: ArtifactPlan) -> float:
    """CPU seconds where matrices keep their codes; those that cannot are looked at first, and rounded then."""
    single = sum(
        rounding_seconds(weights_of(tensor.output.shape), tensor.qtype, weighted=False)
        for tensor in (artifact.tensors[index] for index in artifact.rounded())
    )
    kept = anew = 0
    for matrix in artifact.matrices:
        kept += weights_of(matrix.weight.shape)
        held = holding_of(source, matrix.weight, matrix.qtype, act_order=FORMATS[artifact.format].act_order)
        anew += 0 if held else weights_of(matrix.weight.shape)
    return single + (STARTING + kept / KEEPING_RATE + anew / FITTING_RATE if kept else 0.0)


def _used_weights(source: Source, output: OutputTensor) -> float:
    """Weights of ``output`` that a token is multiplied with: of stacked experts those that it uses."""
    hyper = source.architecture.hyper
    share = hyper.n_expert_used / hyper.n_expert if len(output.shape) > 2 and hyper.n_expert else 1.0
    return weights_of(output.shape) * share


def feedback_sizes(
    network: NetworkSizes,
    artifact: ArtifactPlan,
    options: MethodOptions,
    windows: tuple[int, int],
    chosen: Collection[str],
    *,
    paired: bool,
    device: str,
) -> Sizes:
    """What a run through the model holds: ``windows`` (number, length); ``paired``: the source's stream goes along.

    Windows are captured while sums grow, then a factor is made and rows are solved, stage after stage.
    """
    number, length = windows
    tokens = max(CHUNK_TOKENS, length)
    transform = options.transform_of(artifact.format)
    alone, samples = options.inputs == "sequential" and not transform.passes, transform.samples
    corrects = options.stages(artifact.format).corrects
    back = held_back(number - HELD_OUT_WINDOWS) if corrects and options.gptq.correction is None else 0
    most, seen = (0, 0), 0
    for taps in network.taps:
        for stage in stages(taps, {tap.name for tap in taps}, chosen, sequential=alone):
            sums = sum(tap.matrices * gram_bytes(tap.columns, cross=paired and tap.matrices == 1) for tap in stage)
            sums += sum(4 * tap.matrices * samples_of(samples, tap.matrices) * tap.columns for tap in stage)
            sums += sum(2 * back * length * tap.columns * network.itemsize for tap in stage if tap.matrices == 1)
            captured = sum(_used(network, tap) * tokens * tap.columns * network.itemsize for tap in stage)
            most = max(most, (sums, captured * (1 + paired)), key=sum)
        seen = max(seen, sum(number * length * tap.columns * network.itemsize for tap in taps if tap.matrices == 1))
    widest = _widest(network)
    factor = factor_bytes(widest, corrects)
    each = max(network.workspace(length), solve_bytes(widest))
    held = moving = 0
    if options.refinement:
        weights = network.block // network.itemsize
        held, moving = HELD_BYTES * weights, WEIGHT_BYTES * weights
        each = max(each, KEPT_FOR_BACK * network.workspace(length) + 2 * network.block)
    return Sizes(
        libraries=TORCH_BYTES,
        ends=max(network.embedding, 2 * network.head),
        block=network.block + held,
        sums=most[0],
        captured=max(most[1], moving - most[0] - factor),
        factor=factor,
        values=_values(artifact),
        working=WORKING_BYTES,
        each=each + network.scratch,
        hidden=network.hidden(number, length),
        copies=2 if options.inputs != "source" else 1,
        inputs=seen if paired else 0,
        device=device,
    )


def known_sizes(network: NetworkSizes, artifact: ArtifactPlan) -> Sizes:
    """What solving with the Hessians of a file holds: those of a block, and no model."""
    widest = _widest(network)
    grams = (sum(tap.matrices * gram_bytes(tap.columns, cross=False) for tap in taps) for taps in network.taps)
    return Sizes(
        libraries=TORCH_BYTES,
        sums=max(grams, default=0),
        factor=factor_bytes(widest),
        values=_values(artifact),
        working=WORKING_BYTES,
        each=solve_bytes(widest) + network.scratch,
    )


def rounding_sizes(artifact: ArtifactPlan) -> tuple[Sizes, ...]:
    """What rounding matrices one after the other holds, without text: torch, and the largest matrix as codes."""
    if not artifact.matrices:
        return ()
    values, each = _values(artifact), artifact.source_scratch
    return (Sizes(libraries=TORCH_ALONE_BYTES, margin=0, values=values, each=each),)


def samples_of(samples: int, matrices: int) -> int:
    """How many inputs are kept of each matrix of a tap where ``samples`` are asked for: of experts an eighth."""
    return samples if matrices == 1 else samples // 8


def gram_bytes(columns: int, *, cross: bool) -> int:
    """Bytes that a ``gram.Gram`` of so many columns holds, with what ``finish`` needs for a moment."""
    return 4 * columns * columns * (3 + cross)


def _values(artifact: ArtifactPlan) -> int:
    """The largest matrix in float32 and as codes."""
    return 5 * max((weights_of(matrix.weight.shape) for matrix in artifact.matrices), default=0)


def _widest(network: NetworkSizes) -> int:
    return max((tap.columns for taps in network.taps for tap in taps), default=0)


def _used(network: NetworkSizes, tap: TapLike) -> int:
    """How often a token is among the inputs of a tap: once for every expert that it uses."""
    return network.hyper.n_expert_used if tap.matrices > 1 else 1


def _operations(source: Source, tokens: int, length: int, options: MethodOptions, *, paired: bool) -> float:
    """Forward passes, sums of products, and about eight products of each matrix with its Hessian."""
    outputs = list(block_matrices(source.tensors.outputs))
    refined = 0.0
    if options.refinement and (windows := max(1, tokens // length)):
        trials = min(TRIAL, options.refinement) * len(PACES)  # at worst
        through = refinement_windows(windows, length, options.refinement + trials)
        refined = REFINING * _forward(source, through * length)
    own = {"sequential": 1.2 if paired else 2.2, "block": 1.75, "source": 1.0}
    passes = own[options.inputs] + paired
    forward = _forward(source, tokens) * passes
    inputs = {(output.name.split(".")[1], output.shape[-1]): math.prod(output.shape[:-2]) for output in outputs}
    used = max(1, source.architecture.hyper.n_expert_used)
    products = factors = 0.0
    for (_, columns), matrices in inputs.items():
        products += columns**2 * tokens * (used if matrices > 1 else 1) * (1.25 + 2 * paired)
        factors += 3.0 * columns**3 * matrices
    solved = sum(16.0 * weights_of(output.shape) * output.shape[-1] for output in outputs)
    return forward + products + solved + factors + refined
