"""Matrices of a packed directory held on a grid while all else stays as the source: solved, decoded, put back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from llm_quantize.architectures.rows import matrix_shape, read_output_rows, to_float32
from llm_quantize.blockwise.from_statistics import gram_of, tap_of
from llm_quantize.blockwise.segments import Segment, Sources, column_orders, segments
from llm_quantize.blockwise.solver import Job, Solver
from llm_quantize.blockwise.stages import routers
from llm_quantize.errors import UnsupportedError
from llm_quantize.evaluation.sensitivity import Candidate
from llm_quantize.formats.base import Store
from llm_quantize.io.statistics_file import StatisticsFile
from llm_quantize.methods.gptq_options import GptqOptions
from llm_quantize.methods.table import METHODS, Method
from llm_quantize.models.opening import Source
from llm_quantize.plan import MatrixPlan
from llm_quantize.streams.pool import Pool
from llm_quantize.streams.weights import CheckpointWeights

Floats = npt.NDArray[np.float32]


@dataclass
class Holder:
    """``matrices``: by the names of their weights. ``statistics``: with Hessians of the source's inputs; None: grids
    are fitted to the weights alone."""

    source: Source
    matrices: Mapping[str, MatrixPlan]
    store: Store
    pool: Pool
    statistics: StatisticsFile | None

    def __post_init__(self) -> None:
        self.weights = CheckpointWeights(self.source.checkpoint)
        known = [] if self.statistics is None else self.statistics.blocks()
        self.blocks = [[tap_of(tap) for tap in taps] for taps in known]
        self.homes = {name: index for index, taps in enumerate(self.blocks) for tap in taps for name in tap.tensors}

    def hold(self, candidate: Candidate) -> dict[str, torch.Tensor]:
        """{tensor of the source: float32 values, its shape} as an artifact with ``candidate`` has them.

        Raises UnsupportedError where the statistics say nothing of its inputs.
        """
        found = [replace(self.matrices[output.name], qtype=candidate.qtype) for output in candidate.outputs]
        fed = self.statistics if all(matrix.seen for matrix in found) else None
        solver, jobs = self._rounded(found) if fed is None else self._fed_back(found, fed)
        sources = Sources(self.source.checkpoint, self._present)
        for job in jobs:
            sources.put(job.matrix.weight, self.store.decode(job.matrix, solver.join(job)))
        return {name: torch.from_numpy(values) for name, values in sources.finished()}

    def _rounded(self, found: Sequence[MatrixPlan]) -> tuple[Solver, list[Job]]:
        jobs = [Job(matrix, [Segment(0, matrix_shape(matrix.weight.shape)[0], "", 0)]) for matrix in found]
        solver = self._solver(METHODS["rtn"])
        solver.round(jobs)
        return solver, jobs

    def _fed_back(self, found: Sequence[MatrixPlan], statistics: StatisticsFile) -> tuple[Solver, list[Job]]:
        taps = self.blocks[self.homes.get(found[0].weight.pieces[0].source, 0)]
        jobs = []
        for matrix in found:
            seen = segments(self.source.checkpoint, matrix.weight, taps)
            if seen is None:
                raise UnsupportedError(
                    "the statistics say nothing of the inputs of this matrix",
                    file=statistics.path,
                    tensor=matrix.name,
                    remedy="collect them again with this version, or leave --statistics out",
                )
            jobs.append(Job(matrix, seen))
        wanted = {segment.tap for job in jobs for segment in job.segments}
        looked_at = [tap for tap in taps if tap.name in wanted or any(one.matrices > 1 for one in taps)]
        orders = column_orders((job.matrix.weight, job.segments) for job in jobs)
        grams = {
            (tap.name, matrix): gram_of(statistics, tap, matrix, "cpu", orders.get(tap.name))
            for tap in looked_at
            for matrix in range(tap.matrices)
            if statistics.counts(tap.name)[matrix]
        }
        solver = self._solver(METHODS["gptq"])
        solver.stage(jobs, grams, looked_at, [(job.matrix, job.segments) for job in jobs])
        return solver, jobs

    def _present(self, name: str) -> Floats:
        return self.weights.read(name).to(torch.float32).numpy()

    def _read(self, matrix: MatrixPlan, start: int, stop: int) -> Floats:
        return np.array(to_float32(read_output_rows(self.source.checkpoint, matrix.weight, start, stop)), np.float32)

    def _solver(self, method: Method) -> Solver:
        stages = method.stages(GptqOptions(correction=0.0))  # the statistics are of the source's own inputs
        return Solver(method, self.store, self._read, stages, self.pool, "cpu", routers(self.source.tensors.outputs))
