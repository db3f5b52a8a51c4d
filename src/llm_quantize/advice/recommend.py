"""What to take: for one model and one machine, which level fits, what it costs in quality, and which one is best.

    plans of every level → what each takes in memory and where it lies (``footprint``) → what it loses (``experience``)
    → exclusions with reasons → one choice for the priority, the next better, the next smaller

Sizes are exact, from headers alone; the memory of a running model is computed (``footprint`` says how); the loss is
measured, estimated or published, and always labelled as such.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from llm_quantize.advice.experience import PUBLISHED_SOURCE, Experience, Loss, gains_from_importance
from llm_quantize.advice.footprint import Footprint, Placement, context_of, footprint, place, shape_of, weights_of
from llm_quantize.advice.machine import Machine
from llm_quantize.advice.other_formats import directories_note
from llm_quantize.architectures import rows
from llm_quantize.calibration import choose
from llm_quantize.errors import UsageError
from llm_quantize.formats.gguf.levels import LEVELS
from llm_quantize.formats.gguf.plan import FLOAT_LEVELS
from llm_quantize.formats.gguf.plan import NAME as RANKED
from llm_quantize.formats.table import FORMATS
from llm_quantize.measures.advisor import GOOD, PRIORITIES, USABLE, Offer, advise, beaten_by
from llm_quantize.measures.grades import grade
from llm_quantize.models.opening import Source
from llm_quantize.options import PROMPTS, Options
from llm_quantize.pipeline import plan_source
from llm_quantize.plan import ArtifactPlan
from llm_quantize.reports.numbers import bytes_text
from llm_quantize.results import Tabled

# Only for an order where nothing was measured: memory of a GPU is about ten times as fast as a computer's, and the
# codebooks of the I-quants cost a CPU about half as much again.
CPU_COST, CPU_CODEBOOK_COST = 10.0, 1.5

_FLOAT_LEVEL_OF = {"float32": "F32", "float16": "F16", "uint16": "BF16"}


@dataclass(frozen=True)
class Choice:
    """One level: its file (bytes), the memory it takes when it runs, where it lies (None: it does not fit), what it
    loses (None: nobody measured it), generated tokens per second if they were measured. ``dominated``: a level that is
    no larger and loses no more. ``make``: what makes the very file that was measured, behind ``quantize MODEL``."""

    level: str
    file: str
    size: int
    bits_per_weight: float
    need: Footprint
    placement: Placement | None
    loss: Loss | None
    speed: float | None = None
    calibrate: bool = False
    dominated: str | None = None
    make: tuple[str, ...] | None = None

    @property
    def kld(self) -> float:
        """The mean KLD, infinite where it is not known."""
        return float("inf") if self.loss is None else self.loss.kld

    def offer(self) -> Offer:
        """As the rule of ``measures.advisor`` sees it."""
        basis = "" if self.loss is None else self.loss.basis
        return Offer(
            size=self.size,
            kld=self.kld,
            measured=basis == "measured",
            estimated=basis == "estimated",
            fits=self.placement is not None,
            split=self.placement is not None and self.placement.kind == "split",
            cost=self.cost if self.speed is None else 1 / max(self.speed, 1e-9),
            timed=self.speed is not None,
        )

    @property
    def cost(self) -> float:
        """Time for a token in arbitrary units, to order levels whose speed was not measured."""
        if self.placement is None:
            return float("inf")
        gpu, cpu = self.placement.read
        return gpu + CPU_COST * cpu * (CPU_CODEBOOK_COST if self.level.startswith(("IQ1", "IQ2", "IQ3")) else 1.0)


@dataclass(frozen=True, repr=False)
class Advice(Tabled):
    """The answer. ``choices`` from the largest file to the smallest; ``excluded``: level and reason. ``take`` None:
    nothing fits; ``reason``: why it, as ``measures.advisor.Advice`` has it. ``better`` and ``smaller``: the neighbours
    worth having, whether they fit or not. ``untried``: what may be better, but was not measured, as others were."""

    model: str
    revision: str | None
    name: str
    machine: Machine
    context: int
    priority: str
    reason: str
    take: Choice | None
    better: Choice | None
    smaller: Choice | None
    untried: Choice | None
    why: tuple[str, ...]
    choices: tuple[Choice, ...]
    excluded: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]

    def commands(self, choice: Choice) -> dict[str, str]:
        """How to make the file, to let it write, and to run it in llama.cpp; lines for a shell."""
        calibrate = ["--calibrate"] if choice.calibrate else []
        revision = ["--revision", self.revision] if self.revision else []
        make = choice.make or (RANKED, "-q", choice.level, *calibrate, *revision)
        words = ["llm-quantize", "quantize", self.model, *make]
        run = ["llama-server", "-m", f"out/{choice.file}", "-c", str(self.context)]
        if choice.placement is not None and self.machine.vram:
            run += ["-ngl", str(choice.placement.gpu_layers)]
        return {
            "quantize": shlex.join([*words, "-o", "out"]),
            "try": shlex.join(["llm-quantize", "run", f"out/{choice.file}", PROMPTS[0]]),
            "run": shlex.join(run),
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; sizes in bytes."""

        def shown(choice: Choice | None) -> dict[str, Any] | None:
            return None if choice is None else self._choice_to_dict(choice)

        machine = {**dataclasses.asdict(self.machine), "usable_ram": self.machine.usable_ram}
        return {
            "model": self.name,
            "machine": machine,
            "context": self.context,
            "priority": self.priority,
            "reason": self.reason,
            "take": shown(self.take),
            "better": shown(self.better),
            "smaller": shown(self.smaller),
            "untried": shown(self.untried),
            "why": list(self.why),
            "choices": [self._choice_to_dict(choice) for choice in self.choices],
            "excluded": [{"level": level, "reason": reason} for level, reason in self.excluded],
            "notes": list(self.notes),
        }

    def summary(self) -> dict[str, Any]:
        """The model, the machine, and what to take."""
        machine = f"{self.machine.device}, {bytes_text(self.machine.ram)}"
        return {"model": self.name, "take": self.take.level if self.take else None, "machine": machine,
                "context": self.context, "priority": self.priority}  # fmt: skip

    def rows(self) -> list[dict[str, Any]]:
        """One for each level, from the largest file to the smallest: what it takes, where it runs, what it loses."""
        taken = None if self.take is None else self.take.level
        return [
            {
                "level": choice.level,
                "size": choice.size,
                "bits_per_weight": choice.bits_per_weight,
                "memory": choice.need.total,
                "runs_on": None if choice.placement is None else choice.placement.kind,
                "kld": None if choice.loss is None else choice.loss.kld,
                "kld_basis": None if choice.loss is None else choice.loss.basis,
                "tokens_per_second": choice.speed,
                "take": choice.level == taken,
            }
            for choice in self.choices
        ]

    def _choice_to_dict(self, choice: Choice) -> dict[str, Any]:
        placement = choice.placement
        return {
            "format": "gguf",
            "level": choice.level,
            "file": choice.file,
            "size": choice.size,
            "bits_per_weight": round(choice.bits_per_weight, 4),
            "memory": {**dataclasses.asdict(choice.need), "total": choice.need.total},
            "placement": None
            if placement is None
            else {
                "kind": placement.kind,
                "gpu_layers": placement.gpu_layers,
                "gpu": placement.gpu,
                "ram": placement.ram,
            },
            "kld": None if choice.loss is None else choice.loss.kld,
            "kld_basis": None if choice.loss is None else choice.loss.basis,
            "grade": None if choice.loss is None else grade(choice.loss.kld),
            "generation_tokens_per_second": choice.speed,
            "dominated_by": choice.dominated,
            "commands": self.commands(choice),
        }


