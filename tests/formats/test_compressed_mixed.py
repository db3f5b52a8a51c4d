"""Several grids in one compressed-tensors directory: written from recipes, read back by the package, Transformers and
our reader, whoever wrote it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_name, match_targets
from safetensors.torch import load_file, save_file

from llm_quantize.advice.describe import describe
from llm_quantize.artifacts.manifest import read_manifest
from llm_quantize.artifacts.opening import open_decoded
from llm_quantize.artifacts.verify import verify
from llm_quantize.cli import run
from llm_quantize.errors import IntegrityError, LlmQuantizeError, UnsupportedError, UsageError
from llm_quantize.formats import expressions
from llm_quantize.formats.compressed_groups import Groups
from llm_quantize.formats.compressed_levels import targets
from llm_quantize.formats.compressed_mixed import cautions, mixed_level
from llm_quantize.formats.gguf.levels import Overrides
from llm_quantize.formats.packed import Settings
from llm_quantize.formats.recipe import Recipe
from llm_quantize.formats.recipe_file import read_recipe, write_recipe
from llm_quantize.models.opening import open_source
from llm_quantize.models.quantized import PackedDirectory
from llm_quantize.options import MethodOptions
from llm_quantize.pipeline import Options, plan, quantize
from llm_quantize.plan import ArtifactPlan
from llm_quantize.runtimes import transformers as runtime
from llm_quantize.runtimes.base import Request
from tests.oracles.packed_formats import Form, write_packed
from tests.tiny_models import make_tiny

FORM = "compressed-tensors"
ATTENTION = [f"self_attn.{part}_proj" for part in "qkv"]
GATES = ["mlp.gate_proj", "mlp.up_proj"]


def named(layer: int, parts: list[str], qtype: str) -> dict[str, str]:
    return {f"model.layers.{layer}.{part}": qtype for part in parts}


EVERY_WIDTH = {
    **named(0, ATTENTION, "int2_g32"),
    **named(0, ["self_attn.o_proj"], "int3_g16"),
    **named(0, GATES, "int5_g16"),
    **named(0, ["mlp.down_proj"], "int6"),
    **named(1, ATTENTION, "int8_g32"),
    **named(1, ["self_attn.o_proj"], "int4"),
    **named(1, ["mlp.down_proj"], "int7_g32"),
    "lm_head": "int8_g32",
}
"""Of the tiny llama, whose output matrix is its own; gate and up of layer 1 are left to the level."""


def options(tensors: Mapping[str, str], level: str = "W4A16", name: str = "mine", **method: Any) -> Options:
    recipe = Recipe(name, level, tensors, form=FORM)
    chosen = MethodOptions(**{"method": "rtn", "group_size": 32, **method})
    return Options(threads=1, method=chosen, overrides=Overrides(recipe=recipe))


def planned(model: Path, tensors: Mapping[str, str], level: str = "W4A16", **method: Any) -> ArtifactPlan:
    (found,) = plan(str(model), FORM, levels=[level], options=options(tensors, level, **method))
    return found


def made(model: Path, place: Path, tensors: Mapping[str, str], **method: Any) -> Path:
    (result,) = quantize(str(model), FORM, levels=["W4A16"], output_dir=place, options=options(tensors, **method))
    return result.path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(scope="module")
def mixed(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(llama, tmp_path_factory.mktemp("mixed"), EVERY_WIDTH)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("qwen3_moe", tmp_path_factory.mktemp("experts") / "tiny")


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


def test_every_matrix_is_on_the_grid_that_the_recipe_names(llama: Path, mixed: Path) -> None:
    assert mixed.name == "tiny-mine"
    manifest = read_manifest(mixed / "manifest.json")
    assert manifest is not None
    types = {matrix["name"]: matrix["type"] for matrix in manifest["matrices"]}
    assert types == dict.fromkeys(types, "int4_g32") | EVERY_WIDTH
    assert manifest["identity"]["grids"] == {
        qtype: list(types.values()).count(qtype) for qtype in manifest["identity"]["grids"]
    }
    assert set(manifest["identity"]["grids"]) == set(types.values())
    with PackedDirectory(mixed) as packed:
        assert {matrix.name: matrix.qtype for matrix in packed.matrices.values()} == types
        assert packed.label == "W2-8A16"
        assert packed.misread == ()
    outcome = verify(mixed, source=str(llama))
    assert outcome.ok, outcome.all_problems()
    quantization = describe(str(mixed))["quantization"]
    assert quantization["bits"] == [2, 3, 4, 5, 6, 7, 8]
    assert quantization["grids"] == manifest["identity"]["grids"]
    card = (mixed / "README.md").read_text(encoding="utf-8")
    assert "| Level | W2-8A16 |" in card
    assert "3 × int2_g32" in card
    assert "mixed-bits" in card
    assert "15 matrices of the decoder's blocks, and the output matrix" in card
    assert "bits by its Humming kernels and a packed output matrix on CUDA devices" in card


def test_the_package_gives_every_module_its_own_group(llama: Path, mixed: Path) -> None:
    read = QuantizationConfig.model_validate(config_of(mixed))
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(llama))
    schemes = {target: scheme for scheme in read.config_groups.values() for target in scheme.targets}
    linear = [(name, part) for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
    for name, part in linear:
        meant = match_targets(name, part, schemes)
        assert len(meant) == 1, name
        assert not any(match_name(name, rule) for rule in read.ignore)
        weights, wanted = schemes[meant[0]].weights, EVERY_WIDTH.get(name, "int4_g32")
        group = "" if weights.strategy == "channel" else f"_g{weights.group_size}"
        assert f"int{weights.num_bits}{group}" == wanted, name
    assert not any("Linear" in scheme.targets for scheme in read.config_groups.values())


def test_an_output_matrix_that_no_recipe_names_is_left(llama: Path, tmp_path: Path) -> None:
    folder = made(llama, tmp_path, named(1, ["mlp.down_proj"], "int8_g32"))
    assert config_of(folder)["ignore"] == ["lm_head"]
    assert "of the decoder's blocks |" in (folder / "README.md").read_text(encoding="utf-8")
    tied = make_tiny("llama", tmp_path / "tied", tie_word_embeddings=True)
    with pytest.raises(UsageError, match=r"no matrix to be quantized[\s\S]*lm_head"):
        planned(tied, {"lm_head": "int8_g32"})


def loaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_transformers_loads_the_values_that_stand_there(llama: Path, tmp_path: Path) -> None:
    """Logits equal to those of the source with our decoder's values in it."""
    source = make_tiny("llama", tmp_path / "float", dtype="float32")
    folder, ids = made(source, tmp_path, EVERY_WIDTH), torch.arange(40)[None] % 200
    expected = loaded(source)
    own = dict(expected.named_parameters())
    with PackedDirectory(folder) as packed, torch.no_grad():
        for name, matrix in packed.matrices.items():
            own[name].copy_(torch.from_numpy(packed.rows(name, 0, matrix.rows)))
        assert len(packed.matrices) == 15
    with torch.inference_mode():
        assert torch.allclose(loaded(folder)(ids).logits, expected(ids).logits, atol=1e-5)


