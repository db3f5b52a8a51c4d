"""Verification: a sound artifact passes, and one wrong byte anywhere is found and placed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_quantize import pipeline
from llm_quantize.architectures.rows import weights_of
from llm_quantize.artifacts.manifest import manifest_bytes, read_manifest
from llm_quantize.artifacts.verify import Verification, error_bound, verify
from llm_quantize.cli import run
from llm_quantize.cli.streams import json_text
from llm_quantize.errors import IntegrityError, LlmQuantizeError, MalformedInputError, UsageError
from llm_quantize.formats.gguf.levels import Overrides
from llm_quantize.io.gguf_file import read_gguf
from llm_quantize.pipeline import Options
from llm_quantize.qtypes import QTYPES
from tests.faults.tiny_llama import write_tiny_llama
from tests.hearing import into


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("verify") / "tiny")


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("made")
    results = pipeline.quantize(str(model), levels=["Q4_K_M", "Q8_0", "F16", "F32", "Q2_K"], output_dir=out)
    split = pipeline.quantize(
        str(model), levels=["Q8_0"], output_dir=out, name="split", options=Options(split_max_size=300_000)
    )
    return {result.level: result.path for result in results} | {"split": split[0].path}


def copied(path: Path, directory: Path) -> Path:
    """A copy that a test may damage, manifest included."""
    if path.is_dir():
        return Path(shutil.copytree(path, directory / path.name))
    shutil.copy(path.with_name(path.name + ".manifest.json"), directory)
    return Path(shutil.copy(path, directory))


def flip(path: Path, at: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


@pytest.mark.parametrize("level", ["Q4_K_M", "Q8_0", "F16", "F32", "Q2_K", "split"])
def test_a_sound_artifact(made: dict[str, Path], model: Path, level: str) -> None:
    events: list[Any] = []
    outcome = verify(made[level], source=str(model), on_event=into(events))
    assert outcome.ok, outcome.all_problems()
    assert outcome.has_manifest
    assert outcome.compared
    assert {check.hash for check in outcome.tensors} == {"ok"}
    total = sum(weights_of(tensor.shape) for path in files_of(made[level]) for tensor in read_gguf(path).tensors)
    assert events[-1]["done"] == events[-1]["total"] == total
    for check in outcome.tensors:
        assert check.relative_error is not None
        assert (check.relative_error == 0) or check.type != "f32"
    assert json.loads(json.dumps(outcome.to_dict()))["ok"] is True
    outcome.raise_on_problems()


def files_of(path: Path) -> list[Path]:
    return sorted(path.glob("*.gguf")) if path.is_dir() else [path]


def test_a_flipped_byte_of_any_tensor_is_placed(made: dict[str, Path], tmp_path: Path) -> None:
    path = copied(made["Q4_K_M"], tmp_path)
    whole = path.read_bytes()
    for number, tensor in enumerate(read_gguf(path).tensors):
        at = tensor.offset + (0, tensor.nbytes // 2, tensor.nbytes - 1)[number % 3]
        path.write_bytes(whole)
        flip(path, at, number % 8)
        outcome = verify(path)
        assert not outcome.ok
        assert [check.name for check in outcome.tensors if check.hash == "mismatch"] == [tensor.name]
        problem = next(text for text in outcome.all_problems() if "hash" in text)
        assert problem.startswith(f"{tensor.name}: ")
        first, end = map(int, re.findall(r"bytes (\d+) to (\d+)", problem)[0])
        assert tensor.offset <= first <= at < end <= tensor.offset + tensor.nbytes
        with pytest.raises(IntegrityError, match=re.escape(tensor.name)) as caught:
            outcome.raise_on_problems()
        assert caught.value.exit_code == 8


def test_a_flipped_byte_of_the_header(made: dict[str, Path], tmp_path: Path) -> None:
    path = copied(made["Q8_0"], tmp_path)
    whole, start = path.read_bytes(), read_gguf(path).data_start
    refused = 0
    for number, at in enumerate(range(0, start, start // 60)):
        path.write_bytes(whole)
        flip(path, at, number % 8)
        try:
            problems = verify(path).all_problems()
        except LlmQuantizeError as error:
            refused += error.offset is not None
            continue
        assert any("metadata at the front" in text and f"bytes 0 to {start}" in text for text in problems), (
            at,
            problems,
        )
    assert refused < 60


def test_bytes_between_tensors(tmp_path: Path) -> None:
    """An odd number of rows leaves gaps; no hash covers them, yet what stands there is looked at."""
    model = write_tiny_llama(tmp_path / "odd", rows=321)
    (result,) = pipeline.quantize(str(model), levels=["Q4_0"], output_dir=tmp_path)
    tensors = sorted(read_gguf(result.path).tensors, key=lambda tensor: tensor.offset)
    ends = [tensor.offset + tensor.nbytes for tensor in tensors]
    starts = [tensor.offset for tensor in tensors[1:]] + [result.path.stat().st_size]
    gaps = [(end, start) for end, start in zip(ends, starts, strict=True) if start > end]
    assert gaps
    assert verify(result.path).ok
    whole = result.path.read_bytes()
    for end, start in gaps:
        result.path.write_bytes(whole)
        flip(result.path, start - 1)
        assert verify(result.path).problems == [
            f"{result.path.name}: bytes {end} to {start} between tensors are not zeros"
        ]
    result.path.write_bytes(whole + bytes(32))
    assert any("files differ" in text for text in verify(result.path).problems)


@pytest.mark.parametrize("which", [0, 1, -1])
def test_a_split_artifact(made: dict[str, Path], tmp_path: Path, which: int) -> None:
    path = copied(made["split"], tmp_path)
    part = files_of(path)[which]
    assert len(files_of(path)) > 3
    assert verify(part).ok
    tensor = read_gguf(part).tensors[-1]
    flip(part, tensor.offset + 5)
    problems = verify(path).all_problems()
    assert any(text.startswith(f"{tensor.name}: ") and part.name in text for text in problems)
    part.unlink()
    problems = verify(path).problems
    assert any("missing or mixed" in text for text in problems)
    assert any("is in the manifest but not in the file" in text for text in problems)


def test_split_parts_without_a_manifest(made: dict[str, Path], tmp_path: Path) -> None:
    path = copied(made["split"], tmp_path)
    (path / "manifest.json").unlink()
    parts = files_of(path)
    assert verify(path).ok
    assert verify(parts[1]).ok
    stray = parts[1].read_bytes()
    parts[1].write_bytes(parts[2].read_bytes())
    parts[2].write_bytes(stray)
    assert any("mixed" in text for text in verify(path).problems)
    parts[2].unlink()
    assert any("missing" in text for text in verify(parts[0]).problems)


def test_flipped_bytes_of_the_manifest(made: dict[str, Path], tmp_path: Path) -> None:
    path = copied(made["Q8_0"], tmp_path)
    manifest = path.with_name(path.name + ".manifest.json")
    whole = manifest.read_bytes()
    for number, at in enumerate(range(0, len(whole) - 1, len(whole) // 80)):
        manifest.write_bytes(whole)
        flip(manifest, at, number % 7)
        with pytest.raises((IntegrityError, MalformedInputError)) as caught:
            verify(path)
        assert caught.value.file == str(manifest)
        assert caught.value.exit_code in (3, 8)


def _without(manifest: dict[str, Any]) -> None:
    manifest["tensors"][3]["units"] = []


def _shifted(manifest: dict[str, Any]) -> None:
    manifest["tensors"][3]["units"][0]["rows"] = [1, 2**40]


def _renamed(manifest: dict[str, Any]) -> None:
    manifest["tensors"][3]["name"] = "other"


def _moved(manifest: dict[str, Any]) -> None:
    manifest["tensors"][3]["offset"] += 32


@pytest.mark.parametrize("change", [_without, _shifted, _renamed, _moved])
def test_sealed_manifest_of_something_else(made: dict[str, Path], tmp_path: Path, change: Any) -> None:
    path = copied(made["Q8_0"], tmp_path)
    file = path.with_name(path.name + ".manifest.json")
    manifest = read_manifest(file)
    assert manifest is not None
    change(manifest)
    file.write_bytes(manifest_bytes(manifest))
    assert not verify(path).ok


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"identity": [], "files": [], "tensors": []},
        {"identity": {}, "files": [1], "tensors": []},
        {"identity": {}, "files": [], "tensors": [{"name": "x"}]},
        {
            "identity": {},
            "files": [],
            "tensors": [{"name": "x", "type": "f32", "bytes": 1, "offset": 0, "units": [{}]}],
        },
        {
            "identity": {},
            "files": [],
            "tensors": [
                {
                    "name": "x",
                    "type": "f32",
                    "bytes": 1,
                    "offset": 0,
                    "units": [{"rows": [0, "1"], "sha256": "", "source_sha256": ""}],
                }
            ],
        },
    ],
)
def test_manifest_of_the_wrong_form(made: dict[str, Path], tmp_path: Path, content: dict[str, Any]) -> None:
    path = copied(made["Q8_0"], tmp_path)
    path.with_name(path.name + ".manifest.json").write_bytes(manifest_bytes(content))
    with pytest.raises(MalformedInputError, match="wrong form"):
        verify(path)


def test_without_a_manifest(made: dict[str, Path], model: Path, tmp_path: Path) -> None:
    path = copied(made["Q8_0"], tmp_path)
    path.with_name(path.name + ".manifest.json").unlink()
    outcome = verify(path, source=str(model))
    assert outcome.ok
    assert not outcome.has_manifest
    assert {check.hash for check in outcome.tensors} == {"unknown"}
    tensor = next(tensor for tensor in read_gguf(path).tensors if tensor.name == "blk.1.ffn_up.weight")
    data = bytearray(path.read_bytes())
    data[tensor.offset : tensor.offset + tensor.nbytes // 2] = bytes(tensor.nbytes // 2)
    path.write_bytes(data)
    problems = verify(path, source=str(model)).all_problems()
    assert len(problems) == 1
    assert problems[0].startswith("blk.1.ffn_up.weight: relative error")


def test_wrong_source(made: dict[str, Path], demo_model: Path, tmp_path: Path) -> None:
    other = write_tiny_llama(tmp_path / "tiny", seed=7)
    for level in ("Q2_K", "Q8_0", "F32"):
        outcome = verify(made[level], source=str(other))
        bad = {check.name for check in outcome.tensors if check.problems}
        assert bad == {check.name for check in outcome.tensors}
    outcome = verify(made["Q8_0"], source=str(demo_model))
    assert any("missing from the artifact" in text for text in outcome.problems)
    assert any("has shape" in text for text in outcome.problems)


@pytest.mark.parametrize("bits", [0x7E00, 0x7C00])
def test_not_finite_inside(made: dict[str, Path], tmp_path: Path, bits: int) -> None:
    path = copied(made["Q8_0"], tmp_path)
    path.with_name(path.name + ".manifest.json").unlink()
    tensor = next(tensor for tensor in read_gguf(path).tensors if tensor.name == "blk.0.attn_q.weight")
    data = bytearray(path.read_bytes())
    block = tensor.offset + 34 * 5
    data[block : block + 2] = bits.to_bytes(2, "little")
    path.write_bytes(data)
    outcome: Verification = verify(path)
    (check,) = [check for check in outcome.tensors if check.problems]
    assert check.name == "blk.0.attn_q.weight"
    assert check.nonfinite == 32  # infinity times a code of zero is NaN


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        verify(tmp_path / "absent.gguf")
    with pytest.raises(UsageError):
        verify(tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"not GGUF")
    with pytest.raises(MalformedInputError):
        verify(tmp_path / "x.gguf")


# every type: damage that keeps the file well formed


PLAIN_TYPES = {name for name in QTYPES if not QTYPES[name].needs_importance}


@pytest.fixture(scope="module")
def of_type(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """{type: an artifact without a manifest whose matrices are all of that type}, made from heavy-tailed weights."""
    out = tmp_path_factory.mktemp("types")
    paths = {}
    for qtype in sorted(PLAIN_TYPES):
        options = Options(overrides=Overrides(tensor_types=((".*", qtype),)))
        (result,) = pipeline.quantize(str(model), levels=["Q8_0"], output_dir=out, name=qtype, options=options)
        result.path.with_name(result.path.name + ".manifest.json").unlink()
        paths[qtype] = result.path
    return paths


@pytest.mark.parametrize("qtype", sorted(PLAIN_TYPES))
@pytest.mark.parametrize("damage", ["zeros", "rows"])
def test_zeros_and_shuffled_rows_of_any_type(
    of_type: dict[str, Path], model: Path, tmp_path: Path, qtype: str, damage: str
) -> None:
    assert verify(of_type[qtype], source=str(model)).ok
    path = Path(shutil.copy(of_type[qtype], tmp_path))
    data = bytearray(path.read_bytes())
    matrices = [tensor for tensor in read_gguf(path).tensors if tensor.type.name.lower() == qtype]
    for tensor in matrices:
        place = slice(tensor.offset, tensor.offset + tensor.nbytes)
        rows = np.frombuffer(data[place], np.uint8).reshape(tensor.shape[0], -1)
        data[place] = bytes(tensor.nbytes) if damage == "zeros" else np.roll(rows, 1, axis=0).tobytes()
    path.write_bytes(data)
    bad = {check.name for check in verify(path, source=str(model)).tensors if check.problems}
    assert len(matrices) >= 16 - 2 * (qtype == "f32")
    assert {tensor.name for tensor in matrices if len(tensor.shape) > 1} <= bad


def test_every_bound_is_below_the_error_of_zeros() -> None:
    assert all(error_bound(name) < 1 for name in QTYPES)


def test_every_level_of_the_demo_model_passes(demo_model: Path, tmp_path: Path) -> None:
    levels = ["Q2_K", "Q3_K_S", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
    levels += ["IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4_MOE", "BF16", "F16", "F32"]
    for result in pipeline.quantize(str(demo_model), levels=levels, output_dir=tmp_path):
        outcome = verify(result.path, source=str(demo_model))
        assert outcome.ok, (result.level, outcome.all_problems())


# NaN and infinity in the source


@pytest.fixture(scope="module")
def broken(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with a NaN and two infinities in blk.0.ffn_up, in two blocks of 16."""
    path = Path(shutil.copytree(model, tmp_path_factory.mktemp("broken") / "tiny"))
    shard = path / "model-00001-of-00002.safetensors"
    data = bytearray(shard.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    begin = json.loads(data[8:start])["model.layers.0.mlp.up_proj.weight"]["data_offsets"][0]
    for row, column, bits in ((2, 7, 0x7FC0), (2, 9, 0xFF80), (200, 0, 0x7F80)):
        at = start + begin + 2 * (row * 256 + column)
        data[at : at + 2] = bits.to_bytes(2, "little")
    shard.write_bytes(data)
    return path


UP = "blk.0.ffn_up.weight"


def _made_with(broken: Path, directory: Path, level: str, policy: str) -> Path:
    (result,) = pipeline.quantize(str(broken), levels=[level], output_dir=directory, options=Options(nonfinite=policy))
    return result.path


@pytest.mark.parametrize("level", ["F32", "BF16", "F16", "Q8_0", "Q6_K", "Q4_K_M", "TQ2_0", "MXFP4_MOE"])
def test_replaced_values_are_compared_where_the_source_is_finite(broken: Path, tmp_path: Path, level: str) -> None:
    path = _made_with(broken, tmp_path, level, "zero")
    outcome = verify(path, source=str(broken))
    assert outcome.ok, outcome.all_problems()
    (check,) = [check for check in outcome.tensors if check.source_nonfinite]
    assert (check.name, check.source_nonfinite, check.nonfinite_replaced) == (UP, 3, 3)
    assert check.relative_error is not None
    assert 0 <= check.relative_error < 1


def test_kept_values_are_right_only_in_their_places(broken: Path, model: Path, tmp_path: Path) -> None:
    for level in ("F32", "F16", "BF16"):
        path = _made_with(broken, tmp_path, level, "keep")
        outcome = verify(path, source=str(broken))
        assert outcome.ok, outcome.all_problems()
        (check,) = [check for check in outcome.tensors if check.nonfinite]
        assert (check.name, check.nonfinite, check.nonfinite_kept, check.source_nonfinite) == (UP, 3, 3, 3)
    problems = verify(path, source=str(model)).all_problems()
    assert f"{UP}: 3 values are NaN or infinite where the source is finite" in problems
    assert f"{UP}: 0 weights of the source are NaN or infinite, the manifest knows of 3" in problems
    path.with_name(path.name + ".manifest.json").unlink()
    assert verify(path, source=str(broken)).all_problems() == [f"{UP}: 3 values are NaN or infinite"]


@pytest.mark.parametrize("level", ["Q8_0", "Q6_K", "Q4_K_M", "IQ4_XS"])
def test_json_of_a_poisoned_tensor_is_json(
    broken: Path, tmp_path: Path, level: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _made_with(broken, tmp_path, level, "keep")
    code = run(["verify", str(path), "--source", str(broken), "--json"])
    outcome = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert (code == 0) == outcome["ok"]
    (check,) = [check for check in outcome["tensors"] if check["name"] == UP]
    assert (check["nonfinite_lost"], check["source_nonfinite"]) == (3, 3)
    assert outcome["ok"] == (check["nonfinite"] == 0)


def test_a_failing_verification_is_one_object(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied(made["Q8_0"], tmp_path)
    flip(path, path.stat().st_size - 1)
    assert run(["verify", str(path), "--json"]) == 8
    outcome = json.loads(capsys.readouterr().out)
    assert (outcome["ok"], outcome["error"], outcome["exit_code"]) == (False, "integrity", 8)
    assert outcome["file"] == str(path)
    assert "do not match their hash" in outcome["found"]
    assert run(["verify", str(path)]) == 8
    out, err = capsys.readouterr()
    assert "NOT OK" in out
    assert "the artifact is not what it should be" in err


def test_json_output_has_no_bare_nan() -> None:
    value = {"error": float("nan"), "list": [1.5, float("inf"), {"deep": (float("-inf"), "NaN")}], "count": 3}
    expected = {"error": None, "list": [1.5, None, {"deep": [None, "NaN"]}], "count": 3}
    assert json.loads(json_text(value), parse_constant=pytest.fail) == expected
