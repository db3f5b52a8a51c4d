"""Two sets of weights in one place: the index decides, what it leaves lying is named, what is doubtful is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llm_quantize.advice.describe import describe
from llm_quantize.errors import LlmQuantizeError, MalformedInputError, UnsupportedError
from llm_quantize.models.hub import fetch
from llm_quantize.models.opening import open_source
from llm_quantize.models.safetensors import open_checkpoint
from llm_quantize.models.weight_sets import INDEX, SINGLE
from tests.fake_hub import FakeHub
from tests.hearing import into
from tests.models import test_hub
from tests.safetensors_by_hand import write_model, write_tensors
from tests.tiny_models import make_tiny

X, Y = np.ones((2, 3), np.float32), np.full((4, 3), 2, np.float32)
SHARDS = {"a.safetensors": {"x": X}, "b.safetensors": {"y": Y}}


def two(place: Path) -> Path:
    return write_model(place, SHARDS)


def notes(model: Path) -> str:
    with open_checkpoint(str(model)) as checkpoint:
        assert checkpoint.tensors.keys() == {"x", "y"}
        assert (checkpoint.read_rows("x", 0, 2) == 1).all()
        return "\n".join(checkpoint.notes)


@pytest.mark.parametrize(
    "stray",
    [{"x": 5 * X}, {"x.qweight": np.ones((2, 3), np.int32), "y": Y}, {"base_model.model.x.lora_A.weight": X}],
    ids=["a part", "4 bit", "an adapter"],
)
def test_the_index_decides_and_a_stray_file_is_named(stray: dict[str, np.ndarray], tmp_path: Path) -> None:
    model = two(tmp_path / "model")
    assert notes(model) == ""
    write_tensors(model / SINGLE, stray)
    assert notes(model).startswith(f"{SINGLE}: not read, as {INDEX} names other files")


def test_stray_shards_beside_one_file_are_named(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", {SINGLE: {"x": X, "y": Y}})
    write_tensors(model / "consolidated.safetensors", {"x": X})  # Mistral's own copy of the same weights
    assert notes(model) == ""
    for number in range(1, 6):
        write_tensors(model / f"model-0000{number}-of-00005.safetensors", {"x": 2 * X})
    said = notes(model)
    assert said.startswith("model-00001-of-00005.safetensors, ")
    assert "and 2 more: not read, as the model is model.safetensors" in said


def test_the_same_weights_twice_are_taken_and_another_whole_model_is_refused(tmp_path: Path) -> None:
    model = two(tmp_path / "model")
    write_tensors(model / SINGLE, {"y": Y, "x": X})
    assert SINGLE in notes(model)
    write_tensors(model / SINGLE, {"y": Y, "x": 3 * X})
    with pytest.raises(MalformedInputError, match="two whole models") as caught:
        open_checkpoint(str(model))
    assert (caught.value.tensor, Path(caught.value.file or "").name) == ("x", SINGLE)


def test_an_index_without_its_shards(tmp_path: Path) -> None:
    """All of them merged into one file is one model; anything else is doubtful."""
    model = two(tmp_path / "model")
    for name in SHARDS:
        (model / name).unlink()
    write_tensors(model / SINGLE, {"x": X, "y": Y})
    assert f"{INDEX} is not used" in notes(model)
    write_tensors(model / SINGLE, {"x": X})
    with pytest.raises(MalformedInputError, match="shards that the index names are missing"):
        open_checkpoint(str(model))
    write_tensors(model / SINGLE, {"x": X, "y": Y})
    write_tensors(model / "a.safetensors", {"x": X})
    with pytest.raises(MalformedInputError, match="a shard that the index names is missing"):
        open_checkpoint(str(model))


def test_an_index_that_names_the_one_file_too(tmp_path: Path) -> None:
    """All of its files are the model, not model.safetensors alone."""
    model = write_model(tmp_path / "model", {SINGLE: {"x": X}, "extra.safetensors": {"y": Y}})
    assert notes(model) == ""


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("shards", [SHARDS, {SINGLE: {"x": X, "y": Y}}], ids=["shards", "one file"])
def test_an_adapter_beside_whole_weights_is_refused(
    name: str, shards: dict[str, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    model = write_model(tmp_path / "model", shards)
    (model / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert notes(model) == ""
    write_tensors(model / name, {"base_model.model.x.lora_A.weight": X})
    with pytest.raises(UnsupportedError, match="an adapter") as caught:
        open_checkpoint(str(model))
    assert "--lora" in (caught.value.remedy or "")


def test_a_quantized_source_says_it_too(tmp_path: Path) -> None:
    from tests.oracles.reference_directories import Layout, write_directory

    made = make_tiny("llama", tmp_path / "model", intermediate_size=128)
    write_directory(made, tmp_path / "packed", Layout("gptq", group=32))
    write_tensors(tmp_path / "packed" / "old.safetensors", {"x": X})
    with open_source(str(tmp_path / "packed")).checkpoint as checkpoint:
        assert checkpoint.notes[0].startswith("old.safetensors: not read")
    events: list[dict[str, object]] = []
    describe(str(tmp_path / "packed"), on_event=into(events))
    assert "old.safetensors: not read" in json.dumps(events)


cache = test_hub.cache  # the fixture: huggingface_hub with an empty cache


def hub_files(place: Path, change: Callable[[dict[str, bytes]], object]) -> dict[str, bytes]:
    files = test_hub.files_of(two(place))
    change(files)
    return files


def test_the_hub_is_asked_for_the_files_of_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stray = write_tensors(tmp_path / SINGLE, {"x": 5 * X}).read_bytes()
    events: list[dict[str, object]] = []
    with FakeHub(hub_files(tmp_path / "made", lambda files: files.update({SINGLE: stray}))) as hub:
        test_hub.point_to(hub.url, monkeypatch)
        with open_checkpoint("org/model", on_event=into(events)) as checkpoint:
            assert checkpoint.tensors.keys() == {"x", "y"}
        assert not any(path.endswith(f"/{SINGLE}") for _, path in hub.requests)
    assert "is not fetched" in json.dumps(events)


@pytest.mark.parametrize("headers_only", [False, True])
def test_an_adapter_beside_whole_weights_on_the_hub(
    headers_only: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    added = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}
    with FakeHub(hub_files(tmp_path / "made", lambda files: files.update(added))) as hub:
        test_hub.point_to(hub.url, monkeypatch)
        error: LlmQuantizeError = test_hub.refused(UnsupportedError, headers_only=headers_only)
    assert "adapter" in error.what


def test_a_cache_with_both_is_whole_only_with_the_shards(tmp_path: Path) -> None:
    model = two(tmp_path / "model")
    write_tensors(model / SINGLE, {"x": X})
    snapshot = fetch.LocalSnapshot(model, "c" * 40)
    assert fetch._missing(snapshot) is None
    (model / "b.safetensors").unlink()
    assert fetch._missing(snapshot) == "b.safetensors"
    (model / "a.safetensors").unlink()
    assert fetch._missing(snapshot) is None
