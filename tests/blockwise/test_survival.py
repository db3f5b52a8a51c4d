"""A run through the blocks is killed, interrupted and lied to; then the same command ends in the same bytes.

Every persistence call is in test_survival_heavy.py; what holds of any run, of this kind or not, in ../test_survival.py.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llm_quantize import events, memory
from llm_quantize.artifacts import preflight
from llm_quantize.calibration.collect import calibrate
from llm_quantize.errors import ResourceError
from llm_quantize.events import EventSink
from llm_quantize.formats.recipe import Recipe
from llm_quantize.formats.recipe_file import write_recipe
from llm_quantize.io.journal import parse_journal
from llm_quantize.pipeline import open_source, quantize

from ..faults.forking import CommandLine, Outcome, hashes, recorded
from ..faults.scenario import Scenario
from ..tiny_models import make_tiny
from .tiny import left_behind, options, write_text

ON_DISK = {
    "constants": [
        ["llm_quantize.memory", "HIDDEN_BYTES", 0],
        ["llm_quantize.memory", "INPUT_BYTES", 0],
    ]
}
GGUF = ("-q", "Q4_0", "--output-type", "q8_0", "--method", "gptq", "--threads", "1")
DIRECTORY = ("-q", "4bit", "--group-size", "32", "--threads", "1")
RECIPE = "mixed.recipe.json"
MIXED = {"model.layers.0.mlp.down_proj": "int2_g32", "model.layers.1.self_attn.o_proj": "int6", "lm_head": "int8_g32"}
VARIANTS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "gguf in memory": ("gguf", GGUF, {}),
    "gguf on disk": ("gguf", GGUF, ON_DISK),
    "gptq on disk": ("gptq", DIRECTORY, ON_DISK),
    "gptq of the source's inputs on disk": ("gptq", (*DIRECTORY, "--inputs", "source"), ON_DISK),
    "awq in memory": ("awq", DIRECTORY, {}),
    "awq on disk": ("awq", DIRECTORY, ON_DISK),
    "ctranslate2 on disk": ("ctranslate2", ("-q", "int8", "--threads", "1"), ON_DISK),
    "mlx on disk": ("mlx", DIRECTORY, ON_DISK),
    "mixed bits on disk": ("compressed-tensors", ("--recipe", RECIPE, *DIRECTORY[2:]), ON_DISK),
    "nvfp4 in memory": ("compressed-tensors", ("-q", "NVFP4", "--transform", "smoothquant", "--threads", "1"), {}),
    "keys and values on disk": (
        "compressed-tensors",
        ("-q", "FP8", "--kv-cache", "fp8", "--threads", "1"),
        ON_DISK,
    ),
    "refined in memory": ("gptq", ("-q", "2bit", *DIRECTORY[2:], "--refine", "3"), {}),
    "refined on disk": ("gguf", (*GGUF, "--refine", "3"), ON_DISK),
    "words in memory": ("gguf", ("-q", "IQ2_M", "--method", "gptq", "--threads", "1"), {}),
}
WIDE = ("words in memory",)
"""Variants whose types hold rows of 256."""


@pytest.fixture(scope="module")
def command_line() -> Iterator[CommandLine]:
    with CommandLine("tests.blockwise.warm") as ready:
        yield ready


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("survival") / "tiny", dtype="float32")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4}
    return make_tiny("llama", tmp_path_factory.mktemp("survival") / "wide", dtype="float32", **shape)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The words of a command line that say what is calibrated on: windows enough that one is held back."""
    file = write_text(tmp_path_factory.mktemp("text"))
    return ("--calibration-data", str(file), "--calibration-samples", "5", "--sequence-length", "32")


def scenario_of(variant: str, command_line: CommandLine, model: Path, text: tuple[str, ...], root: Path) -> Scenario:
    format, arguments, always = VARIANTS[variant]
    if RECIPE in arguments:
        write_recipe(root / RECIPE, Recipe("mixed", "W4A16", MIXED, form=format))
        arguments = tuple(str(root / RECIPE) if word == RECIPE else word for word in arguments)
    return Scenario(command_line, model, root, (*arguments, *text), format=format, always=always)


@pytest.fixture
def scenario(
    request: pytest.FixtureRequest,
    command_line: CommandLine,
    model: Path,
    wide: Path,
    text: tuple[str, ...],
    tmp_path: Path,
) -> Scenario:
    chosen = wide if request.param in WIDE else model
    return scenario_of(request.param, command_line, chosen, text, tmp_path)


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
        ("keys and values on disk", "model.layers.0.self_attn.v_scale", "model.layers.1.self_attn.o_proj.weight"),
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


def _change(model: Path, tensor: str, at: int = 2) -> None:
    """Flip a bit of one weight; size and header stay."""
    weights = model / "model.safetensors"
    size = int.from_bytes(weights.read_bytes()[:8], "little")
    offsets = json.loads(weights.read_bytes()[8 : 8 + size])[tensor]["data_offsets"]
    flip(weights, 8 + size + offsets[0] + at)