def recommend(
    source: Source,
    machine: Machine,
    *,
    model: str,
    revision: str | None = None,
    context: int | None = None,
    priority: str = "quality",
    experience: Experience | None = None,
) -> Advice:
    """Which level of ``source`` to take for ``machine`` with a cache of ``context`` tokens (None: 8192, or what the
    model was made for, if that is less). ``model``: as the user named it, for the commands. Reads headers only.

    Raises UsageError for an unknown priority or no context."""
    if priority not in PRIORITIES:
        raise UsageError("unknown priority", expected=", ".join(PRIORITIES), found=priority)
    if context is None:
        context = context_of(source)
    if context < 1:
        raise UsageError("the context must be 1 token or more", found=context)
    experience = experience or Experience()
    shape = shape_of(source)
    excluded = _cannot_be(source)
    exact = _float_level(source)
    found = []
    for plan, calibrate in _plans(source, [level for level in LEVELS if level not in excluded]):
        if plan.level == "MXFP4_MOE" and "mxfp4" not in plan.type_counts():
            excluded[plan.level] = "is for models with experts, and this one has none"
            continue
        weights = weights_of({tensor.name: tensor.nbytes for tensor in plan.tensors}, shape.n_layer)
        found.append(
            Choice(
                level=plan.level,
                file=plan.files[0].name,
                size=plan.size,
                bits_per_weight=plan.bits_per_weight,
                need=footprint(weights, shape, context),
                placement=place(weights, shape, machine, context),
                loss=experience.loss(plan.level, exact=plan.level == exact),
                speed=experience.speed(plan.level),
                calibrate=calibrate,
                make=experience.make(plan.level),
            )
        )
    choices = with_dominated(sorted(found, key=lambda choice: (-choice.size, choice.kld)))
    advice = advise([choice.offer() for choice in choices], priority)
    take, better, smaller, untried = (
        None if place is None else choices[place]
        for place in (advice.take, advice.larger, advice.smaller, advice.untried)
    )
    for choice in choices:
        if choice.placement is None:
            excluded[choice.level] = _too_large(choice, machine)
    return Advice(
        model=model,
        revision=revision,
        name=source.checkpoint.name,
        machine=machine,
        context=context,
        priority=priority,
        reason=advice.reason,
        take=take,
        better=better,
        smaller=smaller,
        untried=untried,
        why=() if take is None else tuple(_why(take, advice.reason, machine)),
        choices=tuple(choices),
        excluded=tuple(excluded.items()),
        notes=tuple(_notes(source, experience, choices, context, take, untried)),
    )


