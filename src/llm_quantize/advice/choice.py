"""One way to store and run the model, as the rule and as programs see it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from llm_quantize.advice.experience import Experience, Loss
from llm_quantize.advice.footprint import Footprint, Placement, Shape
from llm_quantize.advice.machine import Machine
from llm_quantize.formats.gguf.plan import NAME as GGUF
from llm_quantize.measures.advisor import Offer, beaten_by
from llm_quantize.measures.grades import grade
from llm_quantize.models.opening import Source
from llm_quantize.reports.numbers import bytes_text

# Only for an order where nothing was measured: memory of a GPU is about ten times as fast as a computer's, and the
# codebooks of the I-quants cost a CPU about half as much again.
CPU_COST, CPU_CODEBOOK_COST = 10.0, 1.5


@dataclass(frozen=True)
class Question:
    """What is asked: which level of ``source`` for ``machine`` with a cache of ``context`` tokens. ``shape``: what
    memory depends on; ``experience``: what is known of losses and speeds."""

    source: Source
    machine: Machine
    context: int
    shape: Shape
    experience: Experience


@dataclass(frozen=True)
class Choice:
    """One level in one ``runtime`` (a name of RUNTIMES): its file or directory (``file``; ``size`` in bytes), the
    memory it takes when it runs, where it lies (None: it does not fit), what it loses (None: nobody measured it),
    generated tokens per second if they were measured in this runtime. ``dominated``: a level of the same runtime that
    is no larger and loses no more. ``make``: what makes the very file that was measured, behind ``quantize MODEL``."""

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
    format: str = GGUF
    runtime: str = "llama.cpp"

    @property
    def kld(self) -> float:
        """The mean KLD, infinite where it is not known."""
        return float("inf") if self.loss is None else self.loss.kld

    @property
    def name(self) -> str:
        """What people call it: the level, with its format where that is not GGUF."""
        return self.level if self.format == GGUF else f"{self.format} {self.level}"

    @property
    def memory(self) -> int:
        """Bytes that it takes where it lies: on the GPU alone where it lies there whole."""
        whole = self.placement is not None and self.placement.kind == "gpu"
        return self.placement.gpu if whole and self.placement is not None else self.need.total

    def offer(self) -> Offer:
        """As the rule of ``measures.advisor`` sees it."""
        basis = "" if self.loss is None else self.loss.basis
        return Offer(
            size=self.size,
            kld=self.kld,
            measured=basis == "measured",
            estimated=basis in ("estimated", "elsewhere"),
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

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, but for the commands; sizes in bytes."""
        placement = self.placement
        return {
            "runtime": self.runtime,
            "format": self.format,
            "level": self.level,
            "file": self.file,
            "size": self.size,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "memory": {**dataclasses.asdict(self.need), "total": self.need.total},
            "placement": None
            if placement is None
            else {
                "kind": placement.kind,
                "gpu_layers": placement.gpu_layers,
                "gpu": placement.gpu,
                "ram": placement.ram,
            },
            "kld": None if self.loss is None else self.loss.kld,
            "kld_basis": None if self.loss is None else self.loss.basis,
            "grade": None if self.loss is None else grade(self.loss.kld),
            "generation_tokens_per_second": self.speed,
            "dominated_by": self.dominated,
        }

    def row(self) -> dict[str, Any]:
        """A row of a table."""
        return {
            "runtime": self.runtime,
            "format": self.format,
            "level": self.level,
            "size": self.size,
            "bits_per_weight": self.bits_per_weight,
            "memory": self.need.total,
            "runs_on": None if self.placement is None else self.placement.kind,
            "kld": None if self.loss is None else self.loss.kld,
            "kld_basis": None if self.loss is None else self.loss.basis,
            "tokens_per_second": self.speed,
        }


@dataclass(frozen=True)
class Found:
    """``choices`` of one runtime, and what is no choice there: {level: why}."""

    choices: tuple[Choice, ...]
    excluded: tuple[tuple[str, str], ...]


def found(choices: Sequence[Choice], excluded: dict[str, str], room: str) -> Found:
    """The choices from the largest to the smallest; those that do not fit are excluded too, as there is only
    ``room``."""
    ordered = with_dominated(sorted(choices, key=lambda choice: (-choice.size, choice.kld)))
    for choice in ordered:
        if choice.placement is None:
            excluded[choice.name] = f"takes {bytes_text(choice.need.total)} when it runs; there is {room}"
    return Found(tuple(ordered), tuple(excluded.items()))


def with_dominated(choices: Sequence[Choice]) -> list[Choice]:
    """Each with the level that makes it pointless, if there is one."""
    beaten = beaten_by([choice.offer() for choice in choices])
    return [
        replace(one, dominated=None if place is None else choices[place].name)
        for one, place in zip(choices, beaten, strict=True)
    ]
