"""Hidden states that stay between two blocks, and are found again by the run that comes after a kill."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_quantize.io.artifact_paths import hidden_directory, journal_path
from llm_quantize.io.leftovers import discard_hidden
from llm_quantize.io.output import OutputFile, ResumableOutput
from llm_quantize.streams.hidden import Activations, Kept, close

SHAPE = (2, 3, 4)


@pytest.fixture
def output(tmp_path: Path) -> Iterator[ResumableOutput]:
    target = tmp_path / "out"
    with ResumableOutput(
        target,
        [OutputFile("out", 1, b"")],
        identity={},
        spans={},
        journal_path=journal_path(target),
        on_warning=lambda _: None,
    ) as opened:
        yield opened


def kept_of(output: ResumableOutput, *, in_memory: bool = False) -> Kept:
    return Kept(output, SHAPE, torch.float32, None if in_memory else hidden_directory(output.target))


def filled(states: Activations, value: float) -> Activations:
    for window in range(SHAPE[0]):
        states.write(window, torch.full(SHAPE[1:], float(value + window)))
    return states


def leave(kept: Kept, index: int, lanes: int) -> None:
    states = [filled(kept.entering(index + 1, lane), 10 * lane) for lane in range(lanes)]
    kept.remember(index, states)
    close(states)


@pytest.mark.parametrize("lanes", [1, 2])
def test_found_again(lanes: int, output: ResumableOutput) -> None:
    kept, told = kept_of(output), list[str]()
    leave(kept, 4, lanes)
    found = kept.resume(5, range(lanes), told.append)
    assert found is not None
    states, first = found
    assert first == 5
    assert [float(one.read(1)[0, 0]) for one in states] == [10 * lane + 1 for lane in range(lanes)]
    close(states)
    assert not told
    assert sorted(path.name for path in hidden_directory(output.target).iterdir()) == ["1", "3"][:lanes]
    discard_hidden(output.target)
    assert not hidden_directory(output.target).exists()


def test_what_leaves_a_block_spares_what_entered_it(output: ResumableOutput) -> None:
    kept = kept_of(output)
    before = filled(kept.entering(7, 1), 1.0)
    after = filled(kept.leaving(7, before, 1), 2.0)
    assert float(before.read(0)[0, 0]) == 1.0
    close([before, after])
    in_memory = kept_of(output, in_memory=True)
    before = in_memory.entering(7)
    assert in_memory.leaving(7, before) is before
    in_memory.remember(7, [before])
    assert "hidden" not in output.notes
    assert in_memory.resume(8, [0], pytest.fail) is None


def test_damage_is_said_once(output: ResumableOutput) -> None:
    kept, told = kept_of(output), list[str]()
    leave(kept, 0, 1)
    file = hidden_directory(output.target) / "1"
    file.write_bytes(b"\1" + file.read_bytes()[1:])
    assert kept.resume(1, [0], told.append) is None
    assert len(told) == 1
    assert "hidden states are damaged" in told[0]
    assert kept.resume(1, [0], told.append) is None
    assert len(told) == 1


@pytest.mark.parametrize("wanted", [0, 3])
def test_states_from_behind_the_block_that_is_wanted_are_of_no_use(wanted: int, output: ResumableOutput) -> None:
    kept = kept_of(output)
    leave(kept, 3, 1)
    assert kept.resume(wanted, [0], pytest.fail) is None
    assert output.notes["hidden"] is None


@pytest.mark.parametrize("note", [{}, [], None, {"after": "1", "sha256": 1}, {"after": 1, "sha256": "x"}])
def test_odd_notes(note: Any, output: ResumableOutput) -> None:
    output.note({"hidden": note})
    told: list[str] = []
    assert kept_of(output).resume(5, [0], told.append) is None
