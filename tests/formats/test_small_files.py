"""What of a model's directory gets into an artifact: what runtimes read, what the user names, and nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from llm_quantize import pipeline
from llm_quantize.artifacts.verify import verify
from llm_quantize.cli import run
from llm_quantize.errors import IntegrityError, MalformedInputError, UsageError
from llm_quantize.formats.small_files import MOST_BYTES, MOST_INCLUDED, is_read, is_vocabulary, small_files
from llm_quantize.io.output_file import copied_file
from llm_quantize.options import MethodOptions, Options
from tests.formats.test_directory import changed
from tests.tiny_models import make_tiny

READ = (
    *(
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer.model.v3",
        "tokenizer_config.json",
        "qwen.tiktoken",
        "vocab.json",
    ),
    *("special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.jinja", "generation_config.json"),
    *("preprocessor_config.json", "modules.json", "LICENSE", "LICENSE.txt", "Notice", "USE_POLICY.md"),
)
PRIVATE = (
    *("id_rsa", "credentials", "secrets.env", "customers.csv", "modeling_x.py", "trainer_state.json", "notes.txt"),
    *("license_keys.txt", "tokenizer.bak", "tokenizer_training_data.csv", "wandb.json", "hf_quant_config.json"),
)
UNTOLD = ("optimizer.pt", "training_args.bin", "pytorch_model.bin", ".env", ".gitattributes", "README_old.md")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    return changed(tiny, tmp_path / "model", lambda tensors: tensors)


def fill(directory: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (directory / name).write_text("[]" if name == "modules.json" else f"bytes of {name}\n")


def quantized(model: Path, out: Path, **method: object) -> Path:
    options = Options(method=MethodOptions(**method))  # type: ignore[arg-type]
    (result,) = pipeline.quantize(str(model), "safetensors", levels=["F16"], output_dir=out, options=options)
    return result.path


def test_only_what_runtimes_read_is_copied_and_the_rest_is_named_in_one_line(tmp_path: Path) -> None:
    fill(tmp_path, (*READ, *PRIVATE, *UNTOLD))
    (tmp_path / "checkpoint-500").mkdir()
    found, warnings = small_files(tmp_path)
    assert [name for name, _ in found] == sorted(READ)
    for name, file in found:
        data = (tmp_path / name).read_bytes()
        assert (file.size, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert b"".join(file.pieces()) == data
    (line,) = warnings
    assert "--include GLOB" in line
    assert "checkpoint-500/, credentials, customers.csv" in line
    assert f"and {len(PRIVATE) + 1 - 6} more" in line
    assert not any(name in line for name in UNTOLD)
    assert is_read("LICENSE")
    assert not is_vocabulary("LICENSE")


def test_nothing_is_said_where_nothing_is_left(tmp_path: Path) -> None:
    fill(tmp_path, (*READ, *UNTOLD))
    assert small_files(tmp_path)[1] == []


def test_what_the_user_names_is_copied_too(tmp_path: Path) -> None:
    fill(tmp_path, (*READ, *PRIVATE, *UNTOLD, "config.json", "stray.safetensors", "model.safetensors.index.json"))
    (tmp_path / "folder.py").mkdir()
    found, warnings = small_files(tmp_path, ["*.py", "notes.*"])
    assert [name for name, _ in found] == sorted((*READ, "modeling_x.py", "notes.txt"))
    assert "modeling_x.py" not in warnings[0]
    everything = {name for name, _ in small_files(tmp_path, ["*"])[0]}
    assert everything == {*READ, *PRIVATE, *UNTOLD} - {".env", ".gitattributes"}
    assert ".env" in {name for name, _ in small_files(tmp_path, [".e*"])[0]}


@pytest.mark.parametrize("glob", ["*.nothing", "config.json", "*.safetensors", "../*", "/etc/passwd", "sub/*"])
def test_a_glob_that_finds_nothing_is_refused(tmp_path: Path, glob: str) -> None:
    fill(tmp_path, ("config.json", "model.safetensors", "tokenizer.json"))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "file").write_text("x")
    with pytest.raises(UsageError, match="finds no file"):
        small_files(tmp_path, [glob])


def test_how_much_is_copied_has_bounds(tmp_path: Path) -> None:
    fill(tmp_path, tuple(f"{number}.txt" for number in range(MOST_INCLUDED + 1)))
    with pytest.raises(UsageError, match="too many"):
        small_files(tmp_path, ["*.txt"])
    os.truncate(tmp_path / "0.txt", MOST_BYTES + 1)
    with pytest.raises(MalformedInputError, match="larger than its kind"):
        small_files(tmp_path, ["0.txt"])
    (tmp_path / "0.txt").rename(tmp_path / "tokenizer.json")
    with pytest.raises(MalformedInputError, match="larger than its kind"):
        small_files(tmp_path)


def test_links_and_pipes_are_not_followed(tmp_path: Path) -> None:
    model, elsewhere = tmp_path / "model", tmp_path / "id_rsa"
    model.mkdir()
    elsewhere.write_text("secret")
    (model / "tokenizer.json").symlink_to(elsewhere)
    (model / "notes.txt").symlink_to(elsewhere)
    os.mkfifo(model / "merges.txt")
    found, warnings = small_files(model)
    assert found == []
    assert "tokenizer.json" in warnings[0]
    assert "outside the model directory" in warnings[0]
    with pytest.raises(UsageError, match="finds no file"):
        small_files(model, ["notes.txt"])


def test_an_artifact_has_them_streamed_and_verifies(model: Path, tmp_path: Path) -> None:
    """A large file goes through no large buffer, into the artifact, and its hash into the manifest."""
    fill(model, PRIVATE)
    with (model / "table.dat").open("wb") as file:
        file.truncate(96 << 20)
        file.seek(77 << 20)
        file.write(b"something")
    tracemalloc.start()
    path = quantized(model, tmp_path / "out", include=("*.dat",))
    height = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert height < 24 << 20
    names = {file.name for file in path.iterdir()}
    assert "table.dat" in names
    assert not names & set(PRIVATE)
    facts = {entry["name"]: entry for entry in json.loads((path / "manifest.json").read_bytes())["files"]}
    assert facts["table.dat"]["front_sha256"] == hashlib.sha256((model / "table.dat").read_bytes()).hexdigest()
    assert (
        facts["tokenizer.json"]["front_sha256"] == hashlib.sha256((model / "tokenizer.json").read_bytes()).hexdigest()
    )
    tracemalloc.start()
    verify(path, source=str(model)).raise_on_problems()
    assert tracemalloc.get_traced_memory()[1] < 24 << 20
    tracemalloc.stop()
    with (path / "table.dat").open("r+b") as file:
        file.seek(80 << 20)
        file.write(b"x")
    assert any("table.dat does not match" in text for text in verify(path).problems)


def test_a_file_that_changes_while_it_is_copied(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b"first")
    file = copied_file(path, 100)
    path.write_bytes(b"other")
    with pytest.raises(IntegrityError, match="changed"):
        list(file.pieces())
    path.write_bytes(b"abc")
    with pytest.raises(IntegrityError, match="shorter"):
        list(file.pieces())


def test_a_changed_small_file_is_another_artifact(model: Path, tmp_path: Path) -> None:
    quantized(model, tmp_path / "out")
    quantized(model, tmp_path / "out")
    (model / "generation_config.json").write_text('{"temperature": 0.5}')
    with pytest.raises(IntegrityError, match="source changed"):
        quantized(model, tmp_path / "out")


def test_on_the_command_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(model, ("id_rsa", "modeling_x.py"))
    command = ["quantize", str(model), "safetensors", "-q", "F16", "-o", str(tmp_path), "-n", "made"]
    assert run([*command, "--include", "*.py"]) == 0
    told = capsys.readouterr().err
    assert told.count("id_rsa") == 1
    assert {path.name for path in (tmp_path / "made-F16").iterdir()} & {"id_rsa", "modeling_x.py"} == {"modeling_x.py"}
    assert run(["quantize", str(model), "gguf", "-q", "Q8_0", "-o", str(tmp_path), "--include", "*.py"]) == 2
    assert "--include" in capsys.readouterr().err


def test_the_names_are_patterns_of_files() -> None:
    checks: list[tuple[Callable[[str], bool], str, bool]] = [
        (is_read, "tokenizer.model.v11-tekken", True),
        (is_read, "tokenizer.model.backup", False),
        (is_read, "COPYING", True),
        (is_read, "copying_of_mail.txt", False),
        (is_vocabulary, "chat_template.json", True),
        (is_vocabulary, "preprocessor_config.json", False),
    ]
    assert [(name, check(name)) for check, name, _ in checks] == [(name, wanted) for _, name, wanted in checks]
