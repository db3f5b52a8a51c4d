"""Error feedback from Hessians that were collected before: no text is read and no model is run.

What was collected are the inputs of the source model, so nothing makes up for the errors of earlier layers; in return
one collection serves every format and level.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from llm_quantize import events
from llm_quantize.blockwise.gram import Gram
from llm_quantize.blockwise.run import Matrices, matrix_rows
from llm_quantize.blockwise.segments import column_orders, segments
from llm_quantize.blockwise.solver import Job, Solver
from llm_quantize.blockwise.stages import routers
from llm_quantize.errors import UnsupportedError
from llm_quantize.events import EventSink
from llm_quantize.io.statistics_file import StatisticsFile, StoredTap, read_statistics
from llm_quantize.options import MethodOptions
from llm_quantize.streams.pool import Pool
from llm_quantize.streams.taps import Tap


def solve_known(
    matrices: Matrices, path: Path, pool: Pool, options: MethodOptions, device: str, on_event: EventSink
) -> None:
    """Quantize every matrix that is not done with the Hessians in the statistics file ``path``.

    Raises UsageError where it holds none, UnsupportedError for a matrix that it says nothing of, and what reading does.
    """
    chosen = routers(matrices.source.tensors.outputs)
    format = matrices.target.plan.format
    method, stages = options.method_of(format), options.stages(format)
    solver = Solver(method, matrices.store, matrices.rows, stages, pool, device, chosen)
    planned = [matrix for matrix in matrices.target.plan.matrices if matrix.seen]
    todo = {matrix.name: matrix for matrix in planned if not matrices.done(matrix)}
    total = sum(matrix_rows(matrix) * matrix.weight.shape[-1] for matrix in todo.values())
    done = 0
    with read_statistics(path) as statistics:
        blocks = [[tap_of(tap) for tap in taps] for taps in statistics.blocks()]
        homes = {name: index for index, taps in enumerate(blocks) for tap in taps for name in tap.tensors}
        for index, taps in enumerate(blocks):
            members = []
            for matrix in [m for m in planned if homes.get(m.weight.pieces[0].source, 0) == index]:
                seen = segments(matrices.source.checkpoint, matrix.weight, taps)
                if seen is None:
                    raise UnsupportedError(
                        "the statistics say nothing of the inputs of this matrix",
                        file=path,
                        tensor=matrix.name,
                        remedy="collect them again with this version, or leave --statistics out",
                    )
                members.append((matrix, seen))
            jobs = [Job(matrix, seen) for matrix, seen in members if matrix.name in todo]
            orders = column_orders((matrix.weight, seen) for matrix, seen in members)
            grams = {
                (tap.name, matrix): gram_of(statistics, tap, matrix, device, orders.get(tap.name))
                for tap in (taps if jobs else [])
                for matrix in range(tap.matrices)
                if statistics.counts(tap.name)[matrix]
            }
            solver.stage(jobs, grams, taps, members)
            for job in jobs:
                matrices.write(job.matrix, solver.join(job), job.summary())
                done += matrix_rows(job.matrix) * job.matrix.weight.shape[-1]
                on_event(events.Progress(done=done, total=total))


def tap_of(stored: StoredTap) -> Tap:
    """A tap as it was collected."""
    return Tap(stored.name, stored.columns, stored.matrices, stored.tensors)


def gram_of(
    statistics: StatisticsFile, tap: Tap, matrix: int, device: str, order: npt.NDArray[np.int64] | None = None
) -> Gram:
    """What a matrix of a tap saw, its columns in ``order``. Raises UsageError where no Hessians were collected."""
    gram = Gram(tap.columns, cross=False, device=device)
    hessian = statistics.hessian(tap.name, matrix)
    if order is not None:
        hessian = np.ascontiguousarray(hessian[np.ix_(order, order)])
    gram.hessian = torch.from_numpy(hessian).to(device)
    gram.tokens = int(statistics.counts(tap.name)[matrix])
    return gram
