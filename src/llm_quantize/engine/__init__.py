"""Running units of work: ``run(work, jobs)`` gives results in any order. The local pool is the only engine here."""

from llm_quantize.engine.local import run, stop_on_signals

__all__ = ["run", "stop_on_signals"]
