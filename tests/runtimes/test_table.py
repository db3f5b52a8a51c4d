"""The table of runtimes: who opens what, who is asked where nobody is named, and how a row is added."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llm_quantize.errors import MissingExtraError, UsageError
from llm_quantize.events import EventSink
from llm_quantize.runtimes import (
    RUNTIMES,
    artifact_at,
    generate,
    isolated,
    llama_cpp_library,
    open_model,
    runtime_for,
    what_opens_what,
)
from llm_quantize.runtimes.base import Request


@pytest.fixture
def paths(tmp_path: Path) -> SimpleNamespace:
    """A GGUF file, directories of a float model, a quantized one, one of MLX, and GGUF files beside a configuration."""
    file, beside, plain, packed = tmp_path / "a.gguf", tmp_path / "beside", tmp_path / "plain", tmp_path / "packed"
    apple = tmp_path / "apple"
    file.write_bytes(b"")
    for folder, config in (
        (plain, "{}"),
        (beside, "{}"),
        (apple, '{"quantization": {"group_size": 64, "bits": 4}}'),
        (packed, '{"quantization_config": {"quant_method": "gptq"}}'),
    ):
        folder.mkdir()
        (folder / "config.json").write_text(config)
    (beside / "b.gguf").write_bytes(b"")
    return SimpleNamespace(file=file, plain=plain, packed=packed, apple=apple, beside=beside)


def test_who_opens_what(paths: SimpleNamespace) -> None:
    opened = {name: [one.opens(path) for path in vars(paths).values()] for name, one in RUNTIMES.items()}
    directories = [False, True, True, False, False]
    assert opened == {
        "llama.cpp": [True, False, False, False, True],
        "transformers": directories,
        "vllm": directories,
        "ctranslate2": [False] * 5,
        "mlx": [False, False, False, True, False],
    }
    usual = [runtime_for(path) for path in vars(paths).values()]
    names = ("llama.cpp", "transformers", "transformers", "mlx", "llama.cpp")
    assert usual == [RUNTIMES[name] for name in names]
    assert runtime_for(paths.packed, "vllm") is RUNTIMES["vllm"]
    with pytest.raises(UsageError, match=r"expected: llama\.cpp"):
        runtime_for(paths.file, "vllm")
    assert what_opens_what() == (
        "GGUF files (with llama.cpp), model directories (with transformers or vllm), CTranslate2 models (with "
        "ctranslate2), MLX directories (with mlx)"
    )


def test_what_is_measured_at_a_path(paths: SimpleNamespace) -> None:
    assert artifact_at(paths.packed) == paths.packed
    assert artifact_at(paths.plain) == paths.plain
    assert artifact_at(paths.beside) == paths.beside / "b.gguf"
    assert artifact_at(paths.file.parent) == paths.file
    paths.plain.joinpath("config.json").unlink()
    with pytest.raises(UsageError, match="no GGUF file"):
        artifact_at(paths.plain)
    with pytest.raises(UsageError, match="no GGUF file"):
        open_model(paths.packed, context=8, threads=1)


def test_a_runtime_that_is_absent_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_name: str) -> None:
        return None

    llama_cpp_library.load_library.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", absent)
    monkeypatch.setattr(isolated, "find_spec", absent)
    names = ("VLLM", "TRANSFORMERS", "CTRANSLATE2", "MLX")
    for variable in (f"LLM_QUANTIZE_{name}" for name in names):
        monkeypatch.delenv(variable, raising=False)
    for one in RUNTIMES.values():
        with pytest.raises(MissingExtraError, match="pip install"):
            one.require()


def test_another_runtime_is_one_row(paths: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(path: Path, request: Request, on_event: EventSink) -> Iterator[str]:
        yield f"{path.name}: {request.prompts[0]}"

    fifth: Any = SimpleNamespace(OPENS="b", opens=lambda path: path == paths.plain, generate=write)
    monkeypatch.setattr("llm_quantize.runtimes.RUNTIMES", {"fifth": fifth, **RUNTIMES})
    assert list(generate(paths.plain, "Once")) == ["plain: Once"]
    assert runtime_for(paths.packed) is RUNTIMES["transformers"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"context": 64}, "no use for --context"),
        ({"gpu_layers": 1}, "no use for --gpu-layers"),
        ({"top_p": 0.5}, "--top-p has no effect"),
        ({"system": "Be kind."}, "part of a chat"),
    ],
)
def test_a_setting_without_effect_is_refused(paths: SimpleNamespace, more: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        list(generate(paths.plain, "Once", runtime="transformers", **more))


def test_every_runtime_says_what_it_takes() -> None:
    asked = {item.name for item in dataclasses.fields(Request)}
    assert all(asked >= one.TAKES for one in RUNTIMES.values())