def _float_level(source: Source) -> str:
    """The level that holds the values of the source's weights as they are; of a quantized source, float32."""
    kept: Counter[str] = Counter()
    model = source.checkpoint
    for name, info in model.tensors.items():
        if model.is_readable(name):
            dtype = model.stored_dtype(name)
            kept[_FLOAT_LEVEL_OF[dtype.name]] += rows.weights_of(info.shape) * dtype.itemsize
    return max(kept, key=lambda level: kept[level], default="BF16")


def _cannot_be(source: Source) -> dict[str, str]:
    """Levels that are no choice for this model whatever the machine, and why."""
    own = _float_level(source)
    as_stored = any(info.dtype == own for info in source.checkpoint.tensors.values())
    kind = source.checkpoint.kind
    why = f"{own} is what the source stores: the same weights"
    if kind or not as_stored:
        why = f"{own} holds every value of the source ({kind or 'decoded'}) as it is"
    found = {level: why for level in FLOAT_LEVELS if level != own}
    ternary = "is for models trained with ternary weights; any other loses nearly everything"
    return {**found, **{level: ternary for level in LEVELS if level.startswith("TQ")}}


def _plans(source: Source, levels: Sequence[str]) -> list[tuple[ArtifactPlan, bool]]:
    """The plan of each level, and whether to calibrate: it must be, or published figures say that it gains."""
    form = FORMATS[RANKED]
    calibrate = {
        level: gains_from_importance(level) or form.needs_importance(source, level, Options()) for level in levels
    }
    found = []
    for wanted in (False, True):
        chosen = [level for level in levels if calibrate[level] is wanted]
        options = Options(calibrate=wanted)
        foreseen = choose.foresee(source, RANKED, chosen, options)
        plans = plan_source(source, RANKED, levels=chosen, name=None, options=options, importance=foreseen)
        found += [(plan, wanted) for plan in plans]
    return found


def with_dominated(choices: Sequence[Choice]) -> list[Choice]:
    """Each with the level that makes it pointless, if there is one."""
    beaten = beaten_by([choice.offer() for choice in choices])
    return [
        replace(one, dominated=None if place is None else choices[place].level)
        for one, place in zip(choices, beaten, strict=True)
    ]


