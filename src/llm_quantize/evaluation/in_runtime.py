"""Artifacts against one of them, all in their runtime: what can be measured without torch.

The figures hold the runtime's own arithmetic on both sides; ``measure_quality`` leaves it out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from llm_quantize.engine import in_order, stop_on_signals
from llm_quantize.errors import UsageError
from llm_quantize.measures.divergence import Comparison, Divergence, Predicted
from llm_quantize.measures.perplexity import Logits, Tokens, scored
from llm_quantize.memory import available_cpus
from llm_quantize.runtimes import open_model
from llm_quantize.runtimes.base import OpenModel


def measure_in_runtime(
    reference: str | Path,
    candidates: Sequence[str | Path],
    windows: Tokens,
    *,
    threads: int | None = None,
    on_window: Callable[[int, int], None] | None = None,
) -> list[Divergence]:
    """Run artifacts over ``windows`` (n, length) of token ids and compare each candidate to ``reference``.

    All are open together, their weights mapped, and the reference runs once; the models share ``threads`` (None: every
    CPU) by running side by side. ``on_window(done, total)`` is called after each window. Raises UsageError without a
    candidate, StoppedError after a signal, and what ``open_model`` raises.
    """
    if not candidates:
        raise UsageError("no file to compare with the reference")
    total = threads or available_cpus()
    # One thread in each model does the most work per CPU: a runtime's threads wait for one another many times a layer.
    each = max(1, total // (1 + len(candidates)))
    with ExitStack() as stack, stop_on_signals() as stop:
        models = [
            stack.enter_context(open_model(path, context=windows.shape[1], threads=each))
            for path in (reference, *candidates)
        ]
        comparisons = [Comparison() for _ in candidates]
        for done, window in enumerate(windows, start=1):
            ids = window.tolist()
            where, targets = scored(window)
            first, *others = in_order(partial(_logits, ids), models, threads=total, stop=stop, resumable=None)
            base = Predicted.of(first[where])
            for comparison, logits in zip(comparisons, others, strict=True):
                comparison.add_predictions(base, logits[where], targets)
            if on_window is not None:
                on_window(done, len(windows))
        return [comparison.result() for comparison in comparisons]


def _logits(ids: list[int], model: OpenModel) -> Logits:
    return model.logits(ids)
