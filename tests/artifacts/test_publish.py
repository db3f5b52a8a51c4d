"""push: what is sent, what never is, and a hub that refuses, breaks off, or knows some of it already."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.utils._http as hub_http
import pytest
import yaml

from llm_quantize.artifacts.manifest import manifest_bytes
from llm_quantize.artifacts.publish import push, upload_of
from llm_quantize.artifacts.verify import verify
from llm_quantize.cli import run
from llm_quantize.errors import IntegrityError, LlmQuantizeError, MalformedInputError, NetworkError, UsageError
from llm_quantize.formats.card import with_added, without_added
from llm_quantize.options import MethodOptions, Options
from llm_quantize.pipeline import quantize
from tests.fake_upload_hub import UploadHub

# huggingface_hub 2.4 hands files to httpx2 in a way that this means to give up.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
TOKEN = "hf_secretsecretsecretsecretsecret00"


@pytest.fixture(scope="module")
def made(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of artifacts, with what may lie beside them."""
    folder = tmp_path_factory.mktemp("made")
    options = Options(threads=1, method=MethodOptions(method="rtn"))
    quantize(str(demo_model), levels=["Q8_0"], output_dir=folder, options=Options(threads=1, modelfile=True))
    split = Options(threads=1, split_max_size=3_000_000)
    quantize(str(demo_model), levels=["Q4_0"], output_dir=folder, options=split)
    quantize(str(demo_model), "gptq", levels=["4bit"], output_dir=folder, options=options)
    return folder


@pytest.fixture
def artifacts(made: Path, tmp_path: Path) -> Path:
    """A copy, with files beside and inside that are nobody's business."""
    copy = tmp_path / "out"
    shutil.copytree(made, copy)
    for place in (copy, copy / "demo-llama-GPTQ-4bit"):
        for name in ("notes.txt", ".env", "other.gguf.journal", "demo-llama-Q2_K.gguf.partial", "trainer_state.json"):
            (place / name).write_text("private")
    return copy


@pytest.fixture(autouse=True)
def quiet_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """huggingface_hub with a token, no hub and no patience. Xet, which no fake hub speaks, is off."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hub_http.time, "sleep", lambda _seconds: None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    yield
    huggingface_hub.close_session()


def at(hub: UploadHub, monkeypatch: pytest.MonkeyPatch) -> UploadHub:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    return hub


def front(card: bytes) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split(b"---\n")[1])
    return found


@pytest.mark.parametrize("chunk", [None, 1_000_000])
def test_a_directory(artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int | None) -> None:
    """Regular and large files, these in one part or several: exactly those of the manifest. A copy of it verifies."""
    path = artifacts / "demo-llama-GPTQ-4bit"
    with UploadHub(TOKEN, chunk=chunk) as hub:
        at(hub, monkeypatch)
        address, _ = push(path, "org/name", private=True, base_model="org/source")
        assert address == f"{hub.url}/org/name/commit/1"
        held = hub.repositories["org/name"]
        listed = {entry["name"] for entry in json.loads((path / "manifest.json").read_text())["files"]}
        assert held.keys() == listed | {"manifest.json"}
        assert hub.private == {"org/name"}
        assert not hub.strangers
        assert len(hub.puts) == (1 if chunk is None else len(held["model.safetensors"]) // chunk + 1)
        told = front(held["README.md"])
        assert (told["base_model"], told["base_model_relation"], told["quantized_by"]) == (
            "org/source",
            "quantized",
            "org",
        )
        assert {name: data for name, data in held.items() if name != "README.md"} == {
            name: (path / name).read_bytes() for name in held if name != "README.md"
        }
        copy = tmp_path / "copy"
        copy.mkdir()
        for name, data in held.items():
            (copy / name).write_bytes(data)
        outcome = verify(copy)
        assert outcome.ok, outcome.all_problems()
        # What was added before gives way to what is added now.
        again = dict(upload_of(copy, owner="other").files)["README.md"]
        assert isinstance(again, bytes)
        assert (front(again)["quantized_by"], "base_model" in front(again)) == ("other", False)
        # A word changed in what was there before is still found.
        (copy / "README.md").write_bytes(held["README.md"].replace(b"Recipe", b"recipe", 1))
        assert not verify(copy).ok
        # The same again sends nothing, and commits nothing.
        hub.puts.clear()
        hub.messages.clear()
        push(path, "org/name", base_model="org/source")
        assert (hub.puts, hub.messages) == ([], [])


def test_gguf_files(artifacts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One with its Modelfile, and a split one, each with a card; under the account of the token."""
    with UploadHub(TOKEN) as hub:
        at(hub, monkeypatch)
        assert run(["push", str(artifacts / "demo-llama-Q8_0.gguf")]) == 0
        held = hub.repositories["me/demo-llama-Q8_0"]
        assert held.keys() == {
            "README.md",
            "demo-llama-Q8_0.gguf",
            "demo-llama-Q8_0.gguf.manifest.json",
            "demo-llama-Q8_0.Modelfile",
        }
        assert hub.private == set()
        told = front(held["README.md"])
        assert (told["license"], told["library_name"], told["quantized_by"]) == ("apache-2.0", "gguf", "me")
        assert "base_model" not in told
        # The built-in model has no chat template, and its card proposes no conversation.
        assert 'llm-quantize run demo-llama-Q8_0.gguf "' in held["README.md"].decode()
        assert "--chat" not in held["README.md"].decode()
        out = capsys.readouterr().out
        assert "demo-llama-Q8_0.gguf: 6.21 MB" in out
        assert out.endswith("/me/demo-llama-Q8_0/commit/1\n")
        assert run(["push", str(artifacts / "demo-llama-Q4_0"), "--repo", "org/split", "--json"]) == 0
        facts = json.loads(capsys.readouterr().out.splitlines()[-1])
        parts = [f"demo-llama-Q4_0-{number:05d}-of-00002.gguf" for number in (1, 2)]
        assert [file["name"] for file in facts["files"]] == ["README.md", *parts, "manifest.json"]
        assert hub.repositories["org/split"].keys() == {"README.md", *parts, "manifest.json"}
        card = hub.repositories["org/split"]["README.md"].decode()
        assert "3," in card or "bits per weight" in card