def test_targets_find_exactly_their_modules() -> None:
    """Whatever parents a reader puts them under; the numbers of experts are left open."""
    names = [
        *(f"model.layers.{n}.self_attn.{part}" for n in range(12) for part in ("q_proj", "k_proj", "q_proj_2")),
        *(f"transformer.h.{n}.attn.c_attn" for n in (1, 10)),
        "head",
        "other_head",
    ]
    wanted = {*names[::5], "head"}
    experts = [f"model.layers.{n}.mlp.experts.{e}.up_proj" for n in range(12) for e in range(3)]
    wanted |= {name for name in experts if ".1.mlp" in name or ".11.mlp" in name}
    found = targets(sorted(wanted))
    for name in (*names, *experts):
        for moved in (name, f"language_model.{name}"):
            assert any(match_name(moved, target) for target in found) == (name in wanted), moved
    assert len(found) == 5


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (named(0, ["self_attn.k_proj"], "int8_g32"), r"splits modules[\s\S]*k_proj int8_g32"),
        (named(1, ["mlp.up_proj"], "int3_g32"), r"splits modules[\s\S]*gate_proj int4_g32"),
        (named(9, ["mlp.up_proj"], "int3_g32"), r"no matrix to be quantized[\s\S]*layers\.9\.mlp\.up_proj"),
        ({"lm_head": "int5_g32"}, r"gives the output matrix 5 bits[\s\S]*4 or 8 bits"),
        ({"model.embed_tokens": "int8_g32"}, r"no matrix to be quantized[\s\S]*embed_tokens"),
        (
            {"model.layers.0.mlp.down_proj.weight": "int8", "model.layers.0.mlp.down_proj": "int4"},
            r"names a module twice[\s\S]*down_proj[\s\S]*int8 and int4",
        ),
        (named(0, ["mlp.down_proj"], "int4_g64"), r"down_proj[\s\S]*whole groups of 64[\s\S]*int4_g32"),
    ],
)
def test_what_cannot_be_is_refused_in_the_plan(llama: Path, tensors: Mapping[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        planned(llama, tensors)


def test_a_module_by_both_of_its_names_on_one_grid(llama: Path) -> None:
    twice = {"model.layers.0.mlp.down_proj.weight": "int8", "model.layers.0.mlp.down_proj": "int8"}
    types = {matrix.name: matrix.qtype for matrix in planned(llama, twice).matrices}
    assert types["model.layers.0.mlp.down_proj"] == "int8"


def test_all_experts_of_a_layer_have_one_grid(experts: Path) -> None:
    one = "model.layers.0.mlp.experts.1.down_proj"
    with pytest.raises(UsageError, match=r"splits modules[\s\S]*experts\.0\.\w+ int4_g16"):
        planned(experts, {one: "int8_g16"}, group_size=16)
    found = planned(experts, {"model.layers.0.mlp.experts": "int8_g16"}, group_size=16)
    types = {matrix.name: matrix.qtype for matrix in found.matrices}
    assert {types[name] for name in types if "layers.0.mlp.experts" in name} == {"int8_g16"}
    assert {types[name] for name in types if "layers.0.mlp.experts" not in name} == {"int4_g16"}
    assert any("reads the experts of all layers on one grid" in text for text in found.warnings)


def test_recipes_are_of_one_format(llama: Path, tmp_path: Path) -> None:
    gguf = Options(overrides=Overrides(recipe=Recipe("other", "Q4_0", {})))
    with pytest.raises(UsageError, match="for another format"):
        plan(str(llama), FORM, levels=["W4A16"], options=gguf)
    with pytest.raises(UsageError, match=r"for another format[\s\S]*compressed-tensors"):
        plan(str(llama), "gguf", levels=["W4A16"], options=options({}))
    with pytest.raises(UsageError, match="gptq takes no recipes"):
        plan(str(llama), "gptq", levels=["4bit"], options=replace_form("gptq", "4bit"))
    with pytest.raises(UsageError, match="level of its own"):
        plan(str(llama), FORM, levels=["W8A16"], options=options({}))


def replace_form(form: str, level: str) -> Options:
    return Options(overrides=Overrides(recipe=Recipe("mine", level, {}, form=form)))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"level": "W8A8"}, UsageError, "cannot build on W8A8"),
        ({"level": "Q4_0"}, UsageError, "no compressed-tensors level"),
        ({"for": "gptq"}, UsageError, "takes no recipes"),
        ({"for": "exl3"}, LlmQuantizeError, "no format of this version"),
        ({"tensors": {"a": "q4_k"}}, UsageError, "No such integer type"),
        ({"tensors": {"a": "int9_g32"}}, UsageError, "No such integer type"),
    ],
)
def test_a_recipe_file_in_the_words_of_its_format(
    tmp_path: Path, changes: dict[str, Any], error: type[LlmQuantizeError], message: str
) -> None:
    written = write_recipe(tmp_path / "r.json", Recipe("mine", "W4A16", {"a": "int3_g64"}, form=FORM))
    assert read_recipe(tmp_path / "r.json") == written
    fields = json.loads((tmp_path / "r.json").read_text())
    assert fields["for"] == FORM
    (tmp_path / "r.json").write_text(json.dumps(fields | changes))
    with pytest.raises(error, match=message):
        read_recipe(tmp_path / "r.json")


