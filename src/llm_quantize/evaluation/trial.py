"""Recipes tried before one is written: what each would lose on text that chose none of them, without a file.

Every candidate is a stream beside the source's; its matrices are held at their types as they are read, block by block
(evaluation/streamed.py carries the streams). Texts are the same for all, so differences are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from llm_quantize.evaluation.reference import Reference, scored_positions
from llm_quantize.evaluation.sensitivity import Candidate
from llm_quantize.evaluation.streamed import Evaluation, Stream
from llm_quantize.events import EventSink
from llm_quantize.measures.perplexity import Tokens
from llm_quantize.models.opening import Source
from llm_quantize.streams.hidden import Activations
from llm_quantize.streams.network import Network
from llm_quantize.streams.pool import Pool
from llm_quantize.streams.replaced import MixedWeights
from llm_quantize.streams.weights import CheckpointWeights

Hold = Callable[[Candidate], Mapping[str, torch.Tensor]]


def try_recipes(
    source: Source,
    network: Network,
    windows: Tokens,
    recipes: Sequence[Sequence[Candidate]],
    hold: Hold,
    pool: Pool,
    scratch: Path | None,
    on_event: EventSink,
) -> list[float]:
    """The mean KLD, nats, of each of ``recipes`` over ``windows`` (n, length). ``hold``: {tensor of the
    source: float32} with a candidate at its type; ``scratch``: where hidden states lie in files, None: in memory.

    Raises NumericPolicyError for states or logits that are not finite, StoppedError after a signal.
    """
    plain = CheckpointWeights(source.checkpoint)
    with ExitStack() as stack:

        def states(count: int, length: int) -> Activations:
            return stack.enter_context(Activations(count, length, network.width, torch.float32, directory=scratch))

        path, (count, length) = source.checkpoint.directory, windows.shape
        reference = Reference(path, plain, states(count, scored_positions(windows)), states(0, length))
        steps = count * ((1 + len(recipes)) * network.n_blocks + 2 * len(recipes))
        work = Evaluation(network, windows, pool, steps, on_event, head=1)
        with Activations(count, length, network.width, torch.float32, directory=scratch) as whole:
            work.refer(plain, whole, states(0, length), reference)
        streams = []
        for recipe in recipes:
            mixed = MixedWeights(plain, _held(recipe, hold))
            streams.append(Stream(path, mixed, mixed, states(count, length)))
        work.through_blocks(streams)
        for stream in streams:
            work.through_head(reference, [stream])
    return [stream.comparison.result().kld for stream in streams]


def _held(recipe: Sequence[Candidate], hold: Hold) -> dict[str, list[Callable[[], Mapping[str, torch.Tensor]]]]:
    """{tensor of the source: what puts values into it}."""
    found: dict[str, list[Callable[[], Mapping[str, torch.Tensor]]]] = {}
    for candidate in recipe:
        for name in dict.fromkeys(piece.source for output in candidate.outputs for piece in output.pieces):
            found.setdefault(name, []).append(partial(hold, candidate))
    return found