def test_what_was_measured_stands_in_the_metadata(artifacts: Path) -> None:
    path = artifacts / "demo-llama-Q8_0.gguf"
    file = path.with_name(path.name + ".manifest.json")
    manifest = json.loads(file.read_text())
    manifest.pop("manifest_sha256")
    manifest["measured"] = {"kld": 0.0125, "kld_sem": 0.001, "same_top": 0.97, "tokens": 1024, "dtype": "float32"}
    manifest["identity"] |= {"source": "org/source", "source_revision": "1" * 40}
    file.write_bytes(manifest_bytes(manifest))
    card = dict(upload_of(path, owner="me").files)["README.md"]
    assert isinstance(card, bytes)
    data = huggingface_hub.ModelCard(card.decode()).data
    assert data.base_model == "org/source"
    assert data.to_dict()["base_model_relation"] == "quantized"
    assert data.eval_results is not None
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {
        "kl_divergence": 0.0125,
        "accuracy": 0.97,
    }
    assert "0.012500 ± 0.001000" in card.decode()


def test_a_measurement_of_analyze_quality(
    artifacts: Path, tmp_path: Path, demo_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, file = artifacts / "demo-llama-Q8_0.gguf", tmp_path / "quality.json"
    words = ["analyze", "quality", str(path), "--reference", str(demo_model), "--windows", "1", "--json"]
    assert run(words) == 0
    file.write_text(capsys.readouterr().out)
    card = dict(upload_of(path, owner="me", measured=file).files)["README.md"]
    assert isinstance(card, bytes)
    results = huggingface_hub.ModelCard(card.decode()).data.eval_results
    assert results is not None
    found = json.loads(file.read_text())["artifacts"][0]["divergence"]
    assert [(one.metric_type, one.metric_value) for one in results] == [
        ("kl_divergence", found["kld"]),
        ("perplexity", found["perplexity"]),
        ("perplexity", found["reference_perplexity"]),
        ("accuracy", found["same_top"]),
    ]
    with pytest.raises(UsageError, match="of other artifacts"):
        upload_of(artifacts / "demo-llama-GPTQ-4bit", owner="me", measured=file)
    file.write_text('{"artifacts": [{}]}')
    with pytest.raises(MalformedInputError, match="no measurement"):
        upload_of(path, owner="me", measured=file)


def test_added_metadata_comes_off_again() -> None:
    card = b"---\nlicense: mit\ntags:\n- a\n---\n# Text\n---\nmore\n"
    added = with_added(card, {"license": "other", "quantized_by": "me"})
    assert front(added) == {"license": "mit", "tags": ["a"], "quantized_by": "me"}
    assert without_added(added) == card
    assert without_added(card) == card
    assert with_added(card, {"license": "other"}) == card
    assert front(with_added(b"# Text\n", {"quantized_by": "me"})) == {"quantized_by": "me"}


def test_a_dry_run_needs_no_hub_and_no_token(
    artifacts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert run(["push", str(artifacts / "demo-llama-GPTQ-4bit"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "model.safetensors: " in out
    assert "private" not in out
    assert "notes" not in out
    assert "nothing was sent" in out
    assert run(["push", str(artifacts / "demo-llama-GPTQ-4bit")]) == 7
    assert "hf auth login" in capsys.readouterr().err


def refused(path: Path, repository: str | None = "org/name") -> LlmQuantizeError:
    with pytest.raises(LlmQuantizeError) as caught:
        push(path, repository)
    text = str(caught.value) + json.dumps(caught.value.to_dict())
    assert TOKEN not in text
    assert "secret" not in text
    assert caught.value.remedy
    return caught.value


def test_what_is_not_whole_is_not_sent(artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with UploadHub(TOKEN) as hub:
        at(hub, monkeypatch)
        path = artifacts / "demo-llama-Q8_0.gguf"
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)
        assert isinstance(refused(path), IntegrityError)
        path.with_name(path.name + ".manifest.json").unlink()
        assert isinstance(refused(path), UsageError)
        (artifacts / "demo-llama-GPTQ-4bit/config.json").unlink()
        assert isinstance(refused(artifacts / "demo-llama-GPTQ-4bit"), UsageError | IntegrityError)
        (artifacts / "demo-llama-Q4_0/demo-llama-Q4_0-00002-of-00002.gguf").unlink()
        assert isinstance(refused(artifacts / "demo-llama-Q4_0"), UsageError | IntegrityError)
        assert isinstance(refused(artifacts / "notes.txt"), LlmQuantizeError)
        assert hub.repositories == {}


@pytest.mark.parametrize(
    ("step", "status", "words"),
    [
        ("whoami", 401, "does not accept this token"),
        ("create", 401, "does not accept this token"),
        ("create", 403, "may not write there"),
        ("yaml", 400, "takes no such name, model card"),
        ("preupload", 403, "may not write there"),
        ("preupload", 500, "failure of its own"),
        ("batch", 500, "failure of its own"),
        ("put", 500, "failure of its own"),
        ("put", 403, "may not write there"),
        ("commit", 409, "at the same time"),
        ("commit", 500, "failure of its own"),
        ("commit", 429, "slow down"),
    ],
)
def test_a_hub_that_refuses(
    artifacts: Path, monkeypatch: pytest.MonkeyPatch, step: str, status: int, words: str
) -> None:
    """Nothing shows there, and the same again, when it does not, is whole."""
    path = artifacts / "demo-llama-GPTQ-4bit"
    with UploadHub(TOKEN, {step: status}) as hub:
        at(hub, monkeypatch)
        error = refused(path, None if step == "whoami" else "org/name")
        assert isinstance(error, NetworkError)
        assert words in error.what
        assert error.found == f"HTTP {status}"
        assert not any(hub.repositories.values())
        hub.trouble.clear()
        push(path, "org/name")
        assert "model.safetensors" in hub.repositories["org/name"]


def test_no_hub_and_names_that_are_none(artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = artifacts / "demo-llama-GPTQ-4bit"
    assert refused(path).found == "no connection"
    for name in ("org/na me", "a/b/c", "https://huggingface.co/org/name", "org/", "/name", ""):
        assert isinstance(refused(path, name), UsageError)
        assert isinstance(refused(path.with_name("none"), name), UsageError)
        assert run(["push", str(path), "--repo", name, "--dry-run"]) == 2
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "offline" in refused(path).what


def test_files_that_the_repository_ignores(artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with UploadHub(TOKEN, {"preupload": "ignore"}) as hub:
        at(hub, monkeypatch)
        error = refused(artifacts / "demo-llama-GPTQ-4bit")
        assert (error.what, error.found) == ("the hub has left files out", "model.safetensors")


def test_killed_in_the_middle_and_repeated(artifacts: Path, tmp_path: Path) -> None:
    """Nothing shows; what was sent whole is not sent again."""
    words = [sys.executable, "-m", "llm_quantize", "push", str(artifacts / "demo-llama-Q4_0"), "--repo", "org/name"]
    with UploadHub(TOKEN) as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
        environment["HF_HUB_OFFLINE"] = "0"  # what other tests of this process set is for them
        child: list[subprocess.Popen[bytes]] = []

        turns = itertools.count()

        def kill() -> bool:
            """Of two large files the first comes whole; when half of the second is there, the sender dies."""
            if next(turns) == 0:
                return False
            for _ in range(600):
                if hub.stored:
                    break
                time.sleep(0.05)
            child[0].send_signal(signal.SIGKILL)
            child[0].wait()
            return True

        hub.trouble["put"] = kill
        with (
            (tmp_path / "said").open("wb") as said,
            subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=said) as running,
        ):
            child.append(running)
            running.wait(120)
        assert running.returncode == -signal.SIGKILL, (tmp_path / "said").read_text()
        assert hub.repositories["org/name"] == {}
        assert len(hub.stored) == 1
        hub.trouble.clear()
        hub.puts.clear()
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert len(hub.puts) == 1
        assert len(hub.repositories["org/name"]) == 4
