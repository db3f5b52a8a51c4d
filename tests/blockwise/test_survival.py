"""A run through the blocks is killed, interrupted and lied to; then the same command ends in the same bytes.

Every persistence call is in test_survival_heavy.py; what holds of any run, of this kind or not, in ../test_survival.py.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_quantize.io.journal import parse_journal

from ..faults.forking import CommandLine, Outcome, hashes, recorded
from ..faults.scenario import Scenario
from ..tiny_models import make_tiny
from .tiny import left_behind, write_text

ON_DISK = {
    "constants": [
        ["llm_quantize.memory", "HIDDEN_BYTES", 0],
        ["llm_quantize.memory", "INPUT_BYTES", 0],
    ]
}
GGUF = ("-q", "Q4_0", "--output-type", "q8_0", "--method", "gptq", "--threads", "1")
DIRECTORY = ("-q", "4bit", "--group-size", "32", "--threads", "1")
VARIANTS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "gguf in memory": ("gguf", GGUF, {}),
    "gguf on disk": ("gguf", GGUF, ON_DISK),
    "gptq on disk": ("gptq", DIRECTORY, ON_DISK),
    "awq in memory": ("awq", DIRECTORY, {}),
    "awq on disk": ("awq", DIRECTORY, ON_DISK),
}


@pytest.fixture(scope="module")
def command_line() -> Iterator[CommandLine]:
    with CommandLine("tests.blockwise.warm") as ready:
        yield ready


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("survival") / "tiny", dtype="float32")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The words of a command line that say what is calibrated on."""
    file = write_text(tmp_path_factory.mktemp("text"))
    return ("--calibration-data", str(file), "--calibration-samples", "3", "--sequence-length", "32")


def scenario_of(variant: str, command_line: CommandLine, model: Path, text: tuple[str, ...], root: Path) -> Scenario:
    format, arguments, always = VARIANTS[variant]
    return Scenario(command_line, model, root, (*arguments, *text), format=format, always=always)


@pytest.fixture
def scenario(
    request: pytest.FixtureRequest, command_line: CommandLine, model: Path, text: tuple[str, ...], tmp_path: Path
) -> Scenario:
    return scenario_of(request.param, command_line, model, text, tmp_path)


def on(*variants: str) -> Any:
    return pytest.mark.parametrize("scenario", variants, indirect=True)


