"""The command line is killed, starved, interrupted and lied to; then the same command ends in the same bytes.

Full counts are in test_survival_heavy.py; what holds of the output alone, at every byte, is in io/test_output.py.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_quantize import kernels, pipeline
from llm_quantize.errors import IntegrityError, LlmQuantizeError
from llm_quantize.io.gguf_file import read_gguf
from llm_quantize.io.journal import parse_journal, record_line

from .faults.forking import QUIET_MACHINE, CommandLine, Outcome, finished, hashes, recorded
from .faults.scenario import Scenario
from .faults.tiny_llama import write_fp8_llama, write_sparse_llama, write_tiny_llama

VARIANTS = {
    "one file": ("-q", "Q4_K_M", "--threads", "1"),
    "two levels, two threads": ("-q", "Q4_0", "-q", "Q6_K", "--threads", "2"),
    "split": ("-q", "Q8_0", "--split-max-size", "300K", "--threads", "1"),
    "journal elsewhere": ("-q", "Q5_0", "--checkpoint-dir", "{}/journals", "--threads", "1"),
}


@pytest.fixture(scope="module")
def command_line() -> Iterator[CommandLine]:
    with CommandLine() as ready:
        yield ready


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("survival") / "tiny")


@pytest.fixture
def scenario(command_line: CommandLine, model: Path, tmp_path: Path) -> Scenario:
    return Scenario(command_line, model, tmp_path, VARIANTS["one file"])


@pytest.fixture
def own_model(model: Path, tmp_path: Path) -> Path:
    """A model that the test may change."""
    return Path(shutil.copytree(model, tmp_path / "own"))


def half_done(command_line: CommandLine, model: Path, directory: Path, *more: str) -> Outcome:
    """A run killed in the middle, with some units recorded."""
    outcome = command_line.run("quantize", model, "-q", "Q4_K", "-o", directory, "--threads", 1, *more, kill_call=30)
    assert outcome.code == -9
    assert recorded(directory) > 3
    return outcome


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_at_persistence_calls(command_line: CommandLine, model: Path, tmp_path: Path, variant: str) -> None:
    scenario = Scenario(command_line, model, tmp_path, VARIANTS[variant])
    assert scenario.calls > 50
    ending = range(scenario.calls - 9, scenario.calls + 1, 2)
    scenario.kill_at_calls([*range(1, scenario.calls - 9, 11), *ending])
    assert scenario.kills > scenario.calls // 11
    assert scenario.resumed > 0


@pytest.mark.parametrize("words", ["-q int8 --method rtn", "-q float16"])
def test_killed_while_a_ctranslate2_model_is_made(
    command_line: CommandLine, model: Path, tmp_path: Path, words: str
) -> None:
    """Headers stand between the data, and are written like the front of a file."""
    scenario = Scenario(command_line, model, tmp_path, (*words.split(), "--threads", "1"), format="ctranslate2")
    assert scenario.calls > 100
    scenario.kill_at_calls([*range(1, scenario.calls - 9, 71), *range(scenario.calls - 9, scenario.calls + 1, 4)])
    assert scenario.resumed > 0


def test_killed_while_a_directory_is_made_of_a_gguf_file(
    command_line: CommandLine, model: Path, tmp_path: Path
) -> None:
    """Its small files are not copied but made."""
    (origin,) = pipeline.quantize(str(model), "gguf", levels=["F16"], output_dir=tmp_path, options=pipeline.Options())
    arguments = ("-q", "BF16", "--threads", "1")
    scenario = Scenario(command_line, origin.path, tmp_path, arguments, format="safetensors")
    assert any(name.endswith("tokenizer.json") for name in scenario.expected)
    assert scenario.calls > 50
    scenario.kill_at_calls([*range(1, scenario.calls - 9, 41), *range(scenario.calls - 9, scenario.calls + 1, 4)])
    assert scenario.resumed > 0


def test_killed_with_several_split_levels(command_line: CommandLine, model: Path, tmp_path: Path) -> None:
    arguments = ("-q", "Q2_K", "-q", "F16", "--split-max-size", "400K", "--threads", "3")
    scenario = Scenario(command_line, model, tmp_path, arguments)
    scenario.kill_at_calls(range(30, scenario.calls - 8, 29))
    assert scenario.resumed > 20


def test_killed_where_fallbacks_are_measured(command_line: CommandLine, tmp_path: Path) -> None:
    """Rows of 320 have no type of the level; which one loses least is found again by every run."""
    model = write_tiny_llama(tmp_path / "odd", inner=320)
    arguments = ["quantize", str(model), "gguf", "-q", "Q2_K", "--fallback", "best", "--threads", "1", "-o"]
    whole = command_line.run(*arguments, tmp_path / "reference")
    assert whole.code == 20
    assert whole.calls is not None
    assert b"iq4_nl" in (tmp_path / "reference").joinpath("odd-Q2_K.gguf.manifest.json").read_bytes()
    for call in range(5, len(whole.calls), len(whole.calls) // 8):
        out = tmp_path / f"killed-{call}"
        assert command_line.run(*arguments, out, kill_call=call).code == -9
        assert command_line.run(*arguments, out).code == 20
        assert hashes(out) == hashes(tmp_path / "reference")


def test_killed_at_random_instants(scenario: Scenario) -> None:
    scenario.kill_at_instants(10)
    assert scenario.kills >= 5


OVERWRITTEN = {
    "file": ("gguf", VARIANTS["one file"]),
    "split": ("gguf", (*VARIANTS["one file"], "--split-max-size", "300K")),
    "directory": ("safetensors", ("-q", "F32", "--threads", "1")),
}


@pytest.mark.parametrize("kind", OVERWRITTEN)
def test_killed_while_overwriting(command_line: CommandLine, model: Path, tmp_path: Path, kind: str) -> None:
    """The old artifact stays until the new one is whole, and either is right."""
    format, arguments = OVERWRITTEN[kind]
    scenario = Scenario(command_line, model, tmp_path / kind, arguments, format=format)
    resumed: list[int] = []
    last = scenario.calls + 1  # where the old artifact is removed and the new one is put in place, call by call
    for call in [*range(2, last - 13, 13), *range(last - 13, last + 9)]:
        directory = tmp_path / f"{call}"
        assert scenario.run(directory).code == 0
        outcome = scenario.run(directory, "--overwrite", kill_call=call)
        if outcome.code == 0:
            assert outcome.made == scenario.units
            break
        assert outcome.code == -9
        scenario.check_visible(directory)
        before = 0
        # Until the rename what is recorded goes on; after it the whole work is asked for anew.
        if [path for path in directory.rglob("*.partial") if ".replaced" not in path.name]:
            records, _ = parse_journal(b"".join(path.read_bytes() for path in directory.rglob("*.journal")))
            before = sum("unit" in record for record in records)
        outcome = scenario.run(directory, "--overwrite")
        assert outcome.code == 0
        assert outcome.resumed == before
        assert not [event for event in outcome.events if event["event"] == "warning"]
        assert hashes(directory) == scenario.expected
        resumed.append(before)
    assert call > 50
    assert max(resumed) == scenario.units


def test_a_plain_command_after_a_killed_overwrite_of_a_directory(
    command_line: CommandLine, model: Path, tmp_path: Path
) -> None:
    """It finds the old artifact complete, or goes on with the new one, and leaves nothing else."""
    format, arguments = OVERWRITTEN["directory"]
    scenario = Scenario(command_line, model, tmp_path, arguments, format=format)
    last = scenario.calls + 1
    for call in [2, 4, 7, *range(12, last - 5, 9), *range(last - 5, last + 12)]:
        directory = tmp_path / f"{call}"
        assert scenario.run(directory).code == 0
        if scenario.run(directory, "--overwrite", kill_call=call).code == 0:
            break
        outcome = scenario.run(directory)
        assert outcome.code == 0, outcome.out
        assert hashes(directory) == scenario.expected, call
    assert call > last


def test_without_checkpoints_a_killed_run_starts_again(scenario: Scenario, tmp_path: Path) -> None:
    directory = tmp_path / "again"
    for call in (5, 15, 25):
        assert scenario.run(directory, "--no-checkpoints", kill_call=call).code == -9
        assert not list(directory.rglob("*.journal"))
        assert finished(directory) == {}
    outcome = scenario.run(directory, "--no-checkpoints")
    assert (outcome.code, outcome.made, outcome.resumed) == (0, scenario.units, 0)
    assert hashes(directory) == scenario.expected


def test_disk_full_at_a_call_and_then_room_again(scenario: Scenario, tmp_path: Path) -> None:
    for call in range(1, scenario.calls + 1, 7):
        directory = tmp_path / f"full-{call}"
        outcome = scenario.run(directory, fail_from=[call, errno.ENOSPC])
        if outcome.code == 0:  # only taking away what is no longer needed failed: that is allowed to fail no run
            continue
        assert outcome.code == 5, outcome.err
        assert outcome.error["error"] == "resources"
        assert "same command" in outcome.error["remedy"]
        scenario.check_visible(directory)
        scenario.recover(directory)


def test_disk_errors(scenario: Scenario, tmp_path: Path) -> None:
    for call in range(2, scenario.calls + 1, 9):
        directory = tmp_path / f"broken-{call}"
        outcome = scenario.run(directory, fail_call=[call, errno.EIO])
        if outcome.code == 0:
            continue
        assert outcome.code == 5, outcome.err
        scenario.check_visible(directory)
        scenario.recover(directory)


def _tmpfs(size: str) -> list[str] | None:
    """A command prefix that runs the rest with an empty tmpfs of this size on $1; None where nobody may mount."""
    script = f'mount -t tmpfs -o size={size} none "$1" && shift && exec "$@"'
    prefix = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"]
    try:
        subprocess.run([*prefix, "/mnt", "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return prefix


_FILLED = """
import os, sys
from pathlib import Path
from llm_quantize.cli import run
out, model, where = sys.argv[1:]
filler = Path(where) / "filler"
command = ["--json", "quantize", model, "-q", "Q8_0", "-o", where + "/out"]
filler.write_bytes(bytes(700_000))
assert run(command) == 5  # seen before any work
assert run([*command, "--ignore-space"]) == 5  # the disk itself says no
assert not list(Path(where).glob("out/*.gguf"))
filler.unlink()
assert run(command) == 0
Path(out).write_bytes(next(Path(where).glob("out/*.gguf")).read_bytes())
"""


def test_small_disk(command_line: CommandLine, model: Path, tmp_path: Path) -> None:
    reference = command_line.run("quantize", model, "-q", "Q8_0", "-o", tmp_path / "reference")
    assert reference.code == 0
    prefix = _tmpfs("1300k")
    if prefix is not None:
        place = tmp_path / "disk"
        place.mkdir()
        command = [*prefix, str(place), sys.executable, "-c", _FILLED, str(tmp_path / "got"), str(model), str(place)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert (tmp_path / "got").read_bytes() == (tmp_path / "reference" / "tiny-Q8_0.gguf").read_bytes()
    # The file-size limit is a full disk that needs no mount.
    out = tmp_path / "limited"
    outcome = command_line.run("quantize", model, "-q", "Q8_0", "-o", out, file_size=500_000)
    assert outcome.code == 5
    assert "RLIMIT_FSIZE" in outcome.error["expected"]
    assert not out.exists()
    assert command_line.run("quantize", model, "-q", "Q8_0", "-o", out).code == 0
    assert hashes(out) == hashes(tmp_path / "reference")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_resumably(scenario: Scenario, tmp_path: Path, number: int) -> None:
    made = []
    for call in range(1, scenario.calls - 12, 12):
        directory = tmp_path / f"stopped-{call}"
        outcome = scenario.run(directory, signal_call=[[call, number]])
        assert outcome.code == 75, (call, outcome.err)
        assert outcome.error["error"] == "stopped"
        assert finished(directory) == {}
        made.append(outcome.made)
        assert recorded(directory) == outcome.made
        assert scenario.recover(directory).resumed == outcome.made
    assert made == sorted(made)
    assert made[-1] > 10


def test_second_signal_stops_at_once(scenario: Scenario, tmp_path: Path) -> None:
    directory = tmp_path / "twice"
    outcome = scenario.run(directory, signal_call=[[20, signal.SIGINT], [21, signal.SIGTERM]])
    assert outcome.code == 75
    assert outcome.out == ""  # not even a message: the process was gone
    scenario.recover(directory)


def test_signal_before_the_work(command_line: CommandLine, model: Path) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        code = (
            "import os, signal, sys, time, llm_quantize.cli as cli, llm_quantize.pipeline as pipeline\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job inherits it ignored
            f"pipeline.open_source = lambda *_, **__: (os.kill(os.getpid(), {int(number)}), time.sleep(60))\n"
            f"cli.main(['quantize', {str(model)!r}, '-q', 'Q8_0'])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 75, done.stderr
        assert "stopped" in done.stderr


def test_two_processes_one_output(command_line: CommandLine, demo_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["quantize", str(demo_model), "gguf", "-q", "Q2_K", "-o", str(out), "--threads", "1"]
    command = [sys.executable, "-m", "llm_quantize", "--json", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as first:
        assert first.stderr is not None
        first.stderr.readline()  # the start event: the output is open
        os.kill(first.pid, signal.SIGSTOP)
        journals = tmp_path / "journals"
        try:
            before = sorted(out.iterdir())
            for more in ((), ("--overwrite",), ("--no-checkpoints",), ("--checkpoint-dir", journals)):
                outcome = command_line.run(*arguments, *more)
                assert sorted(out.iterdir()) == before
                assert not journals.exists()
                assert outcome.code == 10, outcome.out
                assert outcome.error["error"] == "busy"
        finally:
            os.kill(first.pid, signal.SIGCONT)
        assert first.stderr.read()
        assert first.wait(60) == 0
    command_line.run(*arguments[:-4], "-o", tmp_path / "alone")
    assert hashes(out) == hashes(tmp_path / "alone")


def _edit(path: Path, at: int = -5, *, keep_time: bool = True) -> None:
    """Flip a byte; the size stays, and the time too."""
    facts = path.stat()
    flipped = bytes([path.read_bytes()[at] ^ 0x01])
    with path.open("r+b") as file:
        file.seek(at % facts.st_size)
        file.write(flipped)
    if keep_time:
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


FIRST_SHARD = "model-00001-of-00002.safetensors"


def _first_weight(model: Path) -> int:
    return 8 + int.from_bytes((model / FIRST_SHARD).read_bytes()[:8], "little")


@pytest.mark.parametrize("keep_time", [True, False])
def test_changed_weights_are_refused_by_name(
    command_line: CommandLine, own_model: Path, tmp_path: Path, keep_time: bool
) -> None:
    out = tmp_path / "out"
    half_done(command_line, own_model, out)
    _edit(own_model / FIRST_SHARD, _first_weight(own_model), keep_time=keep_time)
    for _ in range(2):
        outcome = command_line.run("quantize", own_model, "-q", "Q4_K", "-o", out, "--threads", 1)
        assert outcome.code == 8, outcome.out
        assert outcome.error["tensor"] == "token_embd.weight"
        assert "--overwrite" in outcome.error["remedy"]
    count = recorded(out)
    outcome = command_line.run("quantize", own_model, "-q", "Q4_K", "-o", out, "--threads", 1, "--overwrite")
    assert outcome.code == 0
    assert 0 < outcome.resumed < count  # parts of tensors that did not change are kept
    assert command_line.run("quantize", own_model, "-q", "Q4_K", "-o", tmp_path / "anew").code == 0
    assert hashes(out) == hashes(tmp_path / "anew")


def _checked(outcome: Outcome) -> bool:
    """Whether the source was read once more."""
    return any(event["event"] == "check" for event in outcome.events)


@pytest.mark.parametrize("way", ["a clock that ran ahead", "copied", "no cache"])
def test_complete_is_what_hashes_say_and_not_which_time_is_younger(
    command_line: CommandLine, own_model: Path, tmp_path: Path, way: str
) -> None:
    """A manifest younger than the source proves nothing."""
    out, environment = tmp_path / "out", {"LLM_QUANTIZE_CACHE": str(tmp_path / "cache")}
    command = ("quantize", own_model, "-q", "Q4_K", "-q", "F16", "-o")
    assert command_line.run(*command, out, environment=environment).code == 0
    _edit(own_model / FIRST_SHARD, _first_weight(own_model) + 5, keep_time=False)
    if way == "copied":
        out = Path(shutil.copytree(out, tmp_path / "copy", copy_function=shutil.copyfile))
    elif way == "a clock that ran ahead":
        for path in out.iterdir():
            os.utime(path, (4e9, 4e9))
    else:
        shutil.rmtree(tmp_path / "cache")
    for _ in range(2):
        outcome = command_line.run(*command, out, environment=environment)
        assert outcome.code == 8, outcome.out
        assert outcome.error["tensor"] == "token_embd.weight"


def test_complete_costs_a_reading_only_where_nothing_vouches_for_the_source(
    command_line: CommandLine, own_model: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"

    def again(out: str = "out") -> bool:
        words = ("quantize", own_model, "-q", "Q4_K", "-q", "F16", "-o", tmp_path / out)
        outcome = command_line.run(*words, environment={"LLM_QUANTIZE_CACHE": str(cache)})
        assert outcome.code == 0, outcome.out
        assert outcome.made == 0
        return _checked(outcome)

    words = ("quantize", own_model, "-q", "Q4_K", "-q", "F16", "-o", tmp_path / "out")
    assert command_line.run(*words, environment={"LLM_QUANTIZE_CACHE": str(cache)}).code == 0
    assert not again()
    shutil.copytree(tmp_path / "out", tmp_path / "copy", copy_function=shutil.copyfile)
    assert not again("copy")
    os.utime(own_model / FIRST_SHARD)
    assert again()
    assert not again()
    for record in cache.rglob("*.json"):
        _edit(record, 20)
    assert again()
    assert not again()
    shutil.rmtree(cache)
    cache.write_text("no directory")
    assert again()
    assert again()


def test_a_damaged_note_of_the_times_means_a_full_check(
    command_line: CommandLine, own_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    half_done(command_line, own_model, out)
    journal = next(out.glob("*.journal"))
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(line for line in lines if b'"note"' not in line))
    _edit(own_model / FIRST_SHARD, _first_weight(own_model))
    assert command_line.run("quantize", own_model, "-q", "Q4_K", "-o", out).code == 8


def test_changed_scales_of_an_fp8_source_are_refused(command_line: CommandLine, tmp_path: Path) -> None:
    """The weights' own bytes stay; only what they are multiplied with changes."""
    model = write_fp8_llama(tmp_path / "fp8")
    half_done(command_line, model, tmp_path / "half")
    assert command_line.run("quantize", model, "-q", "Q4_K", "-o", tmp_path / "whole").code == 0
    write_fp8_llama(model, scale=0.02)
    for out in ("half", "whole"):
        outcome = command_line.run("quantize", model, "-q", "Q4_K", "-o", tmp_path / out)
        assert outcome.code == 8, outcome.out
        assert outcome.error["tensor"] == "blk.0.attn_q.weight"