def _too_large(choice: Choice, machine: Machine) -> str:
    need, ram = bytes_text(choice.need.total), bytes_text(machine.usable_ram)
    if machine.device == "cuda":
        return f"takes {need} when it runs; there is {ram} of RAM and {bytes_text(machine.vram)} on the GPU"
    return f"takes {need} when it runs; there is {ram} of RAM"


def _why(take: Choice, reason: str, machine: Machine) -> list[str]:
    """The reasons, in sentences."""
    text, need, placement, loss = bytes_text, take.need, take.placement, take.loss
    if placement is None or loss is None:
        return []
    parts = f"weights {text(need.weights)}, cache {text(need.cache)}, buffers {text(need.compute + need.runtime)}"
    if placement.kind == "gpu":
        rest = placement.gpu - placement.context - need.cache - need.compute
        parts = f"weights {text(rest)}, cache {text(need.cache)}, buffers {text(need.compute)}"
        parts += f", CUDA itself {text(placement.context)}" if placement.context else ""
    where = {
        "cpu": f"it runs in RAM: {text(placement.ram)} of {text(machine.usable_ram)} ({parts})",
        "gpu": f"it runs whole on the GPU: {text(placement.gpu)} of {text(machine.vram)} ({parts})",
        "split": f"{placement.gpu_layers} of {placement.layers} layers run on the GPU ({text(placement.gpu)} of "
        f"{text(machine.vram)}), the rest in RAM ({text(placement.ram)} of {text(machine.usable_ram)})",
    }[placement.kind]
    known = {
        "measured": "measured on this model",
        "estimated": "estimated from levels measured on this model",
        "published": "not measured on this model: published for Llama 3 8B",
        "exact": "the source's own weights",
    }[loss.basis]
    found = [where, f"loss: {grade(loss.kld)}, mean KLD {loss.kld:.2g} ({known})"]
    good = f"of those that fit with a loss that is still good (mean KLD below {GOOD:g})"
    speed = f"{take.speed:.1f} tokens per second, measured" if take.speed else "fewest bytes to read; not measured"
    found.append(
        {
            "clean": "the smallest that is indistinguishable from the source: more bits would show in nothing",
            "least": "of those that fit, it loses least",
            "whole": "the best that runs whole on the GPU; better ones would be split between GPU and RAM, and slow",
            "fast": f"the fastest {good}: {speed}",
            "small": f"the smallest of those that fit whose loss stays below a mean KLD of {USABLE:g}",
        }[reason]
    )
    if take.offer().judged >= USABLE:
        found.append("a smaller model at more bits may well be better: compare the two")
    return found


def _notes(
    source: Source,
    experience: Experience,
    choices: Sequence[Choice],
    context: int,
    take: Choice | None,
    untried: Choice | None,
) -> list[str]:
    """What the reader must know beside."""
    notes = []
    if source.checkpoint.kind:
        notes.append(f"losses are counted from this {source.checkpoint.kind} model, not from the one it was made of")
    bases = {choice.loss.basis for choice in choices if choice.loss is not None}
    if "published" in bases:
        notes.append(
            f"losses marked * were not measured on this model; they are from {PUBLISHED_SOURCE}. "
            "llm-quantize compare measures them, and this command then uses its report"
        )
    if "estimated" in bases:
        notes.append(f"losses marked ~ are published ones ({PUBLISHED_SOURCE}), scaled by those measured on this model")
    if experience.file is not None:
        notes.append(f"measured figures are from {experience.file}")
    trained = source.architecture.hyper.context_length
    if trained and context > trained:
        notes.append(f"the model was made for {trained} tokens; the cache is counted for {context}")
    if take is not None and untried is not None and untried.loss is not None:
        notes.append(
            f"{untried.level} was not measured on this model; by estimates (mean KLD {untried.loss.kld:.2g}) it may be "
            f"the better choice: measure it with llm-quantize compare --variants {RANKED}:{untried.level},"
            f"{RANKED}:{take.level}"
        )
    if take is not None and take.calibrate and not take.make:
        notes.append("--calibrate needs the extra [torch] (pip install '.[torch]'); without it take --imatrix FILE")
    return [*notes, directories_note(source)]
