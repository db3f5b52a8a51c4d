"""Artifacts made again: the same bytes in every format, and every byte that is another is found and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import llm_quantize
from llm_quantize import events
from llm_quantize.artifacts.manifest import SEAL, manifest_bytes
from llm_quantize.artifacts.rederivation import Rederivation
from llm_quantize.cli import run
from llm_quantize.errors import IntegrityError, MalformedInputError, UnsupportedError, UsageError
from llm_quantize.formats.recipe import Recipe
from llm_quantize.formats.recipe_file import write_recipe
from llm_quantize.io.artifact_paths import manifest_path
from llm_quantize.made import Given
from llm_quantize.pipeline import quantize
from llm_quantize.provenance.check import check
from llm_quantize.provenance.rederive import ready, rederive
from tests.blockwise.tiny import write_text
from tests.fake_hub import COMMIT, FakeHub
from tests.faults.forking import CommandLine
from tests.faults.tiny_llama import write_tiny_llama
from tests.models.adapters import factors, write_adapter
from tests.models.test_hub import cache, point_to
from tests.tiny_models import make_tiny

__all__ = ["cache"]

MIXED = {"model.layers.0.mlp.down_proj": "int2_g32", "model.layers.1.self_attn.o_proj": "int6", "lm_head": "int8_g32"}
CASES = {
    "gguf": "gguf -q Q4_0 -q Q8_0 --tensor-type attn_v=q8_0",
    "gguf split": "gguf -q Q5_0 --split-max-size 20K",
    "gguf best fallback": "gguf -q Q2_K --fallback best",
    "gguf importance of another level": "gguf -q IQ3_XXS -q Q4_1 TEXT",
    "gguf gptq": "gguf -q Q4_0 --method gptq TEXT",
    "gguf imatrix": "gguf -q Q4_1 --imatrix IMATRIX",
    "gguf recipe": "gguf --recipe GGUF-RECIPE",
    "gptq": "gptq -q 4bit --group-size 32 TEXT",
    "gptq of statistics": "gptq -q 4bit --group-size 32 --inputs source --statistics STATISTICS",
    "awq": "awq -q 4bit --group-size 32 TEXT",
    "smoothquant": "compressed-tensors -q W8A8 --transform smoothquant --ignore o_proj TEXT",
    "mixed": "compressed-tensors --recipe MIXED --group-size 32 TEXT",
    "rtn": "compressed-tensors -q W4A16 --method rtn --group-size 32",
    "mlx": "mlx -q 4bit --group-size 32 --method rtn",
    "bitsandbytes": "bitsandbytes -q NF4 --method rtn",
    "ctranslate2": "ctranslate2 -q int8 -q int16 --method rtn",
    "safetensors": "safetensors -q F16 --output-shard-size 60K",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text, an importance matrix, statistics and recipes; artifacts are made in it."""
    root = tmp_path_factory.mktemp("rederive")
    make_tiny("llama", root / "tiny", dtype="float32", tie_word_embeddings=False, intermediate_size=128)
    write_text(root)
    write_recipe(root / "gguf.json", Recipe("mine", "Q4_0", {"blk.0.attn_v.weight": "q8_0"}))
    write_recipe(root / "mixed.json", Recipe("mixed", "W4A16", MIXED, form="compressed-tensors"))
    text = ["--calibration-data", str(root / "calibration.txt"), "--calibration-samples", "2"]
    analyze = ["analyze", "importance", str(root / "tiny"), *text, "--sequence-length", "48"]
    assert run([*analyze, "-o", str(root / "m.gguf")]) == 0
    assert run([*analyze, "--collect", "imatrix,hessian", "-o", str(root / "s.safetensors")]) == 0
    return root


def made(place: Path, case: str) -> list[Path]:
    """The artifacts of a case, made where they are not."""
    out = place / "out" / case.replace(" ", "-")
    words = (
        CASES[case]
        .replace("TEXT", f"--calibration-data {place / 'calibration.txt'} --calibration-samples 2 --sequence-length 48")
        .replace("IMATRIX", str(place / "m.gguf"))
        .replace("STATISTICS", str(place / "s.safetensors"))
        .replace("GGUF-RECIPE", str(place / "gguf.json"))
        .replace("MIXED", str(place / "mixed.json"))
    )
    if not out.exists():
        assert run(["quantize", str(place / "tiny"), *words.split(), "-o", str(out), "--threads", "2"]) in (0, 20)
    return sorted(path for path in out.iterdir() if not path.name.endswith("manifest.json"))


