"""The reference's hidden states, kept: the same figures without running the source, and nothing believed that is not
what was written of this source, this text and this code."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from llm_quantize import data, memory
from llm_quantize.errors import IntegrityError
from llm_quantize.evaluation import reference
from llm_quantize.evaluation.quality import QualityResult, measure_quality
from llm_quantize.models.opening import Source, open_source
from llm_quantize.pipeline import Options, quantize
from llm_quantize.streams import passes
from llm_quantize.streams.weights import CheckpointWeights
from tests.hearing import into

WINDOWS = np.random.Generator(np.random.PCG64(7)).integers(0, 256, (5, 40)).astype(np.int32)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The built-in model, two levels of it, and what is kept after they were measured once, in order."""
    folder = tmp_path_factory.mktemp("made")
    levels = ("Q8_0", "Q4_K_M")
    results = quantize(str(data.demo_model()), "gguf", levels=levels, output_dir=folder, options=Options(threads=1))
    source = open_source(str(data.demo_model()))
    files, kept = [result.path for result in results], folder / "kept"
    first = measure_quality(source, files, WINDOWS, threads=1, kept=kept)
    yield SimpleNamespace(source=source, files=files, kept=kept, first=first)
    source.checkpoint.close()


@pytest.fixture
def kept(made: SimpleNamespace, tmp_path: Path) -> Path:
    """A copy of what is kept, the times being those of the original."""
    return Path(shutil.copytree(made.kept, tmp_path / "kept"))


def figures(result: QualityResult) -> Any:
    return [one.divergence for one in result.artifacts], result.pairs, result.noise


def states_file(folder: Path) -> Path:
    (found,) = folder.glob("*.states")
    return found


