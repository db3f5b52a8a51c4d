"""A hub model's headers without its weights: what is transferred, what is found, what is refused, what is left."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from llm_quantize.advice.describe import describe
from llm_quantize.errors import (
    IntegrityError,
    LlmQuantizeError,
    MalformedInputError,
    NetworkError,
    ResourceError,
    UsageError,
)
from llm_quantize.models.hub import headers as hub_headers
from llm_quantize.models.hub.fetch import resolve
from llm_quantize.models.safetensors import open_checkpoint
from llm_quantize.pipeline import plan
from llm_quantize.plan import ArtifactPlan
from tests.fake_hub import COMMIT, FakeHub
from tests.models.test_hub import cache, files_of, point_to, refused, sharded, single

__all__ = ["cache", "sharded", "single"]


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    place = tmp_path / "scratch"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    return place


def header_bytes(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def figures(plans: list[ArtifactPlan]) -> list[Any]:
    return [
        (p.level, p.name, p.files, [(t.name, t.qtype, t.file, t.offset, t.nbytes) for t in p.tensors], p.warnings)
        for p in plans
    ]


@pytest.mark.parametrize("trouble", [None, "no-range"])
def test_plan_and_info_fetch_no_weights(
    demo_model: Path,
    tmp_path: Path,
    scratch: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    trouble: str | None,
) -> None:
    files = files_of(demo_model)
    weights = files["model.safetensors"]
    directory = tmp_path / "models--org--model" / "snapshots" / COMMIT  # a directory of the same name
    shutil.copytree(demo_model, directory)
    received: list[int] = []
    chunks = hub_headers._chunks

    def counted(response: Any) -> Iterator[bytes]:
        for piece in chunks(response):
            received.append(len(piece))
            yield piece

    monkeypatch.setattr(hub_headers, "_chunks", counted)
    with FakeHub(files, {"model.safetensors": trouble}) as hub:
        point_to(hub.url, monkeypatch)
        plans = plan("org/model", levels=["Q4_K_M", "Q8_0"])
        if trouble is None:
            assert hub.sent["model.safetensors"] == sum(received) == header_bytes(weights)
        else:  # the whole file is offered twice; after what we need the connection is closed
            assert sum(received) < 1 << 18 < len(weights)
        facts = describe("org/model")
        assert list(scratch.iterdir()) == []
        assert not any("model.safetensors" in str(path) for path in cache.rglob("*"))
        assert facts["revision"] == COMMIT
        assert facts["directory"] is None
        assert facts["files"] == [{"name": "model.safetensors", "size": len(weights)}]
        local = plan(str(directory), levels=["Q4_K_M", "Q8_0"])
        assert figures(plans) == figures(local)
        local_facts = describe(str(directory))
        assert {key for key in facts if facts[key] != local_facts[key]} == {"directory", "revision"}
        hub.trouble.clear()
        resolve("org/model", None)  # now with the weights
        hub.sent.clear()
        again = plan("org/model", levels=["Q4_K_M", "Q8_0"])
        assert figures(again) == figures(plans)
        assert [p.digest for p in again] == [p.digest for p in plans]
        assert describe("org/model")["directory"].endswith(COMMIT)
        assert "model.safetensors" not in hub.sent


def test_headers_of_shards_and_no_rows(
    sharded: dict[str, bytes], scratch: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeHub(sharded) as hub:
        point_to(hub.url, monkeypatch)
        whole = resolve("org/model", None).directory
        (whole / "sub" / "b-2.safetensors").unlink()
        hub.sent.clear()
        before = files_of(cache)
        with open_checkpoint("org/model", headers_only=True) as checkpoint:
            assert checkpoint.directory.is_relative_to(scratch)
            assert checkpoint.revision == COMMIT
            assert {name: info.shape for name, info in checkpoint.tensors.items()} == {"w": (20, 30), "v": (5,)}
            for fact in checkpoint.fingerprint():
                data = sharded[fact.name]
                assert fact.size == len(data)
                assert fact.header_sha256 == hashlib.sha256(data[: header_bytes(data)]).hexdigest()
            for name in ("w", "v"):
                with pytest.raises(UsageError, match="headers only"):
                    checkpoint.read_rows(name, 0, 1)
            with pytest.raises(UsageError, match="headers only"):
                checkpoint.read_rows("w", 0, 1, transpose=True)
        assert hub.sent == {"sub/b-2.safetensors": header_bytes(sharded["sub/b-2.safetensors"])}
        assert files_of(cache) == before
        assert list(scratch.iterdir()) == []
        with open_checkpoint("org/model") as checkpoint:
            assert (checkpoint.read_rows("v", 0, 1) == 1).all()


@pytest.mark.parametrize(
    ("trouble", "error", "says"),
    [
        ("gated", NetworkError, "gated"),
        (401, NetworkError, "private"),
        (403, NetworkError, "refuses"),
        (404, NetworkError, "does not hold"),
        ("late", NetworkError, "failure of its own"),
        ("drop", NetworkError, "connection broke"),
        ("short", NetworkError, "asked for"),
        ("elsewhere", NetworkError, "asked for"),
        ("grown", IntegrityError, "announced"),
    ],
)
def test_headers_refused(
    single: dict[str, bytes],
    scratch: Path,
    monkeypatch: pytest.MonkeyPatch,
    trouble: Any,
    error: type[LlmQuantizeError],
    says: str,
) -> None:
    single["model.safetensors"] = bytes(4) * 2  # so that a connection cut half way ends inside what is asked for
    if trouble == "late":
        single["model.safetensors"] = b"\x02" + bytes(7) + b"{}"
    with FakeHub(single, {"model.safetensors": trouble}) as hub:
        point_to(hub.url, monkeypatch)
        found = refused(error, headers_only=True)
    assert says in found.what
    assert str(found.file).endswith("model.safetensors")
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "too short"),
        (b"1234567", "too short"),
        ((1000).to_bytes(8, "little") + b"{}", "truncated inside its header"),
        ((10**15).to_bytes(8, "little") + b"{}", "beyond what the format allows"),
        (bytes(8) + b"{}", "empty"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS"),
        ((2).to_bytes(8, "little") + b"[]" + bytes(9), "begin with"),
    ],
)
def test_malformed_headers(
    single: dict[str, bytes], scratch: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, says: str
) -> None:
    single["model.safetensors"] = data
    with FakeHub(single) as hub:
        point_to(hub.url, monkeypatch)
        with pytest.raises(MalformedInputError, match=says) as caught:
            open_checkpoint("org/model", headers_only=True)
    assert str(caught.value.file).endswith("/org/model/model.safetensors")
    assert list(scratch.iterdir()) == []


def test_headers_only_offline(single: dict[str, bytes], scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeHub(single) as hub:
        point_to(hub.url, monkeypatch)
        open_checkpoint("org/model", headers_only=True).close()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "only part" in refused(NetworkError, headers_only=True).what


def test_no_room_for_headers(single: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    with FakeHub(single) as hub:
        point_to(hub.url, monkeypatch)
        with pytest.raises(ResourceError, match="TMPDIR"):
            open_checkpoint("org/model", headers_only=True)
