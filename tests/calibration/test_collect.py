"""A calibration run: the same bytes however it is run, continued, and merged; and what it says when it cannot go on."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_quantize import memory
from llm_quantize.calibration import collect
from llm_quantize.calibration.choose import from_statistics
from llm_quantize.calibration.collect import calibrate
from llm_quantize.calibration.imatrix import importance
from llm_quantize.calibration.outcome import Calibration, export, refuse_export
from llm_quantize.cli import run as command
from llm_quantize.errors import AccessError, BusyError, IntegrityError, NumericPolicyError, ResourceError, UsageError
from llm_quantize.events import Progress
from llm_quantize.io.artifact_paths import manifest_path
from llm_quantize.io.imatrix_file import read_imatrix
from llm_quantize.io.journal import parse_journal, record_line
from llm_quantize.io.statistics_file import read_statistics
from llm_quantize.models.opening import Source, open_source
from llm_quantize.options import CalibrationOptions
from tests.hearing import into

from ..faults.forking import CommandLine, hashes
from ..tiny_models import make_tiny

KINDS = ("imatrix", "hessian", "absmax")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ("the", "cat", "sat", "on", "a", "mat", "saw", "an", "old", "house", "by", "river", "nobody", "lived")
    chance = random.Random(5)
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text(" ".join(chance.choice(words) for _ in range(3000)))
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen2", tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLM_QUANTIZE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def options(text: Path, **more: Any) -> CalibrationOptions:
    return CalibrationOptions(data=(str(text),), samples=6, length=64, collect=KINDS, **more)


def run(model: Path, chosen: CalibrationOptions, events: list[Any] | None = None) -> Calibration:
    source = open_source(str(model))
    with source.checkpoint:
        return calibrate(source, chosen, on_event=into(events if events is not None else []))


@pytest.mark.parametrize("in_memory", [True, False])
def test_the_bytes_do_not_depend_on_threads_or_on_where_hidden_states_lie(
    model: Path, text: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, in_memory: bool
) -> None:
    if not in_memory:
        monkeypatch.setattr(memory, "HIDDEN_BYTES", 0)
    contents = set()
    for threads in (1, 2, 3):
        result = run(model, options(text, threads=threads))
        assert not result.reused
        contents.add(result.path.read_bytes())
        assert [path.name for path in result.path.parent.iterdir() if ".safetensors" not in path.suffixes[:1]] == []
        assert sorted(path.name for path in result.path.parent.iterdir()) == [
            result.path.name,
            result.path.name + ".manifest.json",
        ]
        shutil.rmtree(cache)
    assert len(contents) == 1


def test_both_places_of_hidden_states_give_the_same(
    model: Path, text: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(model, options(text)).path.read_bytes()
    shutil.rmtree(cache)
    monkeypatch.setattr(memory, "HIDDEN_BYTES", 0)
    assert run(model, options(text)).path.read_bytes() == first


def test_what_was_collected_is_found_again_and_is_of_this_model(model: Path, text: Path, cache: Path) -> None:
    first = run(model, options(text))
    again = run(model, options(text))
    assert (again.path, again.reused, first.reused) == (first.path, True, False)
    other = run(model, options(text, seed=1))
    assert other.path != first.path
    source = open_source(str(model))
    with source.checkpoint, read_statistics(first.path) as statistics:
        assert statistics.identity.model["sha256"] == source.content()
        assert all(int(statistics.counts(tap).max()) == 6 * 64 for tap in statistics.taps)


def test_a_copy_elsewhere_is_the_same_model(model: Path, tmp_path: Path, text: Path, cache: Path) -> None:
    first = run(model, options(text))
    moved = Path(shutil.copytree(model, tmp_path / model.name))
    os.utime(moved / "model.safetensors", ns=(1, 1))
    again = run(moved, options(text))
    assert (again.path, again.reused) == (first.path, True)


@pytest.mark.parametrize("way", ["a copy", "in place"])
@pytest.mark.parametrize("changed", ["a weight", "the configuration", "the tokenizer"])
def test_another_models_statistics_are_not_taken(
    model: Path, tmp_path: Path, text: Path, cache: Path, changed: str, way: str
) -> None:
    """A fine-tune of equal headers, sizes and times: one byte in the middle of one tensor is enough."""
    own = Path(shutil.copytree(model, tmp_path / "own"))
    first = run(own, options(text))
    place = own if way == "in place" else Path(shutil.copytree(own, tmp_path / "tuned"))
    file = place / {"a weight": "model.safetensors", "the configuration": "config.json"}.get(changed, "tokenizer.json")
    before = file.stat()
    if changed == "a weight":
        _change_row(file, "model.layers.0.mlp.down_proj.weight", 1, columns=1)
    elif changed == "the configuration":
        file.write_bytes(file.read_bytes().replace(b'"rms_norm_eps": 1e-06', b'"rms_norm_eps": 2e-06'))
    else:
        file.write_bytes(file.read_bytes() + b" ")
    assert file.stat().st_size == before.st_size + (changed == "the tokenizer")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    again = run(place, options(text))
    assert not again.reused
    assert again.path != first.path
    source = open_source(str(place))
    with source.checkpoint, pytest.raises(IntegrityError, match="another model"):
        from_statistics(first.path, source)
    with source.checkpoint:
        assert from_statistics(again.path, source).names


def test_an_activation_that_is_not_finite_is_named_and_finished_layers_are_kept(
    model: Path, text: Path, tmp_path: Path, cache: Path
) -> None:
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][3] = float("inf")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericPolicyError, match=r"model\.layers\.1.*sample \d") as caught:
        run(broken, options(text))
    assert caught.value.exit_code == 9
    events: list[Any] = []
    with pytest.raises(NumericPolicyError):
        run(broken, options(text), events)
    assert next(event for event in events if event["event"] == "start")["resumed_units"] == 1


def test_more_text_is_drawn_until_every_expert_has_its_minimum(tmp_path: Path, text: Path, cache: Path) -> None:
    mixture = make_tiny("qwen3_moe", tmp_path / "moe")
    plain = run(mixture, options(text, expert_minimum=0))
    least = _least(plain.path)
    more = run(mixture, options(text, expert_minimum=least + 1))
    assert more.windows == 2 * plain.windows
    assert _least(more.path) > least
    assert not more.short
    again = run(mixture, options(text, expert_minimum=least + 1))
    assert (again.path, again.reused) == (more.path, True)
    never = run(mixture, options(text, expert_minimum=10**6))
    assert never.short
    assert "experts" in " ".join(never.sentences())


def _least(path: Path) -> int:
    with read_statistics(path) as statistics:
        return min(int(statistics.counts(tap).min()) for tap in statistics.taps)


def test_a_block_that_does_not_fit_is_refused_before_work(model: Path, text: Path, cache: Path) -> None:
    with pytest.raises(ResourceError, match="do not fit the memory limit"):
        run(model, options(text, max_ram=50 << 20))
    assert not list(cache.rglob("*.partial"))


def test_exports_are_what_planning_uses(model: Path, text: Path, tmp_path: Path, cache: Path) -> None:
    source = open_source(str(model))
    with source.checkpoint:
        result = calibrate(source, options(text))
        for kind in ("imatrix", "dat", "json", "statistics"):
            export(result, source, tmp_path / kind, kind)
        with read_statistics(tmp_path / "statistics") as statistics:
            values = importance(statistics, source.tensors.outputs)
    for kind in ("imatrix", "dat"):
        found = read_imatrix(tmp_path / kind)
        assert found.values.keys() == values.keys()
        for name, rows in values.items():
            np.testing.assert_array_equal(found.values[name].reshape(rows.shape), rows)
    assert {entry["name"] for entry in json.loads((tmp_path / "json").read_text())["tensors"]} == set(values)


# kills


@pytest.fixture(scope="module")
def command_line() -> Iterator[CommandLine]:
    modules = ("torch", "transformers", "transformers.models.qwen2.modeling_qwen2", "llm_quantize.streams.network")
    with CommandLine(*modules) as ready:
        yield ready


class Killed:
    """The command, killed here and there; ``expected`` are the bytes of a run that was left alone."""

    def __init__(self, command_line: CommandLine, model: Path, text: Path, root: Path) -> None:
        self.command_line, self.root = command_line, root
        self.words = ("analyze", "importance", model, "--calibration-data", text, "--calibration-samples", "5",
                      "--sequence-length", "32", "--collect", "imatrix,absmax", "--threads", "2")  # fmt: skip
        outcome = self.run("reference")
        assert outcome.code == 0, outcome.err
        assert outcome.calls is not None
        self.calls, self.expected = len(outcome.calls), hashes(root / "reference")

    def run(self, name: str, **faults: Any) -> Any:
        directory = self.root / name
        faults["environment"] = {"LLM_QUANTIZE_CACHE": str(directory)}
        faults["constants"] = [["llm_quantize.memory", "HIDDEN_BYTES", 0]]
        return self.command_line.run(*self.words, "-o", directory / "i.gguf", **faults)

    def recover(self, name: str) -> None:
        outcome = self.run(name)
        assert outcome.code == 0, outcome.err + outcome.out
        assert hashes(self.root / name) == self.expected
        shutil.rmtree(self.root / name)


@pytest.fixture(scope="module")
def killed(command_line: CommandLine, model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    return Killed(command_line, model, text, tmp_path_factory.mktemp("killed"))


def _kill(killed: Killed, calls: Any) -> None:
    chance = random.Random(3)
    for call in calls:
        name = f"call-{call}"
        assert killed.run(name, kill_call=call).code == -9
        assert killed.run(name, kill_call=chance.randrange(1, killed.calls)).code in (-9, 0)
        killed.recover(name)


def test_killed_at_persistence_calls_it_ends_in_the_same_bytes(killed: Killed) -> None:
    _kill(killed, range(1, killed.calls, max(1, killed.calls // 8)))


@pytest.mark.heavy
def test_killed_at_every_persistence_call_it_ends_in_the_same_bytes(killed: Killed) -> None:
    _kill(killed, range(1, killed.calls + 1))


def test_a_signal_stops_it_and_the_same_command_goes_on(killed: Killed) -> None:
    outcome = killed.run("signal", signal_call=[[killed.calls // 4, signal.SIGTERM]])
    assert outcome.code == 75, outcome.err
    killed.recover("signal")


def _killed_between_blocks(killed: Killed, name: str) -> None:
    """Killed when the hidden states after a block are noted, and the next block is not done."""
    for call in range(killed.calls // 4, killed.calls, 2):
        assert killed.run(name, kill_call=call).code == -9
        journals = list((killed.root / name).rglob("*.journal"))
        records = parse_journal(journals[0].read_bytes())[0] if journals else []
        noted = any("hidden" in record.get("note", {}) for record in records)
        if noted and {record["unit"] for record in records if "unit" in record} == {"block 0"}:
            return
        shutil.rmtree(killed.root / name)
    raise AssertionError("no kill left noted hidden states")


def test_damaged_hidden_states_are_made_again(killed: Killed) -> None:
    _killed_between_blocks(killed, "damaged")
    hidden = list((killed.root / "damaged").rglob("*.hidden/*"))
    assert hidden
    for path in hidden:
        data = bytearray(path.read_bytes())
        data[len(data) // 2 | 1] ^= 0x10  # the exponent of a bfloat16: no rounding hides it
        path.write_bytes(data)
    killed.recover("damaged")


def test_a_damaged_block_is_collected_again(killed: Killed) -> None:
    """The first block's statistics stand in the unfinished file and in its journal; a byte of them is changed."""
    assert killed.run("block", kill_call=killed.calls // 2).code == -9
    (partial,) = (killed.root / "block").rglob("*.safetensors.partial")
    (journal,) = (killed.root / "block").rglob("*.journal")
    spans = [record["span"] for record in parse_journal(journal.read_bytes())[0] if "span" in record]
    assert spans
    data = bytearray(partial.read_bytes())
    data[spans[0][1] + spans[0][2] // 2] ^= 1
    partial.write_bytes(data)
    killed.recover("block")


class _StoppedError(Exception):
    pass


@pytest.mark.parametrize("moment", ["between two runs", "during a run"])
def test_a_source_that_changed_is_not_mixed_with_what_was_collected(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Nor what was collected while it was another, where it is as before again."""
    monkeypatch.setattr(memory, "HIDDEN_BYTES", 0)
    monkeypatch.setenv("LLM_QUANTIZE_CACHE", str(tmp_path / "cache"))
    own = Path(shutil.copytree(model, tmp_path / "own"))
    chosen, before = options(text), (own / "model.safetensors").read_bytes()

    def stop(event: Any) -> None:
        late = isinstance(event, Progress) and 3 * event.done > 2 * event.total
        if late and (own / "model.safetensors").read_bytes() == before:
            _change_row(own / "model.safetensors", "model.layers.0.mlp.down_proj.weight", 1)
            if moment == "between two runs":
                raise _StoppedError

    source = open_source(str(own))
    with source.checkpoint, pytest.raises(_StoppedError if moment == "between two runs" else IntegrityError):
        calibrate(source, chosen, on_event=stop)
    events: list[Any] = []
    other = run(own, chosen, events).path
    (own / "model.safetensors").write_bytes(before)
    path = run(own, chosen, events).path
    assert any("collected anew" in event.get("text", "") for event in events)
    monkeypatch.setenv("LLM_QUANTIZE_CACHE", str(tmp_path / "other"))
    assert run(own, chosen).path.read_bytes() == path.read_bytes() != other.read_bytes()


def _change_row(file: Path, tensor: str, row: int, columns: int | None = None) -> None:
    """Make every value of a row another (bfloat16), or those of the first ``columns``."""
    data = bytearray(file.read_bytes())
    front = 8 + int.from_bytes(data[:8], "little")
    info = json.loads(data[8:front])[tensor]
    first = front + info["data_offsets"][0] + 2 * row * info["shape"][1]
    for at in range(first, first + 2 * (columns or info["shape"][1]), 2):
        data[at] ^= 0x40
    with file.open("r+b") as written:
        written.write(data)


def test_statistics_of_another_arithmetic_are_others(
    model: Path, text: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = set()
    for dtype in ("float32", "bfloat16"):
        monkeypatch.setattr(collect, "compute_dtype", lambda source, device, chosen=dtype: chosen)
        paths.add(run(model, options(text)).path)
    assert len(paths) == 2


@pytest.mark.parametrize("note", [{"hidden": {}}, {"hidden": {"after": "1", "sha256": 1}}, {"hidden": []}, [1], None])
def test_odd_notes_are_passed_over(killed: Killed, note: Any) -> None:
    assert killed.run("odd", kill_call=killed.calls // 2).code == -9
    (journal,) = (killed.root / "odd").rglob("*.journal")
    journal.write_bytes(journal.read_bytes() + record_line({"note": note}))
    killed.recover("odd")


def _source(directory: Path) -> Source:
    return open_source(str(directory))


def test_a_limit_is_refused_before_torch_is_there(
    model: Path, text: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which alone may take more than the limit; what is kept already needs no room."""
    with monkeypatch.context() as patch:
        patch.setattr(collect, "compute_dtype", lambda source, device: pytest.fail("torch is asked"))
        with pytest.raises(ResourceError, match="do not fit the memory limit"):
            run(model, options(text, max_ram=50 << 20))
    first = run(model, options(text))
    assert first.memory_planned > 0
    assert run(model, options(text, max_ram=50 << 20)).reused


def test_the_dtype_follows_the_checkpoint(model: Path) -> None:
    with _source(model).checkpoint as checkpoint:
        stored = {info.dtype for info in checkpoint.tensors.values()}
        source = open_source(str(model))
    with source.checkpoint:
        quick = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        wanted = "bfloat16" if quick and "F32" not in stored else "float32"
        assert collect.compute_dtype(source, "cpu") == wanted
        assert collect.compute_dtype(source, "cuda") == ("float32" if "F32" in stored else "bfloat16")


# what stands in the way


@pytest.mark.parametrize("damage", ["flipped", "cut", "manifest", "no manifest"])
def test_damaged_statistics_are_collected_again(model: Path, text: Path, cache: Path, damage: str) -> None:
    path = run(model, options(text)).path
    expected, beside = path.read_bytes(), manifest_path(path)
    if damage == "flipped":
        path.write_bytes(expected[:-9] + bytes([expected[-9] ^ 1]) + expected[-8:])
    elif damage == "cut":
        path.write_bytes(expected[: len(expected) // 2])
    elif damage == "manifest":
        beside.write_text("{")
    else:
        beside.unlink()
    events: list[Any] = []
    again = run(model, options(text), events)
    assert (again.path, again.path.read_bytes(), again.reused) == (path, expected, False)
    assert [event["text"] for event in events if event["event"] == "warning" and "damaged" in event["text"]]


def test_damaged_parts_put_together_are_put_together_again(tmp_path: Path, text: Path, cache: Path) -> None:
    model = make_tiny("qwen3_moe", tmp_path / "model")
    chosen = CalibrationOptions(data=(str(text),), samples=1, length=16, expert_minimum=64)
    merged = run(model, chosen).path
    expected = merged.read_bytes()
    merged.write_bytes(expected[:-1] + bytes([expected[-1] ^ 1]))
    assert run(model, chosen).path == merged
    assert merged.read_bytes() == expected


def test_a_text_that_repeats_itself_has_parts_of_the_same_tokens(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "same.txt").write_text("the the the the " * 500)
    model = make_tiny("qwen3_moe", tmp_path / "model")
    events: list[Any] = []
    chosen = CalibrationOptions(data=(str(tmp_path / "same.txt"),), samples=2, length=16)
    result = run(model, chosen, events)
    assert result.short
    assert result.windows == 16
    assert len(list(cache.rglob("*.safetensors"))) == 7


def test_a_cache_that_is_taken_away_is_said(
    model: Path, text: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = collect._run_blocks

    def taken(*arguments: Any) -> None:
        finished(*arguments)
        shutil.rmtree(cache)

    monkeypatch.setattr(collect, "_run_blocks", taken)
    with pytest.raises(BusyError, match="taken away"):
        run(model, options(text))


def test_a_cache_that_is_no_directory_is_refused(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        monkeypatch.setenv("LLM_QUANTIZE_CACHE", str(tmp_path / name))
        with pytest.raises(AccessError, match="LLM_QUANTIZE_CACHE"):
            run(model, options(text))


def test_what_lies_with_the_hidden_states_stays_and_stops_nothing(
    model: Path, text: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "HIDDEN_BYTES", 0)
    path = run(model, options(text)).path
    hidden = path.with_name(path.name + ".hidden")
    path.unlink()
    hidden.mkdir()
    (hidden / "foreign").write_text("kept")
    run(model, options(text))
    assert run(model, options(text)).reused
    assert [entry.name for entry in hidden.iterdir()] == ["foreign"]
    path.unlink()
    (hidden / "foreign").rename(tmp_path / "0")
    hidden.rmdir()
    hidden.symlink_to(tmp_path)
    with pytest.raises(AccessError, match="a link stands"):
        run(model, options(text))
    assert (tmp_path / "0").read_text() == "kept"


def test_an_export_that_cannot_be_is_refused_before_work(tmp_path: Path) -> None:
    with (source := open_source(str(make_tiny("llama", tmp_path / "model")))).checkpoint:
        _refused_exports(source, tmp_path)


def _refused_exports(source: Source, tmp_path: Path) -> None:
    refuse_export(source, tmp_path / "x.safetensors", "statistics", ("hessian",))
    with pytest.raises(UsageError, match="imatrix in --collect"):
        refuse_export(source, tmp_path / "x.gguf", "imatrix", ("hessian",))
    for place in (tmp_path, tmp_path / ("x" * 300), Path(os.devnull), Path(__file__, "x.gguf")):
        with pytest.raises(AccessError):
            refuse_export(source, place, "imatrix", ("imatrix",))
    kept = tmp_path / "model.safetensors"
    kept.write_text("weights")
    (tmp_path / "link.gguf").symlink_to(tmp_path)
    with pytest.raises(UsageError, match="a file that is read"):
        refuse_export(source, tmp_path / "link.gguf" / "model.safetensors", "statistics", KINDS, ["absent", kept])


def test_a_model_is_not_replaced_by_its_statistics(model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("model.safetensors", "config.json"):
        before = (model / name).read_bytes()
        words = ["analyze", "importance", str(model), "--calibration-data", str(text), "-o", str(model / name)]
        assert command(words) == 2
        assert "a file that is read" in capsys.readouterr().err
        assert (model / name).read_bytes() == before
