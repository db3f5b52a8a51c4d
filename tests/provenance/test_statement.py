"""Statements: the fields that in-toto and SLSA publish, the same bytes but for times, and no word of the machine.

The rules are written from the specifications of in-toto (Statement v1, ResourceDescriptor v1, Test Result v0.1) and
SLSA (Provenance v1): fields by name and type, which are required, and what kind of URI and time they hold.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import re
import shutil
import socket
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

import llm_quantize
from llm_quantize.cli import run
from llm_quantize.errors import MalformedInputError
from llm_quantize.provenance.statement import statement_bytes, unlike
from tests.faults.tiny_llama import write_tiny_llama

URI = re.compile(r"[a-z][a-z0-9+.-]*:[^\s]+", re.ASCII)
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", re.ASCII)
DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)


def only(value: Any, required: Collection[str], optional: Collection[str] = ()) -> None:
    assert isinstance(value, dict)
    assert set(required) <= set(value)
    extension = {key for key in value if re.fullmatch(r"[a-z]+_[A-Za-z]+", key)}
    assert set(value) <= {*required, *optional, *extension}


def check_descriptor(value: Any, *, digest: bool) -> None:
    """ResourceDescriptor v1: one of uri, digest and content at least; a digest is a map of algorithm to hex."""
    only(value, (), ("name", "uri", "digest", "content", "downloadLocation", "mediaType", "annotations"))
    assert {"uri", "digest", "content"} & set(value)
    assert isinstance(value.get("name", ""), str)
    if digest or "digest" in value:
        only(value["digest"], ("sha256",))
        assert DIGEST.fullmatch(value["digest"]["sha256"])
    if "uri" in value:
        assert URI.fullmatch(value["uri"])
    assert isinstance(value.get("annotations", {}), dict)


def check_statement(value: Any) -> None:
    """Statement v1: its type, subjects with digests and names of their own, a predicate of a type."""
    only(value, ("_type", "subject", "predicateType"), ("predicate",))
    assert value["_type"] == "https://in-toto.io/Statement/v1"
    assert URI.fullmatch(value["predicateType"])
    assert value["subject"]
    for subject in value["subject"]:
        check_descriptor(subject, digest=True)
    names = [subject["name"] for subject in value["subject"]]
    assert len(set(names)) == len(names)


def check_provenance(value: Any) -> None:
    """SLSA Provenance v1: buildDefinition and runDetails with what they require."""
    only(value, ("buildDefinition", "runDetails"))
    definition, details = value["buildDefinition"], value["runDetails"]
    only(definition, ("buildType", "externalParameters"), ("internalParameters", "resolvedDependencies"))
    assert URI.fullmatch(definition["buildType"])
    assert isinstance(definition["externalParameters"], dict)
    assert definition["externalParameters"]
    for one in definition["resolvedDependencies"]:
        check_descriptor(one, digest=True)
    only(details, ("builder",), ("metadata", "byproducts"))
    only(details["builder"], ("id",), ("builderDependencies", "version"))
    assert URI.fullmatch(details["builder"]["id"])
    assert all(isinstance(one, str) for one in details["builder"]["version"].values())
    only(details["metadata"], (), ("invocationId", "startedOn", "finishedOn"))
    for key in ("startedOn", "finishedOn"):
        assert TIME.fullmatch(details["metadata"][key])
    for one in details["byproducts"]:
        check_descriptor(one, digest=True)


def check_test_result(value: Any) -> None:
    """Test Result v0.1: an outcome of three, what was run with, and lists of names."""
    only(value, ("result", "configuration"), ("url", "passedTests", "warnedTests", "failedTests"))
    assert value["result"] in ("PASSED", "WARNED", "FAILED")
    for one in value["configuration"]:
        check_descriptor(one, digest=False)
    for key in ("passedTests", "warnedTests", "failedTests"):
        assert all(isinstance(name, str) for name in value[key])
    assert bool(value["failedTests"]) == (value["result"] == "FAILED")
    assert bool(value["warnedTests"]) <= (value["result"] != "PASSED")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("statement")
    write_tiny_llama(root / "tiny")
    for words in ("gguf -q Q4_0", "safetensors -q F16"):
        assert run(["quantize", str(root / "tiny"), *words.split(), "-o", str(root)]) == 0
    return root


@pytest.fixture(params=["tiny-Q4_0.gguf", "tiny-F16"])
def artifact(place: Path, request: pytest.FixtureRequest) -> Path:
    return place / str(request.param)


def attested(artifact: Path, target: Path, **more: Any) -> dict[str, Any]:
    found = llm_quantize.verify(artifact, attest=target, **more)
    assert found.statement == target
    statement: dict[str, Any] = json.loads(target.read_bytes())
    check_statement(statement)
    return statement


def says_nothing_of_here(statement: dict[str, Any], *places: Path) -> None:
    text = json.dumps(statement)
    for word in (*map(str, places), "/tmp", "/home", "/root", socket.gethostname(), f'"{getpass.getuser()}"'):
        assert word not in text


def test_what_was_looked_at(artifact: Path, place: Path, tmp_path: Path) -> None:
    statement = attested(artifact, tmp_path / "s.json")
    assert statement["predicateType"] == "https://in-toto.io/attestation/test-result/v0.1"
    check_test_result(statement["predicate"])
    assert statement["predicate"]["result"] == "PASSED"
    assert "hashes of the manifest" in statement["predicate"]["passedTests"]
    says_nothing_of_here(statement, place, tmp_path)
    files = {artifact.name: artifact} if artifact.is_file() else {path.name: path for path in artifact.iterdir()}
    files.pop("manifest.json", None)
    assert {one["name"]: one["digest"]["sha256"] for one in statement["subject"]} == {
        name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()
    }
    attested(artifact, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "s.json").read_bytes()


def test_what_was_made_again(artifact: Path, place: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {"rederive": True, "source": place / "tiny"}
    statement = attested(artifact, tmp_path / "s.json", **more)
    assert statement["predicateType"] == "https://slsa.dev/provenance/v1"
    predicate = statement["predicate"]
    check_provenance(predicate)
    says_nothing_of_here(statement, place, tmp_path)
    assert predicate["llmquantize_checks"]["reproduced"] is True
    assert predicate["buildDefinition"]["externalParameters"]["source"] == {"name": "tiny"}
    dependencies = {
        one["name"]: one["digest"]["sha256"] for one in predicate["buildDefinition"]["resolvedDependencies"]
    }
    for name in (
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "config.json",
        "tokenizer.json",
    ):
        assert dependencies[name] == hashlib.sha256((place / "tiny" / name).read_bytes()).hexdigest()
    again = attested(artifact, tmp_path / "again.json", **more)
    for one in (statement, again):
        one["predicate"]["runDetails"].pop("metadata")
    assert statement_bytes(statement) == statement_bytes(again)


def test_where_another_version_made_the_fronts_tests_are_stated(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No build of these very bytes took place: there is no provenance to be stated."""
    monkeypatch.setattr(llm_quantize, "__version__", "9.9")
    statement = attested(place / "tiny-Q4_0.gguf", tmp_path / "s.json", rederive=True, source=place / "tiny")
    check_test_result(statement["predicate"])
    assert statement["predicate"]["result"] == "WARNED"
    assert statement["predicate"]["warnedTests"] == ["made again: every byte"]