@on(*VARIANTS)
def test_killed_at_persistence_calls(scenario: Scenario) -> None:
    assert scenario.calls > 50
    assert not left_behind(scenario.root / "reference")
    scenario.kill_at_calls([scenario.calls // 3, scenario.calls * 3 // 4, scenario.calls - 2])
    assert scenario.kills >= 3


def half_done(scenario: Scenario, name: str, *, after: str) -> Path:
    """A run killed as soon as this was written to its journal: the beginning of a unit's name, or that of a note."""
    directory = scenario.root / name
    text = f'"note":{{"{after}"' if after in ("hidden", "measured") else f'"unit":"{after}'
    assert scenario.run(directory, kill_after_write=text).code == -9
    return directory


def journal_of(directory: Path) -> dict[str, dict[str, Any]]:
    """{unit or note: record}"""
    found = {}
    for path in directory.rglob("*.journal"):
        for record in parse_journal(path.read_bytes())[0]:
            name = record.get("unit") or "note " + ",".join(record.get("note", ()))
            found[name] = record
    return found


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def partial_of(directory: Path, file: int) -> Path:
    (partial,) = (directory / "out").glob("*.partial")
    return partial if partial.is_file() else sorted(partial.glob("*.safetensors"))[0]


@pytest.mark.parametrize(
    ("scenario", "damaged", "after"),
    [
        ("gguf in memory", "blk.0.ffn_up.weight", "blk.1.attn_q.weight"),
        ("gguf on disk", "blk.0.attn_q.weight", "blk.1.attn_v.weight"),
        ("gptq on disk", "model.layers.0.self_attn.k_proj.qweight", "model.layers.1.self_attn.o_proj.qweight"),
        ("awq in memory", "model.layers.0.post_attention_layernorm.weight", "model.layers.1.self_attn.o_proj.qweight"),
        ("awq on disk", "model.layers.0.mlp.down_proj.scales", "model.layers.1.self_attn.o_proj.qweight"),
    ],
    indirect=["scenario"],
)
def test_a_flipped_byte_in_a_finished_part_is_found_and_mended(scenario: Scenario, damaged: str, after: str) -> None:
    directory = half_done(scenario, "flipped", after=after)
    record = next(record for unit, record in journal_of(directory).items() if unit.startswith(damaged))
    flip(partial_of(directory, record["span"][0]), record["span"][1] + 3)
    outcome = scenario.run(directory)
    assert outcome.code == 0, outcome.out
    assert any(damaged in warning and "journal record" in warning for warning in scenario.warned(outcome))
    assert hashes(directory) == scenario.expected


@on("awq in memory", "awq on disk")
def test_a_flipped_byte_in_a_rescaled_norm_when_all_matrices_are_done(scenario: Scenario) -> None:
    """Only the norm is missing then, and only the run can make it again."""
    directory = half_done(scenario, "last", after="measured")
    name = "model.layers.0.input_layernorm.weight"
    record = next(record for unit, record in journal_of(directory).items() if unit.startswith(name))
    flip(partial_of(directory, 0), record["span"][1])
    outcome = scenario.run(directory)
    assert outcome.code == 0, outcome.out
    assert hashes(directory) == scenario.expected


@on("gguf on disk", "awq on disk")
def test_damaged_hidden_states_are_made_again(scenario: Scenario) -> None:
    directory = half_done(scenario, "hidden", after="hidden")
    states = sorted((directory / "out").glob("*.hidden/[0-3]"))
    assert states
    for path in states:
        flip(path, 5)
    outcome = scenario.run(directory)
    assert outcome.code == 0, outcome.out
    assert any("hidden states are damaged" in warning for warning in scenario.warned(outcome))
    assert hashes(directory) == scenario.expected


@on("gguf on disk")
def test_hidden_states_are_used_again(scenario: Scenario) -> None:
    """A run that goes on from them has fewer windows to run than one that goes through all blocks again."""
    directory = half_done(scenario, "used", after="hidden")
    other = shutil.copytree(directory, scenario.root / "unused")
    shutil.rmtree(next((other / "out").glob("*.hidden")))
    outcomes = [scenario.run(place) for place in (directory, other)]
    assert [outcome.code for outcome in outcomes] == [0, 0]
    assert outcomes[0].made < outcomes[1].made
    for place in (directory, other):
        assert hashes(place) == scenario.expected


@on("gguf on disk", "awq in memory")
def test_a_signal_stops_it_and_the_same_command_goes_on(scenario: Scenario) -> None:
    for share, number in ((2, signal.SIGTERM), (3, signal.SIGINT)):
        directory = scenario.root / f"stopped-{share}"
        outcome = scenario.run(directory, signal_call=[[scenario.calls * share // 4, number]])
        assert outcome.code == 75, outcome.out
        assert outcome.error["error"] == "stopped"
        assert recorded(directory) > 0
        scenario.recover(directory)


@on("gguf in memory", "awq on disk")
def test_a_changed_source_is_refused_by_name(scenario: Scenario) -> None:
    after = {"gguf": "blk.0.ffn_down", "awq": "model.layers.0.mlp.down_proj.qweight"}[scenario.format]
    scenario.model = Path(shutil.copytree(scenario.model, scenario.root / "own" / "tiny"))
    directory = half_done(scenario, "changed", after=after)
    weights = scenario.model / "model.safetensors"
    size = int.from_bytes(weights.read_bytes()[:8], "little")
    offsets = json.loads(weights.read_bytes()[8 : 8 + size])["model.layers.0.mlp.down_proj.weight"]["data_offsets"]
    flip(weights, 8 + size + offsets[0] + 1)
    outcome = scenario.run(directory)
    assert outcome.code == 8, outcome.out
    assert {"gguf": "ffn_down", "awq": "down_proj"}[scenario.format] in outcome.error["tensor"]
    assert scenario.run(directory, "--overwrite").code == 0
    assert hashes(directory) != scenario.expected
    assert not left_behind(directory)


@on("gptq on disk")
def test_a_touched_source_is_read_again_and_the_run_goes_on(scenario: Scenario) -> None:
    """Killed when all is written, the model card too, which is no part of the source."""
    scenario.model = Path(shutil.copytree(scenario.model, scenario.root / "own" / "tiny"))
    directory = half_done(scenario, "touched", after="model card")
    os.utime(scenario.model / "model.safetensors")
    scenario.recover(directory)


@on("gguf on disk", "gptq on disk")
def test_another_method_is_refused_or_replaces_what_was_begun(scenario: Scenario) -> None:
    directory = half_done(scenario, "other", after="hidden")
    place = ("quantize", scenario.model, scenario.format, "-o", directory / "out")
    own = [word for word in scenario.arguments if word not in ("--method", "gptq")]
    words = (*place, *own[: own.index("--calibration-data")], "--method", "rtn")
    outcome: Outcome = scenario.command_line.run(*words)
    assert outcome.code == 2, outcome.out
    assert "--overwrite" in outcome.error["remedy"]
    assert scenario.command_line.run(*words, "--overwrite").code == 0
    assert not left_behind(directory)
    anew = scenario.root / "anew" / "out"
    assert scenario.command_line.run(*words[:4], anew, *words[5:]).code == 0
    assert hashes(directory / "out") == hashes(anew)


@on("gptq on disk")
def test_an_existing_directory(scenario: Scenario) -> None:
    directory = scenario.root / "existing"
    assert scenario.run(directory).code == 0
    outcome = scenario.run(directory)
    assert (outcome.code, outcome.made) == (0, 0)
    assert json.loads(outcome.out)["artifacts"][0]["status"] == "already complete"
    assert hashes(directory) == scenario.expected
    assert scenario.run(directory, "--overwrite").made > 0
    assert hashes(directory) == scenario.expected
    (artifact,) = (directory / "out").iterdir()
    (artifact / "notes.txt").write_text("mine")
    for more in ((), ("--overwrite",)):
        before = hashes(directory)
        outcome = scenario.run(directory, *more)
        assert outcome.code == (6 if more else 0)
        assert hashes(directory) == before
    (artifact / "model.safetensors").unlink(missing_ok=True)
    assert scenario.run(directory).code == 2


@on("gguf on disk")
def test_what_a_finished_run_could_not_take_away_goes_with_the_next(scenario: Scenario) -> None:
    directory = scenario.root / "late"
    assert scenario.run(directory).code == 0
    (artifact,) = (path for path in (directory / "out").iterdir() if path.suffix == ".gguf")
    hidden = artifact.with_name(artifact.name + ".hidden")
    hidden.mkdir()
    for name in ("0", "3", "llm-quantize-ab12.activations"):
        (hidden / name).write_bytes(b"states")
    outcome = scenario.run(directory)
    assert (outcome.code, outcome.made) == (0, 0)
    assert hashes(directory) == scenario.expected
    hidden.mkdir()
    (hidden / "mine").write_text("stays")
    assert scenario.run(directory).code == 0
    assert (hidden / "mine").exists()
