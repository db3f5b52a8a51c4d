"""Models of Ollama's store, by name: the manifest says which blob is the model, and what else there is."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from llm_quantize.advice.describe import describe
from llm_quantize.cli import run
from llm_quantize.errors import IntegrityError, LlmQuantizeError, MalformedInputError, UnsupportedError, UsageError
from llm_quantize.models.hub.ollama import stored
from llm_quantize.models.opening import open_source
from llm_quantize.models.recipes import recipe_from
from llm_quantize.options import Options
from llm_quantize.pipeline import quantize
from llm_quantize.runtimes import generate
from tests.hearing import into
from tests.tiny_models import make_tiny

KIND = "application/vnd.ollama.image."


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file of Q8_0."""
    folder = tmp_path_factory.mktemp("gguf")
    model = make_tiny("llama", folder / "net")
    (result,) = quantize(str(model), "gguf", levels=["Q8_0"], output_dir=folder, options=Options(threads=1))
    return result.path


def layer(store: Path, kind: str, data: bytes) -> dict[str, Any]:
    """A layer of a manifest, and its blob."""
    digest = hashlib.sha256(data).hexdigest()
    (store / "blobs").mkdir(parents=True, exist_ok=True)
    (store / "blobs" / f"sha256-{digest}").write_bytes(data)
    return {"mediaType": f"{KIND}{kind}", "digest": f"sha256:{digest}", "size": len(data)}


def manifest(store: Path, name: str, layers: Any) -> Path:
    path = store / "manifests" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"schemaVersion": 2, "config": {}, "layers": layers}))
    return path


@pytest.fixture
def store(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "models"
    model = layer(place, "model", made.read_bytes())
    parts = [model, layer(place, "template", b"{{ .Prompt }}"), layer(place, "params", b'{"stop": ["x"]}')]
    manifest(place, "registry.ollama.ai/library/tiny/latest", parts)
    manifest(place, "registry.ollama.ai/library/tiny/1b", [model])
    manifest(place, "registry.ollama.ai/me/tiny/latest", [model])
    manifest(place, "hf.co/owner/Tiny-GGUF/Q8_0", [model])
    monkeypatch.setenv("OLLAMA_MODELS", str(place))
    return place


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("ollama:tiny", "tiny"),
        ("ollama:tiny:latest", "tiny"),
        ("ollama:tiny:1b", "tiny-1b"),
        ("ollama:me/tiny", "tiny"),
        ("ollama:hf.co/owner/Tiny-GGUF:Q8_0", "Tiny-GGUF-Q8_0"),
    ],
)
def test_a_name_is_its_blob(name: str, called: str, store: Path, made: Path) -> None:
    with open_source(name).checkpoint as model, open_source(str(made)).checkpoint as file:
        assert (model.name, model.kind) == (called, "GGUF Q8_0")
        weight = "model.layers.0.mlp.up_proj.weight"
        rows = model.matrix(weight)[0]
        assert np.array_equal(model.read_rows(weight, 0, rows), file.read_rows(weight, 0, rows))
    assert describe(name)["dtypes"] == describe(str(made))["dtypes"]


def test_what_is_made_of_it_has_its_name(store: Path, tmp_path: Path, made: Path) -> None:
    heard: list[dict[str, Any]] = []
    (result,) = quantize(
        "ollama:tiny", "gguf", levels=["F32"], output_dir=tmp_path / "out", options=Options(threads=1),
        on_event=into(heard),
    )  # fmt: skip
    assert result.path.name == "tiny-F32.gguf"
    assert any("Ollama's own template" in str(event.get("text")) for event in heard)
    names = {tensor.name for tensor in gguf.GGUFReader(result.path).tensors}
    assert names == {tensor.name for tensor in gguf.GGUFReader(made).tensors}


def test_a_blob_by_its_path(store: Path) -> None:
    path = stored("ollama:tiny").path
    assert path.name.startswith("sha256-")
    with open_source(str(path)).checkpoint as model:
        assert model.kind == "GGUF Q8_0"


