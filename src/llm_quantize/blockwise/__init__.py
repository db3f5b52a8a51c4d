"""Quantizing with calibration: block after block, each matrix against the inputs that it will really be given.

Here is the door: ``solve_matrices``; torch is imported behind it.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from llm_quantize import events
from llm_quantize.events import EventSink
from llm_quantize.io.leftovers import hidden_bytes
from llm_quantize.plan import ARITHMETIC, CARD_UNIT

if TYPE_CHECKING:
    from llm_quantize.artifacts.preflight import Preflight
    from llm_quantize.artifacts.rounding import Policy, Target
    from llm_quantize.calibration.choose import Chosen
    from llm_quantize.models.opening import Source
    from llm_quantize.options import Options


def solve_matrices(
    source: Source,
    target: Target,
    policy: Policy,
    importance: Chosen | None,
    options: Options,
    fitted: Preflight,
    stop: threading.Event,
    on_event: EventSink,
) -> None:
    """Quantize every matrix of ``target`` that is not done, with the text that is its importance; with none: with the
    Hessians of the statistics that ``options`` name, or by rounding alone.

    Everything else of the artifact must be written already. Raises MissingExtraError without torch, ResourceError
    before any work where memory or disk do not suffice, NumericPolicyError for values that are not finite,
    StoppedError after a signal: what is finished is kept.
    """
    from llm_quantize.blockwise.from_statistics import solve_known
    from llm_quantize.blockwise.plainly import round_matrices
    from llm_quantize.blockwise.run import Blocks, Matrices
    from llm_quantize.calibration.choose import Text
    from llm_quantize.formats.table import FORMATS
    from llm_quantize.streams.pool import Pool

    plan, method = target.plan, options.method
    paired = method.pairs(plan.format)
    matrices = Matrices(source, target, FORMATS[plan.format].store(plan), policy)
    if not isinstance(importance, Text) or not plan.observed:
        pool = Pool(fitted.threads, stop, resumable=options.checkpoints)
        if options.statistics is not None and method.calibrates(plan.format) and plan.observed:
            round_matrices(matrices, pool, method, on_event, seen=False)
            solve_known(matrices, options.statistics, pool, method, options.calibration.device, on_event)
        else:
            round_matrices(matrices, pool, method, on_event)
        return
    windows = importance.windows
    written = {CARD_UNIT, *target.output.records}
    if target.output.notes.get("measured") is not None and written.issuperset(plan.units()):
        return
    import numpy as np
    import torch

    from llm_quantize import memory
    from llm_quantize.artifacts.preflight import check_disk
    from llm_quantize.artifacts.recheck import note_sources
    from llm_quantize.blockwise.estimate import HELD_OUT_WINDOWS, feedback_sizes
    from llm_quantize.blockwise.stages import routers
    from llm_quantize.streams.network import open_network
    from llm_quantize.streams.sizes import from_network

    device = options.calibration.device
    note_sources(target, source.checkpoint)
    on_event(events.Stage("build the network"))
    network = open_network(source, dtype=plan.identity[ARITHMETIC], device=device)
    _note_processor(target, on_event)
    further = windows.draw(windows.samples, HELD_OUT_WINDOWS if paired else 0)
    ids = torch.from_numpy(np.concatenate([windows.ids, further]) if len(further) else windows.ids)
    need = feedback_sizes(
        from_network(source, network, [network.taps(index) for index in range(network.n_blocks)]),
        plan,
        method,
        (ids.shape[0], ids.shape[1]),
        routers(source.tensors.outputs),
        paired=paired,
        device=device,
    )
    found = memory.fit(need, threads=fitted.threads, max_ram=options.max_ram, before=fitted.before)
    if found.disk_bytes:
        check_disk(
            target.output.target.parent,
            found.disk_bytes,
            held=0 if found.in_memory else hidden_bytes(target.output.target),
            remedy="choose another directory with -o, or take fewer --calibration-samples",
        )
    pool = Pool(found.threads, stop, resumable=options.checkpoints)
    round_matrices(matrices, pool, method, on_event, seen=False)
    Blocks(matrices, network, ids, len(windows.ids), method, found, pool, on_event).run()


def _note_processor(target: Target, on_event: EventSink) -> None:
    """Remember whose sums these are, and say so where those of an earlier run were another's."""
    import torch

    now = f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"
    begun = target.output.notes.get("processor", now)
    if begun != now:
        text = f"{target.output.target.name} was begun with {begun} and goes on with {now}: it will be as good"
        on_event(events.Caution(f"{text}, but its bytes may be neither's own"))
    target.output.note({"processor": now})
