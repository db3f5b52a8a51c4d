"""The matrices that one stage of a block quantizes: factored, solved rows side by side, joined.

Rows do not depend on one another once their inputs are known, so a matrix is cut into pieces of ROWS rows; how many
threads take them changes nothing. Experts are many and small: each is factored and solved by one thread, and its
factor is dropped before the next.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llm_quantize.blockwise.gram import Gram, complete
from llm_quantize.blockwise.kv_cache import Largest
from llm_quantize.blockwise.proof import prove
from llm_quantize.blockwise.segments import Segment
from llm_quantize.blockwise.stages import parent_tap
from llm_quantize.formats.base import ReadRows, Store
from llm_quantize.grids.grid import Grid, GridType
from llm_quantize.methods.correction import UNTRIED, Correction, Part, decide, moment, sampled
from llm_quantize.methods.gptq_options import GptqOptions
from llm_quantize.methods.hessian import Factor, factorize
from llm_quantize.methods.table import Method
from llm_quantize.plan import MatrixPlan
from llm_quantize.qtypes.inputs import InputGrid
from llm_quantize.streams.pool import Pool
from llm_quantize.streams.taps import Tap

ROWS = 256
_SAMPLED = 64
_LOST = 1e-3
_ON_GRID = {2: 0.02, 3: 0.015, 4: 0.01, 5: 0.008, 6: 0.004}

UNSEEN = "no input was ever seen: every channel weighs the same"
UNREACHED = "no token reached an expert: it is quantized for the inputs of its whole layer"
OUT_OF_RANGE = "weights too large or too small for the scales that the format stores: rows of it are lost"
STARVED = "an expert saw few tokens: its inputs are drawn towards those of its layer"
FALLBACKS = {
    "diagonal": "the inputs could not be factored, only their mean squares are used: no error feedback",
    "block-diagonal": "the inputs could not be factored as a whole: error feedback goes over 1024 columns at a time",
    "correction": "the errors of earlier layers are not made up for: the least squares problem could not be solved",
}

Fields = list[npt.NDArray[Any]]
Floats = npt.NDArray[np.float32]
Members = Sequence[tuple[MatrixPlan, Sequence[Segment]]]


@dataclass
class Job:
    """A matrix to be quantized in this stage and what its rows see; ``facts`` and ``pieces`` fill up.

    ``facts``: loss and plain_loss (sums over rows of the weighted square error, of ours and of plain rounding),
    plain_rows (rows for which plain rounding was better and kept), tokens (seen by the matrix, or by each of a stack),
    notes and fallbacks (text: count), what was out of the ordinary, and of that what was not done as asked.
    ``solved``: {first row: grid and codes of what a method chose, on the device}, where they are kept to be moved;
    ``fields``: the matrix joined, until it is written.
    ``inputs``: what runtimes round its inputs to, with what was calibrated of it. ``cache``: the keys and values that
    were seen before it.
    """

    matrix: MatrixPlan
    segments: Sequence[Segment]
    on_grid: str = ""
    inputs: InputGrid | None = None
    cache: Largest | None = None
    pieces: dict[int, Any] = field(default_factory=dict)
    solved: dict[int, tuple[Grid, torch.Tensor]] = field(default_factory=dict)
    fields: Fields = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, loss: float, plain_loss: float, plain_rows: int) -> None:
        """Add the figures of some rows, in any order (the sums are made when they are read); NaN was not asked for."""
        with self.lock:
            for name, value in (("loss", loss), ("plain_loss", plain_loss)):
                if math.isfinite(value):
                    self.facts.setdefault(name, []).append(value)
            self.facts["plain_rows"] = self.facts.get("plain_rows", 0) + plain_rows

    def tell(
        self, number: int, tokens: int, factor: Factor | None, *, corrects: bool = False, few: bool = False
    ) -> None:
        """What is known of matrix ``number``: ``tokens`` it saw, and what was out of the ordinary about them.
        ``corrects``: the errors of earlier layers were to be made up for; ``few``: an expert, starved."""
        fallbacks = []
        if factor is None or factor.dead == len(factor.order):
            fallbacks.append(UNSEEN)
        elif factor.mode != "full":
            fallbacks.append(FALLBACKS[factor.mode])
        elif few and not tokens:
            fallbacks.append(UNREACHED)
        elif corrects and factor.correction is None:
            fallbacks.append(FALLBACKS["correction"])
        if self.on_grid:
            fallbacks.clear()
        notes = [*(factor.notes if factor else ()), *([STARVED] if few and tokens else [])]
        with self.lock:
            self.tokens[number] = tokens
            for kind, texts in (("fallbacks", fallbacks), ("notes", notes)):
                for text in texts:
                    table = self.facts.setdefault(kind, {})
                    table[text] = table.get(text, 0) + 1

    def summary(self) -> dict[str, Any]:
        """The facts, sums in a fixed order."""
        sums: dict[str, Any] = {
            name: float(np.sum(sorted(self.facts[name]))) for name in ("loss", "plain_loss") if name in self.facts
        }
        rest = {name: value for name, value in self.facts.items() if name not in sums}
        tokens = [self.tokens[number] for number in sorted(self.tokens)]
        seen = {"tokens": tokens if len(tokens) > 1 else tokens[0]} if tokens else {}
        return {**sums, **rest, **seen, **({"on_grid": True} if self.on_grid else {})}


@dataclass(frozen=True)
class Solver:
    """``method`` chooses codes. ``read``: float32 rows of a matrix. ``routers``: the source's tensors that choose
    experts. ``keeps``: jobs keep their pieces, and grids and codes of those that may be moved."""

    method: Method
    store: Store
    read: ReadRows
    options: GptqOptions
    pool: Pool
    device: str
    routers: frozenset[str] = frozenset()
    keeps: bool = False

    def stage(
        self, jobs: Sequence[Job], grams: Mapping[tuple[str, int], Gram], taps: Sequence[Tap], members: Members
    ) -> None:
        """Quantize all rows of ``jobs``; ``grams`` are what their taps saw, and are used up. None seen: rounding.
        ``members``: all matrices of the stage, those that are done too: what is decided for them all must not depend
        on which are left."""
        for job in jobs:
            job.on_grid = self._trained_on_grid(job.matrix)
        stacks = {tap.name for tap in taps if tap.matrices > 1}
        parents = {name: parent_tap(name, taps, self.routers) for name in stacks}
        factors: dict[str, Factor] = {}
        corrections: dict[str, Correction | None] = {}
        for tap in taps:
            needed = tap.name in parents.values() or any(s.tap == tap.name for job in jobs for s in job.segments)
            if tap.matrices == 1 and needed:
                behind = {tap.name, *(name for name, parent in parents.items() if parent == tap.name)}
                corrections[tap.name] = how = self._correction(members, behind, grams[tap.name, 0])
                factor = partial(self._factor, how=how, joint=self._joint(members, tap.name))
                (factors[tap.name],) = self.pool.each(factor, [grams[tap.name, 0]])
        work = [
            _Rows(job, start, min(start + ROWS, segment.stop), factors.get(segment.tap))
            for job in jobs
            for segment in job.segments
            if segment.tap not in stacks
            for start in range(segment.start, segment.stop, ROWS)
        ]
        for job in jobs:
            for name in dict.fromkeys(segment.tap for segment in job.segments if segment.tap not in stacks):
                how = corrections[name]
                corrects = grams[name, 0].cross is not None and self._corrects(how)
                job.tell(0, grams[name, 0].tokens, factors[name], corrects=corrects)
                if how is not None:
                    job.facts["correction"] = {"share": round(how.share, 4), "ridge": how.ridge}
        for _ in self.pool.each(self._rows, work):
            pass
        experts = [key for key in sorted({(s.tap, s.matrix) for job in jobs for s in job.segments}) if key[0] in stacks]
        layer = {name: _together(name, grams, parents[name]) for name in stacks}

        def expert(key: tuple[str, int]) -> None:
            parent = parents[key[0]] or ""
            corrects = parent in factors and self._corrects(corrections[parent])
            joint = self._joint(members, key[0])
            self._expert(jobs, key, grams.get(key), layer[key[0]], factors.get(parent), corrects=corrects, joint=joint)

        for _ in self.pool.each(expert, experts):
            pass

    def round(self, jobs: Sequence[Job], *, fits: bool = False) -> None:
        """Quantize all rows of ``jobs`` without knowing any inputs: as the store rounds; with ``fits``, on the grids
        that fit best, but for weights that are on the grid already."""
        for job in jobs if fits else ():
            job.on_grid = self._trained_on_grid(job.matrix)
        work = [
            _Rows(job, start, min(start + ROWS, segment.stop), None, "fit" if fits else self.store.rounds)
            for job in jobs
            for segment in job.segments
            for start in range(segment.start, segment.stop, ROWS)
        ]
        for _ in self.pool.each(self._rows, work):
            pass

    def join(self, job: Job) -> Fields:
        """The fields of a job whose rows are all there."""
        starts = sorted(job.pieces)
        pieces = [job.pieces[start] if self.keeps else job.pieces.pop(start) for start in starts]
        fields = self.store.join(job.matrix, pieces)
        calibrated = job.inputs is not None and job.inputs.static
        return [*fields, *(self.store.numbers(job.matrix, job.inputs) if calibrated and job.inputs else [])]

    def _factor(self, gram: Gram, how: Correction | None, joint: int) -> Factor:
        return factorize(gram.hessian, gram.tokens, self.options, cross=gram.cross, correction=how, joint=joint)

    def _joint(self, members: Members, tap: str) -> int:
        """So many neighbouring columns stay together in the order for the matrices behind ``tap``: the most that any
        of them needs."""
        qtypes = {matrix.qtype for matrix, segments in members if any(segment.tap == tap for segment in segments)}
        kinds = [self.store.grid_type(qtype) for qtype in sorted(qtypes)]
        return max((kind.joint for kind in kinds if kind is not None), default=1)

    def _corrects(self, how: Correction | None) -> bool:
        return self.options.corrects if how is None else how.share > 0

    def _correction(self, members: Members, taps: Collection[str], gram: Gram) -> Correction | None:
        """How far the matrices of ``members`` behind ``taps``, whose inputs ``gram`` sums up, make up for the errors of
        earlier layers, by what was held back of ``gram``; that is then added. None: the options say it, or there is
        nothing to make up for."""
        if gram.cross is None or self.options.correction is not None:
            return None
        if not gram.held:
            return UNTRIED
        weights = self._sampled(members, taps, gram.columns)
        (known,) = self.pool.each(partial(_moment, gram.cross), [weights])
        (lacking,) = self.pool.each(partial(moment, gram.held), [weights])
        held, tokens = torch.zeros_like(gram.hessian), sum(len(inputs) for inputs, *_ in gram.held)
        for work in gram.release(held):
            self.pool.do(work)
        complete(held)
        parts = Part(gram.hessian, known, gram.tokens), Part(held, lacking, tokens)
        how = next(self.pool.each(_decided, [parts])) if len(weights) else UNTRIED
        gram.join(held, tokens)
        return how

    def _sampled(self, members: Members, taps: Collection[str], columns: int) -> torch.Tensor:
        """float32 (rows, columns): rows of the matrices behind ``taps``, at even distances, done or not."""
        seen = [(matrix, segment) for matrix, segments in members for segment in segments if segment.tap in taps]
        parts = sampled([segment.stop - segment.start for _, segment in seen])
        rows = [
            self.read(matrix, segment.start + row, segment.start + row + 1)
            for (matrix, segment), indices in zip(seen, parts, strict=True)
            for row in indices
        ]
        return torch.from_numpy(np.concatenate(rows) if rows else np.empty((0, columns), np.float32)).to(self.device)

    def _rows(self, work: _Rows) -> None:
        matrix = work.job.matrix
        rows = self.read(matrix, work.start, work.stop)
        kind = self.store.grid_of(matrix, work.start, work.stop, self.read)
        factor = work.factor
        if kind is None:
            importance = None if factor is None else factor.importance.cpu().numpy()
            work.job.pieces[work.start] = self.store.plain(matrix, rows, importance)
            return
        weight = torch.from_numpy(rows).to(self.device)
        if work.job.on_grid or factor is None:
            grid, codes = _rounded(kind, weight, work.job.on_grid or work.rounds)
        else:
            found = self.method.solve(weight, kind, factor, self.options)
            grid, codes = found.grid, found.codes
            if self.options.compare:
                prove(matrix.name, matrix.qtype, work.start, weight, factor, found)
            work.job.note(float(found.loss.sum()), float(found.plain_loss.sum()), found.plain_rows)
        if _out_of_range(grid, codes, weight):
            with work.job.lock:
                work.job.facts.setdefault("fallbacks", {})[OUT_OF_RANGE] = 1
        if self.keeps and not work.job.on_grid and factor is not None and grid.index is None:
            work.job.solved[work.start] = grid, codes
        work.job.pieces[work.start] = self.store.piece(matrix, grid, codes)

    def _expert(
        self,
        jobs: Sequence[Job],
        key: tuple[str, int],
        gram: Gram | None,
        layer: tuple[torch.Tensor, int] | None,
        parent: Factor | None,
        *,
        corrects: bool,
        joint: int,
    ) -> None:
        """One expert: its own inputs, drawn towards its layer's where they are few. ``corrects``: its ``parent`` makes
        up for the errors of earlier layers."""
        concerned = [(job, segment) for job in jobs for segment in job.segments if (segment.tap, segment.matrix) == key]
        tokens = 0 if gram is None else gram.tokens
        factor = None
        if layer is not None:
            own = torch.zeros_like(layer[0]) if gram is None else gram.hessian
            factor = factorize(own, tokens, self.options, prior=layer[0], prior_tokens=layer[1], joint=joint)
            if parent is not None:
                factor = replace(factor, correction=parent.correction)
        for job, segment in concerned:
            few = tokens < job.matrix.weight.shape[-1] // 4
            job.tell(key[1], tokens, factor, corrects=corrects, few=few)
            for start in range(segment.start, segment.stop, ROWS):
                self._rows(_Rows(job, start, min(start + ROWS, segment.stop), factor))

    def _trained_on_grid(self, matrix: MatrixPlan) -> str:
        """How plain rounding changes next to nothing, "" where it does: the weights were trained (or rounded) onto
        this very grid, and feedback would take them off it. "plain": as the format's owner rounds; "fit": with the
        best scales, as owners differ in what they divide the largest weight by."""
        kind = self.store.grid_type(matrix.qtype)
        if kind is None:
            return ""
        rows = int(np.prod(matrix.weight.shape[:-1]))
        sampled = [self.read(matrix, row, row + 1) for row in sorted({i * rows // _SAMPLED for i in range(_SAMPLED)})]
        weight = torch.from_numpy(np.concatenate(sampled)).to(self.device)
        norm = weight.double().norm()
        for way in ("plain", "fit") if norm > 0 else ():
            grid, codes = _rounded(kind, weight, way)
            bound = _ON_GRID.get((len(grid.levels) - 1).bit_length(), 0.0)
            if (grid.decode(codes) - weight).double().norm() < bound * norm:
                return way
        return ""


def _moment(cross: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return weights @ cross


def _decided(parts: tuple[Part, Part]) -> Correction:
    return decide(*parts)


def _rounded(kind: GridType, weight: torch.Tensor, way: str) -> tuple[Grid, torch.Tensor]:
    """``weight`` on a grid that knows no inputs: the format owner's ("plain"), or the one that fits best ("fit")."""
    if way == "plain":
        return kind.plain(weight, None)
    grid = kind.fit(weight, None)
    return grid, grid.nearest(weight)


