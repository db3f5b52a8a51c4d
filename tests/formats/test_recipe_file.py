"""Recipe files: read strictly, refused for what they do not fit, and every tensor stored as they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_quantize.cli import run
from llm_quantize.errors import (
    AccessError,
    IntegrityError,
    LlmQuantizeError,
    MalformedInputError,
    UnsupportedError,
    UsageError,
)
from llm_quantize.formats.gguf.levels import Overrides
from llm_quantize.formats.recipe import Recipe
from llm_quantize.formats.recipe_file import read_recipe, write_recipe
from llm_quantize.models.opening import open_source
from llm_quantize.pipeline import Options, plan, quantize
from tests.oracles.llama_quantize import types_of
from tests.tiny_models import make_tiny

TENSORS = {"blk.0.attn_v.weight": "q8_0", "blk.1.ffn_down.weight": "q4_1", "token_embd.weight": "q5_0"}


def fields(**changes: Any) -> dict[str, Any]:
    found = {"format": "llm-quantize-recipe", "format_version": 1, "name": "mine", "level": "Q4_0", "tensors": TENSORS}
    return {key: value for key, value in {**found, **changes}.items() if value is not ...}


def save(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("model") / "tiny")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    recipe = Recipe("Q4_K_M-profiled", "Q4_K_M", TENSORS, "a" * 64)
    written = write_recipe(tmp_path / "r.json", recipe, model_name="日本", made={"tokens": 5})
    assert read_recipe(tmp_path / "r.json") == written
    assert json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["model"]["name"] == "日本"
    with pytest.raises(UsageError, match="exists"):
        write_recipe(tmp_path / "r.json", recipe)


def test_by_hand(tmp_path: Path) -> None:
    found = read_recipe(save(tmp_path / "r.json", fields(level="q4_k", tensors={"a": "Q6_K"})))
    assert (found.level, found.tensors, found.model) == ("Q4_K_M", {"a": "q6_k"}, None)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"format": "x"}, MalformedInputError, "not a recipe"),
        ({"format_version": 2}, UnsupportedError, "another version"),
        ({"tensors": ...}, MalformedInputError, "tensors"),
        ({"extra": 1}, MalformedInputError, "extra"),
        ({"name": "../up"}, MalformedInputError, "name"),
        ({"name": 4}, MalformedInputError, "name"),
        ({"name": ".hidden"}, MalformedInputError, "name"),
        ({"level": 4}, MalformedInputError, "level"),
        ({"level": "Q9"}, UsageError, "no gguf level 'Q9'"),
        ({"model": {"name": "x"}}, MalformedInputError, "sha256"),
        ({"tensors": {"a": 4}}, MalformedInputError, "words"),
        ({"tensors": ["a"]}, MalformedInputError, "words"),
        ({"tensors": {"blk.0.attn_v.weight": "q9"}}, UsageError, "blk.0.attn_v.weight"),
        ({"tensors": {"a": "Q4_K_M"}}, UsageError, "level for whole files"),
    ],
)
def test_strictness(tmp_path: Path, change: dict[str, Any], error: type[LlmQuantizeError], message: str) -> None:
    with pytest.raises(error, match=message) as refused:
        read_recipe(save(tmp_path / "r.json", fields(**change)))
    assert "Q9" in str(refused.value) or refused.value.file == str(tmp_path / "r.json")


def test_what_is_no_recipe_at_all(tmp_path: Path) -> None:
    for value in ([], 3, None):
        with pytest.raises(MalformedInputError, match="not a recipe"):
            read_recipe(save(tmp_path / "r.json", value))
    (tmp_path / "r.json").write_bytes(b'{"format": NaN}')
    with pytest.raises(MalformedInputError, match="NaN"):
        read_recipe(tmp_path / "r.json")
    with pytest.raises(UsageError, match="no such recipe"):
        read_recipe(tmp_path / "absent")
    with pytest.raises(AccessError):
        read_recipe(tmp_path)


def test_every_tensor_is_stored_as_the_recipe_says(model: Path, tmp_path: Path) -> None:
    path = save(tmp_path / "r.json", fields())
    options = Options(overrides=Overrides(recipe=read_recipe(path), output_type="q8_0", embedding_type="q4_1"))
    (result,) = quantize(str(model), levels=["Q4_0"], output_dir=tmp_path, name="out", options=options)
    assert result.path.name == "out-mine.gguf"
    found = types_of(result.path)
    assert {name: found[name] for name in TENSORS} == TENSORS
    assert found["output.weight"] == "q8_0"
    assert found["blk.0.attn_q.weight"] == "q4_0"
    assert found["blk.0.attn_norm.weight"] == "f32"
    (planned,) = plan(str(model), levels=["Q4_0"], name="out", options=options)
    assert planned.size == result.path.stat().st_size


def test_another_recipe_is_another_artifact(model: Path, tmp_path: Path) -> None:
    plans = []
    for qtype in ("q8_0", "q4_1"):
        recipe = read_recipe(save(tmp_path / "r.json", fields(tensors={"blk.0.attn_v.weight": qtype})))
        options = Options(overrides=Overrides(recipe=recipe))
        plans += plan(str(model), levels=["Q4_0"], options=options)
    assert plans[0].digest != plans[1].digest
    assert plan(str(model), levels=["Q4_0"])[0].digest not in {plans[0].digest, plans[1].digest}


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"blk.9.attn_v.weight": "q8_0"}, "blk.9.attn_v.weight"),
        ({f"x{i}": "q8_0" for i in range(8)}, "x4 and 3 more"),
        ({"blk.0.attn_norm.weight": "q8_0"}, "blk.0.attn_norm.weight"),
        ({"blk.0.attn_v.weight": "q4_k"}, "multiple of 256"),
    ],
)
def test_what_does_not_fit_the_model_is_named(model: Path, tmp_path: Path, tensors: dict[str, str], named: str) -> None:
    recipe = read_recipe(save(tmp_path / "r.json", fields(tensors=tensors)))
    with pytest.raises(UsageError, match=named.replace(".", r"\.")):
        plan(str(model), levels=["Q4_0"], options=Options(overrides=Overrides(recipe=recipe)))


def test_a_recipe_for_another_model_is_refused(model: Path, tmp_path: Path) -> None:
    source = open_source(str(model))
    with source.checkpoint:
        own = source.content()
    for digest, fits in ((own, True), ("b" * 64, False)):
        recipe = read_recipe(save(tmp_path / "r.json", fields(model={"sha256": digest})))
        options = Options(overrides=Overrides(recipe=recipe))
        if fits:
            assert quantize(str(model), levels=["Q4_0"], output_dir=tmp_path, options=options)[0].path.is_file()
            continue
        with pytest.raises(IntegrityError, match="another model") as refused:
            quantize(str(model), levels=["Q4_0"], output_dir=tmp_path, options=options)
        assert own in str(refused.value)
        assert digest in str(refused.value)


def test_on_the_command_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(save(tmp_path / "r.json", fields()))
    assert run(["plan", str(model), "--recipe", path, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert "mine" in json.dumps(planned)
    command = ["quantize", str(model), "--recipe", path, "-o", str(tmp_path)]
    assert run(command) == 20  # output.weight has rows of 64
    assert (tmp_path / "tiny-mine.gguf").is_file()
    assert run([*command, "-q", "Q4_0"]) == 2
    assert "a recipe is a level of its own" in capsys.readouterr().err
    assert run(["quantize", str(model), "-o", str(tmp_path)]) == 2
