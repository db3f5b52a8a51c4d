"""Refusals that name what they are about: the weight, the layer, the figure that is enough, the source that changed."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_quantize import memory
from llm_quantize.artifacts import preflight
from llm_quantize.artifacts.manifest import read_manifest
from llm_quantize.cli import run
from llm_quantize.errors import IntegrityError, MalformedInputError, ResourceError, UsageError
from llm_quantize.io.artifact_paths import manifest_path
from llm_quantize.io.journal import refuse_other_identity
from llm_quantize.io.json_file import MAX_DEPTH, parse_json
from llm_quantize.memory import Sizes
from llm_quantize.models.opening import open_source
from llm_quantize.options import Options
from llm_quantize.pipeline import plan
from tests.tiny_models import make_tiny, row_lengths_of_256


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("model") / "tiny", **row_lengths_of_256("llama"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "t.txt"
    file.write_text("the cat sat on a mat by the river " * 300)
    return file


def changed(model: Path, target: Path, name: str, index: tuple[int, ...], value: float) -> Path:
    shutil.copytree(model, target)
    tensors = load_file(target / "model.safetensors")
    tensors[name] = tensors[name].to(torch.float32)
    tensors[name][index] = value
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def command(model: Path, text: Path, directory: Path, form: str, *, length: int = 64) -> list[str]:
    words = ["-s", "quantize", str(model), form, "-q", "4bit", "--group-size", "32", "--calibration-data", str(text)]
    words += ["--calibration-samples", "2", "--sequence-length", str(length), "--threads", "1"]
    return [*words, "-o", str(directory)]


@pytest.mark.parametrize("name", ["self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"])
def test_awq_names_the_weight_that_is_nan(
    name: str, model: Path, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tensor = f"model.layers.1.{name}.weight"
    bad = changed(model, tmp_path / "bad", tensor, (5, 9), float("nan"))
    assert run(command(bad, text, tmp_path / "out", "awq")) == 9
    told = capfd.readouterr().err
    assert "a weight is NaN or infinite" in told
    assert tensor in told
    assert "[5, 9]" in told
    assert "model.safetensors" in told


def test_squares_that_overflow_name_the_layer(
    model: Path, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bad = changed(model, tmp_path / "bad", "model.layers.1.input_layernorm.weight", (3,), 1e25)
    assert run(command(bad, text, tmp_path / "out", "gptq")) == 9
    told = capfd.readouterr().err
    assert re.search(r"layer input model\.layers\.1\.self_attn\.[qkv]_proj overflow", told), told


def test_windows_too_short_to_measure_are_refused_before_the_work(
    model: Path, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(command(model, text, tmp_path / "out", "gptq", length=2)) == 2
    assert "--sequence-length of 3 or more" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(command(model, text, tmp_path / "out", "gptq", length=3)) == 0


def test_what_a_refusal_asks_for_is_enough(model: Path, text: Path) -> None:
    """Several phases do not fit: the refusal is of the most demanding one, whichever comes first."""
    artifact = plan(str(model), "gguf", levels=["Q4_0"], options=Options())[0]
    small, large = Sizes(block=2 << 30), Sizes(block=3 << 30)
    asked = set()
    for phases in ((small, large), (large, small)):
        for limit in (1 << 30, 5 << 29):
            with pytest.raises(ResourceError) as refused:
                preflight.fit([replace(artifact, phases=phases)], threads=2, max_ram=limit, before=1 << 20)
            asked.add(int(str(refused.value.expected).split()[0].replace(",", "")) >> 24)
    assert asked == {memory.least(large, before=1 << 20) >> 24}


@pytest.mark.parametrize("way", ["gguf -q Q4_0", "gptq -q 4bit --group-size 32 --method rtn", "safetensors -q F16"])
def test_a_changed_tokenizer_is_a_changed_source(
    way: str, model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    own = Path(shutil.copytree(model, tmp_path / "own"))
    words = ["-s", "quantize", str(own), *way.split(), "--threads", "1", "-o", str(tmp_path / "out")]
    assert run(words) == 0
    file = own / "tokenizer.json"
    content = json.loads(file.read_text("utf-8"))
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(content), "utf-8")
    capfd.readouterr()
    assert run(words) == 8
    told = capfd.readouterr().err
    assert "its configuration or its tokenizer" in told
    # The unfinished run of the same: its journal knows the identity alone.
    (artifact,) = [path for path in (tmp_path / "out").iterdir() if path.suffix in (".gguf", "")]
    before = (read_manifest(manifest_path(artifact)) or {})["identity"]
    form, _, level, *_ = way.split()
    now = dict(before) | {"layout_sha256": "0" * 64} | ({"source_metadata_sha256": "1"} if form == "gguf" else {})
    with pytest.raises(IntegrityError, match="source changed"):
        refuse_other_identity(before, now, artifact)
    with pytest.raises(UsageError, match="an unfinished run with another"):
        refuse_other_identity(before, now | {"level": f"not {level}"} | _same_source(before, form), artifact)


def _same_source(before: dict[str, object], form: str) -> dict[str, object]:
    return {"source_metadata_sha256": before["source_metadata_sha256"]} if form == "gguf" else {}


def test_short_documents_are_tokenized_by_the_batch_to_the_same_ids(model: Path) -> None:
    from llm_quantize.calibration.tokens import TextTokenizer

    with (source := open_source(str(model))).checkpoint:
        tokenizer = TextTokenizer(source)
        texts = ["a", "", "the cat", " <s> sat", "日本語", "x" * 3000, "</s>"]
        assert tokenizer.encode_all(texts) == [tokenizer.encode(text) for text in texts]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a": 1, "a": 2}', "the same name twice"),
        (b'{"a": NaN}', "not a JSON number"),
        (b'{"a": ' + b"1" * 100 + b"}", "too long"),
        (b'{"a": 1e999}', "too large for a float"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "nested too deeply"),
        (b'{"a": }', "not JSON"),
    ],
)
def test_the_quick_way_through_json_refuses_as_the_slow_one(data: bytes, message: str) -> None:
    with pytest.raises(MalformedInputError, match=message):
        parse_json(data, file="x.json")
    assert parse_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH, file="x.json")
