"""How long the parts of a comparison take beside one another, in floating-point operations: for its progress alone."""

from __future__ import annotations

from collections.abc import Sequence

from llm_quantize.architectures.rows import weights_of
from llm_quantize.blockwise.effort import FINISHED, ROUNDED, collecting, forward, writing
from llm_quantize.calibration import choose
from llm_quantize.evaluation.speed import NEW_TOKENS, PROMPT_TOKENS, REPEATS
from llm_quantize.measures.perplexity import Tokens
from llm_quantize.models.opening import Source
from llm_quantize.options import Options
from llm_quantize.pipeline import plan_source

WRITTEN = 10.0
"""Operations for a weight and a token that is written alone: memory is what it waits for."""
STARTED = 2e11
"""Operations in the time in which a runtime, or torch, starts."""
TOKENS = 64  # of a sample


def making(source: Source, format: str, levels: Sequence[str], options: Options) -> float:
    """All levels of a format. Raises what planning them raises."""
    importance = choose.foresee(source, format, levels, options)
    plans = plan_source(source, format, levels=levels, name=None, options=options, importance=importance)
    written = sum(writing(plan) for plan in plans)
    return collecting(source, importance, options) + written


def measuring(source: Source, windows: Tokens, variants: int) -> float:
    """The divergence of so many variants in one pass."""
    return STARTED + (1 + variants) * forward(_weights(source), windows.size)


def on_the_bench(source: Source, variants: int, prompts: int, *, runs: bool) -> list[float]:
    """What compare/bench.py does with each variant, in its order: errors of each, speeds, the source's text, theirs."""
    weights = _weights(source)
    errors = [4 * ROUNDED * weights] * variants
    if not runs:
        return [*errors, *([0.0] * (2 * variants + 1))]
    timed = forward(weights, PROMPT_TOKENS) + WRITTEN * weights * NEW_TOKENS
    speeds = [STARTED + (1 + REPEATS) * timed] * variants
    text = STARTED + WRITTEN * weights * prompts * TOKENS
    return [*errors, *speeds, 2 * text, *([text] * variants)]


def telling(source: Source) -> float:
    """The hash of all that the source holds."""
    return FINISHED * sum(header.file_size for header in source.checkpoint.headers)


def _weights(source: Source) -> int:
    return sum(weights_of(output.shape) for output in source.tensors.outputs)