def test_from_the_command_line(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "r.json"
    tensors = {**named(0, ["mlp.down_proj"], "INT2_g32"), **named(1, ["mlp.down_proj"], "int8")}
    recipe.write_text(
        json.dumps(
            {"format": "llm-quantize-recipe", "format_version": 1, "for": FORM, "name": "hand", "level": "w4a16"}
            | {"tensors": tensors}
        )
    )
    words = [FORM, "--recipe", str(recipe), "--method", "rtn", "--group-size", "32", "-o", str(tmp_path)]
    assert run(["quantize", str(llama), *words, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "W2-8A16 (" in told
    assert " bits): " in told
    assert "on a CPU it takes matrices of blocks in 4 bits only" in told
    assert run(["quantize", str(llama), *words]) == 0
    assert run(["verify", str(tmp_path / "tiny-hand"), "--source", str(llama)]) == 0
    assert run(["quantize", str(llama), *words, "-q", "W4A16"]) == 2
    assert "level of its own" in capsys.readouterr().err


def test_channels_are_rescaled_for_the_grid_that_reads_them(llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the wind began to sing in the thin trees " * 60)
    from llm_quantize.options import CalibrationOptions

    chosen = options(EVERY_WIDTH, method="gptq", transform="awq")
    calibration = CalibrationOptions(data=(str(text),), samples=2, length=32)
    (result,) = quantize(
        str(llama), FORM, levels=["W4A16"], output_dir=tmp_path, options=replace(chosen, calibration=calibration)
    )
    outcome = verify(result.path, source=str(llama))
    assert outcome.ok, outcome.all_problems()


def test_levels_in_words() -> None:
    assert mixed_level({"int3_g64", "int4", "int8_g128"}) == "W3-8A16"
    assert mixed_level({"int4_g64", "int4_g128"}) == "W4A16"
    assert mixed_level({"int4_g64", "int2_g32_asym"}) == "W2-4A16_ASYM"
    assert list(cautions({"int4_asym": ["a"]})) == []
    assert len(list(cautions({"int4_asym": ["a"], "int3": ["b"]}))) == 1


# directories of any writer

WRITERS: dict[str, dict[str, Any]] = {
    "names": {"targets": lambda names: names},
    "expressions": {"targets": lambda names: [f"re:{name.replace('.', '[.]')}$" for name in names]},
}
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def foreign(model: Path, folder: Path, forms: Mapping[str, Form], others: Form) -> dict[str, torch.Tensor]:
    """A directory in which the modules of ``forms`` are of their form and all else of another, without its groups
    settled; {name: values}."""
    expected = write_packed(model, folder, others)
    stored = load_file(folder / "model.safetensors")
    for number, (name, form) in enumerate(forms.items()):
        part = folder.with_name(f"{folder.name}-{number}")
        values = write_packed(model, part, form)
        own = load_file(part / "model.safetensors")
        for key in [key for key in stored if key.startswith(f"{name}.")]:
            del stored[key]
        stored |= {key: value for key, value in own.items() if key.startswith(f"{name}.")}
        expected[f"{name}.weight"] = values[f"{name}.weight"]
        shutil.rmtree(part)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    return expected


def groups_of(folder: Path, groups: list[tuple[list[str], Form]], **more: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    found = {}
    for number, (meant, form) in enumerate(groups):
        strategy = {"strategy": "channel"} if form.group == -1 else {"strategy": "group", "group_size": form.group}
        weights = {"num_bits": form.bits, "type": "int", "symmetric": form.symmetric, "dynamic": False, **strategy}
        kind = "int-quantized" if form.integer else "pack-quantized"
        found[f"group_{number}"] = {"targets": meant, "weights": weights, "format": kind}
    config["quantization_config"] |= {"config_groups": found, **more}
    file.write_text(json.dumps(config))


def same_values(model: Path, folder: Path, expected: Mapping[str, torch.Tensor]) -> None:
    source = open_source(str(model))
    with source.checkpoint:
        artifact = open_decoded(source, folder)
        for name, values in expected.items():
            assert np.array_equal(artifact.read(name).numpy(), values.numpy()), name
        artifact.close()


@pytest.mark.parametrize("writer", WRITERS)
def test_groups_of_equal_bits_are_told_apart(llama: Path, tmp_path: Path, writer: str) -> None:
    """Four bits in groups of 16, of 32 and of a row, of which only the configuration knows whose is whose."""
    fine, row, usual = Form(FORM, group=16), Form(FORM, group=-1, symmetric=False), Form(FORM)
    expected = foreign(llama, tmp_path / "packed", {Q: fine, DOWN: row}, usual)
    meant = WRITERS[writer]["targets"]
    groups_of(tmp_path / "packed", [(["Linear"], usual), (meant([Q]), fine), (meant([DOWN]), row)])
    same_values(llama, tmp_path / "packed", expected)
    assert verify(tmp_path / "packed", source=str(llama)).ok
    with PackedDirectory(tmp_path / "packed") as packed:
        assert packed.matrices[f"{Q}.weight"].qtype == "int4_g16"
        assert packed.matrices[f"{DOWN}.weight"].qtype == "int4_asym"
        assert packed.label == "W4A16_ASYM"


def test_whole_bytes_beside_packed_codes(llama: Path, tmp_path: Path) -> None:
    """mixed-precision: int-quantized 8 bits beside pack-quantized 4, and groups beside rows in whole bytes."""
    plain, groups, usual = Form(FORM, bits=8, group=-1, integer=True), Form(FORM, bits=8, integer=True), Form(FORM)
    expected = foreign(llama, tmp_path / "packed", {Q: plain, DOWN: groups}, usual)
    named_groups = [([Q], plain), ([DOWN], groups), (["re:.*"], usual)]
    groups_of(tmp_path / "packed", named_groups, format="mixed-precision")
    same_values(llama, tmp_path / "packed", expected)


def test_names_of_another_reader_fall_back_to_the_scales(llama: Path, tmp_path: Path) -> None:
    """Where no target knows the names of the file, the groups that fit the scales decide."""
    fine, usual = Form(FORM, group=16), Form(FORM)
    expected = foreign(llama, tmp_path / "packed", {Q: fine}, usual)
    groups_of(tmp_path / "packed", [([f"other.{Q}"], fine), (["re:other.*"], usual)])
    same_values(llama, tmp_path / "packed", expected)


def test_a_group_that_contradicts_the_tensors(llama: Path, tmp_path: Path) -> None:
    fine, usual = Form(FORM, group=16), Form(FORM)
    foreign(llama, tmp_path / "packed", {Q: fine}, usual)
    groups_of(tmp_path / "packed", [([DOWN], fine), (["re:.*"], usual)])
    with pytest.raises(IntegrityError, match=r"does not fit the others, or the configuration"):
        PackedDirectory(tmp_path / "packed")


def test_verify_names_what_readers_would_find_elsewhere(mixed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(mixed, tmp_path / "packed"))
    (folder / "manifest.json").unlink()
    file = folder / "config.json"
    whole = file.read_text()

    def problems(change: Any) -> list[str]:
        config = json.loads(whole)
        change(config["quantization_config"]["config_groups"])
        file.write_text(json.dumps(config))
        return verify(folder).problems

    assert problems(lambda groups: None) == []

    def swap(groups: dict[str, Any]) -> None:
        by_bits = {group["weights"]["num_bits"]: group for group in groups.values()}
        by_bits[2]["targets"], by_bits[6]["targets"] = by_bits[6]["targets"], by_bits[2]["targets"]

    (first, second) = sorted(problems(swap))
    assert "down_proj has 6 bits in 1 groups a row, and its group in the configuration 2 bits in 3" in first
    assert "(3 such modules)" in second

    def forget(groups: dict[str, Any]) -> None:
        next(group for group in groups.values() if group["weights"]["num_bits"] == 7)["targets"] = ["re:nothing"]

    assert problems(forget) == [f"{DOWN} is quantized, but no target of the configuration means it"]


def test_groups_of_no_sense_are_refused_and_never_a_bug(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(mixed, tmp_path / "packed"))
    (folder / "manifest.json").unlink()
    file = folder / "config.json"
    whole = json.loads(file.read_text())

    def ends(meant: Any, **weights: Any) -> int:
        config = json.loads(json.dumps(whole))
        groups = config["quantization_config"]["config_groups"]
        groups["group_1"]["targets"] = meant
        for group in groups.values():
            group["weights"] |= weights
        file.write_text(json.dumps(config))
        code = run(["verify", str(folder), "--json"])
        told = capsys.readouterr()
        assert code in (0, 3, 4, 8), (told.out, told.err)
        return code

    assert ends(["re:.*"]) == 8
    for odd in (None, 5, {}, [5], [None, []], "re:.*", ["re:(?=x)"], ["re:["], ["re:" + "a" * 5000], []):
        assert ends(odd) in (3, 8), odd
    for size in (None, 0, -5, "x", 1 << 40, [], {}, 32.0):
        assert ends(["re:.*"], group_size=size) in (3, 4, 8), size
    for bits in (4.0, "4", None, True, [], 3.5):
        assert ends(["re:.*"], num_bits=bits) in (3, 4, 8), bits
    assert ends(["re:(a+)+$", "re:(.*)*x"]) == 8
    monkeypatch.setattr(expressions, "MOST_SECONDS", 0.05)
    assert ends([f"re:x{number}.*" for number in range(20_000)]) == 3


def test_what_transformers_misreads_is_not_run_there(experts: Path, tmp_path: Path) -> None:
    folder = made(experts, tmp_path, {"model.layers.0.mlp.experts": "int8_g16"}, group_size=16)
    with pytest.raises(UnsupportedError, match=r"other values[\s\S]*experts of all layers"):
        runtime.run(folder, Request(prompts=("a",), max_tokens=1))


def test_order_of_targets_is_the_packages(llama: Path) -> None:
    """A name before expressions, expressions by their text, classes last."""
    kinds = {"a": {"num_bits": 2}, "b": {"num_bits": 3}, "c": {"num_bits": 4}, "d": {"num_bits": 5}}
    meant = {"a": ["re:.*z.*"], "b": ["re:.*proj"], "c": ["Linear"], "d": [Q]}
    groups = {key: {"targets": meant[key], "weights": kinds[key]} for key in kinds}
    read = Groups(Settings({"config_groups": groups}, llama / "config.json"))
    names = [Q, "x.z_proj", "x.z", "x"]
    module = torch.nn.Linear(1, 1)
    for name in names:
        schemes = {target: kinds[key] for key in kinds for target in meant[key]}
        group = read.of(name, names)
        assert group is not None
        assert group["weights"] == schemes[match_targets(name, module, schemes)[0]], name
