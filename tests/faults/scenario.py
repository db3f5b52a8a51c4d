"""Kill, kill again while recovering, run again: what must hold after every step."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .forking import CommandLine, Outcome, finished, hashes, recorded

BY_BYTES_ALONE = ["llm_quantize.io.output", "SYNC_SECONDS", 1e9]
"""A slow machine would save more often than the run whose calls were counted."""


@dataclass
class Scenario:
    """A command whose result is known. ``arguments`` follow the output directory; ``root`` holds one per try;
    ``always``: faults of every run (see server.py)."""

    command_line: CommandLine
    model: Path
    root: Path
    arguments: tuple[str, ...]
    kills: int = 0
    resumed: int = 0
    expected: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    units: int = 0
    calls: int = 0
    times: list[float] = field(default_factory=list)
    format: str = "gguf"
    command: str = "quantize"
    always: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        outcome = self.run(self.root / "reference")
        assert outcome.code == 0, outcome.err
        assert outcome.calls is not None
        self.warnings = self.warned(outcome)
        self.expected, self.calls, self.units = hashes(self.root / "reference"), len(outcome.calls), outcome.made

    def run(self, directory: Path, *more: str, **faults: Any) -> Outcome:
        """The command into ``directory``; ``{}`` in an argument stands for it."""
        words = [word.replace("{}", str(directory)) for word in (*self.arguments, *more)]
        place = ("-o", directory / "out")
        given = {**self.always, **faults}
        given["constants"] = [*given.get("constants", []), BY_BYTES_ALONE]
        return self.command_line.run(self.command, self.model, self.format, *place, *words, **given)

    @staticmethod
    def warned(outcome: Outcome) -> list[str]:
        return [event["text"] for event in outcome.events if event["event"] == "warning"]

    def check_visible(self, directory: Path) -> None:
        """Nothing stands under a final name but what belongs there, whole."""
        for name, digest in finished(directory).items():
            assert self.expected[name] == digest, name

    def recover(self, directory: Path) -> Outcome:
        """The same command to its end: the bytes of an uninterrupted run, nothing recorded done again, nothing left."""
        before = recorded(directory)
        outcome = self.run(directory)
        assert outcome.code == 0, outcome.err + outcome.out
        assert hashes(directory) == self.expected
        assert self.warned(outcome) == self.warnings
        if before and outcome.made + outcome.resumed:
            assert outcome.resumed == before
        self.resumed += outcome.resumed
        shutil.rmtree(directory)
        return outcome

    def kill_at_calls(self, calls: Iterable[int], *, seed: int = 0) -> None:
        """SIGKILL ahead of each of these persistence calls, then again at a random call of the recovery."""
        chance = random.Random(seed)
        for call in calls:
            directory = self.root / f"call-{call}"
            outcome = self.run(directory, kill_call=call)
            assert outcome.code == -9, (call, outcome.code, outcome.err)
            self.check_visible(directory)
            again = self.run(directory, kill_call=chance.randrange(1, self.calls - call // 2))
            assert again.code in (-9, 0), again.err
            self.check_visible(directory)
            self.kills += 1 + (again.code == -9)
            self.recover(directory)

    def _shortest_run(self) -> float:
        """Seconds of the quickest of three undisturbed runs: the time in which a kill can strike."""
        if not self.times:
            for number in range(3):
                began = time.monotonic()
                assert self.run(self.root / f"timing-{number}").code == 0
                self.times.append(time.monotonic() - began)
        return min(self.times)

    def kill_at_instants(self, count: int, *, seed: int = 0) -> None:
        """SIGKILL after random times up to that of a whole run, twice, then the end."""
        chance = random.Random(seed)
        longest = self._shortest_run()
        for number in range(count):
            directory = self.root / f"instant-{number}"
            for _ in range(2):
                outcome = self.run(directory, kill_after=chance.uniform(0.0, longest))
                assert outcome.code in (-9, 0), outcome.err
                self.kills += outcome.code == -9
                if directory.exists():
                    self.check_visible(directory)
            self.recover(directory)
