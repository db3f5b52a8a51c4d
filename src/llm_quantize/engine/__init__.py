"""Running units of work: ``run(work, jobs)`` gives results in any order, ``in_order`` in theirs. The local pool is the
only engine here."""

from llm_quantize.engine.local import in_order, run, stop_on_signals

__all__ = ["in_order", "run", "stop_on_signals"]