def test_a_commit_of_the_hub_is_named_by_its_address() -> None:
    from llm_quantize.artifacts.rederivation import Dependency
    from llm_quantize.provenance.statement import _descriptor

    found = _descriptor(Dependency("model.safetensors", "0" * 64, "source", "org/model", "a" * 40))
    check_descriptor(found, digest=True)
    assert found["uri"] == f"https://huggingface.co/org/model/resolve/{'a' * 40}/model.safetensors"


def test_of_other_bytes_no_provenance_is_stated(place: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copy(place / "tiny-Q4_0.gguf", tmp_path))
    shutil.copy(place / "tiny-Q4_0.gguf.manifest.json", tmp_path)
    data = bytearray(broken.read_bytes())
    data[-100] ^= 1
    broken.write_bytes(data)
    found = llm_quantize.verify(broken, rederive=True, source=place / "tiny", attest=tmp_path / "s.json")
    assert not found.ok
    assert found.statement is None
    assert not (tmp_path / "s.json").exists()
    statement = attested(broken, tmp_path / "s.json")
    check_test_result(statement["predicate"])
    assert statement["predicate"]["result"] == "FAILED"
    assert "hashes of the manifest" in statement["predicate"]["failedTests"]


def test_a_statement_is_held_against_the_files(artifact: Path, place: Path, tmp_path: Path) -> None:
    attested(artifact, tmp_path / "s.json")
    assert run(["verify", str(artifact), "--against", str(tmp_path / "s.json")]) == 0
    copy = tmp_path / "copy" / artifact.name
    if artifact.is_dir():
        shutil.copytree(artifact, copy)
        (copy / "extra.txt").write_text("x")
        (copy / "README.md").write_text("other")
        told = unlike(copy, tmp_path / "s.json")
        assert told == [
            "the statement says nothing of extra.txt",
            "README.md is not the file of the statement",
        ]
        (copy / "README.md").unlink()
        assert any(
            "README.md, of which the statement says something" in text for text in unlike(copy, tmp_path / "s.json")
        )
    else:
        copy.parent.mkdir()
        copy.write_bytes(artifact.read_bytes()[:-1] + b"x")
        assert unlike(copy, tmp_path / "s.json") == [f"{artifact.name} is not the file of the statement"]
    assert run(["verify", str(copy), "--against", str(tmp_path / "s.json")]) == 8


