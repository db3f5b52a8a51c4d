"""Matrices rounded without knowing their inputs: all of them, or those that nothing observes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_quantize import events
from llm_quantize.architectures.rows import matrix_shape
from llm_quantize.blockwise.keeping import keep
from llm_quantize.blockwise.segments import Segment
from llm_quantize.blockwise.solver import Job, Solver
from llm_quantize.events import EventSink
from llm_quantize.options import MethodOptions
from llm_quantize.plan import MatrixPlan
from llm_quantize.streams.pool import Pool

if TYPE_CHECKING:
    from llm_quantize.blockwise.run import Matrices


def round_matrices(
    matrices: Matrices, pool: Pool, options: MethodOptions, on_event: EventSink, *, seen: bool = True
) -> None:
    """Quantize every matrix that is not done by rounding alone, without text; ``seen`` False: those alone whose inputs
    nothing observes (embedding and output matrix), beside a method that chooses the codes of the others."""
    format = matrices.target.plan.format
    method, stages_left = options.method_of(format), options.stages(format)
    solver = Solver(method, matrices.store, matrices.rows, stages_left, pool, "cpu")
    plan = matrices.target.plan
    todo = [matrix for matrix in plan.matrices if (seen or not matrix.seen) and not matrices.done(matrix)]
    total = sum(_rows(matrix) * matrix.weight.shape[-1] for matrix in todo)
    done = 0
    for matrix in todo:
        kept = keep(matrices, matrix, pool) if method.keeps else None
        if kept is not None:
            matrices.write(matrix, kept.fields, kept.facts, kept.origin)
        else:
            job = Job(matrix, [Segment(0, _rows(matrix), "", 0)])
            solver.round([job], fits=not seen and matrices.store.fits_unseen)
            matrices.write(matrix, solver.join(job), job.summary())
        done += _rows(matrix) * matrix.weight.shape[-1]
        on_event(events.Progress(done=done, total=total))


def _rows(matrix: MatrixPlan) -> int:
    return matrix_shape(matrix.weight.shape)[0]
