"""SIGKILL at every persistence call of every kind of run, and killed again while recovering."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..faults.forking import CommandLine
from .test_survival import VARIANTS, command_line, model, scenario_of, text

__all__ = ["command_line", "model", "text"]  # fixtures

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(3600)]


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_at_every_persistence_call(
    command_line: CommandLine, model: Path, text: tuple[str, ...], tmp_path: Path, variant: str, part: int
) -> None:
    scenario = scenario_of(variant, command_line, model, text, tmp_path)
    scenario.kill_at_calls(range(1 + part, scenario.calls + 1, 4), seed=part)
    assert scenario.kills > scenario.calls // 4
    assert scenario.resumed > 0