def _out_of_range(grid: Grid, codes: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether groups whose stored scale is the least or the largest that is stored lost most of themselves,
    and together more than the share _LOST of the square norm of ``weight``. Groups of zeros are no loss."""
    limits = torch.finfo(grid.storage)
    edge = (grid.d.abs() <= limits.tiny) | (grid.d.abs() >= limits.max)
    rows = torch.nonzero(edge.any(dim=1)).flatten()
    if not rows.numel():
        return False
    exact = weight[rows].double()
    error = (grid.decode(codes)[rows].double() - exact).square().reshape(len(rows), -1, grid.span).sum(dim=2)
    lost = edge[rows] & (2 * error > exact.square().reshape(error.shape[0], -1, grid.span).sum(dim=2))
    return bool((error * lost).sum() > _LOST * weight.double().square().sum())


@dataclass(frozen=True)
class _Rows:
    """Rows [start, stop) of a job, with the factor of what they see (None: nothing known, and how they are rounded)."""

    job: Job
    start: int
    stop: int
    factor: Factor | None
    rounds: str = "fit"


def _together(name: str, grams: Mapping[tuple[str, int], Gram], parent: str | None) -> tuple[torch.Tensor, int] | None:
    """What the experts of a layer see together: (hessian, tokens)."""
    if parent is not None and (parent, 0) in grams:
        return grams[parent, 0].hessian, grams[parent, 0].tokens
    own = [gram for (tap, _), gram in sorted(grams.items()) if tap == name]
    if not own:
        return None
    total = torch.zeros_like(own[0].hessian)
    for gram in own:
        total += gram.hessian
    return total, sum(gram.tokens for gram in own)
