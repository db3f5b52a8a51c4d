"""The hub: pinned commit, only data files, every byte proved, and each kind of trouble told in our words."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.utils._http as hub_http
import numpy as np
import pytest

from llm_quantize.errors import (
    IntegrityError,
    LlmQuantizeError,
    MalformedInputError,
    NetworkError,
    ResourceError,
    StoppedError,
    UnsupportedError,
    UsageError,
)
from llm_quantize.models.hub import fetch as module
from llm_quantize.models.hub.fetch import resolve
from llm_quantize.models.hub.runnable import fetch_runnable, is_hub_id
from llm_quantize.models.opening import open_model
from llm_quantize.models.safetensors import open_checkpoint
from llm_quantize.runtimes import generate
from tests.fake_hub import COMMIT, FakeHub
from tests.hearing import into
from tests.io.torch_by_hand import state_dict, tensor, write_zip
from tests.safetensors_by_hand import write_model

TOKEN = "hf_secretsecretsecret"
ARRAYS = {"w": np.arange(600, dtype=np.float32).reshape(20, 30)}
EXTRAS = {
    "README.md": b"---\nlicense: mit\n---\n",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ x }}",
    "tokenizer.model": b"\x0a",
    "modeling_evil.py": b"raise SystemExit",
    "pytorch_model.bin": b"\x80\x04.",
    "consolidated.safetensors": b"x" * 100,
    "onnx/model.onnx": b"x",
    "adapter_config.json": b"{}",
    "..\\evil.json": b"{}",
}


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def single(tmp_path: Path) -> dict[str, bytes]:
    return {**files_of(write_model(tmp_path / "made", {"model.safetensors": ARRAYS})), **EXTRAS}


@pytest.fixture
def sharded(tmp_path: Path) -> dict[str, bytes]:
    shards = {"a-1.safetensors": ARRAYS, "sub/b-2.safetensors": {"v": np.ones(5, np.float16)}}
    return {**files_of(write_model(tmp_path / "made", shards)), **EXTRAS}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """huggingface_hub with an empty cache, a token, no hub, no patience and no memory of earlier tests."""
    place = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(place))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(hub_http.time, "sleep", lambda _seconds: None)
    point_to("http://127.0.0.1:9", monkeypatch)
    yield place
    huggingface_hub.close_session()


def point_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setenv("HF_ENDPOINT", url)


def refused(error: type[LlmQuantizeError], **options: Any) -> LlmQuantizeError:
    with pytest.raises(error) as caught:
        resolve("org/model", options.pop("revision", None), **options)
    text = json.dumps(caught.value.to_dict()) + str(caught.value)
    assert TOKEN not in text
    assert "secret" not in text
    assert "org/model" in text
    assert caught.value.remedy
    return caught.value


def test_a_model_is_fetched_once_from_one_commit(
    single: dict[str, bytes], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[dict[str, Any]] = []
    with FakeHub(single) as hub:
        point_to(hub.url, monkeypatch)
        with open_checkpoint("org/model", on_event=into(events)) as checkpoint:
            np.testing.assert_array_equal(checkpoint.read_rows("w", 0, 20), ARRAYS["w"])
            assert (checkpoint.name, checkpoint.revision) == ("org/model", COMMIT)
        assert {path.name for path in checkpoint.directory.iterdir()} == {
            "config.json",
            "model.safetensors",
            "README.md",
            "tokenizer.json",
            "chat_template.jinja",
            "tokenizer.model",
        }
        assert all("/resolve/" not in path or COMMIT in path for _, path in hub.requests)
        assert f"Bearer {TOKEN}" in hub.tokens
        first = len(hub.requests)
        assert resolve("org/model", None).directory == checkpoint.directory
        assert [path for _, path in hub.requests[first:]] == ["/api/models/org/model"]
        second = len(hub.requests)
        assert resolve("org/model", COMMIT).commit == COMMIT
        assert len(hub.requests) == second  # a commit never changes
    downloads = [event for event in events if event["event"] == "download"]
    assert downloads[-1]["done"] == downloads[-1]["total"] == len(single["model.safetensors"])


def test_shards_and_subfolders(sharded: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeHub(sharded) as hub:
        point_to(hub.url, monkeypatch)
        with open_checkpoint("org/model", revision="main") as checkpoint:
            assert (checkpoint.read_rows("v", 0, 1) == 1).all()
        assert not any(path.endswith((".bin", ".py", "consolidated.safetensors")) for _, path in hub.requests)


@pytest.mark.parametrize(
    ("trouble", "says", "remedy"),
    [
        (401, "private", "HF_TOKEN"),
        (403, "refuses", "permission"),
        ("gated", "gated", "terms"),
        (404, "no such public model|does not hold", "spelling|page"),
        ("no-revision", "revision", "branch"),
        (429, "slow down", "wait"),
        (500, "failure of its own", "later"),
        (503, "failure of its own", "later"),
    ],
)
@pytest.mark.parametrize("where", ["info", "model.safetensors"])
def test_refusals(
    single: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, trouble: Any, says: str, remedy: str, where: str
) -> None:
    with FakeHub(single, {where: trouble}) as hub:
        point_to(hub.url, monkeypatch)
        error = refused(NetworkError)
    assert error.exit_code == 7
    assert any(word in error.what for word in says.split("|"))
    assert any(word in str(error.remedy) for word in remedy.split("|"))
    if where != "info":
        assert error.file == "org/model/model.safetensors"


def test_connection_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.perf_counter()
    error = refused(NetworkError)
    assert "cannot be reached" in error.what
    assert time.perf_counter() - began < 5


def test_unknown_host(monkeypatch: pytest.MonkeyPatch) -> None:
    point_to("http://user:hf_secretsecretsecret@no-such-host.invalid", monkeypatch)
    error = refused(NetworkError)
    assert error.expected == "an answer from no-such-host.invalid"


def test_download_cut_half_way_then_continued(single: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeHub(single, {"model.safetensors": "drop"}) as hub:
        point_to(hub.url, monkeypatch)
        error = refused(NetworkError)
        assert error.file == "org/model/model.safetensors"
        hub.trouble.clear()
        with open_checkpoint("org/model") as checkpoint:
            np.testing.assert_array_equal(checkpoint.read_rows("w", 0, 20), ARRAYS["w"])


def test_a_signal_ends_a_download_between_two_blocks(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = {"w": np.arange(600_000, dtype=np.float32).reshape(20, 30_000)}
    files = files_of(write_model(tmp_path / "large", {"model.safetensors": large}))
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 64 << 10)

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(2)  # until the main thread has heard it, on a busy machine too

    with FakeHub(files, {"model.safetensors": interrupt}) as hub:
        point_to(hub.url, monkeypatch)
        with pytest.raises(StoppedError, match="kept"):
            resolve("org/model", None)
        assert not list(cache.rglob("*.incomplete"))
        assert not list(cache.rglob("*.safetensors"))
        hub.trouble.clear()
        with open_checkpoint("org/model") as checkpoint:
            np.testing.assert_array_equal(checkpoint.read_rows("w", 0, 20), large["w"])


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_right_size_wrong_bytes(single: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with FakeHub(single, {name: "wrong"}) as hub:
        point_to(hub.url, monkeypatch)
        error = refused(IntegrityError)
        assert (error.file, error.exit_code) == (name, 8)
        assert error.expected != error.found
        hub.trouble.clear()
        with open_checkpoint("org/model") as checkpoint:
            np.testing.assert_array_equal(checkpoint.read_rows("w", 0, 20), ARRAYS["w"])


def test_offline(single: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "not in the cache" in refused(NetworkError).what
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with FakeHub(single) as hub:
        point_to(hub.url, monkeypatch)
        place = resolve("org/model", "main").directory
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for revision in (None, "main", COMMIT):
        assert resolve("org/model", revision).directory == place
    (place / "model.safetensors").unlink()
    error = refused(NetworkError, revision=COMMIT)
    assert "only part" in error.what
    assert error.file == "model.safetensors"


def test_hub_away_but_cached(sharded: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[dict[str, Any]] = []
    with FakeHub(sharded) as hub:
        point_to(hub.url, monkeypatch)
        place = resolve("org/model", None).directory
    assert resolve("org/model", None, on_event=into(events)).directory == place
    assert events[0]["event"] == "warning"
    assert COMMIT in events[0]["text"]
    (place / "sub" / "b-2.safetensors").unlink()
    assert "cannot be reached" in refused(NetworkError).what


def test_only_sane_revision_names_become_files(cache: Path) -> None:
    for revision in ("../../../x", "/x", "a/../../b", ".x", COMMIT):
        module._remember(huggingface_hub, "org/model", revision, COMMIT)
    assert not cache.exists()


@pytest.mark.parametrize(
    ("names", "error", "says"),
    [
        (["config.json", "weights.pt"], UnsupportedError, "python -c"),
        (["adapter_config.json", "adapter_model.safetensors"], UnsupportedError, "--lora"),
        (["config.json", "consolidated.safetensors"], UnsupportedError, "consolidated.safetensors"),
        ([], UnsupportedError, "no files"),
    ],
)
def test_repositories_without_safetensors(
    monkeypatch: pytest.MonkeyPatch, names: list[str], error: type[LlmQuantizeError], says: str
) -> None:
    with FakeHub(dict.fromkeys(names, b"{}")) as hub:
        point_to(hub.url, monkeypatch)
        assert says in str(refused(error))
        assert len(hub.requests) == 1


@pytest.mark.parametrize("shards", [("pytorch_model.bin",), ("a.bin", "b.bin")])
def test_pickled_weights_are_fetched_where_there_are_no_others(
    shards: tuple[str, ...], tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"config.json": b'{"model_type": "llama"}', "training_args.bin": b"x", "evil.py": b"x"}
    for number, shard in enumerate(shards):
        write_zip(tmp_path / shard, state_dict(**{f"w{number}": tensor()}))
        files[shard] = (tmp_path / shard).read_bytes()
    if len(shards) > 1:
        places = {f"w{number}": shard for number, shard in enumerate(shards)}
        files["pytorch_model.bin.index.json"] = json.dumps({"weight_map": places}).encode()
    with FakeHub(files) as hub:
        point_to(hub.url, monkeypatch)
        assert "hf download" in str(refused(UnsupportedError, headers_only=True).remedy)
        with open_model("org/model") as checkpoint:
            assert checkpoint.read_rows("w0", 0, 2).tolist() == [[0, 1, 2], [3, 4, 5]]
            assert (checkpoint.name, checkpoint.revision) == ("org/model", COMMIT)
        with open_model("org/model", headers_only=True) as checkpoint:
            assert checkpoint.temporary is None
        assert not any(path.endswith((".py", "training_args.bin")) for _, path in hub.requests)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        (cache / "models--org--model" / "snapshots" / COMMIT / shards[-1]).unlink()
        assert refused(NetworkError).file == (shards[-1] if len(shards) > 1 else "model.safetensors")


def test_index_names_what_the_repository_lacks(sharded: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    del sharded["a-1.safetensors"]
    with FakeHub(sharded) as hub:
        point_to(hub.url, monkeypatch)
        assert refused(MalformedInputError).file == "a-1.safetensors"


def test_disk_too_small(single: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 100

    monkeypatch.setattr(module.shutil, "disk_usage", lambda _path: Usage)
    with FakeHub(single) as hub:
        point_to(hub.url, monkeypatch)
        error = refused(ResourceError)
        assert error.found == "100 bytes"
        assert not any(path.endswith("model.safetensors") for _, path in hub.requests)


@pytest.mark.parametrize("name", ["org/mo del", "-x", "org/..", "a" * 200, "名前"])
def test_not_an_id(name: str) -> None:
    with pytest.raises(UsageError):
        resolve(name, None)


def test_environment_is_honoured(single: dict[str, bytes], tmp_path: Path) -> None:
    """HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE, as a fresh process sees them."""
    code = (
        "import sys\n"
        "from llm_quantize.models.safetensors import open_checkpoint\n"
        "from llm_quantize.errors import LlmQuantizeError\n"
        "assert 'huggingface_hub' not in sys.modules\n"
        "try:\n"
        "    print(open_checkpoint('org/model', revision=sys.argv[1] or None).directory)\n"
        "except LlmQuantizeError as error:\n"
        "    print(error)\n"
        "    sys.exit(error.exit_code)\n"
    )

    def run(revision: str, **environment: str) -> subprocess.CompletedProcess[str]:
        keep = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        return subprocess.run(
            [sys.executable, "-c", code, revision],
            env={**keep, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", **environment},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    assert run("", HF_HUB_OFFLINE="1").returncode == 7
    with FakeHub(single) as hub:
        done = run("", HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)
        assert f"Bearer {TOKEN}" in hub.tokens
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(str(tmp_path / "home"))
    assert TOKEN not in done.stdout + done.stderr
    assert run("", HF_HUB_OFFLINE="1").stdout == done.stdout


GGUF_FILES = {
    "m-Q4_K_M.gguf": b"four",
    "m-Q4_K_S.gguf": b"small",
    "big/m-Q8_0-00001-of-00002.gguf": b"one",
    "big/m-Q8_0-00002-of-00002.gguf": b"two",
    "mmproj-m.gguf": b"eyes",
    "README.md": b"",
}


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        (":Q4_K_M", ["m-Q4_K_M.gguf"]),
        (":q4_k_s", ["m-Q4_K_S.gguf"]),
        (":Q8_0", ["big/m-Q8_0-00001-of-00002.gguf", "big/m-Q8_0-00002-of-00002.gguf"]),
        (":m-Q4_K_M.gguf", ["m-Q4_K_M.gguf"]),
    ],
)
def test_a_gguf_file_of_a_repository_is_fetched_to_be_run(
    wanted: str, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeHub(GGUF_FILES) as hub:
        point_to(hub.url, monkeypatch)
        path = fetch_runnable(f"org/model{wanted}", None, lambda _event: None)
        fetched = {path.split(COMMIT + "/")[1] for _, path in hub.requests if COMMIT in path}
        assert fetched == set(names)
        assert path.read_bytes() == GGUF_FILES[names[0]]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert fetch_runnable(f"org/model{wanted}", None, lambda _event: None) == path


@pytest.mark.parametrize(
    ("wanted", "says"), [("", "several"), (":Q4_K", "no such"), (":m", "several"), (":Q5", "no such")]
)
def test_what_file_is_meant_is_asked(wanted: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeHub(GGUF_FILES) as hub:
        point_to(hub.url, monkeypatch)
        with pytest.raises(UsageError, match=says) as caught:
            fetch_runnable(f"org/model{wanted}", None, lambda _event: None)
        assert "m-Q4_K_M.gguf, m-Q4_K_S.gguf" in str(caught.value.expected)
        assert "mmproj" not in str(caught.value.expected)
        assert not [path for _, path in hub.requests if COMMIT in path]


def test_a_model_directory_is_fetched_to_be_run(single: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeHub({**single, **GGUF_FILES}) as hub:
        point_to(hub.url, monkeypatch)
        found = fetch_runnable("org/model", None, lambda _event: None)
        assert (found / "model.safetensors").is_file()
        assert not list(found.glob("*.gguf"))


def test_paths_are_not_taken_for_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    assert [is_hub_id(text) for text in ("out/model", "org/m.gguf", "./org/m", "a/b/c", "model", "org/")] == [False] * 6
    assert is_hub_id("org/model")
    assert is_hub_id("TheBloke/zephyr-7B-beta-GGUF:Q4_K_M")
    with pytest.raises(UsageError, match="no revisions"):
        list(generate("out", "x", revision="main"))
