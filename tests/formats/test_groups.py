"""Groups where nobody asks for any: the largest that every matrix allows, the same wherever they are told."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from llm_quantize.artifacts.manifest import read_manifest
from llm_quantize.artifacts.verify import verify
from llm_quantize.cli import run
from llm_quantize.errors import UsageError
from llm_quantize.formats.base import SchemeOptions, scheme_of
from llm_quantize.formats.packed_formats import PACKED
from llm_quantize.formats.packing import odd_groups
from llm_quantize.formats.table import FORMATS
from llm_quantize.models.opening import open_source
from llm_quantize.options import MethodOptions, Options
from llm_quantize.pipeline import quantize
from llm_quantize.plan import ArtifactPlan
from tests.tiny_models import make_tiny

ODD = {  # rows of hidden and intermediate size: the group of 128, 64, 32 that divides them, and what is said
    (256, 384): (128, None),
    (192, 384): (64, "groups of 64: rows of 192 are not divisible by 128"),
    (192, 320): (64, "groups of 64: rows of 192 and 320 are not divisible by 128"),
    (256, 96): (32, "groups of 32: rows of 96 are not divisible by 128"),
}
LEVELS = [("gptq", "4bit"), ("awq", "4bit"), ("compressed-tensors", "W4A16_ASYM"), ("compressed-tensors", "W8A16")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        (hidden, inner): make_tiny(
            "llama", folder / f"{hidden}-{inner}", hidden_size=hidden, intermediate_size=inner, num_hidden_layers=1
        )
        for hidden, inner in [*ODD, (64, 200)]
    }


def planned(model: Path, format: str, level: str, **method: Any) -> ArtifactPlan:
    source = open_source(str(model))
    with closing(source.checkpoint):
        options = Options(method=MethodOptions(**{"method": "rtn", **method}))
        (plan,) = FORMATS[format].plan(source, [level], "tiny", None, options)
    return plan


@pytest.mark.parametrize("sizes", ODD)
@pytest.mark.parametrize(("format", "level"), LEVELS)
def test_the_largest_that_every_matrix_allows(
    format: str, level: str, sizes: tuple[int, int], models: dict[tuple[int, int], Path]
) -> None:
    group, said = ODD[sizes]
    plan = planned(models[sizes], format, level)
    asked = planned(models[sizes], format, level, group_size=group)
    assert scheme_of(plan).qtype.group_size == group
    assert plan.name == asked.name
    assert plan.name.endswith(f"-g{group}") == (group != 128)
    assert plan.digest == asked.digest
    assert [note for note in plan.notes if "groups" in note] == ([said] if said else [])
    assert not any("groups" in note for note in asked.notes)
    assert {matrix.qtype for matrix in plan.matrices} == {scheme_of(asked).qtype.name}


def test_mlx_keeps_its_own(models: dict[tuple[int, int], Path]) -> None:
    groups = {sizes: scheme_of(planned(model, "mlx", "4bit")).qtype.group_size for sizes, model in models.items()
              if sizes in ODD}  # fmt: skip
    assert groups == {(256, 384): 64, (192, 384): 64, (192, 320): 64, (256, 96): 32}
    assert "groups of 32: rows of 96 are not divisible by 64" in planned(models[256, 96], "mlx", "4bit").notes


@pytest.mark.parametrize(("format", "level"), [*LEVELS, ("mlx", "4bit")])
def test_no_group_is_no_group_for_a_row(format: str, level: str, models: dict[tuple[int, int], Path]) -> None:
    tried = "64 or 32" if format == "mlx" else "128, 64 or 32"
    with pytest.raises(UsageError, match=rf"200 weights are not whole groups of {tried}") as caught:
        planned(models[64, 200], format, level)
    assert caught.value.tensor == "model.layers.0.mlp.down_proj"
    assert ("--group-size -1" in str(caught.value)) == (format != "mlx")
    assert "--ignore" in str(caught.value)


def test_what_is_asked_for_is_strict(models: dict[tuple[int, int], Path]) -> None:
    with pytest.raises(UsageError, match=r"192 weights are not whole groups of 128[\s\S]*--group-size 64"):
        planned(models[192, 384], "gptq", "4bit", group_size=128)
    with pytest.raises(UsageError, match=r"192 weights are not whole groups of 128") as caught:
        planned(models[192, 384], "compressed-tensors", "W4AFP8")
    assert "--group-size" not in str(caught.value)
    rest = planned(models[64, 200], "gptq", "4bit", ignore=("down_proj",))
    assert scheme_of(rest).qtype.group_size == 64


def test_a_remedy_is_one_that_the_grid_has() -> None:
    affine = PACKED["mlx"].scheme("4bit", SchemeOptions(group_size=64))
    assert "--group-size 32" in (odd_groups(affine, (64,), 96, "x").remedy or "")
    assert "--group-size" not in (odd_groups(affine, (64,), 40, "x").remedy or "")


def test_sizes_that_no_kernel_takes_are_one_line(models: dict[tuple[int, int], Path]) -> None:
    told = planned(models[64, 200], "gptq", "4bit", group_size=-1).warnings
    (line,) = [text for text in told if "kernel" in text]
    assert line.startswith(
        "3 of 7 matrices have sizes for which no kernel of vLLM is known (CPU: rows a multiple of 32, "
    )
    (line,) = [text for text in planned(models[192, 384], "gptq", "4bit").warnings if "kernel" in text]
    assert "CUDA (Marlin) kernels want" in line


def test_made_and_told_everywhere(
    models: dict[tuple[int, int], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = models[192, 320]
    options = Options(threads=1, method=MethodOptions(method="rtn"))
    (result,) = quantize(str(model), "gptq", levels=["4bit"], output_dir=tmp_path, options=options)
    assert result.path.name == f"{model.name}-GPTQ-4bit-g64"
    assert json.loads((result.path / "config.json").read_text())["quantization_config"]["group_size"] == 64
    manifest = read_manifest(result.path / "manifest.json")
    assert manifest is not None
    assert manifest["identity"]["scheme"]["qtype"] == "int4_g64"
    assert verify(result.path, source=str(model)).ok
    capsys.readouterr()
    for words in (["plan", str(model), "gptq", "-q", "4bit"], ["quantize", str(model), "gptq", "--dry-run"]):
        assert run([*words, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        (one,) = told["artifacts"]
        assert one["level"] == "GPTQ-4bit-g64"
        assert "groups of 64: rows of 192 and 320 are not divisible by 128" in one["notes"]
    assert run(["recommend", str(model), "--device", "cuda", "--vram", "8G", "--gpu", "8.9", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    files = {choice["file"] for answer in told["others"] for choice in answer["choices"]}
    assert any(file.endswith("GPTQ-4bit-g64") for file in files)
