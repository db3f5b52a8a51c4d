"""Folders beside the weights: named chat templates and sentence-transformers' modules stay, and GGUF names the pooling
as llama.cpp reads it."""

from __future__ import annotations

import ctypes
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from gguf.constants import PoolingType

from llm_quantize.artifacts.verify import verify
from llm_quantize.errors import AccessError, MalformedInputError
from llm_quantize.io.output import OutputFile, ResumableOutput, Span
from llm_quantize.models.hub.fetch import resolve
from llm_quantize.models.opening import open_source
from llm_quantize.options import MethodOptions
from llm_quantize.pipeline import Options, plan, quantize
from llm_quantize.runtimes.llama_cpp import LlamaCpp
from tests.fake_hub import FakeHub
from tests.models import test_hub
from tests.safetensors_by_hand import write_model
from tests.tiny_models import make_tiny, row_lengths_of_256

TYPES = "sentence_transformers.models"


def modules(*kinds: str) -> list[dict[str, Any]]:
    """As sentence-transformers writes them: the model first, in the directory itself."""
    named = [("Transformer", ""), *((kind, f"{number}_{kind}") for number, kind in enumerate(kinds, start=1))]
    return [
        {"idx": number, "name": str(number), "path": path, "type": f"{TYPES}.{kind}"}
        for number, (kind, path) in enumerate(named)
    ]


def embedding(model: Path, pooling: dict[str, Any] | None, *kinds: str) -> Path:
    (model / "modules.json").write_text(json.dumps(modules(*kinds)))
    for number, kind in enumerate(kinds, start=1):
        folder = model / f"{number}_{kind}"
        folder.mkdir()
        if kind == "Pooling" and pooling is not None:
            (folder / "config.json").write_text(json.dumps({"word_embedding_dimension": 64, **pooling}))
        if kind == "Dense":
            (folder / "config.json").write_text("{}")
            (folder / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}" + b"weights")
    return model


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return make_tiny("qwen3", tmp_path / "model", **row_lengths_of_256("qwen3"))


def made(model: Path, place: Path, format: str = "gptq", level: str = "4bit", **options: Any) -> Path:
    method = MethodOptions(method="rtn", group_size=32) if format == "gptq" else MethodOptions()
    given = Options(threads=1, method=method, **options)
    (result,) = quantize(str(model), format, levels=[level], output_dir=place, options=given)
    return result.path


def nested(directory: Path) -> dict[str, bytes]:
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.glob("*/*")}


