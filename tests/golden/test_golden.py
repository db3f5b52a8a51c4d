"""Today's bytes: every format, level, method and transform over four tiny models, and the JSON of the commands.

A failure names the case and the files. Where a byte changes on purpose, make.py says what to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.golden import harness
from tests.golden.cases import CALIBRATED, COMMANDS, PLAIN, Case, Command
from tests.golden.models import digest, make_models


@pytest.fixture(scope="session")
def origin() -> dict[str, Any]:
    return harness.stored("origin")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, origin: Mapping[str, Any]) -> Path:
    """The models, proved to be those that the golden files were made from."""
    directory = tmp_path_factory.mktemp("golden").resolve() / "models"
    make_models(directory)
    found = {path.name: digest(path) for path in sorted(directory.iterdir())}
    assert found == origin["sources"], "the models themselves have changed: no golden file says anything now"
    return directory


@pytest.fixture(scope="session")
def same_machine(origin: Mapping[str, Any]) -> bool:
    return bool(harness.machine() == origin["machine"])


def test_every_case_has_a_golden_record_and_no_record_is_without_a_case() -> None:
    for name, cases in (("plain", PLAIN), ("calibrated", CALIBRATED), ("commands", COMMANDS)):
        assert list(harness.stored(name)) == [case.id for case in cases]
    assert set(harness.stored("memory")) == {case.id for case in (*PLAIN, *CALIBRATED, *COMMANDS)}


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.id)
def test_plain(case: Case, models: Path, tmp_path: Path, origin: Mapping[str, Any]) -> None:
    found = harness.quantized(case, models, tmp_path, origin["version"])
    memory = found.pop("memory")
    _agree(harness.stored("plain")[case.id], found)
    _agree_in_memory(case.id, memory)


@pytest.mark.parametrize("case", CALIBRATED, ids=lambda case: case.id)
def test_calibrated(case: Case, models: Path, tmp_path: Path, origin: Mapping[str, Any], same_machine: bool) -> None:
    found = harness.quantized(case, models, tmp_path, origin["version"])
    memory = found.pop("memory")
    golden = harness.stored("calibrated")[case.id]
    if same_machine:
        _agree(golden, found)
    else:
        for key in ("exit", "warnings", "outline"):
            _agree(golden[key], found[key])
        figures = (harness.kld_figures(golden), harness.kld_figures(found))
        assert not list(
            harness.differences(*figures, relative=harness.KLD_TOLERANCE, floor=harness.KLD_FLOOR, at="measured kld")
        )
    _agree_in_memory(case.id, memory)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.id)
def test_command(command: Command, models: Path, tmp_path: Path, origin: Mapping[str, Any], same_machine: bool) -> None:
    found = harness.commanded(command, models, tmp_path, origin["version"])
    memory = found.pop("memory")
    golden = harness.stored("commands")[command.id]
    if same_machine:
        _agree(golden, found)
    else:
        if command.measures:
            golden["files"], found["files"] = list(golden["files"]), list(found["files"])
        _agree(golden, found, relative=harness.FIGURE_TOLERANCE, floor=harness.FIGURE_FLOOR)
    _agree_in_memory(command.id, memory)


def _agree(golden: Any, found: Any, **tolerance: float) -> None:
    lines = list(harness.differences(golden, found, **tolerance))
    if lines:
        pytest.fail("not what it was:\n" + "\n".join(lines[:40]), pytrace=False)


def _agree_in_memory(name: str, found: Any) -> None:
    lines = list(harness.differences(harness.stored("memory")[name], found))
    if lines:
        pytest.fail(
            "the outputs are what they were, figures of memory are not:\n" + "\n".join(lines[:40]), pytrace=False
        )
