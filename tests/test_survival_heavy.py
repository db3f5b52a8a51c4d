"""The full counts: SIGKILL at every persistence call and at 200 random instants, killed again while recovering."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from .faults.forking import CommandLine
from .faults.scenario import Scenario
from .faults.tiny_llama import write_tiny_llama
from .test_survival import VARIANTS

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def command_line() -> Iterator[CommandLine]:
    with CommandLine() as ready:
        yield ready


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("survival") / "tiny")


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_at_every_persistence_call(
    command_line: CommandLine, model: Path, tmp_path: Path, variant: str, request: pytest.FixtureRequest
) -> None:
    scenario = Scenario(command_line, model, tmp_path, VARIANTS[variant])
    # With several threads the order of calls, and so the number of the last one, differs from run to run by a few.
    calls = scenario.calls - (4 if "two threads" in variant else 0)
    scenario.kill_at_calls(range(1, calls + 1), seed=1)
    request.node.user_properties.append(("kills", scenario.kills))
    assert scenario.kills > 1.5 * calls


@pytest.mark.parametrize("variant", ["one file", "two levels, two threads"])
def test_killed_at_two_hundred_random_instants(
    command_line: CommandLine, model: Path, tmp_path: Path, variant: str, request: pytest.FixtureRequest
) -> None:
    scenario = Scenario(command_line, model, tmp_path, VARIANTS[variant])
    seed = 0
    while scenario.kills < 200:
        scenario.kill_at_instants(25, seed=seed)
        seed += 1
        assert seed < 40
    request.node.user_properties.append(("kills", scenario.kills))
    assert scenario.resumed > 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("lasting", [False, True])
def test_every_persistence_call_fails(
    command_line: CommandLine, model: Path, tmp_path: Path, number: int, lasting: bool
) -> None:
    scenario = Scenario(command_line, model, tmp_path, VARIANTS["one file"])
    for call in range(1, scenario.calls + 1):
        directory = tmp_path / f"{call}"
        outcome = scenario.run(directory, **{"fail_from" if lasting else "fail_call": [call, number]})
        if outcome.code != 0:
            assert outcome.code == (6 if number == errno.EROFS else 5), (call, outcome.err)
            scenario.check_visible(directory)
        scenario.recover(directory)
