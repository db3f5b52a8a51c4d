"""What ``recommend`` gives back: the answer of one runtime, those of the others, and the commands."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llm_quantize.advice.choice import Choice
from llm_quantize.advice.machine import Machine
from llm_quantize.advice.ways import Way
from llm_quantize.formats.gguf.plan import NAME as GGUF
from llm_quantize.reports.numbers import bytes_text
from llm_quantize.results import Shown, Tabled


@dataclass(frozen=True, repr=False)
class Answer(Shown):
    """What one runtime comes to. ``choices`` from the largest to the smallest; ``excluded``: level and reason. ``take``
    None: nothing fits, or nothing whose loss is known; ``reason``: why it, as ``measures.advisor.Advice`` has it.
    ``better`` and ``smaller``: the neighbours worth having, whether they fit or not. ``untried``: what may be better,
    but was not measured, as others were."""

    way: Way
    reason: str
    take: Choice | None
    better: Choice | None
    smaller: Choice | None
    untried: Choice | None
    why: tuple[str, ...]
    choices: tuple[Choice, ...]
    excluded: tuple[tuple[str, str], ...]

    @property
    def runtime(self) -> str:
        """A name of RUNTIMES."""
        return self.way.runtime

    def summary(self) -> dict[str, Any]:
        """The runtime, and what to take there."""
        return {"runtime": self.runtime, "take": None if self.take is None else self.take.name}


@dataclass(frozen=True, repr=False)
class Advice(Tabled):
    """The answer, and what ``others`` (other runtimes of this machine) come to."""

    model: str
    revision: str | None
    name: str
    machine: Machine
    context: int
    priority: str
    answer: Answer
    others: tuple[Answer, ...]
    notes: tuple[str, ...]
    lora: tuple[str, ...] = ()

    @property
    def runtime(self) -> str:
        """The advised runtime, a name of RUNTIMES."""
        return self.answer.runtime

    @property
    def reason(self) -> str:
        """Why ``take``."""
        return self.answer.reason

    @property
    def take(self) -> Choice | None:
        """What to take; None where nothing fits."""
        return self.answer.take

    @property
    def better(self) -> Choice | None:
        """The next better level."""
        return self.answer.better

    @property
    def smaller(self) -> Choice | None:
        """The next smaller level."""
        return self.answer.smaller

    @property
    def untried(self) -> Choice | None:
        """What may be better, but was not measured."""
        return self.answer.untried

    @property
    def why(self) -> tuple[str, ...]:
        """The reasons, in sentences."""
        return self.answer.why

    @property
    def choices(self) -> tuple[Choice, ...]:
        """Levels of the advised runtime, the largest first."""
        return self.answer.choices

    @property
    def excluded(self) -> tuple[tuple[str, str], ...]:
        """Levels that are no choice, and why."""
        return self.answer.excluded

    @property
    def answers(self) -> tuple[Answer, ...]:
        """All runtimes, the advised one first."""
        return (self.answer, *self.others)

    def commands(self, choice: Choice) -> dict[str, str]:
        """{"quantize", "try", "run"}: lines for a shell that make it, let it write (where ``llm-quantize run`` can on
        such a machine), and serve it."""
        revision = ["--revision", self.revision] if self.revision else []
        calibrate = ["--calibrate"] if choice.calibrate else []
        make = choice.make or (choice.format, "-q", choice.level, *calibrate, *revision)
        adapters = [word for text in self.lora for word in ("--lora", text)]
        words = ["llm-quantize", "quantize", self.model, *make, *adapters, "-o", "out"]
        way = next(answer.way for answer in self.answers if answer.runtime == choice.runtime)
        return {
            "quantize": shlex.join(words),
            **way.commands(f"out/{choice.file}", choice, self.machine, self.context),
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; sizes in bytes."""
        machine = {**dataclasses.asdict(self.machine), "usable_ram": self.machine.usable_ram}
        return {
            "model": self.name,
            "machine": machine,
            "context": self.context,
            "priority": self.priority,
            **self._answer_to_dict(self.answer),
            "others": [self._answer_to_dict(other) for other in self.others],
            "notes": list(self.notes),
        }

    def _answer_to_dict(self, answer: Answer) -> dict[str, Any]:
        def shown(choice: Choice | None) -> dict[str, Any] | None:
            return None if choice is None else {**choice.to_dict(), "commands": self.commands(choice)}

        return {
            "runtime": answer.runtime,
            "suits": answer.way.suits,
            "reason": answer.reason,
            "take": shown(answer.take),
            "better": shown(answer.better),
            "smaller": shown(answer.smaller),
            "untried": shown(answer.untried),
            "why": list(answer.why),
            "choices": [shown(choice) for choice in answer.choices],
            "excluded": [{"level": level, "reason": reason} for level, reason in answer.excluded],
        }

    def summary(self) -> dict[str, Any]:
        """The model, the machine, and what to take."""
        machine = f"{self.machine.device}, {bytes_text(self.machine.ram)}"
        take = {"runtime": self.runtime, "take": self.take.level if self.take else None}
        if self.take is not None and self.take.format != GGUF:
            take["format"] = self.take.format
        return {"model": self.name, **take, "machine": machine, "context": self.context, "priority": self.priority}

    def rows(self) -> list[dict[str, Any]]:
        """One for each level of each runtime, the advised runtime first, from the largest to the smallest: what it
        takes, where it runs, what it loses."""
        return [{**choice.row(), "take": choice is self.take} for choice in self._all()]

    def _all(self) -> Iterator[Choice]:
        for answer in self.answers:
            yield from answer.choices