def test_a_name_that_is_not_there(store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such model in Ollama") as caught:
        open_source("ollama:other")
    assert "tiny:1b" in str(caught.value.expected)
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="no such model in Ollama"):
        open_source("ollama:tiny")
    monkeypatch.setenv("OLLAMA_MODELS", str(store))
    with pytest.raises(UsageError, match="has no revisions"):
        open_source("ollama:tiny", revision="main")


@pytest.mark.parametrize(
    "name",
    [
        *("ollama:", "ollama:../tiny", "ollama:a/../tiny", "ollama:/etc/passwd", "ollama:a/b/c/d", "ollama:tiny:a:b"),
        *("ollama:tiny:..", "ollama:.tiny", "ollama:ti\0ny", "ollama:名"),
    ],
)
def test_names_that_are_none(name: str, store: Path) -> None:
    with pytest.raises(UsageError, match="no name of a model"):
        open_source(name)


def test_it_is_run_by_its_name(store: Path, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In llama.cpp, which is given the blob; what Ollama has beside it is told."""
    heard: list[dict[str, Any]] = []
    found = "".join(generate("ollama:tiny", "Once", max_tokens=4, threads=1, on_event=into(heard)))
    assert found == "".join(generate(made, "Once", max_tokens=4, threads=1))
    assert any("Ollama's own template" in str(event.get("text")) for event in heard)
    assert run(["run", "ollama:hf.co/owner/Tiny-GGUF:Q8_0", "Once", "-n", "4", "--threads", "1"]) == 0
    assert found in capsys.readouterr().out
    with pytest.raises(UsageError, match="no such model in Ollama"):
        next(generate("ollama:other", "Once"))
    with pytest.raises(UsageError, match="no revisions"):
        next(generate("ollama:tiny", "Once", revision="main"))


def test_an_adapter_is_said(store: Path) -> None:
    model = layer(store, "model", b"GGUF")
    manifest(store, "registry.ollama.ai/library/tuned/latest", [model, layer(store, "adapter", b"GGUFx")])
    with pytest.raises(UnsupportedError, match="adapter") as caught:
        open_source("ollama:tuned")
    assert "llama-export-lora" in (caught.value.remedy or "")


@pytest.mark.parametrize(
    ("layers", "kind"),
    [
        (None, MalformedInputError),
        ({}, MalformedInputError),
        (["x"], MalformedInputError),
        ([], UnsupportedError),
        ([{"mediaType": f"{KIND}tensor", "digest": "sha256:0", "size": 1}], UnsupportedError),
        ([{"mediaType": f"{KIND}model"}], MalformedInputError),
        ([{"mediaType": f"{KIND}model", "digest": "sha256:../../x", "size": 1}], MalformedInputError),
        ([{"mediaType": f"{KIND}model", "digest": f"sha256:{'0' * 64}", "size": "1"}], MalformedInputError),
        ([{"mediaType": f"{KIND}model", "digest": f"sha256:{'0' * 64}", "size": 1}], IntegrityError),
        ([{"mediaType": ["x"], "digest": 3, "size": None}], UnsupportedError),
    ],
)
def test_manifests_of_no_sense(layers: Any, kind: type[LlmQuantizeError], store: Path) -> None:
    manifest(store, "registry.ollama.ai/library/odd/latest", layers)
    with pytest.raises(kind) as caught:
        open_source("ollama:odd")
    assert caught.value.file


def test_a_blob_of_another_size(store: Path) -> None:
    path = stored("ollama:tiny").path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match="another size"):
        open_source("ollama:tiny")


def test_its_types_are_a_recipe(store: Path, made: Path) -> None:
    assert recipe_from("ollama:tiny").tensors == recipe_from(made).tensors
    with pytest.raises(UsageError, match="no such model in Ollama's store"):
        recipe_from("ollama:none")
