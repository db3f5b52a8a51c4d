"""Model directories in the runtime that loads them: sizes as planned, memory as needs.py counts it for that runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llm_quantize.advice.choice import Choice, Found, Question, found
from llm_quantize.advice.footprint import Footprint, Placement
from llm_quantize.advice.gguf_choices import float_level
from llm_quantize.advice.machine import Machine
from llm_quantize.advice.needs import Load, Need
from llm_quantize.architectures.rows import matrix_shape, weights_of
from llm_quantize.calibration import choose
from llm_quantize.errors import UnsupportedError, UsageError
from llm_quantize.formats.base import scheme_of
from llm_quantize.formats.packed_formats import PACKED
from llm_quantize.formats.safetensors import Safetensors
from llm_quantize.options import Options
from llm_quantize.pipeline import plan_source
from llm_quantize.plan import ArtifactPlan
from llm_quantize.reports.numbers import bytes_text
from llm_quantize.runtimes import RUNTIMES

PLAIN = Safetensors.name
LEAST_CAPABILITY = 7.5
"""What a GPU is counted as that nobody has named (Turing, the oldest that vLLM has kernels for)."""


@dataclass(frozen=True)
class Level:
    """A level of a directory format that a runtime has kernels for: from the compute ``capability`` on (0: any).
    ``widens``: as ``Load`` has it."""

    format: str
    level: str
    capability: float = 0.0
    widens: bool = False


@dataclass(frozen=True)
class Directories:
    """How one runtime runs directories: its ``levels``, what it needs and what it may have (``on`` "gpu" or "cpu"), the
    ``steps`` of rows and columns without which it has no kernel, and whether it takes packed ``experts``. ``floats``:
    the compute capability from which it runs plain 16-bit weights; None: it is not asked to."""

    runtime: str
    levels: Sequence[Level]
    need: Need
    room: Callable[[Machine], int]
    on: str
    steps: tuple[int, int] = (1, 1)
    experts: bool = True
    floats: float | None = 0.0

    def __call__(self, question: Question) -> Found:
        """The choices; what this model, this machine or the runtime rules out is excluded with its reason."""
        choices, excluded = [], dict[str, str]()
        for level in [*self._plain(question), *self.levels]:
            name = f"{level.format} {level.level}"
            refusal = self._refusal(level, question)
            if refusal is not None:
                excluded[name] = refusal
                continue
            try:
                plan = _planned(level, question)
                self._check(level, plan)
            except (UnsupportedError, UsageError) as error:
                excluded[name] = f"cannot be made of this model ({error.what})"
                continue
            choices.append(self._choice(level, plan, question))
        room = bytes_text(self.room(question.machine))
        gpu = self.on == "gpu"
        there = f"{room} on the GPU for {self._label}" if gpu else f"{room} of RAM for {self._label}"
        return found(choices, excluded, there)

    @property
    def _label(self) -> str:
        return RUNTIMES[self.runtime].LABEL

    def _plain(self, question: Question) -> list[Level]:
        """The source's own weights, where they are 16-bit floats."""
        own = float_level(question.source)
        return [] if own == "F32" or self.floats is None else [Level(PLAIN, own, self.floats if own == "BF16" else 0.0)]

    def _refusal(self, level: Level, question: Question) -> str | None:
        """Why the machine or the runtime rules a level out."""
        machine = question.machine
        known = machine.capability or LEAST_CAPABILITY
        if self.on == "gpu" and level.capability > known:
            have = f"this GPU has {known:.1f}"
            if machine.capability is None:
                have = f"nobody has named this GPU (--gpu NAME), which is counted as {known:.1f}"
            return f"{self._label} has kernels for it from compute capability {level.capability:.1f} on; {have}"
        if question.shape.experts_used and level.format != PLAIN and not self.experts:
            return f"{self._label} does not run packed experts here"
        return None

    def _check(self, level: Level, plan: ArtifactPlan) -> None:
        """Raise UnsupportedError where the runtime has no kernel for what was planned."""
        form = PACKED.get(level.format)
        refusal = None if form is None or form.RUNTIME is not None else form.vllm_refusal(scheme_of(plan))
        if refusal is not None:
            raise UnsupportedError(f"{self._label}: {refusal}")
        rows, columns = self.steps
        for matrix in plan.matrices:
            shape = matrix_shape(matrix.weight.shape)
            if shape[0] % rows or shape[1] % columns:
                raise UnsupportedError(
                    f"{self._label} here wants rows in steps of {rows} and columns in steps of {columns}; "
                    f"{matrix.name} has {shape[0]} and {shape[1]}"
                )

    def _choice(self, level: Level, plan: ArtifactPlan, question: Question) -> Choice:
        shape, machine, experience = question.shape, question.machine, question.experience
        load = Load(
            sum(tensor.nbytes for tensor in plan.tensors),
            max((weights_of(matrix.weight.shape) for matrix in plan.matrices), default=0),
            level.widens,
        )
        need = self.need(load, shape, machine, question.context)
        fits = need.total <= self.room(machine)
        return Choice(
            level=level.level,
            file=plan.name,
            size=plan.size,
            bits_per_weight=plan.bits_per_weight,
            need=need,
            placement=self._placement(need, shape.n_layer + 1) if fits else None,
            loss=experience.loss(level.format, level.level, exact=level.format == PLAIN),
            speed=experience.speed(level.format, level.level, self._label) if self.on == "cpu" else None,
            make=experience.make(level.format, level.level),
            format=level.format,
            runtime=self.runtime,
        )

    def _placement(self, need: Footprint, layers: int) -> Placement:
        read = need.weights + need.cache
        if self.on == "gpu":
            return Placement("gpu", layers, layers, need.total, 0, (read, 0), need.runtime)
        return Placement("cpu", 0, layers, 0, need.total, (0, read))


def _planned(level: Level, question: Question) -> ArtifactPlan:
    """Every byte of the directory. Raises what the format refuses."""
    options, source = Options(), question.source
    foreseen = choose.foresee(source, level.format, [level.level], options)
    (plan,) = plan_source(source, level.format, levels=[level.level], name=None, options=options, importance=foreseen)
    return plan
