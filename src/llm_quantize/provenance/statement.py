"""What a verification found, as an in-toto Statement v1 that others can sign, keep and check.

Owners of the fields: in-toto's attestation specification (Statement v1, ResourceDescriptor v1, the predicate Test
Result v0.1) and SLSA (Provenance v1). An artifact that was made again here, to the byte, has provenance: this very run
built it. Of any other, the tests that it passed are stated. There are no paths and no names of users or machines
in it; what changes from run to run are the two times of a build.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import llm_quantize
from llm_quantize.artifacts.manifest import read_manifest
from llm_quantize.artifacts.rederivation import Dependency, Rederivation
from llm_quantize.artifacts.verification import Verification
from llm_quantize.errors import MalformedInputError, printable
from llm_quantize.io.artifact_files import artifact_files
from llm_quantize.io.artifact_paths import MANIFEST, manifest_path
from llm_quantize.io.json_file import read_json_object
from llm_quantize.io.output_file import file_sha256
from llm_quantize.made import version_of

STATEMENT = "https://in-toto.io/Statement/v1"
PROVENANCE = "https://slsa.dev/provenance/v1"
TEST_RESULT = "https://in-toto.io/attestation/test-result/v0.1"
BUILDER = "pkg:generic/llm-quantize"
BUILD_TYPE = f"{BUILDER}#quantize/v1"
EXTENSION = "llmquantize_checks"
MAX_BYTES = 64 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


def files_of(artifact: Path) -> dict[str, Path]:
    """{name: file} of an artifact, without its manifest, in order of names."""
    if artifact.is_dir():
        found = {path.relative_to(artifact).as_posix(): path for path in artifact.rglob("*") if path.is_file()}
        found.pop(MANIFEST, None)
        return dict(sorted(found.items()))
    return {path.name: path for path in artifact_files(artifact)}


def statement_of(outcome: Verification, began: datetime) -> dict[str, Any]:
    """The statement, JSON-ready. ``began``: when making the artifact again began. Raises what reading files raises."""
    again = outcome.rederived
    manifest = read_manifest(manifest_path(outcome.path))
    return {
        "_type": STATEMENT,
        "subject": [
            {"name": name, "digest": {"sha256": file_sha256(path)}} for name, path in files_of(outcome.path).items()
        ],
        **(
            {"predicateType": TEST_RESULT, "predicate": _tested(outcome)}
            if again is None or not again.same or manifest is None
            else {"predicateType": PROVENANCE, "predicate": _provenance(outcome, again, manifest, began)}
        ),
    }


def _tests(outcome: Verification) -> Iterator[tuple[str, bool]]:
    """(what was checked, whether it is right)."""
    tensors = outcome.tensors
    yield "files and headers", not outcome.problems
    if outcome.has_manifest:
        yield "hashes of the manifest", all(one.hash == "ok" for one in tensors)
    yield (
        ("values and error against the source" if outcome.compared else "values"),
        not any(one.problems for one in tensors if one.hash != "mismatch"),
    )
    if outcome.rederived is not None:
        yield "made again: tensors", outcome.rederived.same_tensors
        yield "made again: every byte", outcome.rederived.same


def _tested(outcome: Verification) -> dict[str, Any]:
    wrong = [name for name, right in _tests(outcome) if not right]
    failed = [] if outcome.ok else wrong
    file = manifest_path(outcome.path)
    configuration = [{"name": file.name, "digest": {"sha256": file_sha256(file)}}] if outcome.has_manifest else []
    return {
        "result": "FAILED" if failed else "WARNED" if wrong else "PASSED",
        "configuration": [
            *configuration,
            {"name": f"llm-quantize verify {llm_quantize.__version__}", "uri": BUILDER},
        ],
        "passedTests": [name for name, right in _tests(outcome) if right],
        "warnedTests": [name for name in wrong if name not in failed],
        "failedTests": failed,
    }


def _provenance(
    outcome: Verification, again: Rederivation, manifest: Mapping[str, Any], began: datetime
) -> dict[str, Any]:
    made = manifest["made"]
    source = {"name": again.source}
    revision = manifest["identity"].get("source_revision")
    source |= {} if revision is None else {"revision": str(revision)}
    merges = manifest["identity"].get("adapters")
    adapters = [{key: merge[key] for key in ("name", "revision", "scale")} for merge in merges or ()]
    asked = {"adapters": adapters} if adapters else {}
    asked |= {key: made[key] for key in ("level", "name", "options", "recipe") if key in made}
    file = manifest_path(outcome.path)
    return {
        "buildDefinition": {
            "buildType": BUILD_TYPE,
            "externalParameters": {"source": source, "format": manifest.get("format"), **asked},
            "internalParameters": {},
            "resolvedDependencies": [_descriptor(one) for one in again.dependencies],
        },
        "runDetails": {
            "builder": {
                "id": BUILDER,
                "version": {"llm-quantize": llm_quantize.__version__, **_versions(made)},
            },
            "metadata": {"startedOn": _time(began), "finishedOn": _time(datetime.now(UTC))},
            "byproducts": [{"name": file.name, "digest": {"sha256": file_sha256(file)}}],
        },
        EXTENSION: {
            "reproduced": again.same,
            "tests": dict(_tests(outcome)),
            **({"cautions": list(again.cautions)} if again.cautions else {}),
        },
    }


def _versions(made: Mapping[str, Any]) -> dict[str, str]:
    """The packages that computed here, of those that the manifest names."""
    return {package: now for package in made.get("versions", {}) if (now := version_of(package)) is not None}


def _descriptor(one: Dependency) -> dict[str, Any]:
    found: dict[str, Any] = {"name": one.name, "digest": {"sha256": one.sha256}}
    if one.revision is not None:
        found["uri"] = f"https://huggingface.co/{one.model}/resolve/{one.revision}/{one.name}"
    return found | {"annotations": {"kind": one.kind, **({"model": one.model} if one.model else {})}}


def _time(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def statement_bytes(statement: Mapping[str, Any]) -> bytes:
    """The file of a statement."""
    return json.dumps(statement, indent=1, ensure_ascii=False).encode() + b"\n"


def unlike(artifact: Path, file: Path) -> list[str]:
    """What of ``artifact``'s files is not as the statement in ``file`` says, a sentence each; the files that it names
    are never opened by its names, and the statement itself may lie among them.

    Raises MalformedInputError (no statement of files by SHA-256), AccessError, UsageError.
    """
    statement = read_json_object(file, limit_bytes=MAX_BYTES)
    subjects = statement.get("subject")
    known = statement.get("_type") == STATEMENT and isinstance(subjects, list) and subjects
    named = known and all(_is_subject(one) for one in subjects or ())
    if not named or len({one["name"] for one in subjects or ()}) != len(subjects or ()):
        raise MalformedInputError(
            "this is no in-toto statement of files by their SHA-256",
            file=file,
            expected=f"_type {STATEMENT}, with one subject for each file",
            found=printable(str(statement.get("_type")), 80),
            remedy="give a file that --attest wrote",
        )
    said = {one["name"]: one["digest"]["sha256"] for one in subjects or ()}
    found = {name: path for name, path in files_of(artifact).items() if not path.samefile(file)}
    told = [
        f"{printable(name, 120)}, of which the statement says something, is not there"
        for name in said
        if name not in found
    ]
    told += [f"the statement says nothing of {printable(name, 120)}" for name in found if name not in said]
    for name, path in found.items():
        if name in said and file_sha256(path) != said[name]:
            told.append(f"{printable(name, 120)} is not the file of the statement")
    return told


def _is_subject(one: Any) -> bool:
    digest = one.get("digest") if isinstance(one, dict) and isinstance(one.get("name"), str) else None
    sha256 = digest.get("sha256") if isinstance(digest, dict) else None
    return isinstance(sha256, str) and _SHA256.fullmatch(sha256) is not None
