"""Act-order: groups whose columns do not stand side by side are kept by the format with a ``g_idx``, by no other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationScheme
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from llm_quantize import api
from llm_quantize.artifacts.manifest import read_manifest
from llm_quantize.artifacts.result import ArtifactResult
from llm_quantize.artifacts.verify import verify
from llm_quantize.cli import run
from llm_quantize.compare.assessment import assess
from llm_quantize.conversion import foresee
from llm_quantize.errors import IntegrityError, UnsupportedError, UsageError
from llm_quantize.formats.packed_formats import PACKED
from llm_quantize.formats.table import ACT_ORDER, FORMATS
from llm_quantize.models.opening import open_model
from llm_quantize.models.quantized import PackedDirectory
from llm_quantize.options import MethodOptions, Options
from llm_quantize.provenance.rederive import ready, rederive
from tests.conversions.cells import UNNAMED
from tests.oracles.packed_formats import Form, write_packed
from tests.tiny_models import make_tiny, row_lengths_of_256

UP = "model.layers.0.mlp.up_proj"
GPTQ, COMPRESSED = Form("gptq", group=64, act_order=True), Form("compressed-tensors", group=64, act_order=True)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("source") / "tiny", **row_lengths_of_256("llama"))


@pytest.fixture(scope="module")
def made(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories with act-order, by format."""
    folder = tmp_path_factory.mktemp("made")
    for form in (GPTQ, COMPRESSED):
        write_packed(llama, folder / form.method, form)
    return {form.method: folder / form.method for form in (GPTQ, COMPRESSED)}


def converted(
    source: Path, place: Path, format: str = "gptq", level: str | None = None, **given: Any
) -> ArtifactResult:
    exact = given.pop("exact", False)
    options = Options(threads=1, exact=exact, method=MethodOptions(**given))
    return api.convert(source, format, level, output_dir=place, options=options)


def fields_of(directory: Path, module: str = UP) -> dict[str, torch.Tensor]:
    tensors = load_file(directory / "model.safetensors")
    return {name.removeprefix(f"{module}."): one for name, one in tensors.items() if name.startswith(f"{module}.")}