def read_names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every tensor of the source that is read from now on."""
    names: list[str] = []
    for method in ("read", "read_into", "read_rows"):
        if plain := getattr(CheckpointWeights, method, None):

            def noted(self: Any, name: str, *rest: Any, plain: Any = plain) -> Any:
                names.append(name)
                return plain(self, name, *rest)

            monkeypatch.setattr(CheckpointWeights, method, noted)
    return names


def test_another_run_skips_the_source_and_has_the_same_figures(
    made: SimpleNamespace, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[Any] = []
    names = read_names(monkeypatch)
    again = measure_quality(made.source, made.files, WINDOWS, threads=2, kept=kept, on_event=into(heard))
    assert not made.first.reused
    assert again.reused
    assert figures(again) == figures(made.first)
    assert names, "the head is still the source's"
    assert not [name for name in names if ".layers." in name]
    assert again.to_dict()["reused"] is True
    steps = [event for event in heard if event["event"] == "measure"]
    assert steps[-1]["done"] == steps[-1]["total"]


def test_other_artifacts_meet_the_same_reference(made: SimpleNamespace, kept: Path) -> None:
    """Each alone, with what is kept and without."""
    for index, file in enumerate(made.files):
        alone = measure_quality(made.source, [file], WINDOWS, threads=1, kept=kept)
        assert alone.reused
        assert alone.artifacts[0].divergence == made.first.artifacts[index].divergence


def test_threads_and_disk_keep_the_same_bytes(
    made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "HIDDEN_BYTES", 0)
    found = measure_quality(made.source, made.files[:1], WINDOWS, threads=3, scratch=tmp_path, kept=tmp_path / "kept")
    assert found.memory.on_disk
    assert states_file(tmp_path / "kept").read_bytes() == states_file(made.kept).read_bytes()
    assert states_file(tmp_path / "kept").name == states_file(made.kept).name


def test_what_is_kept_is_small_and_says_what_it_is(made: SimpleNamespace) -> None:
    line, _, rest = states_file(made.kept).read_bytes().partition(b"\n")
    header = json.loads(line)
    width = made.source.architecture.hyper.embedding_length
    assert header["bytes"] == len(rest) == (5 + 4) * 19 * width * 4  # 19 of 40 positions are scored
    assert header["identity"]["model"] == made.source.content()
    seal = hashlib.sha256(json.dumps(header["identity"], sort_keys=True, separators=(",", ":")).encode() + rest)
    assert header["sha256"] == seal.hexdigest()


@pytest.mark.parametrize("damage", ["bit", "short", "long", "header", "empty", "endless", "exchanged"])
def test_damage_is_noticed(damage: str, made: SimpleNamespace, kept: Path) -> None:
    path = states_file(kept)
    content = bytearray(path.read_bytes())
    start = content.index(b"\n") + 1
    if damage == "bit":
        content[len(content) // 2] ^= 1
    elif damage == "short":
        del content[-4:]
    elif damage == "long":
        content += bytes(4)
    elif damage == "header":
        content = content.replace(b'"device":"cpu"', b'"device":"gpu"')
    elif damage == "empty":
        content.clear()
    elif damage == "endless":
        content = bytearray(len(content))
    else:  # states of two windows in each other's place
        size = (len(content) - start) // 9
        one, two = content[start : start + size], content[start + size : start + 2 * size]
        content[start : start + 2 * size] = two + one
    path.write_bytes(content)
    heard: list[Any] = []
    found = measure_quality(made.source, made.files, WINDOWS, threads=1, kept=kept, on_event=into(heard))
    assert not found.reused
    assert figures(found) == figures(made.first)
    assert any("were damaged" in event["text"] for event in heard if event["event"] == "warning")
    assert path.read_bytes() == states_file(made.kept).read_bytes()


def test_another_source_text_or_code_is_another_reference(
    made: SimpleNamespace, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(source: Source, windows: np.ndarray) -> bool:
        return measure_quality(source, made.files[:1], windows, threads=1, kept=kept).reused

    other = WINDOWS.copy()
    other[3, 5] += 1
    assert not measured(made.source, other)
    assert not measured(made.source, WINDOWS[:4])
    model = tmp_path / "tuned"
    shutil.copytree(data.demo_model(), model)
    assert identity_reused(model, made, kept), "a copy is the same model"
    values = load_file(model / "model.safetensors")
    name = next(name for name in sorted(values) if name.endswith("down_proj.weight"))
    values[name].view(-1)[0] *= 2
    save_file(values, model / "model.safetensors", {"format": "pt"})
    assert not identity_reused(model, made, kept), "a fine-tune is another"
    monkeypatch.setattr(reference, "_code", lambda: "another version")
    assert not measured(made.source, WINDOWS)
    assert measured(made.source, WINDOWS)


def identity_reused(model: Path, made: SimpleNamespace, kept: Path) -> bool:
    source = open_source(str(model))
    try:
        return measure_quality(source, made.files[:1], WINDOWS, threads=1, kept=kept).reused
    finally:
        source.checkpoint.close()


def test_a_model_without_weights_here_keeps_nothing() -> None:
    nowhere: Any = SimpleNamespace(checkpoint=SimpleNamespace(temporary=object()))
    assert reference.identity_of(nowhere, WINDOWS, 4, "cpu", lambda _: None) is None


def test_what_was_not_used_for_longest_goes(made: SimpleNamespace, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = states_file(kept).stat().st_size
    for place, name in enumerate(("old.states", "left.states.partial", "new.states")):
        (kept / name).write_bytes(bytes(size))
        os.utime(kept / name, (1000 + place, 1000 + place))
    states_file_of_made = kept / states_file(made.kept).name
    os.utime(states_file_of_made, (1, 1))
    monkeypatch.setattr(reference, "KEPT_BYTES", int(3.5 * size))
    assert measure_quality(made.source, made.files[:1], WINDOWS, threads=1, kept=kept).reused  # and so used just now
    assert not measure_quality(made.source, made.files[:1], WINDOWS[:, :36], threads=1, kept=kept).reused
    names = {path.name for path in kept.iterdir()}
    assert states_file_of_made.name in names
    assert "new.states" in names
    assert not names & {"old.states", "left.states.partial"}
    assert sum(path.stat().st_size for path in kept.iterdir()) <= 3.5 * size + 4096
    monkeypatch.setattr(reference, "KEPT_BYTES", size)  # one that would take more than half of it is not kept
    before = {path.name for path in kept.iterdir()}
    assert not measure_quality(made.source, made.files[:1], WINDOWS[:, :38], threads=1, kept=kept).reused
    assert {path.name for path in kept.iterdir()} == before


def test_what_cannot_be_kept_or_read_is_told(made: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    heard: list[Any] = []
    found = measure_quality(
        made.source, made.files, WINDOWS, threads=1, kept=tmp_path / "file" / "kept", on_event=into(heard)
    )
    assert figures(found) == figures(made.first)
    assert any("are not kept for other runs" in event.get("text", "") for event in heard)
    folder = tmp_path / "links"
    folder.mkdir()
    os.mkfifo(folder / states_file(made.kept).name)
    heard.clear()
    found = measure_quality(made.source, made.files, WINDOWS, threads=1, kept=folder, on_event=into(heard))
    assert figures(found) == figures(made.first)


def test_a_run_that_is_killed_leaves_nothing_or_all(
    made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the states are written, and after: the artifact's own blocks are not there yet."""

    class Killed(BaseException):
        pass

    def end(*_: Any) -> None:
        raise Killed

    kept = tmp_path / "kept"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", end)
        with pytest.raises(Killed):
            measure_quality(made.source, made.files, WINDOWS, threads=1, kept=kept)
    assert not list(kept.glob("*.states"))
    run, through = passes.Pass.run, []

    def first_only(self: Any, *rest: Any) -> None:
        through.append(1)
        if len(through) == 2:
            raise Killed
        run(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(passes.Pass, "run", first_only)
        with pytest.raises(Killed):
            measure_quality(made.source, made.files, WINDOWS, threads=1, kept=kept)
    found = measure_quality(made.source, made.files, WINDOWS, threads=1, kept=kept)
    assert found.reused
    assert figures(found) == figures(made.first)


def test_a_source_that_changes_meanwhile_is_not_kept(
    made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(data.demo_model(), model)
    source, keep = open_source(str(model)), tmp_path / "kept"
    run = passes.Pass.run

    def touched(self: Any, *rest: Any) -> None:
        run(self, *rest)
        os.utime(model / "model.safetensors")

    monkeypatch.setattr(passes.Pass, "run", touched)
    with pytest.raises(IntegrityError, match="changed while it was read"):
        measure_quality(source, made.files[:1], WINDOWS, threads=1, kept=keep)
    source.checkpoint.close()
    assert not keep.is_dir() or not list(keep.iterdir())
