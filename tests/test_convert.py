"""``convert``: what is exact is proved by the owners of the formats, what is not says how far it is."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import bitsandbytes.functional as owner
import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file, save_file

from llm_quantize import api
from llm_quantize.artifacts.manifest import manifest_bytes, read_manifest
from llm_quantize.artifacts.result import ArtifactResult
from llm_quantize.artifacts.verify import verify
from llm_quantize.blockwise import keeping
from llm_quantize.calibration import choose
from llm_quantize.cli import run
from llm_quantize.conversion import foresee
from llm_quantize.errors import MissingExtraError, NumericPolicyError, UnsupportedError, UsageError
from llm_quantize.formats.gguf.levels import Overrides
from llm_quantize.formats.recipe import Recipe
from llm_quantize.io.artifact_paths import manifest_path
from llm_quantize.models.opening import open_model
from llm_quantize.models.quantized import PackedDirectory
from llm_quantize.options import MethodOptions, Options
from llm_quantize.provenance.rederive import ready, rederive
from tests.faults.forking import CommandLine
from tests.faults.scenario import Scenario
from tests.models.adapters import factors, write_adapter
from tests.oracles.packed_formats import Form, write_packed
from tests.oracles.reference_directories import Layout, write_directory
from tests.tiny_models import make_tiny, row_lengths_of_256

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("source") / "tiny", **row_lengths_of_256("llama"))


@pytest.fixture(scope="module")
def command_line() -> Iterator[CommandLine]:
    with CommandLine("tests.blockwise.warm") as ready:
        yield ready


def quantized(model: Path, place: Path, format: str, level: str, **method: Any) -> Path:
    options = Options(threads=1, method=MethodOptions(method="rtn", **method))
    (result,) = api.quantize(model, format, levels=level, output_dir=place, options=options)
    return result.path


def converted(
    source: Path, place: Path, format: str, level: str | None = None, *, exact: bool = False, **method: Any
) -> ArtifactResult:
    options = Options(threads=1, exact=exact, method=MethodOptions(**method))
    return api.convert(source, format, level, output_dir=place, options=options)


def test_a_model_with_an_adapter(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Codes that the adapter leaves alone are kept; what it changes has none, and stays the sum in float32."""
    source, module = quantized(llama, tmp_path, "gptq", "4bit", group_size=32), "model.layers.0.self_attn.o_proj"
    with open_model(str(source)) as opened:
        rows, columns = opened.tensors[f"{module}.weight"].shape
    adapter = write_adapter(tmp_path / "mine", factors({module: (rows, columns)}))
    words = f"convert {source} compressed-tensors --lora {adapter} -o {tmp_path / 'out'} --threads 1 --json".split()
    assert run([*words, "--dry-run"]) == 0
    foreseen = json.loads(capsys.readouterr().out)["verdicts"]
    assert {f"{module}.weight", UP} <= foreseen.keys()
    assert run(words) == 0
    (told,) = json.loads(capsys.readouterr().out)["artifacts"]
    assert told["conversion"]["verdict"] == "exact"
    found, base = values(Path(told["path"])), values(source)
    assert [name for name in base if not np.array_equal(found[name], base[name])] == [f"{module}.weight"]
    assert verify(told["path"], source=str(source), lora=[str(adapter)]).ok
    assert not verify(told["path"], source=str(source)).ok
    whole = api.convert(source, "safetensors", "BF16", output_dir=tmp_path / "bf16", lora=adapter)
    assert whole.path.name == "tiny-mine-BF16"
    assert whole.conversion is not None
    assert whole.conversion["verdict"] == "rounded"