def changed(source: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], **settings: Any) -> Path:
    """A copy with other tensors, and other words in its quantization_config."""
    shutil.copytree(source, folder)
    values = load_file(folder / "model.safetensors")
    change(values)
    save_file({name: one.contiguous() for name, one in values.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def said(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "config.json").read_text())["quantization_config"]
    return found


def is_exact(source: Path, result: ArtifactResult, expected: dict[str, torch.Tensor]) -> None:
    """Told exact, verified against its source, made again with the same bytes, and read as what was put in."""
    assert result.conversion is not None
    assert (result.conversion["verdict"], set(result.conversion["tensors"])) == ("exact", {"exact"})
    outcome = verify(result.path, source=str(source))
    assert outcome.ok, outcome.all_problems()
    assert rederive(ready(result.path, source=str(source)), threads=1).verdict == "same"
    with open_model(str(result.path)) as model:
        for name, rows in expected.items():
            found = model.read_rows(name, 0, model.matrix(name)[0])
            wide = (found.astype(np.uint32) << 16).view(np.float32) if found.dtype == np.uint16 else found
            assert np.array_equal(np.asarray(wide, np.float32).reshape(rows.shape), rows.numpy()), name


@pytest.mark.parametrize(
    ("form", "label"),
    [
        (Form("gptq", group=64, act_order=True), "GPTQ-4bit-g64"),
        (Form("gptq", bits=2, group=32, act_order=True), "GPTQ-2bit-g32"),
        (Form("gptq", bits=3, group=32, symmetric=False, act_order=True), "GPTQ-3bit-g32-asym"),
        (Form("gptq", bits=8, group=128, act_order=True), "GPTQ-8bit"),
        (Form("gptq", group=32, symmetric=False, version="gptq_v2", act_order=True), "GPTQ-4bit-g32-asym"),
        (Form("compressed-tensors", group=64, act_order=True), "GPTQ-4bit-g64"),
        (Form("compressed-tensors", bits=8, group=128, act_order=True), "GPTQ-8bit"),
        (Form("compressed-tensors", group=32, symmetric=False, act_order=True), "GPTQ-4bit-g32-asym"),
    ],
    ids=lambda one: "" if isinstance(one, str) else f"{one.method}-{one.version}-{one.bits}-{one.symmetric}",
)
def test_codes_and_the_group_of_each_column_are_kept(llama: Path, tmp_path: Path, form: Form, label: str) -> None:
    source = tmp_path / "source"
    expected = write_packed(llama, source, form)
    foreseen = foresee(str(source), "gptq")
    assert (foreseen.verdict, foreseen.never) == ("exact", ())
    result = converted(source, tmp_path / "made", exact=True)
    assert result.level == label
    is_exact(source, result, expected)
    assert said(result.path)["desc_act"] is True
    before, after = fields_of(source), fields_of(result.path)
    if form.method == "gptq":
        same = {"qweight", "scales", "g_idx"} | (
            {"qzeros"} if said(result.path)["checkpoint_format"] == form.version else set()
        )
        assert all(torch.equal(before[name], after[name]) for name in same)
    else:
        assert torch.equal(before["weight_g_idx"], after["g_idx"])
        assert torch.equal(before["weight_scale"].T, after["scales"])
    (warning,) = [text for text in result.plan.warnings if "vLLM" in text]
    assert "act-order (desc_act)" in warning or "symmetric grids only" in warning


def test_groups_may_be_cut(llama: Path, tmp_path: Path) -> None:
    """64 columns in two groups of 32, in the order of the file, with the same scale."""
    expected = write_packed(llama, tmp_path / "source", GPTQ)
    result = converted(tmp_path / "source", tmp_path / "made", exact=True, group_size=32)
    is_exact(tmp_path / "source", result, expected)
    index, cut = fields_of(tmp_path / "source")["g_idx"], fields_of(result.path)["g_idx"]
    assert torch.equal(cut // 2, index)
    assert torch.bincount(cut).tolist() == [32] * (len(cut) // 32)


def test_again_they_are_the_same_bytes(made: dict[str, Path], tmp_path: Path) -> None:
    first = converted(made["gptq"], tmp_path / "one").path
    again = converted(first, tmp_path / "two", exact=True).path
    assert (first / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()


@pytest.mark.parametrize("threads", [1, 3])
def test_rows_in_pieces(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """A matrix that is read a few rows at a time is joined to the same grid."""
    monkeypatch.setattr("llm_quantize.blockwise.keeping.chunk_rows", lambda columns: 32)
    expected = write_packed(llama, tmp_path / "source", Form("gptq", group=64, symmetric=False, act_order=True))
    made = api.convert(tmp_path / "source", "gptq", output_dir=tmp_path, options=Options(threads=threads, exact=True))
    is_exact(tmp_path / "source", made, expected)


@pytest.mark.parametrize(("format", "verdict"), [("gptq", "exact"), ("compressed-tensors", "rounded")])
def test_some_matrices_alone_may_have_it(
    llama: Path, made: dict[str, Path], tmp_path: Path, format: str, verdict: str
) -> None:
    """Nothing is said of grids that the format does not hold: it holds them all."""
    write_packed(llama, tmp_path / "plain", Form("gptq", group=64))
    plain = {
        name: one for name, one in load_file(tmp_path / "plain" / "model.safetensors").items() if ".down_proj." in name
    }
    source = changed(made["gptq"], tmp_path / "source", lambda values: values.update(plain))
    result = converted(source, tmp_path / "made", format)
    assert result.conversion is not None
    assert result.conversion["verdict"] == verdict
    assert not [text for text in result.plan.warnings if "does not hold" in text]
    told = [text for text in result.plan.warnings if text.startswith("12 matrices rounded anew: g_idx")]
    assert len(told) == (verdict == "rounded")


OTHERS = [
    ("awq", "4bit"),
    ("compressed-tensors", "W4A16"),
    ("compressed-tensors", "W8A16"),
    ("mlx", "4bit"),
    ("bitsandbytes", "NF4"),
    ("gguf", "Q4_0"),
]


@pytest.mark.parametrize("method", ["gptq", "compressed-tensors"])
@pytest.mark.parametrize(("format", "level"), OTHERS)
def test_formats_without_it_round_and_say_why(
    made: dict[str, Path], tmp_path: Path, method: str, format: str, level: str
) -> None:
    source = made[method]
    foreseen = foresee(str(source), format, level)
    assert foreseen.verdict == "rounded"
    result = converted(source, tmp_path / "made", format, level)
    assert result.conversion is not None
    assert result.conversion["tensors"]["rounded"] >= 14
    (warning,) = [text for text in result.plan.warnings if "g_idx" in text]
    assert warning.startswith("14 matrices rounded anew: g_idx spreads the columns of each group over the row")
    assert f"(act-order), {format} has them side by side; gptq keeps them" in warning
    assert len(result.plan.details[warning]) == 14
    with pytest.raises(UnsupportedError, match=r"cannot hold this model exactly[\s\S]*act-order") as caught:
        converted(source, tmp_path / "exact", format, level, exact=True)
    assert "gptq keeps them" in str(caught.value.found)
    assert not (tmp_path / "exact").exists()


@pytest.mark.parametrize("format", ["awq", "compressed-tensors", "gguf", "mlx"])
def test_no_level_is_chosen_where_none_holds_it(made: dict[str, Path], tmp_path: Path, format: str) -> None:
    with pytest.raises(UsageError, match=UNNAMED) as caught:
        converted(made["gptq"], tmp_path / "made", format)
    assert "act-order" in str(caught.value.found)


def test_floats_hold_it(llama: Path, tmp_path: Path) -> None:
    expected = write_packed(llama, tmp_path / "source", GPTQ)
    result = converted(tmp_path / "source", tmp_path / "made", "safetensors", "F32", exact=True)
    assert not [text for text in result.plan.warnings if "g_idx" in text]
    is_exact(tmp_path / "source", result, expected)


def test_the_package_of_compressed_tensors_takes_it_no_longer() -> None:
    """Why its format is not written with weight_g_idx: since 0.20 the owner refuses what calls for one."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
    QuantizationScheme.model_validate({"targets": ["Linear"], "weights": weights})
    for word in ("group", "dynamic", True):
        with pytest.raises(ValidationError, match="has been removed"):
            QuantizationScheme.model_validate({"targets": ["Linear"], "weights": {**weights, "actorder": word}})


def test_what_is_chosen_anew_has_its_groups_side_by_side(made: dict[str, Path], tmp_path: Path) -> None:
    for place, given, level in (("rtn", {"method": "rtn"}, "4bit"), ("narrow", {}, "2bit")):
        result = converted(made["gptq"], tmp_path / place, "gptq", level, **given)
        assert result.conversion is not None
        assert result.conversion["verdict"] == "rounded"
        assert said(result.path)["desc_act"] is False
        index = fields_of(result.path)["g_idx"]
        assert torch.equal(index, torch.arange(len(index)) // said(result.path)["group_size"])


def test_desc_act_with_columns_in_their_order_is_none(llama: Path, tmp_path: Path) -> None:
    """What the file says of its order is believed, not the word in its configuration."""
    write_packed(llama, tmp_path / "plain", Form("gptq", group=64))
    source = changed(tmp_path / "plain", tmp_path / "source", lambda values: None, desc_act=True)
    result = converted(source, tmp_path / "made", exact=True)
    assert said(result.path)["desc_act"] is False
    assert foresee(str(source), "compressed-tensors").verdict == "exact"
    assert converted(source, tmp_path / "made", "awq", exact=True).level == "AWQ-4bit-g64"


def uneven(values: dict[str, torch.Tensor]) -> None:
    """Group 0 gets a column of group 1."""
    index = values[f"{UP}.g_idx"]
    index[int((index == 1).nonzero()[0])] = 0


def test_groups_of_several_sizes_are_rounded(made: dict[str, Path], tmp_path: Path) -> None:
    source = changed(made["gptq"], tmp_path / "source", uneven)
    foreseen = foresee(str(source), "gptq")
    assert foreseen.never == (UP,)
    with pytest.raises(UnsupportedError, match="cannot hold this model exactly") as caught:
        converted(source, tmp_path / "made", exact=True)
    assert caught.value.tensor == UP
    result = converted(source, tmp_path / "made")
    assert result.conversion is not None
    assert result.conversion["tensors"] == {"rounded": 1, "exact": 20}
    assert verify(result.path, source=str(source)).ok
    index = fields_of(result.path)["g_idx"]
    assert torch.equal(index, torch.arange(len(index)) // 64)


def test_a_last_group_that_is_shorter_is_rounded(llama: Path, tmp_path: Path) -> None:
    """Groups of 96 in rows of 256 and 128: the owner writes a shorter one, which no grid here has."""
    write_packed(llama, tmp_path / "source", Form("gptq", group=96, act_order=True))
    assert foresee(str(tmp_path / "source"), "gptq", "4bit").verdict == "rounded"
    result = converted(tmp_path / "source", tmp_path / "made", "gptq", "4bit")
    assert result.conversion is not None
    assert result.conversion["tensors"]["rounded"] == 14
    assert verify(result.path, source=str(tmp_path / "source")).ok


@pytest.mark.parametrize("method", ["gptq", "compressed-tensors"])
@pytest.mark.parametrize("value", [-1, 4, 1 << 30, -(1 << 31)])
@pytest.mark.parametrize("format", ["gptq", "awq", "gguf"])
def test_a_group_that_does_not_exist_is_refused_in_the_plan(
    made: dict[str, Path], tmp_path: Path, method: str, value: int, format: str
) -> None:
    name = {"gptq": f"{UP}.g_idx", "compressed-tensors": f"{UP}.weight_g_idx"}[method]
    source = changed(made[method], tmp_path / "source", lambda values: values[name][7:8].fill_(value))
    level = None if format == "gptq" else FORMATS[format].example
    for work in (
        lambda: foresee(str(source), format, level),
        lambda: converted(source, tmp_path / "made", format, level),
    ):
        with pytest.raises(IntegrityError, match="group that does not exist") as caught:
            work()
        assert (caught.value.tensor, caught.value.found) == (name, str(value))
        assert Path(str(caught.value.file)).name == "model.safetensors"
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("length", [0, 1, 63, 128, 257, 512])
def test_an_index_of_another_length_is_refused(made: dict[str, Path], tmp_path: Path, length: int) -> None:
    def cut(values: dict[str, torch.Tensor]) -> None:
        values[f"{UP}.g_idx"] = torch.zeros(length, dtype=torch.int32)

    source = changed(made["gptq"], tmp_path / "source", cut)
    with pytest.raises(IntegrityError) as caught:
        converted(source, tmp_path / "made")
    assert caught.value.tensor == f"{UP}.g_idx"
    assert Path(str(caught.value.file)).name == "model.safetensors"
    assert not (tmp_path / "made").exists()


def test_wherever_artifacts_are_read(
    llama: Path, made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``info``, ``verify``, ``analyze quality``; the card and the manifest say it."""
    path = converted(made["gptq"], tmp_path).path
    assert run(["info", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quantization"]["act_order"] == 14
    write_packed(llama, tmp_path / "plain", Form("gptq", group=64))
    assert run(["info", str(tmp_path / "plain"), "--json"]) == 0
    assert "act_order" not in json.loads(capsys.readouterr().out)["quantization"]
    manifest = read_manifest(path / "manifest.json")
    assert manifest is not None
    assert manifest["identity"]["scheme"]["act_order"] is True
    assert "desc_act" in (path / "README.md").read_text()
    options = Options(threads=1, measurement=type(Options().measurement)(context=32, windows=2))
    (found,) = assess(str(made["gptq"]), [path], options).quality.artifacts
    assert abs(found.divergence.kld) < 1e-9
    with open_model(str(made["gptq"])) as source, open_model(str(path)) as other:
        held, again = (model.held_grid(f"{UP}.weight", 3, 90) for model in (source, other))
    assert held is not None
    assert again is not None
    assert held[0].index is not None
    assert again[0].index is not None
    assert torch.equal(held[0].index, again[0].index)
    assert torch.equal(held[0].decode(held[1]), again[0].decode(again[1]))


def test_where_only_headers_are_here_the_configuration_is_believed(made: dict[str, Path], tmp_path: Path) -> None:
    plain = changed(made["gptq"], tmp_path / "plain", lambda values: None, desc_act=False)
    fixed = changed(made["gptq"], tmp_path / "fixed", lambda values: None, static_groups=True)
    for path, hollow, told in (
        (made["gptq"], True, True),
        (plain, True, False),
        (fixed, True, False),
        (plain, False, True),
    ):
        with PackedDirectory(path, hollow=hollow) as packed:
            assert {packed.grid(matrix).act_order for matrix in packed.matrices.values()} == {told}


def test_a_configuration_that_lies_is_told(made: dict[str, Path], tmp_path: Path) -> None:
    """Without desc_act a runtime may read the columns in their order: other values."""
    path = converted(made["gptq"], tmp_path).path
    lying = changed(path, tmp_path / "lying", lambda values: None, desc_act=False)
    assert any("not in the order of their groups" in text for text in verify(lying).all_problems())


def test_the_table_of_formats() -> None:
    assert ACT_ORDER == ("gptq",)
    assert [name for name, form in PACKED.items() if form.ACT_ORDER] == ["gptq"]