@pytest.mark.parametrize("moment", [None, (0, 0)], ids=["now", "clock set back"])
def test_touched_source_is_checked_and_goes_on(
    command_line: CommandLine, own_model: Path, tmp_path: Path, moment: tuple[int, int] | None
) -> None:
    half_done(command_line, own_model, tmp_path / "out")
    count = recorded(tmp_path / "out")
    for shard in own_model.glob("*.safetensors"):
        os.utime(shard, moment)
    outcome = command_line.run("quantize", own_model, "-q", "Q4_K", "-o", tmp_path / "out")
    assert (outcome.code, outcome.resumed) == (0, count)


def _config(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 20_000.0
    (model / "config.json").write_text(json.dumps(config))


def _longer(model: Path) -> None:
    write_tiny_llama(model, seed=1)
    header = (model / FIRST_SHARD).read_bytes()
    size = int.from_bytes(header[:8], "little")
    (model / FIRST_SHARD).write_bytes(
        (size + 8).to_bytes(8, "little") + header[8 : 8 + size] + b" " * 8 + header[8 + size :]
    )


@pytest.mark.parametrize(
    ("change", "arguments", "code", "named"),
    [
        (_config, (), 8, "source_metadata_sha256"),
        (_longer, (), 8, "source_files"),
        (None, ("--pure",), 2, "pure"),
        (None, ("--tensor-type", "ffn_down=q6_k"), 2, "tensor_types"),
        (None, ("--output-type", "q8_0"), 2, "output_type"),
        (None, ("--nonfinite", "zero"), 2, "nonfinite"),
    ],
)
def test_another_source_or_recipe_is_refused_by_name(
    command_line: CommandLine,
    own_model: Path,
    tmp_path: Path,
    change: Any,
    arguments: tuple[str, ...],
    code: int,
    named: str,
) -> None:
    out = tmp_path / "out"
    half_done(command_line, own_model, out)
    before = hashes(out)
    if change is not None:
        change(own_model)
    outcome = command_line.run("quantize", own_model, "-q", "Q4_K", "-o", out, *arguments)
    assert outcome.code == code, outcome.out
    assert outcome.error["expected"].startswith(f"{named} = ")
    assert "--overwrite" in outcome.error["remedy"]
    assert hashes(out) == before


def test_another_version_is_refused(command_line: CommandLine, model: Path, tmp_path: Path) -> None:
    half_done(command_line, model, tmp_path)
    journal = next(tmp_path.glob("*.journal"))
    records, _ = parse_journal(journal.read_bytes())
    records[0]["identity"]["version"] = "0.0.0"
    journal.write_bytes(b"".join(record_line(record) for record in records))
    outcome = command_line.run("quantize", model, "-q", "Q4_K", "-o", tmp_path)
    assert outcome.code == 2
    assert outcome.error["expected"] == "version = 0.0.0 (the unfinished run)"


def test_finished_artifact_of_a_source_that_was_replaced(
    command_line: CommandLine, own_model: Path, tmp_path: Path
) -> None:
    command = ("quantize", own_model, "-q", "Q8_0", "-o", tmp_path / "out")
    assert command_line.run(*command).code == 0
    before = hashes(tmp_path / "out")
    for shard in own_model.glob("*.safetensors"):
        os.utime(shard)
    outcome = command_line.run(*command)
    assert (outcome.code, outcome.made) == (0, 0)
    _edit(own_model / FIRST_SHARD, _first_weight(own_model))
    outcome = command_line.run(*command)
    assert outcome.code == 8
    assert outcome.error["tensor"] == "token_embd.weight"
    assert hashes(tmp_path / "out") == before


def test_source_changed_while_it_is_read(own_model: Path, tmp_path: Path) -> None:
    for number, at in enumerate((1, 12)):
        seen: list[int] = []

        def change(event: Any, at: int = at, seen: list[int] = seen) -> None:
            if event.kind == "progress":
                seen.append(1)
                if len(seen) == at:
                    _edit(own_model / FIRST_SHARD, keep_time=False)

        out = tmp_path / f"out-{number}"
        with pytest.raises(IntegrityError, match="while it was read") as caught:
            pipeline.quantize(str(own_model), levels=["Q4_0"], output_dir=out, on_event=change)
        assert FIRST_SHARD in str(caught.value.file)
        assert finished(out) == {}


def test_source_rewritten_with_its_old_time_while_it_is_read(own_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    seen: list[int] = []

    def change(event: Any) -> None:
        if event.kind == "progress":
            seen.append(1)
            if len(seen) == 3:
                _edit(own_model / FIRST_SHARD, _first_weight(own_model))

    with pytest.raises(IntegrityError, match="changed while it was read") as caught:
        pipeline.quantize(str(own_model), levels=["Q4_0"], output_dir=out, on_event=change)
    assert FIRST_SHARD in str(caught.value.file)
    assert finished(out) == {}


@pytest.mark.parametrize("moment", ["start", "progress"])
def test_source_taken_away_while_it_is_read(own_model: Path, tmp_path: Path, moment: str) -> None:
    def remove(event: Any) -> None:
        if event.kind == moment:
            (own_model / FIRST_SHARD).unlink(missing_ok=True)

    with pytest.raises(LlmQuantizeError) as caught:
        pipeline.quantize(str(own_model), levels=["Q4_0"], output_dir=tmp_path / "out", on_event=remove)
    assert caught.value.file is not None
    assert FIRST_SHARD in caught.value.file
    assert moment == "start" or caught.value.exit_code == 8
    assert finished(tmp_path / "out") == {}


def _half_then(command_line: CommandLine, model: Path, tmp_path: Path, first: list[str], then: list[str]) -> Outcome:
    half_done_at = command_line.run(
        "quantize", model, "-q", "Q4_K", "-o", tmp_path / "out", "--threads", 1, *first, kill_call=30
    )
    assert half_done_at.code == -9
    assert recorded(tmp_path) > 3
    return command_line.run("quantize", model, "-q", "Q4_K", "-o", tmp_path / "out", "--threads", 1, *then)


@pytest.mark.parametrize(
    ("first", "then", "told"),
    [
        (["--checkpoint-dir", "{}/journals"], [], "--checkpoint-dir"),
        ([], ["--checkpoint-dir", "{}/journals"], "--checkpoint-dir"),
        ([], ["--no-checkpoints"], "--no-checkpoints"),
    ],
)
def test_another_place_for_the_journal_is_told(
    command_line: CommandLine, model: Path, tmp_path: Path, first: list[str], then: list[str], told: str
) -> None:
    first, then = ([word.replace("{}", str(tmp_path)) for word in words] for words in (first, then))
    outcome = _half_then(command_line, model, tmp_path, first, then)
    assert (outcome.code, outcome.resumed) == (0, 0)
    (warning,) = [event["text"] for event in outcome.events if event["event"] == "warning"]
    assert told in warning
    assert not list((tmp_path / "out").glob("*.journal"))


def test_stopped_without_checkpoints_nothing_is_promised_and_nothing_left(scenario: Scenario, tmp_path: Path) -> None:
    directory = tmp_path / "stopped"
    outcome = scenario.run(directory, "--no-checkpoints", signal_call=[[12, signal.SIGTERM]])
    assert outcome.code == 75
    assert "nothing is kept" in outcome.error["what"]
    assert "continues where" not in outcome.error["remedy"]
    assert hashes(directory) == {}


def test_one_directory_of_journals_for_two_outputs(command_line: CommandLine, model: Path, tmp_path: Path) -> None:
    journals = ("--checkpoint-dir", tmp_path / "journals")
    for name in ("a", "b"):
        command = ("quantize", model, "-q", "Q4_K", "-o", tmp_path / name, "--threads", 1, *journals)
        assert command_line.run(*command, kill_call=30).code == -9
    assert len(list((tmp_path / "journals").iterdir())) == 2
    for name in ("a", "b"):
        outcome = command_line.run("quantize", model, "-q", "Q4_K", "-o", tmp_path / name, *journals)
        assert outcome.code == 0
        assert outcome.resumed > 3
        assert not [event for event in outcome.events if event["event"] == "warning"]


def test_reading_back_is_shown(command_line: CommandLine, own_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    half_done(command_line, own_model, out)
    count = recorded(out)
    outcome = command_line.run("quantize", own_model, "-q", "Q4_K", "-o", out)
    before_start = outcome.events[: [event["event"] for event in outcome.events].index("start")]
    assert [event["event"] for event in before_start] == ["resuming", *["check"] * count]
    assert before_start[0]["units"] == count
    assert before_start[-1]["done"] == before_start[-1]["total"] == before_start[0]["total"] > 0
    for shard in own_model.glob("*.safetensors"):
        os.utime(shard)
    outcome = command_line.run("quantize", own_model, "-q", "Q4_K", "-o", out)
    checks = [event for event in outcome.events if event["event"] == "check"]
    assert checks[0]["done"] == 0
    assert checks[-1]["done"] == checks[-1]["total"] > 0
    assert "source" in checks[0]["what"]


def test_damage_to_what_is_kept(command_line: CommandLine, model: Path, tmp_path: Path) -> None:
    reference = command_line.run("quantize", model, "-q", "Q4_K", "-o", tmp_path / "reference", "--threads", 1)
    assert reference.code == 0
    half_done(command_line, model, tmp_path / "half")
    count = recorded(tmp_path / "half")
    journal = next((tmp_path / "half").glob("*.journal"))
    records, _ = parse_journal(journal.read_bytes())
    _, offset, nbytes = records[-1]["span"]
    places = [(".partial", offset, 1), (".partial", offset + nbytes - 1, 1), (".partial", 3, 0)]
    places += [(".journal", -3, 1), (".journal", 40, count)]
    for number, (suffix, at, lost) in enumerate(places):
        out = Path(shutil.copytree(tmp_path / "half", tmp_path / f"damaged-{number}"))
        _edit(next(out.glob("*" + suffix)), at)
        outcome = command_line.run("quantize", model, "-q", "Q4_K", "-o", out)
        assert (outcome.code, outcome.resumed) == (0, count - lost)
        assert bool(lost) == any(event["event"] == "warning" for event in outcome.events)
        assert hashes(out) == hashes(tmp_path / "reference")


def test_same_bytes_for_every_thread_count_and_simd_level(
    command_line: CommandLine, model: Path, tmp_path: Path
) -> None:
    levels = ["Q4_K_M", "Q2_K", "IQ4_XS", "Q5_1", "TQ2_0", "Q2_0", "Q1_0"]
    arguments = ["quantize", str(model), "gguf", *(word for level in levels for word in ("-q", level))]
    found = []
    for threads in (1, 2, 3, 7):
        out = tmp_path / f"threads-{threads}"
        assert command_line.run(*arguments, "-o", out, "--threads", threads).code == 0
        found.append(hashes(out))
    for level in kernels.simd_levels():
        out = tmp_path / level
        environment = {**os.environ, **QUIET_MACHINE, "LLM_QUANTIZE_SIMD": level}
        command = [sys.executable, "-m", "llm_quantize", "-s", *arguments, "-o", str(out)]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        found.append(hashes(out))
    assert len(found[0]) == 2 * len(levels)
    assert all(other == found[0] for other in found)


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model shaped like a 70 B one; its weights are a hole in the file."""
    place = tmp_path_factory.mktemp("huge") / "huge"
    return write_sparse_llama(place, layers=80, hidden=8192, inner=28_672, key_value_heads=8)


def _high_water(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def test_seventy_billion_weights_in_a_gigabyte(huge: Path, tmp_path: Path) -> None:
    """Planned in little processor time; tensors get through under RLIMIT_AS, however many threads are asked for."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    tool = [sys.executable, "-m", "llm_quantize", "--json"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*tool, "plan", str(huge), "-q", "Q4_K_M"], env=environment, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime < 2.0
    plan = json.loads(done.stdout)["artifacts"][0]
    assert plan["weights"] > 68e9
    # The hole takes no room, but the output would: its blocks must not be claimed on the machine that runs the tests.
    code = (
        "import os, resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_AS, (10**9, 10**9))\n"
        "del os.posix_fallocate\n"
        "from llm_quantize.cli import main\n"
        "main()"
    )
    arguments = ["quantize", str(huge), "-q", "Q4_K_M", "-o", str(tmp_path), "--threads", "64", "--ignore-space"]
    command = [sys.executable, "-c", code, "--json", *arguments]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        start = json.loads(run.stderr.readline())
        assert start["event"] == "start", start
        peak = 0
        for _ in range(3):
            assert json.loads(run.stderr.readline())["event"] == "progress"
            peak = _high_water(run.pid)
        run.kill()
    assert 1 < start["threads"] < 64
    assert peak < start["memory_needed"] < 10**9


def test_nonfinite_weights(command_line: CommandLine, model: Path, own_model: Path, tmp_path: Path) -> None:
    path = own_model / FIRST_SHARD
    header = json.loads(path.read_bytes()[8 : _first_weight(own_model)])
    info = header["model.layers.0.mlp.up_proj.weight"]
    columns = info["shape"][1]
    with path.open("r+b") as file:
        for row, column, bits in ((2, 7, 0x7FC0), (2, 9, 0xFF80), (200, 0, 0x7F80)):
            file.seek(_first_weight(own_model) + info["data_offsets"][0] + 2 * (row * columns + column))
            file.write(bits.to_bytes(2, "little"))
    command = ("quantize", own_model, "-q", "Q8_0", "-o")
    outcome = command_line.run(*command, tmp_path / "refuse")
    assert outcome.code == 9
    assert outcome.error["tensor"] == "blk.0.ffn_up.weight"
    assert outcome.error["found"] == "3 such values, the first at row 2, column 7"
    assert "--nonfinite=zero" in outcome.error["remedy"]
    assert finished(tmp_path / "refuse") == {}
    outcome = command_line.run(*command, tmp_path / "zero", "--nonfinite", "zero")
    assert outcome.code == 20
    (artifact,) = json.loads(outcome.out)["artifacts"]
    assert artifact["nonfinite_replaced"] == {"blk.0.ffn_up.weight": 3}
    assert command_line.run(*command, tmp_path / "strict", "--nonfinite", "zero", "--strict").code == 9
    assert command_line.run(*command, tmp_path / "keep", "--nonfinite", "keep").code == 20
    zero, kept = (_q8_rows(tmp_path / name / "own-Q8_0.gguf", columns) for name in ("zero", "keep"))
    assert np.isfinite(zero).all()
    assert zero[2, 7] == zero[2, 9] == zero[200, 0] == 0
    assert not np.isfinite(kept[2, :32].astype(np.float32)).all()
    # A killed run that replaced values still says so when it ends.
    killed = command_line.run(*command, tmp_path / "killed", "--nonfinite", "zero", "--threads", 1, kill_call=50)
    assert killed.code == -9
    outcome = command_line.run(*command, tmp_path / "killed", "--nonfinite", "zero")
    assert outcome.code == 20
    assert outcome.resumed > 10
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "zero")


def _q8_rows(path: Path, columns: int) -> np.ndarray[Any, Any]:
    entry = next(tensor for tensor in read_gguf(path).tensors if tensor.name == "blk.0.ffn_up.weight")
    packed = np.fromfile(path, np.uint8, entry.nbytes, offset=entry.offset).reshape(entry.shape[0], -1)
    with np.errstate(invalid="ignore"):
        return kernels.dequantize("q8_0", packed, columns)


def test_overflowing_scale_is_refused(command_line: CommandLine, own_model: Path, tmp_path: Path) -> None:
    path = own_model / FIRST_SHARD
    with path.open("r+b") as file:
        file.seek(_first_weight(own_model) + 2 * 256 * 17)
        file.write((0x7F7F).to_bytes(2, "little"))  # the largest bfloat16, in row 17 of the embedding
    outcome = command_line.run("quantize", own_model, "-q", "Q8_0", "-o", tmp_path)
    assert outcome.code == 9
    assert outcome.error["tensor"] == "token_embd.weight"
    assert outcome.error["found"].endswith("at row 17, column 0")
    assert "bf16" in outcome.error["remedy"]
    outcome = command_line.run(
        "quantize", own_model, "-q", "Q8_0", "-o", tmp_path, "--tensor-type", "^token_embd.weight$=bf16", "--overwrite"
    )
    assert outcome.code == 0