def given(place: Path, case: str) -> dict[str, Any]:
    """What of the user's files a case was made with, as ``verify`` takes it."""
    words = CASES[case]
    return {
        **({"calibration_data": [place / "calibration.txt"]} if "TEXT" in words else {}),
        **({"imatrix": place / "m.gguf"} if "IMATRIX" in words else {}),
        **({"statistics": place / "s.safetensors"} if "STATISTICS" in words else {}),
    }


def again(place: Path, artifact: Path, case: str, **more: Any) -> Rederivation:
    files = given(place, case)
    found = Given(tuple(map(str, files.get("calibration_data", ()))), files.get("imatrix"), files.get("statistics"))
    needed = {"source": str(place / "tiny"), "given": found}
    needed |= {key: more.pop(key) for key in tuple(more) if key in needed}
    return rederive(ready(artifact, **needed), **{"threads": 1, **more})


def copied(artifact: Path, target: Path) -> Path:
    """A copy of an artifact and its manifest."""
    target.mkdir(exist_ok=True)
    if artifact.is_dir():
        return Path(shutil.copytree(artifact, target / artifact.name))
    shutil.copy(manifest_path(artifact), target)
    return Path(shutil.copy(artifact, target))


def rewritten(artifact: Path, change: Any) -> None:
    """Change the manifest of an artifact, and seal it again, as whoever wishes can."""
    file = manifest_path(artifact)
    content = json.loads(file.read_bytes())
    content.pop(SEAL)
    change(content)
    file.write_bytes(manifest_bytes(content))