MADE_OF_AN_OLDER_SOURCE = [
    # a weight of which no matrix is made, but whose values all of them have seen
    ("gguf on disk", "note hidden", "model.layers.0.input_layernorm.weight"),
    ("awq on disk", "model.layers.1.self_attn.k_proj.qweight", "model.layers.0.mlp.up_proj.weight"),
    # a matrix that is not made yet, but is one of those whose scales were found together
    ("awq in memory", "model.layers.0.self_attn.q_proj.qweight", "model.layers.0.self_attn.v_proj.weight"),
    # what was measured, and the model card that says it
    ("gptq on disk", "note measured", "model.layers.0.mlp.down_proj.weight"),
    ("gptq on disk", "model card", "lm_head.weight"),
]


@pytest.mark.parametrize(
    ("scenario", "after", "tensor"), MADE_OF_AN_OLDER_SOURCE, ids=lambda value: str(value), indirect=["scenario"]
)
@pytest.mark.parametrize("killed", [False, True], ids=["at once", "killed again"])
def test_nothing_that_depended_on_the_older_source_is_kept(
    scenario: Scenario, after: str, tensor: str, killed: bool
) -> None:
    scenario.model = Path(shutil.copytree(scenario.model, scenario.root / "own" / "tiny"))
    directory = half_done(scenario, "changed", after=after.removeprefix("note "))
    _change(scenario.model, tensor)
    outcome = scenario.run(directory)
    assert outcome.code == 8, outcome.out
    assert "--overwrite" in outcome.error["remedy"]
    if killed:  # what was forgotten once stays forgotten, though the source does not change any more
        assert scenario.run(directory, "--overwrite", kill_after_write='"source_times"').code == -9
    outcome = scenario.run(directory, *([] if killed else ["--overwrite"]))
    assert outcome.code == 0, outcome.out
    anew = scenario.root / "anew"
    assert scenario.run(anew).code == 0
    assert hashes(anew) != scenario.expected
    assert hashes(directory) == hashes(anew)
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


def _child_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def _wait_until_stopped(pid: int) -> None:
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < deadline
        time.sleep(0.01)


@on("gguf on disk")
def test_a_second_command_leaves_the_hidden_states_of_the_running_one(scenario: Scenario) -> None:
    """It finds the old artifact complete while another is being made in its place."""
    directory = scenario.root / "both"
    assert scenario.run(directory).code == 0
    stop = [[scenario.calls * 3 // 4, signal.SIGSTOP]]
    with CommandLine("tests.blockwise.warm") as other, ThreadPoolExecutor(1) as pool:
        scenario.command_line, first = other, scenario.command_line
        running = pool.submit(scenario.run, directory, "--overwrite", signal_call=stop)
        while not list((directory / "out").glob("*.hidden/?")):
            time.sleep(0.01)
        child = _child_of(other.pid)
        try:
            _wait_until_stopped(child)
            scenario.command_line = first
            states = hashes(directory)
            assert any(".hidden" in name for name in states)
            outcome = scenario.run(directory)
            assert (outcome.code, outcome.made) == (0, 0)
            assert hashes(directory) == states
            assert scenario.run(directory, "--overwrite").code == 10
            assert hashes(directory) == states
        finally:
            os.kill(child, signal.SIGCONT)
        assert running.result(60).code == 0
    assert hashes(directory) == scenario.expected


class _StoppedError(Exception):
    pass


@pytest.mark.parametrize("what", ["artifact", "statistics"])
def test_a_resume_needs_no_space_that_it_holds_already(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setenv("LLM_QUANTIZE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(memory, "HIDDEN_BYTES", 0)
    file = write_text(tmp_path)
    chosen = options(file, samples=3, length=32)
    free = os.statvfs(tmp_path)

    def make(on_event: EventSink) -> None:
        if what == "artifact":
            quantize(str(model), "gguf", levels=["Q4_0"], output_dir=tmp_path, options=chosen, on_event=on_event)
            return
        source = open_source(str(model))
        with source.checkpoint:
            calibrate(source, chosen.calibration, on_event=on_event)

    def stop(event: object) -> None:
        if isinstance(event, events.Progress) and event.unit == "tokens" and 2 * event.done > event.total:
            raise _StoppedError

    with pytest.raises(_StoppedError):
        make(stop)
    held = sum(path.stat().st_blocks * 512 for path in tmp_path.rglob("*") if path.is_file())
    assert list(tmp_path.rglob("*.hidden/?"))
    found = SimpleNamespace(f_bavail=held // 4, f_frsize=1, f_blocks=free.f_blocks)
    monkeypatch.setattr(preflight.os, "statvfs", lambda path: found)
    make(lambda event: None)
    found.f_bavail = 1
    chosen = options(file, samples=4, length=32, overwrite=True, ignore_space=True)
    with pytest.raises(ResourceError, match="not enough disk space") as caught:
        make(lambda event: None)
    assert ("-o" if what == "artifact" else "LLM_QUANTIZE_CACHE") in str(caught.value.remedy)