@pytest.mark.parametrize(
    "content",
    [
        "x",
        "[]",
        "{}",
        '{"_type": "https://in-toto.io/Statement/v1", "subject": []}',
        '{"_type": "https://in-toto.io/Statement/v1", "subject": [{"name": "a"}]}',
        '{"_type": "https://in-toto.io/Statement/v1", "subject": [{"name": "a", "digest": {"sha256": "xyz"}}]}',
        '{"_type": "https://in-toto.io/Statement/v1", "subject": [7]}',
        '{"_type": "https://in-toto.io/Statement/v0.1", "subject": [{"name": "a", "digest": {"sha256": "%s"}}]}'
        % ("0" * 64),
        json.dumps(
            {
                "_type": "https://in-toto.io/Statement/v1",
                "subject": [{"name": "tiny-Q4_0.gguf", "digest": {"sha256": digit * 64}} for digit in "01"],
            }
        ),
    ],
)
def test_what_is_no_statement_is_refused(place: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "s.json").write_text(content)
    with pytest.raises(MalformedInputError):
        unlike(place / "tiny-Q4_0.gguf", tmp_path / "s.json")


def test_a_statement_may_lie_beside_the_files(place: Path, tmp_path: Path) -> None:
    copy = tmp_path / "tiny-F16"
    shutil.copytree(place / copy.name, copy)
    attested(copy, copy / "s.json")
    assert unlike(copy, copy / "s.json") == []
    shutil.copy(copy / "s.json", copy / "other.json")
    assert unlike(copy, copy / "s.json") == ["the statement says nothing of other.json"]


def test_a_statement_takes_the_place_of_nothing(place: Path, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text("mine")
    for words in (["--attest", str(tmp_path / "s.json")], ["--attest", str(place / "tiny-Q4_0.gguf")]):
        assert run(["verify", str(place / "tiny-Q4_0.gguf"), *words]) == 2
    assert (tmp_path / "s.json").read_text() == "mine"
    assert run(["verify", str(place), "--attest", str(tmp_path / "t.json")]) == 2