def flip(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("case", CASES)
def test_the_same_bytes(place: Path, case: str) -> None:
    for artifact in made(place, case):
        found = llm_quantize.verify(artifact, source=place / "tiny", rederive=True, **given(place, case))
        assert found.ok
        assert found.rederived is not None
        assert (found.rederived.verdict, found.rederived.cautions) == ("same", ())
        assert list(found.rederived.lines()) == []
    left = [path.name for path in (place / "out" / case.replace(" ", "-")).iterdir() if "rederived" in path.name]
    assert left == []


@pytest.mark.parametrize("case", ["gguf", "gguf split", "gptq", "mixed", "ctranslate2", "safetensors"])
def test_a_flipped_byte_is_named(place: Path, tmp_path: Path, case: str) -> None:
    """In the middle of a tensor, with hashes and seal made right: only making it again can tell."""
    artifact = copied(made(place, case)[0], tmp_path)
    content = json.loads(manifest_path(artifact).read_bytes())
    entry = next(one for one in content["tensors"] if "norm" not in one["name"] and one["bytes"] > 2000)
    names = [one["name"] for one in content["files"]]
    file = artifact if artifact.is_file() else artifact / names[entry["file"]]
    rows, offset = entry["units"][0]["rows"], entry["offset"] + entry["bytes"] // 2 + 1
    total = entry["units"][-1]["rows"][1]
    flip(file, offset)

    def resealed(manifest: dict[str, Any]) -> None:
        import hashlib

        (one,) = [one for one in manifest["tensors"] if one["name"] == entry["name"]]
        assert len(one["units"]) == 1
        data = file.read_bytes()[entry["offset"] : entry["offset"] + entry["bytes"]]
        one["units"][0]["sha256"] = hashlib.sha256(data).hexdigest()

    rewritten(artifact, resealed)
    assert llm_quantize.verify(artifact).ok
    found = again(place, artifact, case)
    assert found.verdict == "differs"
    one, *others = found.differences
    # A card tells what the artifact loses as it is, so that it may tell another figure.
    assert [other.file for other in others] in ([], ["README.md"] if case == "mixed" else [])
    row = (entry["bytes"] // 2 + 1) // (entry["bytes"] // total)
    assert (one.file, one.tensor, one.rows, one.count, one.offset) == (file.name, entry["name"], (row, row), 1, offset)
    assert rows[0] <= row < rows[1]
    error = found.error()
    assert isinstance(error, IntegrityError)
    assert (error.tensor, error.offset) == (entry["name"], offset)


@pytest.mark.parametrize(("case", "name"), [("gguf", ""), ("gptq", "config.json"), ("gptq", "README.md"), ("mlx", "")])
def test_a_byte_beside_the_tensors_is_named(place: Path, tmp_path: Path, case: str, name: str) -> None:
    artifact = copied(made(place, case)[0], tmp_path)
    name = name or ("model.safetensors" if artifact.is_dir() else "")
    file = artifact / name if name else artifact
    flip(file, 40)
    found = again(place, artifact, case)
    assert [(one.file, one.tensor, one.offset) for one in found.differences] == [(file.name, "", 40)]
    assert found.verdict == "differs"
    file.write_bytes(file.read_bytes() + b"x")
    assert {(one.file, one.offset) for one in again(place, artifact, case).differences} == {(file.name, 40)}
    if artifact.is_dir():
        file.unlink()
        (one,) = again(place, artifact, case).differences
        assert (one.file, one.offset) == (file.name, None)
        assert "is not there" in one.text


@pytest.mark.parametrize("case", ["gguf", "gptq", "rtn", "gguf gptq"])
def test_another_source_is_found_and_named(place: Path, tmp_path: Path, case: str) -> None:
    source = Path(shutil.copytree(place / "tiny", tmp_path / "tiny"))
    weights = source / "model.safetensors"
    header = int.from_bytes(weights.read_bytes()[:8], "little")
    facts = json.loads(weights.read_bytes()[8 : 8 + header])["model.layers.1.mlp.down_proj.weight"]
    flip(weights, 8 + header + facts["data_offsets"][0] + 42)
    found = again(place, made(place, case)[0], case, source=str(source))
    assert found.verdict == "another source"
    assert all("down_proj" in name or "blk.1.ffn_down" in name for name in found.sources)
    assert found.error() is not None
    assert "source" in str(found.error())
    assert (found.left > 0) == (case in ("gptq", "gguf gptq"))
    assert ("not made again" in "".join(found.lines())) == (found.left > 0)


def test_another_configuration_of_the_source_is_found(place: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(place / "tiny", tmp_path / "tiny"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    found = again(place, made(place, "gguf")[0], "gguf", source=str(source))
    assert found.verdict != "same"
    assert {one.tensor for one in found.differences} == {""}


def test_what_is_missing_is_refused_before_a_tensor_is_read(place: Path) -> None:
    artifact = made(place, "gguf")[0]
    changed = Given(imatrix=place / "tiny" / "config.json")
    for words, message in (({}, "another place"), ({"source": str(place / "tiny"), "given": changed}, "no part")):
        told: list[Any] = []
        with pytest.raises(UsageError, match=message):
            check(artifact, rederive=True, on_event=told.append, **words)
        assert told == []


def test_a_copy_of_the_source_under_another_name_is_the_same(place: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(place / "tiny", tmp_path / "another-name"))
    for case in ("gguf", "gptq"):
        assert again(place, made(place, case)[0], case, source=str(source)).same


def test_merged_adapters_in_a_name_that_nobody_gave(place: Path, tmp_path: Path) -> None:
    """The card is called by the model and its adapters; the manifest records that name."""
    adapter = str(write_adapter(tmp_path / "mine", factors({"model.layers.0.self_attn.q_proj": (64, 64)})))
    (result,) = quantize(
        str(place / "tiny"), "safetensors", levels=["F16"], output_dir=tmp_path / "out", lora=[adapter]
    )
    assert result.path.name == "tiny-mine-F16"
    assert rederive(ready(result.path, source=str(place / "tiny")), lora=[adapter], threads=1).verdict == "same"


@pytest.fixture(scope="module")
def merged(place: Path) -> Path:
    """An artifact of the model with two adapters merged into it."""
    shapes = {"model.layers.0.self_attn.q_proj": (tiny_shape(place), tiny_shape(place))}
    lora = []
    for number, scale in enumerate(("", "=0.5")):
        write_adapter(place / f"lora{number}", factors(shapes, seed=number), base_model_name_or_path="org/tiny")
        lora += ["--lora", f"{place / f'lora{number}'}{scale}"]
    assert run(["quantize", str(place / "tiny"), "gguf", "-q", "Q8_0", *lora, "-o", str(place / "merged")]) == 0
    return place / "merged" / "tiny-lora0-lora1-Q8_0.gguf"


def tiny_shape(place: Path) -> int:
    size: int = json.loads((place / "tiny" / "config.json").read_text())["hidden_size"]
    return size


def test_adapters_are_part_of_the_source(place: Path, merged: Path, tmp_path: Path) -> None:
    lora = [str(place / "lora0"), f"{place / 'lora1'}=0.5"]
    found = rederive(ready(merged, source=str(place / "tiny")), lora=lora, digests=True)
    assert found.verdict == "same"
    for wrong in ([], lora[:1], lora[::-1], [lora[0], str(place / "lora1")]):
        with pytest.raises(UsageError, match="adapters are not those"):
            rederive(ready(merged, source=str(place / "tiny")), lora=wrong)
    files = [(one.name, one.kind, one.model) for one in found.dependencies if one.kind != "source"]
    assert files == [
        (name, "adapter", owner)
        for owner in ("lora0", "lora1")
        for name in ("adapter_config.json", "adapter_model.safetensors")
    ]
    assert "adapter_model.safetensors" not in [one.name for one in found.dependencies if one.kind == "source"]
    llm_quantize.verify(merged, source=place / "tiny", lora=lora, rederive=True, attest=tmp_path / "s.json")
    predicate = json.loads((tmp_path / "s.json").read_bytes())["predicate"]
    assert predicate["buildDefinition"]["externalParameters"]["adapters"] == [
        {"name": "lora0", "revision": None, "scale": 1.0},
        {"name": "lora1", "revision": None, "scale": 0.5},
    ]


def test_a_text_that_is_gone_or_changed_is_refused(place: Path, tmp_path: Path) -> None:
    (artifact,) = made(place, "gptq")
    with pytest.raises(UsageError, match="needed") as caught:
        again(place, artifact, "gptq", given=Given())
    assert "calibration.txt" in str(caught.value.expected)
    other = tmp_path / "calibration.txt"
    other.write_text((place / "calibration.txt").read_text() + "more")
    with pytest.raises(IntegrityError, match="not the file"):
        again(place, artifact, "gptq", given=Given((str(other),)))


def test_statistics_kept_by_earlier_runs_are_not_believed(
    place: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are collected anew, elsewhere: damaged ones in the cache make no other bytes, and are not even read."""
    artifact = next(path for path in made(place, "gguf importance of another level") if "IQ3" in path.name)
    kept = list(own_cache.glob("statistics/*.safetensors"))
    assert kept
    for file in kept:
        file.rename(file.with_suffix(".away"))
    assert again(place, artifact, "gguf importance of another level").same
    assert not list(own_cache.glob("statistics/*.safetensors"))
    for file in kept:
        file.with_suffix(".away").rename(file)


def test_what_was_not_recorded_is_refused(place: Path, tmp_path: Path) -> None:
    artifact = copied(made(place, "gguf")[0], tmp_path)
    rewritten(artifact, lambda content: content.pop("made"))
    with pytest.raises(UnsupportedError, match="earlier version"):
        again(place, artifact, "gguf")
    manifest_path(artifact).unlink()
    with pytest.raises(UnsupportedError, match="no manifest"):
        again(place, artifact, "gguf")
    assert run(["verify", str(artifact), "--rederive"]) == 4


def test_another_version_is_told_and_tried(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A longer version moves what stands behind it: tensors are compared where they are."""
    artifact = made(place, "gguf")[0]
    monkeypatch.setattr(llm_quantize, "__version__", "7.12.34567890+longer")
    found = again(place, artifact, "gguf")
    assert found.verdict == "same tensors"
    assert found.error() is None
    assert found.same_tensors
    assert not found.same
    assert "made by llm-quantize" in found.cautions[0]
    words = ["verify", str(artifact), "--rederive", "--source", str(place / "tiny")]
    assert run(words) == 20
    broken = copied(artifact, tmp_path)
    content = json.loads(manifest_path(broken).read_bytes())
    flip(broken, content["tensors"][3]["offset"])
    assert again(place, broken, "gguf").verdict == "differs"


def test_other_packages_are_told(place: Path, tmp_path: Path) -> None:
    artifact = copied(made(place, "gptq")[0], tmp_path)
    rewritten(artifact, lambda content: content["made"]["versions"].update(torch="1.0", processor="torch 1.0, none"))
    found = again(place, artifact, "gptq")
    assert found.same
    assert len(found.cautions) == 2
    assert "made with torch 1.0" in "".join(found.cautions)


# manifests of strangers


@pytest.mark.parametrize("name", ["/etc", "../tiny", "tiny", "~/x", "builtin:demo-llama", "org/model"])
def test_a_manifest_opens_no_model_of_this_machine(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    artifact = copied(made(place, "gguf")[0], tmp_path)
    (tmp_path / "org").mkdir()
    shutil.copytree(place / "tiny", tmp_path / "org" / "model")
    shutil.copytree(place / "tiny", tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    for commit in (None, "../x", "a" * 40) if name == "org/model" else (None, "a" * 40):
        rewritten(
            artifact, lambda content, commit=commit: content["identity"].update(source=name, source_revision=commit)
        )
        with pytest.raises(UsageError, match="made from") as caught:
            ready(artifact)
        assert "--source" in str(caught.value.remedy)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"level": "Q9_9"}, UsageError, "Q9_9"),
        ({"name": "../../escaped"}, None, ""),
        (
            {"options": {"overrides": {"tensor_types": [["(a|a|aa)+$|([a-z._]+)+[0-9]$", "q8_0"]]}}},
            MalformedInputError,
            "seconds",
        ),
        ({"options": {"overrides": {"tensor_types": [["(", "q8_0"]]}}}, MalformedInputError, "expressions"),
        ({"options": {"overrides": {"tensor_types": [["x", "q99"]]}}}, UsageError, "no type"),
        ({"options": {"overrides": {"output_type": "q99"}}}, UsageError, "no type"),
        ({"options": {"calibration": {"seed": -1}}}, MalformedInputError, "does not say"),
        ({"options": {"method": {"group_size": 0}}}, UsageError, "group-size"),
        ({"options": {"split_max_size": 1}}, None, ""),
        ({"options": {"calibrate": True, "calibration": {"samples": 10**9, "length": 10**9}}}, UsageError, "needed"),
    ],
    ids=["level", "name", "expression", "no expression", "type", "output type", "seed", "group", "split", "text"],
)
def test_absurd_records(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    error: type[Exception] | None,
    says: str,
) -> None:
    """Refused, or made so and found to be something else; nothing is written anywhere."""
    monkeypatch.setattr("llm_quantize.provenance.rederive._SECONDS", 2)
    artifact = copied(made(place, "gguf")[0], tmp_path / "in")
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))

    def absurd(content: dict[str, Any]) -> None:
        content["made"] = {**content["made"], **change}
        if says == "needed":
            content["made"]["texts"] = [{"name": "secret.txt", "sha256": "0" * 64, "weight": 1.0}]

    rewritten(artifact, absurd)
    if error is None:
        assert again(place, artifact, "gguf").verdict != "same" or "name" in change
    else:
        with pytest.raises(error, match=says):
            again(place, artifact, "gguf")
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


def test_expressions_of_modules_are_tried_out_too(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_quantize.provenance.rederive._SECONDS", 2)
    artifact = copied(made(place, "rtn")[0], tmp_path)
    slow = r"^model\.layers\.0\.self_attn\.q_proj$|(([a-z]+[._]?)+)+_projection$"
    rewritten(artifact, lambda content: content["made"]["options"]["method"].update(ignore=[slow]))
    with pytest.raises(MalformedInputError, match="expressions"):
        again(place, artifact, "rtn")


def test_a_manifest_with_places_outside_of_its_files(place: Path, tmp_path: Path) -> None:
    for key, value in (("offset", -(1 << 40)), ("offset", 1 << 40), ("file", 7), ("bytes", 1 << 40)):
        artifact = copied(made(place, "gguf")[0], tmp_path / f"{key}{value}")
        rewritten(artifact, lambda content, key=key, value=value: content["tensors"][3].update({key: value}))
        found = again(place, artifact, "gguf")
        assert found.verdict == "differs"
        assert {one.tensor for one in found.differences} <= {
            "",
            json.loads(manifest_path(artifact).read_bytes())["tensors"][3]["name"],
        }
        assert found.differences


# the command


def test_the_command(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (artifact,) = made(place, "gptq")
    words = ["verify", str(artifact), "--rederive", "--source", str(place / "tiny")]
    words += ["--calibration-data", str(place / "calibration.txt"), "--threads", "1", "--max-ram", "4G"]
    assert run(words) == 0
    assert "made again from tiny: the same" in capsys.readouterr().out
    broken = copied(artifact, tmp_path)
    flip(broken / "model.safetensors", 30_000)
    words[1] = str(broken)
    assert run([*words, "--json"]) == 8
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is False
    assert told["rederived"]["verdict"] == "differs"
    assert told["rederived"]["differences"][0]["offset"] == 30_000
    assert run(["verify", str(artifact), "--imatrix", str(place / "m.gguf")]) == 2


def test_the_built_in_model_needs_no_source(tmp_path: Path) -> None:
    assert run(["quantize", "builtin:demo-llama", "-q", "Q4_0", "-o", str(tmp_path)]) == 0
    found = rederive(ready(tmp_path / "demo-llama-Q4_0.gguf"))
    assert found.same
    assert found.source == "demo-llama"


def test_a_commit_of_the_hub_is_fetched_again(
    place: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source that the manifest names, at that commit; nothing else is asked for."""
    files = {path.name: path.read_bytes() for path in (place / "tiny").iterdir()}
    with FakeHub(files) as hub:
        point_to(hub.url, monkeypatch)
        assert run(["quantize", "org/model", "-q", "Q8_0", "-o", str(tmp_path)]) == 0
        shutil.rmtree(cache)
        found = llm_quantize.verify(tmp_path / "model-Q8_0.gguf", rederive=True, attest=tmp_path / "s.json")
    assert found.ok
    assert found.rederived is not None
    assert (found.rederived.source, found.rederived.same) == ("org/model", True)
    statement = json.loads((tmp_path / "s.json").read_bytes())
    (weights,) = [
        one
        for one in statement["predicate"]["buildDefinition"]["resolvedDependencies"]
        if one["name"] == "model.safetensors"
    ]
    assert weights["uri"].endswith(f"/org/model/resolve/{COMMIT}/model.safetensors")


def test_progress_ends_whole(place: Path) -> None:
    heard: list[events.Event] = []
    again(place, made(place, "gguf")[0], "gguf", on_event=heard.append)
    steps = [event for event in heard if isinstance(event, events.Progress)]
    assert steps[-1].done == steps[-1].total


@pytest.fixture(scope="module")
def command_line() -> Iterator[CommandLine]:
    with CommandLine("tests.blockwise.warm") as ready:
        yield ready


@pytest.mark.parametrize("case", ["gguf importance of another level", "gguf gptq"])
def test_killed_and_asked_again(place: Path, tmp_path: Path, command_line: CommandLine, case: str) -> None:
    """Whatever a killed run left beside the artifact is gone after the next, and the answer is the same."""
    artifact = copied(made(place, case)[0], tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    words = ["verify", artifact, "--rederive", "--source", place / "tiny", "--threads", "1"]
    words += ["--calibration-data", place / "calibration.txt"]
    on_disk = {"constants": [["llm_quantize.memory", "HIDDEN_BYTES", 0], ["llm_quantize.memory", "INPUT_BYTES", 0]]}
    whole = command_line.run(*words, **on_disk)
    assert whole.code == 0, whole.out
    assert whole.calls is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    left = 0
    for call in range(2, len(whole.calls), max(1, len(whole.calls) // 6)):
        assert command_line.run(*words, **on_disk, kill_call=call).code == -9
        left += len(list(tmp_path.iterdir())) > len(before)
        outcome = command_line.run(*words, **on_disk)
        assert outcome.code == 0, outcome.out
        assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert left > 0


def test_large_files_are_compared_a_few_rows_at_a_time(tmp_path: Path) -> None:
    """A flip in each of several units is found at its row."""
    model = write_tiny_llama(tmp_path / "rows", rows=70000)
    quantize(str(model), levels=["Q8_0"], output_dir=tmp_path)
    artifact = tmp_path / "rows-Q8_0.gguf"
    content = json.loads(manifest_path(artifact).read_bytes())
    entry = content["tensors"][0]
    assert len(entry["units"]) > 1
    row_bytes = entry["bytes"] // 70000
    for row in (3, 4, 69999):
        flip(artifact, entry["offset"] + row * row_bytes)
    (one,) = rederive(ready(artifact, source=str(model))).differences
    assert (one.tensor, one.rows, one.count) == (entry["name"], (3, 69999), 3)