def test_a_directory_keeps_them_through_its_whole_life(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    embedding(tiny, {"pooling_mode_lasttoken": True}, "Pooling", "Normalize", "Dense")
    (tiny / "chat_template.jinja").write_text("plain {{ messages }}")
    (tiny / "additional_chat_templates").mkdir()
    (tiny / "additional_chat_templates" / "rag.jinja").write_text("rag {{ messages }}")
    (tiny / "additional_chat_templates" / "notes.txt").write_text("not a template")
    (tiny / "9_Private").mkdir()
    (tiny / "9_Private" / "config.json").write_text("{}")  # no module of this model
    out = made(tiny, tmp_path / "out")
    kept = {"1_Pooling/config.json", "3_Dense/config.json", "3_Dense/model.safetensors",
            "additional_chat_templates/rag.jinja"}  # fmt: skip
    assert nested(out) == {name: data for name, data in nested(tiny).items() if name in kept}
    assert (out / "modules.json").read_bytes() == (tiny / "modules.json").read_bytes()
    assert set(AutoTokenizer.from_pretrained(out).chat_template) == {"default", "rag"}
    assert verify(out, source=str(tiny)).ok
    assert made(tiny, tmp_path / "out") == out  # complete
    assert made(tiny, tmp_path / "out", overwrite=True) == out
    assert set(nested(out)) == kept
    (out / "1_Pooling" / "config.json").write_text("{}")
    assert any("1_Pooling/config.json" in problem for problem in verify(out).problems)
    (out / "1_Pooling" / "config.json").write_bytes((tiny / "1_Pooling" / "config.json").read_bytes())
    assert verify(out).ok
    data = (out / "3_Dense" / "model.safetensors").read_bytes()
    (out / "3_Dense" / "model.safetensors").write_bytes(data[:-1] + b"!")
    assert any("3_Dense/model.safetensors" in problem for problem in verify(out).problems)


def test_nothing_that_a_user_put_into_a_folder_is_removed(tiny: Path, tmp_path: Path) -> None:
    embedding(tiny, {"pooling_mode_lasttoken": True}, "Pooling")
    out = made(tiny, tmp_path / "out")
    mine = out / "1_Pooling" / "mine.txt"
    mine.write_text("kept")
    with pytest.raises(AccessError, match="not an artifact that --overwrite may replace"):
        made(tiny, tmp_path / "out", overwrite=True)
    mine.unlink()
    (out / "2_Own").mkdir()
    with pytest.raises(AccessError, match="not an artifact that --overwrite may replace"):
        made(tiny, tmp_path / "out", overwrite=True)
    (out / "2_Own").rmdir()
    (out / "1_Pooling" / "config.json").unlink()
    (out / "1_Pooling").rmdir()
    assert made(tiny, tmp_path / "out", overwrite=True) == out
    assert nested(out).keys() == {"1_Pooling/config.json"}


def test_an_output_with_folders_is_resumed_started_again_and_replaced(tmp_path: Path) -> None:
    target, data = tmp_path / "out", b"weights"
    files = [OutputFile("w.bin", len(data), b""), OutputFile("1_Pooling/config.json", 2, b"{}")]

    def opened(identity: str, *, replace: bool = False) -> ResumableOutput:
        return ResumableOutput(
            target, files, identity={"made": identity}, spans={"w": Span(0, 0, len(data))},
            journal_path=tmp_path / "out.journal", on_warning=lambda text: None, replace=replace,
        )  # fmt: skip

    def write(output: ResumableOutput) -> None:
        output.write(Span(0, 0, len(data)), 0, data)
        output.record("w", {"sha256": hashlib.sha256(data).hexdigest()})

    with opened("first") as output:
        write(output)
    with opened("first") as output:
        assert output.check("w")
    with opened("second", replace=True) as output:  # what the first left is not its own
        assert output.records == {}
        write(output)
        output.finish(b'{"files": [{"name": "w.bin"}, {"name": "1_Pooling/config.json"}]}')
    assert nested(target) == {"1_Pooling/config.json": b"{}"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (target / "1_Pooling" / "config.json").write_bytes(b"damaged")
    with opened("third", replace=True) as output:
        write(output)
        output.finish(b'{"files": []}')
    assert nested(target) == {"1_Pooling/config.json": b"{}"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_in_the_place_of_a_folder_is_not_written_through(tiny: Path, tmp_path: Path) -> None:
    embedding(tiny, {"pooling_mode_lasttoken": True}, "Pooling")
    outside = tmp_path / "outside"
    outside.mkdir()
    out = made(tiny, tmp_path / "out")
    partial = out.with_name(f"{out.name}.partial")
    partial.mkdir()
    (partial / "1_Pooling").symlink_to(outside)
    with pytest.raises(AccessError, match="a link stands where the output is written"):
        made(tiny, tmp_path / "out", overwrite=True)
    assert list(outside.iterdir()) == []


def test_a_link_out_of_the_model_is_not_copied(tiny: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.jinja"
    secret.write_text("secret")
    (tiny / "additional_chat_templates").mkdir()
    (tiny / "additional_chat_templates" / "rag.jinja").symlink_to(secret)
    options = Options(method=MethodOptions(method="rtn", group_size=32))
    (planned,) = plan(str(tiny), "gptq", levels=["4bit"], options=options)
    assert not any("rag" in file.name for file in planned.files)
    assert "rag.jinja' is not copied" in "\n".join(planned.warnings)


WORDS = [
    ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, PoolingType.LAST),
    ({"pooling_mode_mean_tokens": True}, PoolingType.MEAN),
    ({"pooling_mode_cls_token": True}, PoolingType.CLS),
    ({"pooling_mode": "lasttoken"}, PoolingType.LAST),
    ({"pooling_mode": ["mean"]}, PoolingType.MEAN),
]


@pytest.mark.parametrize(("said", "expected"), WORDS)
def test_gguf_names_the_pooling(said: dict[str, Any], expected: PoolingType, tiny: Path, tmp_path: Path) -> None:
    embedding(tiny, said, "Pooling", "Normalize")
    (planned,) = plan(str(tiny), "gguf", levels=["F16"])
    assert not any("pooling" in warning or "module" in warning for warning in planned.warnings)
    out = made(tiny, tmp_path / "out", "gguf", "F16")
    with LlamaCpp(out, context=64, threads=1) as runtime:
        assert runtime.metadata("qwen3.pooling_type") == str(int(expected))
        pooling = runtime._library.call.llama_pooling_type(ctypes.c_void_p(runtime._context))
    assert pooling == int(expected)  # what llama.cpp itself pools by when nobody says otherwise


@pytest.mark.parametrize(
    ("said", "kinds", "told"),
    [
        ({"pooling_mode_max_tokens": True}, ("Pooling",), "pooling_mode_max_tokens"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, ("Pooling",), "mean and cls"),
        ({"pooling_mode": "weightedmean"}, ("Pooling",), "weightedmean"),
        ({}, ("Pooling",), "none"),
        (None, ("Pooling",), "which is not there"),
        ({"pooling_mode_mean_tokens": True}, ("Pooling", "Dense", "Normalize"), "Dense of sentence-transformers"),
    ],
)
def test_what_gguf_cannot_say_is_told(
    said: dict[str, Any] | None, kinds: tuple[str, ...], told: str, tiny: Path, tmp_path: Path
) -> None:
    embedding(tiny, said, *kinds)
    (planned,) = plan(str(tiny), "gguf", levels=["F16"])
    assert sum(told in warning for warning in planned.warnings) == 1


def test_prompts_are_told(tiny: Path) -> None:
    (tiny / "config_sentence_transformers.json").write_text('{"prompts": {"query": "Instruct: ", "document": ""}}')
    (planned,) = plan(str(tiny), "gguf", levels=["F16"])
    assert not any("prompts" in warning for warning in planned.warnings)
    embedding(tiny, {"pooling_mode_lasttoken": True}, "Pooling")
    (planned,) = plan(str(tiny), "gguf", levels=["F16"])
    assert sum("config_sentence_transformers.json (query)" in warning for warning in planned.warnings) == 1


@pytest.mark.parametrize("text", ["{}", "[1]", '[{"type": "x.Pooling", "path": "../up"}]', '[{"path": "1_Pooling"}]'])
def test_a_broken_list_of_modules_is_refused(text: str, tiny: Path) -> None:
    (tiny / "modules.json").write_text(text)
    for format, level in (("gguf", "F16"), ("safetensors", "BF16")):
        with pytest.raises(MalformedInputError, match="wrong form") as caught:
            plan(str(tiny), format, levels=[level])
        assert caught.value.file == str(tiny / "modules.json")


cache = test_hub.cache  # the fixture: huggingface_hub with an empty cache


@pytest.mark.parametrize("headers_only", [False, True])
def test_the_hubs_folders_are_fetched(headers_only: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model(tmp_path / "made", {"model.safetensors": test_hub.ARRAYS})
    embedding(model, {"pooling_mode_lasttoken": True}, "Pooling")
    wanted = {"1_Pooling/config.json", "additional_chat_templates/rag.jinja"}
    files = test_hub.files_of(model) | {
        "additional_chat_templates/rag.jinja": b"x",
        **dict.fromkeys(("0_Transformer/model.safetensors", "onnx/config.json", "1_Pooling/evil.py"), b"x"),
    }
    with FakeHub(files) as hub:
        test_hub.point_to(hub.url, monkeypatch)
        found = resolve("org/model", None, headers_only=headers_only)
    assert nested(found.directory).keys() == wanted
    if found.temporary is not None:
        found.temporary.cleanup()


def test_a_source_that_is_opened_has_no_other_tensors_of_it(tiny: Path) -> None:
    with open_source(str(tiny)).checkpoint as before:
        names = list(before.tensors)
    embedding(tiny, {"pooling_mode_lasttoken": True}, "Pooling", "Dense")
    with open_source(str(tiny)).checkpoint as after:
        assert list(after.tensors) == names