def test_a_missing_extra_is_named_before_any_work(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = quantized(llama, tmp_path, "gptq", "4bit", group_size=32)
    monkeypatch.setattr(choose, "find_spec", lambda name: None)
    out = tmp_path / "out"
    with pytest.raises(MissingExtraError, match="keeping the codes of a model needs"):
        api.convert(source, "compressed-tensors", output_dir=out)
    with pytest.raises(MissingExtraError, match="Measuring quality needs"):
        api.convert(llama, "gguf", "F32", output_dir=out, measure=True)
    assert not out.exists()


def values(directory: Path) -> dict[str, np.ndarray]:
    """Every tensor as it is read, float32."""
    with open_model(str(directory)) as model:
        found = {}
        for name in model.tensors:
            rows = model.read_rows(name, 0, model.matrix(name)[0])
            found[name] = (rows.astype(np.uint32) << 16).view(np.float32) if rows.dtype == np.uint16 else rows
        return {name: np.asarray(rows, np.float32) for name, rows in found.items()}


def is_exact(source: Path, made: ArtifactResult) -> None:
    """Told exact, verified against its source, and value for value the same to the readers of both."""
    assert made.conversion is not None
    assert (made.conversion["verdict"], set(made.conversion["tensors"])) == ("exact", {"exact"})
    outcome = verify(made.path, source=str(source))
    assert outcome.ok, outcome.all_problems()
    assert {check.relative_error for check in outcome.tensors} <= {0.0, None}
    wanted, found = values(source), values(made.path)
    assert wanted.keys() == found.keys()
    for name, rows in wanted.items():
        assert np.array_equal(found[name], rows), name


EXACT = [
    ("gptq", "4bit", {}, "compressed-tensors", "W4A16"),
    ("gptq", "4bit", {"group_size": 64}, "compressed-tensors", "W4A16"),
    ("gptq", "8bit", {"group_size": -1}, "compressed-tensors", "W8A16"),
    ("gptq", "3bit", {"symmetric": False}, "compressed-tensors", "W3A16_ASYM"),
    ("gptq", "4bit", {}, "awq", "AWQ-4bit"),
    ("gptq", "4bit", {"group_size": 32}, "mlx", "MLX-4bit-g32"),
    ("gptq", "8bit", {"group_size": 32}, "mlx", "MLX-8bit-g32"),
    ("gptq", "4bit", {}, "safetensors", "F32"),
    ("compressed-tensors", "W4A16", {}, "gptq", "GPTQ-4bit"),
    ("compressed-tensors", "W8A16", {}, "gptq", "GPTQ-8bit"),
    ("compressed-tensors", "W8A8", {}, "compressed-tensors", "W8A16"),
    ("compressed-tensors", "NVFP4A16", {}, "compressed-tensors", "NVFP4A16"),
    ("compressed-tensors", "MXFP4A16", {}, "mlx", "MLX-mxfp4"),
    ("compressed-tensors", "FP8_DYNAMIC", {}, "compressed-tensors", "FP8_DYNAMIC"),
    ("compressed-tensors", "FP8_BLOCK", {}, "compressed-tensors", "FP8_BLOCK"),
    ("awq", "4bit", {}, "compressed-tensors", "W4A16_ASYM"),
    ("awq", "4bit", {}, "gptq", "GPTQ-4bit-asym"),
    ("bitsandbytes", "NF4", {}, "bitsandbytes", "BNB-NF4"),
    ("bitsandbytes", "FP4", {"double_quant": True}, "bitsandbytes", "BNB-FP4"),
    ("bitsandbytes", "INT8", {}, "bitsandbytes", "BNB-INT8"),
    ("mlx", "5bit", {}, "mlx", "MLX-5bit"),
    ("mlx", "nvfp4", {}, "mlx", "MLX-nvfp4"),
]


@pytest.mark.parametrize(("format", "level", "method", "target", "label"), EXACT)
def test_what_the_target_holds_is_exact(
    llama: Path, tmp_path: Path, format: str, level: str, method: dict[str, Any], target: str, label: str
) -> None:
    source = quantized(llama, tmp_path / "source", format, level, **method)
    made = converted(source, tmp_path / "made", target, exact=True)
    assert made.level.startswith(label)
    is_exact(source, made)
    assert foresee(str(source), target).verdict == "exact"


def test_there_and_back_are_the_same_bytes(llama: Path, tmp_path: Path) -> None:
    """GPTQ → compressed-tensors → GPTQ, and AWQ → W4A16_ASYM → GPTQ 2 → AWQ."""
    for first, way in (("gptq", ["compressed-tensors", "gptq"]), ("awq", ["compressed-tensors", "gptq", "awq"])):
        source = place = quantized(llama, tmp_path / first, first, "4bit")
        for step, target in enumerate(way):
            made = converted(place, tmp_path / f"{first}{step}", target, exact=True)
            is_exact(place, made)
            place = made.path
        stored, again = (load_file(one / "model.safetensors") for one in (source, place))
        assert stored.keys() == again.keys()
        assert all(torch.equal(stored[name], value) for name, value in again.items())


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_directories_of_other_writers(llama: Path, tmp_path: Path, version: str) -> None:
    """Signed scales, and both of GPTQ's formats, written by hand."""
    for symmetric in (True, False):
        place = tmp_path / f"{version}{symmetric}"
        layout = Layout("gptq", group=32, symmetric=symmetric, signed_scales=symmetric, version=version)
        expected = write_directory(llama, place, layout)
        made = converted(place, tmp_path / "made", "compressed-tensors", exact=True)
        assert made.level == ("W4A16-g32" if symmetric else "W4A16_ASYM-g32")
        with PackedDirectory(made.path) as packed:
            for name, rows in expected.items():
                assert np.array_equal(packed.rows(name, 0, len(rows)), rows)


def fields_of(directory: Path, module: str) -> dict[str, torch.Tensor]:
    tensors = load_file(directory / "model.safetensors")
    return {name.removeprefix(f"{module}."): value for name, value in tensors.items() if name.startswith(f"{module}.")}


@pytest.mark.parametrize(("level", "source"), [("W4A16", "gptq"), ("W4A16_ASYM", "awq"), ("FP8_DYNAMIC", "")])
def test_the_package_of_compressed_tensors_reads_the_values(
    llama: Path, tmp_path: Path, level: str, source: str
) -> None:
    place = (
        quantized(llama, tmp_path / "source", source, "4bit")
        if source
        else quantized(llama, tmp_path / "source", "compressed-tensors", level)
    )
    made = converted(place, tmp_path / "made", "compressed-tensors", exact=True).path
    config = json.loads((made / "config.json").read_text())["quantization_config"]
    group = QuantizationScheme.model_validate(config["config_groups"]["group_0"])
    tensors = {
        name: one.float() if one.dtype in (torch.bfloat16, torch.float16) else one
        for name, one in fields_of(made, UP).items()
    }
    theirs = BaseCompressor.get_value_from_registry(config["format"]).decompress(tensors, group)["weight"].float()
    with open_model(str(place)) as model:
        wanted = model.read_rows(f"{UP}.weight", 0, model.matrix(f"{UP}.weight")[0])
    assert torch.equal(theirs, torch.from_numpy(np.array(wanted, np.float32)))


def test_bitsandbytes_reads_the_values(llama: Path, tmp_path: Path) -> None:
    """Blocks of 128 are cut in two of 64 with the same scale."""
    place = quantized(llama, tmp_path / "source", "bitsandbytes", "NF4", group_size=128)
    made = converted(place, tmp_path / "made", "bitsandbytes", "NF4", exact=True, group_size=64).path
    tensors = {name.removeprefix("weight."): one for name, one in fields_of(made, UP).items()}
    packed = tensors.pop("weight")
    state = owner.QuantState.from_dict(tensors, torch.device("cpu"))
    assert state.blocksize == 64
    state.dtype = torch.float32
    with open_model(str(place)) as model:
        wanted = model.read_rows(f"{UP}.weight", 0, model.matrix(f"{UP}.weight")[0])
    assert torch.equal(owner.dequantize_4bit(packed, state), torch.from_numpy(np.array(wanted, np.float32)))


def test_fp8_as_releases_have_it(llama: Path, tmp_path: Path) -> None:
    """DeepSeek's form, scales beside the weights, becomes compressed-tensors' blocks."""
    place, generator = tmp_path / "fp8", torch.Generator().manual_seed(1)
    shutil.copytree(llama, place)
    tensors = load_file(place / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        rows, columns = tensors[name].shape
        tensors[name] = torch.randn((rows, columns), generator=generator).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.rand((-(-rows // 128), -(-columns // 128)), generator=generator) + 0.5
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((place / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (place / "config.json").write_text(json.dumps(config))
    made = converted(place, tmp_path / "made", "compressed-tensors", exact=True)
    assert made.level == "FP8_BLOCK"
    is_exact(place, made)
    assert fields_of(made.path, UP)["weight_scale"].dtype == torch.float32
    rounded = converted(place, tmp_path / "made", "safetensors", "BF16")
    assert rounded.conversion is not None
    assert rounded.conversion["verdict"] == "rounded"


def test_mixed_bits_stay_mixed(llama: Path, tmp_path: Path) -> None:
    """Each matrix keeps its own width and group; a GPTQ directory has one, so the wider is taken for all."""
    names = [f"model.layers.{layer}.mlp.{part}_proj" for layer in (0, 1) for part in ("gate", "up")]
    recipe = Recipe("mine", "W4A16", dict.fromkeys(names, "int8_g64"), sha256="0" * 64, form="compressed-tensors")
    options = Options(threads=1, method=MethodOptions(method="rtn"), overrides=Overrides(recipe=recipe))
    (mixed,) = api.quantize(llama, "compressed-tensors", levels="W4A16", output_dir=tmp_path, options=options)
    made = converted(mixed.path, tmp_path / "made", "compressed-tensors", exact=True)
    is_exact(mixed.path, made)
    with PackedDirectory(mixed.path) as before, PackedDirectory(made.path) as after:
        assert {name: one.qtype for name, one in before.matrices.items()} == {
            name: one.qtype for name, one in after.matrices.items()
        }
        assert len({one.qtype for one in after.matrices.values()}) == 2
    wide = converted(mixed.path, tmp_path / "made", "gptq", exact=True)
    assert wide.level == "GPTQ-8bit-g64"
    is_exact(mixed.path, wide)


def test_a_mix_that_a_format_cannot_hold_is_said(llama: Path, tmp_path: Path) -> None:
    """AWQ has 4 bits for all: what has 8 is rounded, and the plan says which grids those are."""
    names = [UP, UP.replace("up_proj", "gate_proj")]
    recipe = Recipe("mine", "W4A16", dict.fromkeys(names, "int8_g128"), sha256="0" * 64, form="compressed-tensors")
    options = Options(threads=1, method=MethodOptions(method="rtn"), overrides=Overrides(recipe=recipe))
    (made,) = api.quantize(llama, "compressed-tensors", levels="W4A16", output_dir=tmp_path, options=options)
    plan = foresee(str(made.path), "awq").plan
    assert any(
        "2 of 14 matrices are stored on grids that AWQ 4bit does not hold (int8_g128)" in w for w in plan.warnings
    )
    assert not any("does not hold" in warning for warning in foresee(str(made.path), "gptq").plan.warnings)
    same = quantized(llama, tmp_path / "same", "compressed-tensors", "W4A16")
    assert not any("does not hold" in warning for warning in foresee(str(same), "awq").plan.warnings)


def test_modules_that_are_floats_in_the_source_stay_so(llama: Path, tmp_path: Path) -> None:
    place = quantized(llama, tmp_path / "source", "gptq", "4bit", ignore=(r"layers\.1\.mlp\.down_proj",))
    made = converted(place, tmp_path / "made", "compressed-tensors", exact=True)
    is_exact(place, made)
    ignored = json.loads((made.path / "config.json").read_text())["quantization_config"]["ignore"]
    assert "model.layers.1.mlp.down_proj" in ignored


ROUNDED = [
    ("gptq", "4bit", {}, "bitsandbytes", "NF4"),
    ("awq", "4bit", {}, "mlx", "4bit"),
    ("compressed-tensors", "NVFP4A16", {}, "mlx", "nvfp4"),
    ("bitsandbytes", "NF4", {}, "compressed-tensors", "W4A16"),
    ("gptq", "4bit", {}, "safetensors", "BF16"),
    ("gptq", "4bit", {}, "gguf", "Q4_K"),
]


@pytest.mark.parametrize(("format", "level", "method", "target", "asked"), ROUNDED)
def test_the_error_of_what_is_rounded_is_the_recorded_one(
    llama: Path, tmp_path: Path, format: str, level: str, method: dict[str, Any], target: str, asked: str
) -> None:
    source = quantized(llama, tmp_path / "source", format, level, **method)
    made = converted(source, tmp_path / "made", target, asked)
    manifest = read_manifest(manifest_path(made.path))
    assert manifest is not None
    assert made.conversion is not None
    assert manifest["conversion"]["verdict"] == made.conversion["verdict"] == "rounded"
    told = {
        entry["name"]: entry for entry in (*manifest["tensors"], *manifest.get("matrices", [])) if "verdict" in entry
    }
    assert len(told) == sum(made.conversion["tensors"].values()) == 21
    assert made.conversion["tensors"]["rounded"] >= 14
    outcome = verify(made.path, source=str(source))
    assert outcome.ok, outcome.all_problems()
    if target == "gguf":
        errors = {check.name: check.relative_error for check in outcome.tensors}
        for name, entry in told.items():
            assert errors[name] == pytest.approx(entry.get("relative_error", 0.0), rel=1e-6)
        return
    wanted, found = values(source), values(made.path)
    for name, rows in wanted.items():
        entry = told.get(name.removesuffix(".weight"), told.get(name))
        assert entry is not None
        error = float(np.linalg.norm(found[name].astype(np.float64) - rows) / np.linalg.norm(rows.astype(np.float64)))
        assert entry.get("relative_error", 0.0) == pytest.approx(error, rel=1e-6), name
        assert (entry["verdict"] == "exact") == (error == 0)


def test_codes_are_kept_where_only_an_offset_is_rounded(llama: Path, tmp_path: Path) -> None:
    """AWQ in MLX: s (q - z) is s q - s z, whose offset takes more digits than float16 has."""
    source = quantized(llama, tmp_path / "source", "awq", "4bit")
    made = converted(source, tmp_path / "made", "mlx", "4bit")
    manifest = read_manifest(made.path / "manifest.json")
    assert manifest is not None
    assert {entry["kept"] for entry in manifest["matrices"]} == {True}
    assert all(0 < entry["relative_error"] < 2**-10 for entry in manifest["matrices"])
    with open_model(str(source)) as one, open_model(str(made.path)) as other:
        name = f"{UP}.weight"
        pair = [model.held_grid(name, 0, model.matrix(name)[0]) for model in (one, other)]
        assert pair[0] is not None
        assert pair[1] is not None
        assert torch.equal(pair[0][1], pair[1][1])


def test_a_plain_model_is_rounded_or_cast(llama: Path, tmp_path: Path) -> None:
    same = converted(llama, tmp_path / "made", "safetensors", exact=True)
    assert same.level == "BF16"
    is_exact(llama, same)
    made = converted(llama, tmp_path / "made", "gptq", "4bit")
    assert made.conversion is not None
    assert made.conversion["tensors"] == {"rounded": 14, "exact": 7}
    with pytest.raises(UsageError, match=r"no level of gptq holds[\s\S]*not quantized[\s\S]*-q 4bit"):
        converted(llama, tmp_path / "made", "gptq")


def test_error_feedback_is_told_as_what_it_is(llama: Path, tmp_path: Path) -> None:
    source = quantized(llama, tmp_path / "source", "bitsandbytes", "NF4")
    words = ["--method", "gptq", "--calibration-samples", "2", "--sequence-length", "64"]
    arguments = ["convert", str(source), "gptq", "-q", "4bit", "-o", str(tmp_path / "made"), *words, "--quiet"]
    assert run(arguments) == 0
    (made,) = (tmp_path / "made").iterdir()
    manifest = read_manifest(made / "manifest.json")
    assert manifest is not None
    assert manifest["conversion"]["verdict"] == "re-quantized"
    assert {entry["verdict"] for entry in manifest["matrices"]} == {"re-quantized"}
    assert manifest["identity"]["source_kind"] == "BNB-NF4"
    assert all(0 < entry["relative_error"] < 0.3 for entry in manifest["matrices"])
    assert verify(made, source=str(source)).ok


def test_what_cannot_be_exact_is_refused_before_anything_is_written(llama: Path, tmp_path: Path) -> None:
    source = quantized(llama, tmp_path / "source", "gptq", "4bit")
    for target, level, first in (("bitsandbytes", "NF4", "down_proj"), ("gguf", "Q4_K", "token_embd.weight")):
        with pytest.raises(UnsupportedError, match=rf"cannot hold this model exactly[\s\S]*{first}"):
            converted(source, tmp_path / "made", target, level, exact=True)
    awq = quantized(llama, tmp_path / "source", "awq", "4bit")
    with pytest.raises(UsageError, match=r"no level of mlx holds[\s\S]*AWQ-4bit"):
        converted(awq, tmp_path / "made", "mlx")
    assert not (tmp_path / "made").exists()


def test_what_turns_out_inexact_is_removed(llama: Path, tmp_path: Path) -> None:
    """Scales of bfloat16 do not all fit float16, which no header says."""
    awq = quantized(llama, tmp_path / "source", "awq", "4bit")
    with pytest.raises(NumericPolicyError, match=r"not exact[\s\S]*14 rounded"):
        converted(awq, tmp_path / "made", "mlx", "4bit", exact=True)
    assert list((tmp_path / "made").iterdir()) == []
    made = converted(awq, tmp_path / "made", "mlx", "4bit")
    with pytest.raises(NumericPolicyError, match="the conversion that is there is not exact"):
        converted(awq, tmp_path / "made", "mlx", "4bit", exact=True)
    assert made.path.exists()


def test_a_grid_that_claims_too_much_is_not_believed(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One code of one row is another: the proof by decoding both finds it, and the matrix is rounded, not kept."""
    source, honest = quantized(llama, tmp_path / "source", "gptq", "4bit"), keeping.held_output_rows

    def wrong(*arguments: Any) -> Any:
        found = honest(*arguments)
        assert found is not None
        if arguments[1].name == f"{UP}.weight":
            found[1][5, 7] ^= 1
        return found

    monkeypatch.setattr(keeping, "_repacked", lambda *_: None)  # words are another way (test_repacking.py)
    monkeypatch.setattr(keeping, "held_output_rows", wrong)
    made = converted(source, tmp_path / "made", "compressed-tensors")
    manifest = read_manifest(made.path / "manifest.json")
    assert manifest is not None
    assert [entry["name"] for entry in manifest["matrices"] if not entry.get("kept")] == [UP]
    assert verify(made.path, source=str(source)).ok


def test_verify_holds_a_conversion_to_its_verdict(llama: Path, tmp_path: Path) -> None:
    source = quantized(llama, tmp_path / "source", "awq", "4bit")
    made = converted(source, tmp_path / "made", "bitsandbytes", "NF4").path
    manifest = read_manifest(made / "manifest.json")
    assert manifest is not None

    def told(change: Mapping[str, Any]) -> list[str]:
        entries = [{**entry, **change} if entry["name"] == UP else entry for entry in manifest["matrices"]]
        (made / "manifest.json").write_bytes(manifest_bytes({**manifest, "matrices": entries}))
        return verify(made, source=str(source)).all_problems()

    assert told({}) == []
    (problem,) = told({"verdict": "exact"})
    assert "but the manifest says exact" in problem
    (problem,) = told({"relative_error": 0.01})
    assert "but the manifest says rounded (0.01)" in problem


def test_the_same_bytes_for_any_number_of_threads(llama: Path, tmp_path: Path) -> None:
    source = quantized(llama, tmp_path / "source", "gptq", "4bit")
    found = []
    for threads in (1, 3):
        options = Options(threads=threads)
        made = api.convert(source, "bitsandbytes", "NF4", output_dir=tmp_path / str(threads), options=options).path
        found.append({file.name: file.read_bytes() for file in made.iterdir()})
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ("gptq 4bit", "compressed-tensors"),
        ("gptq 4bit", "safetensors -q BF16"),
        ("gptq 4bit", "gguf"),
        ("gptq act-order", "gptq"),
        ("ctranslate2 int8", "ctranslate2"),
    ],
)
def test_killed_while_converting(
    command_line: CommandLine, llama: Path, tmp_path_factory: pytest.TempPathFactory, stored: str, words: str
) -> None:
    place = tmp_path_factory.mktemp("killed")
    if stored == "gptq act-order":
        source = place / "source"
        write_packed(llama, source, Form("gptq", group=64, act_order=True))
    else:
        source = quantized(llama, place / "source", *stored.split())
    format, *more = words.split()
    scenario = Scenario(command_line, source, place, (*more, "--threads", "1"), format=format, command="convert")
    assert scenario.calls > 50
    scenario.kill_at_calls([*range(5, scenario.calls - 9, 41), *range(scenario.calls - 9, scenario.calls + 1, 4)])
    assert scenario.resumed > 0


def test_on_the_command_line(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = quantized(llama, tmp_path / "source", "gptq", "4bit"), str(tmp_path / "made")
    assert run(["convert", str(source), "compressed-tensors", "--dry-run"]) == 0
    assert "at best: 21 exact" in capsys.readouterr().out
    assert run(["convert", str(source), "compressed-tensors", "-o", out]) == 0
    told = capsys.readouterr().out
    assert "verdict: exact" in told
    assert "exact: 21 tensors" in told
    assert run(["convert", str(source), "compressed-tensors", "-o", out, "--json"]) == 0
    (artifact,) = json.loads(capsys.readouterr().out)["artifacts"]
    assert (artifact["status"], artifact["conversion"]["verdict"]) == ("already complete", "exact")
    card = (Path(artifact["path"]) / "README.md").read_text()
    assert re.search(r"\| Verdict \| exact +\|", card)
    assert re.search(r"\| Tensors \| 21 exact +\|", card)
    assert run(["convert", str(source), "awq", "-q", "4bit", "--exact", "-o", out, "--lang", "ja"]) == 0
    assert "判定: exact" in capsys.readouterr().out


def test_small_errors_are_told_as_what_they_are(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = quantized(llama, tmp_path / "source", "compressed-tensors", "NVFP4A16")
    capsys.readouterr()
    assert run(["convert", str(source), "gguf", "-o", str(tmp_path / "made")]) == 0
    (error,) = re.findall(r"largest relative error (\S+): blk", capsys.readouterr().out)
    assert 1e-9 < float(error) < 1e-6
    (made,) = (tmp_path / "made").glob("*.gguf")
    assert run(["verify", str(made), "--source", str(source)]) == 0
    errors = re.findall(r"blk\S+\s+nvfp4\s+(\S+)", capsys.readouterr().out)
    assert errors
    assert all(0 < float(one) < 1e-6 and len(one.partition("e")[0].replace(".", "")) == 3 for one in errors)


def test_with_an_adapter_only_what_it_changes_is_rounded(llama: Path, tmp_path: Path) -> None:
    """What an adapter leaves alone keeps its codes; made again with the adapter, the bytes are the same."""
    source = quantized(llama, tmp_path / "source", "gptq", "4bit")
    with open_model(str(source)) as opened:
        shape = opened.matrix(f"{UP}.weight")
    adapter = str(write_adapter(tmp_path / "adapter", factors({UP: shape})))
    out = tmp_path / "made"
    words = ["convert", str(source), "compressed-tensors", "-q", "W4A16", "--lora", adapter, "-o", str(out)]
    assert run([*words, "--dry-run"]) == 0
    assert not out.exists()
    assert run(words) == 0
    (path,) = (path for path in out.iterdir() if path.is_dir())
    manifest = read_manifest(manifest_path(path))
    assert manifest is not None
    told = {one["name"]: one["verdict"] for one in [*manifest["matrices"], *manifest["tensors"]] if "verdict" in one}
    assert [name for name, word in told.items() if word != "exact"] == [UP]
    floats = api.convert(source, "compressed-tensors", output_dir=tmp_path / "floats", lora=adapter)
    assert (floats.conversion or {})["verdict"] == "exact"
    assert verify(path, source=str(source), lora=(adapter,)).ok
    assert rederive(ready(path, source=str(source)), lora=(adapter,), threads=1).verdict == "same"


def test_quantize_names_convert(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = quantized(llama, tmp_path / "source", "gptq", "4bit")
    capsys.readouterr()
    assert run(["quantize", str(source), "safetensors", "-q", "BF16", "-o", str(tmp_path)]) == 0
    assert "`llm-quantize convert` keeps the codes" in capsys.readouterr().err


def test_measured_against_the_source(llama: Path, tmp_path: Path) -> None:
    source, options = quantized(llama, tmp_path / "source", "gptq", "4bit"), Options(threads=1)
    text = tmp_path / "text.txt"
    text.write_text("The old man looked at the sea and said nothing. " * 40)
    options = Options(threads=1, measurement=type(options.measurement)(texts=(str(text),), context=64, windows=2))
    for target, level, lossless in (("compressed-tensors", None, True), ("bitsandbytes", "NF4", False)):
        made = api.convert(source, target, level, output_dir=tmp_path, options=options, measure=True)
        manifest = read_manifest(made.path / "manifest.json")
        assert manifest is not None
        assert made.conversion is not None
        assert manifest["conversion"] == made.conversion
        found = made.conversion["measured"]
        assert (abs(found["kld"]) < 1e-9) == lossless
        assert verify(made.path, source=str(source)).ok
        assert rederive(ready(made.path, source=str(source)), threads=1).verdict == "same"
        again = api.convert(source, target, level, output_dir=tmp_path, options=options, measure=True)
        assert (again.status, again.conversion) == ("already complete", made.conversion)
