"""Profiles of packed directories: figures equal to artifacts that were really written, and recipes that keep their
size."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from llm_quantize.calibration.collect import calibrate
from llm_quantize.cli import run
from llm_quantize.errors import MalformedInputError, ResourceError, UsageError
from llm_quantize.evaluation.allocation import Target
from llm_quantize.evaluation.ladders import ladder_of
from llm_quantize.evaluation.profile import measure_profile, plan_profile
from llm_quantize.evaluation.quality import measure_quality
from llm_quantize.evaluation.sensitivity import Profile, read_profile, write_profile
from llm_quantize.formats.gguf.levels import Overrides
from llm_quantize.formats.recipe import Recipe
from llm_quantize.models.opening import open_source
from llm_quantize.options import CalibrationOptions, MethodOptions
from llm_quantize.pipeline import Options, plan, quantize
from tests.blockwise.tiny import write_text
from tests.evaluation.test_sensitivity import windows_of
from tests.tiny_models import make_tiny

FORM = "compressed-tensors"
TYPES = ("int8_g16", "int4_g16", "int3_g16")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("llama") / "tiny")


@pytest.fixture(scope="module")
def statistics(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("statistics")
    options = CalibrationOptions(
        (str(write_text(folder)),), samples=3, length=48, collect=("imatrix", "hessian"), threads=1
    )
    source = open_source(str(llama))
    with source.checkpoint:
        return calibrate(source, options).path


def profile_of(model: Path, statistics: Path | None = None, types: tuple[str, ...] = TYPES) -> Profile:
    source = open_source(str(model))
    with source.checkpoint:
        found = plan_profile(source, windows_of(), types, None, threads=2, form=FORM, statistics=statistics)
        return measure_profile(found)


def test_estimates_follow_error_feedback(llama: Path, statistics: Path) -> None:
    """Errors of feedback are larger than those of rounding and lose less: an estimate must know that."""
    windows = windows_of(24, 32)
    found = {}
    with (source := open_source(str(llama))).checkpoint:
        for estimated in (False, True):
            plan = plan_profile(
                source, windows, ("int8_g16",), None, threads=2, form=FORM, statistics=statistics, estimated=estimated
            )
            found[estimated] = {row.tensor: row.kld for row in measure_profile(plan).rows}
    assert found[True].keys() == found[False].keys()
    ratios = [found[True][name] / kld for name, kld in found[False].items()]
    assert all(0.4 < ratio < 2.5 for ratio in ratios), ratios


@pytest.fixture(scope="module")
def profile(llama: Path) -> Profile:
    return profile_of(llama)


def written_kld(model: Path, unit: str, out: Path, **options: Any) -> float:
    """The same figure by the long way: a directory with these modules packed and all others left, compared."""
    parent, _, lasts = unit.rpartition(".")
    inside = r"\d+\.\w+" if lasts == "experts" else f"(?:{lasts.replace('+', '|')})"
    own = rf"{re.escape(unit)}\.{inside}" if lasts == "experts" else rf"{re.escape(parent)}\.{inside}"
    fed = {"method": "gptq", "inputs": "source"} if options else {"method": "rtn"}
    method = MethodOptions(**fed, group_size=16, ignore=(rf"^(?!{own}$)",))
    chosen = Options(threads=1, method=method, **options)
    (result,) = quantize(str(model), FORM, levels=["W4A16"], output_dir=out, options=chosen)
    source = open_source(str(model))
    with source.checkpoint:
        return measure_quality(source, [result.path], windows_of(), threads=1).artifacts[0].divergence.kld


UNITS = [
    "model.layers.0.self_attn.k_proj+q_proj+v_proj",
    "model.layers.1.mlp.gate_proj+up_proj",
    "model.layers.0.mlp.down_proj",
]


def test_a_figure_is_that_of_a_written_directory(llama: Path, profile: Profile, tmp_path: Path) -> None:
    figures = {(row.tensor, row.qtype): row for row in profile.rows}
    for number, unit in enumerate(UNITS):
        expected = written_kld(llama, unit, tmp_path / str(number))
        assert expected > 1e-5
        assert figures[unit, "int4_g16"].kld == pytest.approx(expected, rel=1e-3), unit
        assert figures[unit, "int8_g16"].kld < expected < figures[unit, "int3_g16"].kld
    assert len(profile.by_tensor()) == 2 * 4 + 1
    assert [row.qtype for row in profile.by_tensor()["lm_head"]] == ["int8_g16", "int4_g16"]
    assert figures[UNITS[0], "int4_g16"].bits == pytest.approx(4 + 16 / 16 + 3 * 128 / (128 * 64), rel=1e-6)


def test_the_figure_of_an_output_matrix(llama: Path, profile: Profile, tmp_path: Path) -> None:
    recipe = Recipe("head", "W4A16", {"lm_head": "int4_g16"}, form=FORM)
    method = MethodOptions(method="rtn", ignore=("^(?!lm_head$)",))
    options = Options(threads=1, method=method, overrides=Overrides(recipe=recipe))
    (result,) = quantize(str(llama), FORM, levels=["W4A16"], output_dir=tmp_path, options=options)
    source = open_source(str(llama))
    with source.checkpoint:
        expected = measure_quality(source, [result.path], windows_of(), threads=1).artifacts[0].divergence.kld
    figures = {(row.tensor, row.qtype): row.kld for row in profile.rows}
    assert expected > 1e-5
    assert figures["lm_head", "int4_g16"] == pytest.approx(expected, rel=1e-3)


def test_an_output_matrix_is_left_where_there_is_room(llama: Path, profile: Profile) -> None:
    source = open_source(str(llama))
    with source.checkpoint:
        roomy = ladder_of(FORM).choose(source, profile, Target(bpw=16.0, form=FORM))
        small = ladder_of(FORM).choose(source, profile, Target(bpw=9.0, form=FORM))
    assert "lm_head" not in roomy.recipe.tensors
    assert small.recipe.tensors["lm_head"] in ("int8_g16", "int4_g16")
    assert small.size < roomy.size


def test_with_hessians_errors_are_fed_back(llama: Path, statistics: Path, profile: Profile, tmp_path: Path) -> None:
    fed = profile_of(llama, statistics)
    figures = {(row.tensor, row.qtype): row.kld for row in fed.rows}
    plain = {(row.tensor, row.qtype): row.kld for row in profile.rows}
    unit = UNITS[0]
    expected = written_kld(llama, unit, tmp_path, statistics=statistics)
    assert figures[unit, "int4_g16"] == pytest.approx(expected, rel=1e-3)
    assert figures[unit, "int4_g16"] != pytest.approx(plain[unit, "int4_g16"], rel=1e-2)
    assert fed.importance is not None
    assert profile.importance is None


def test_experts_of_a_layer_are_held_together(tmp_path: Path) -> None:
    model = make_tiny("qwen3_moe", tmp_path / "model")
    found = profile_of(model, types=("int4_g16",))
    unit = "model.layers.1.mlp.experts"
    figure = next(row for row in found.rows if row.tensor == unit)
    assert figure.kld == pytest.approx(written_kld(model, unit, tmp_path), rel=1e-3)
    source = open_source(str(model))
    with source.checkpoint:
        choice = ladder_of(FORM).choose(source, found, Target(bpw=16.0, form=FORM))
    assert choice.recipe.tensors[unit] == "int4_g16"
    assert not [name for name in choice.recipe.tensors if ".experts." in name]


def test_of_mlx_embedding_and_head_are_on_grids_too(tmp_path: Path) -> None:
    """The figure of the embedding is that of a directory that was written, and nothing is left as it is."""
    model = make_tiny("llama", tmp_path / "model", hidden_size=64, intermediate_size=128)
    types = ("affine8_g64", "affine4_g64", "affine3_g32")
    with (source := open_source(str(model))).checkpoint:
        found = measure_profile(plan_profile(source, windows_of(), types, None, threads=2, form="mlx"))
        choice = ladder_of("mlx").choose(source, found, Target(like="4bit", form="mlx"))
        roomy = ladder_of("mlx").choose(source, found, Target(bpw=20.0, form="mlx"))
    unit = "model.embed_tokens"
    rtn = MethodOptions(method="rtn")
    mixed = Options(overrides=Overrides(recipe=choice.recipe), method=rtn)
    (planned,) = plan(str(model), "mlx", levels=[choice.recipe.level], options=mixed)
    (plain,) = plan(str(model), "mlx", levels=["4bit"], options=Options(method=rtn))
    assert planned.size == choice.size <= plain.size
    assert set(roomy.recipe.tensors.values()) == {"affine8_g64"}
    assert {unit, "lm_head"} < roomy.recipe.tensors.keys()
    method = MethodOptions(method="rtn", ignore=(f"^(?!{unit}$)",))
    options = Options(threads=1, method=method)
    (result,) = quantize(str(model), "mlx", levels=["4bit"], output_dir=tmp_path / "out", options=options)
    with (source := open_source(str(model))).checkpoint:
        expected = measure_quality(source, [result.path], windows_of(), threads=1).artifacts[0].divergence.kld
    assert expected > 1e-5
    write_profile(tmp_path / "p.json", found)
    assert read_profile(tmp_path / "p.json") == found
    figures = {(row.tensor, row.qtype): row.kld for row in found.rows}
    assert figures[unit, "affine4_g64"] == pytest.approx(expected, rel=1e-3)


def test_smaller_groups_where_rows_are_odd(llama: Path) -> None:
    source = open_source(str(llama))
    with source.checkpoint:
        found = ladder_of(FORM).candidates(source, ["int4_g128", "int3"], {})
        types = {one.name: set() for one in found}
        for one in found:
            types[one.name].add(one.qtype)
        assert types["model.layers.0.mlp.down_proj"] == {"int4_g32", "int3"}  # rows of 96
        assert types[UNITS[0]] == {"int4_g64", "int3"}
        with pytest.raises(UsageError, match="no type"):
            ladder_of(FORM).candidates(source, [], {})
    with pytest.raises(UsageError, match="not measured for this format"):
        ladder_of("gptq")


@pytest.mark.parametrize("target", [{"like": "W4A16"}, {"bpw": 11.0}, {"size": 160_000}])
def test_a_recipe_keeps_its_size(llama: Path, profile: Profile, target: dict[str, Any]) -> None:
    """All files counted; the plan of the recipe has the size that is told."""
    wanted = Target(**target, form=FORM)
    source = open_source(str(llama))
    with source.checkpoint:
        choice = ladder_of(FORM).choose(source, profile, wanted)
        options = Options(overrides=Overrides(recipe=choice.recipe), method=MethodOptions(method="rtn"))
        (planned,) = plan(str(llama), FORM, levels=[choice.recipe.level], options=options)
        weights = planned.weights
    assert planned.size == choice.size
    limits = {"size": target.get("size"), "bpw": int(11.0 * weights / 8)}
    if "like" in target:
        method = MethodOptions(method="rtn", group_size=32)  # the largest that divides all rows
        (plain,) = plan(str(llama), FORM, levels=["W4A16"], options=Options(method=method))
        limits["like"] = plain.size
    limit = limits[next(iter(target))]
    assert limit is not None
    assert 0.9 * limit < choice.size <= limit
    used = set(choice.allocation.types.values())
    assert used <= set(TYPES)
    assert choice.recipe.form == FORM


def test_a_size_that_nothing_fits(llama: Path, profile: Profile) -> None:
    source = open_source(str(llama))
    with source.checkpoint, pytest.raises(ResourceError, match="does not fit this size") as refused:
        ladder_of(FORM).choose(source, profile, Target(bpw=1.0, form=FORM))
    assert refused.value.found == "0 bytes"  # its other tensors alone are larger
    assert "q2_k" not in str(refused.value)


def test_written_and_read(profile: Profile, tmp_path: Path) -> None:
    write_profile(tmp_path / "p.json", profile)
    assert read_profile(tmp_path / "p.json") == profile
    fields = json.loads((tmp_path / "p.json").read_text())
    fields["for"] = 4
    (tmp_path / "p.json").write_text(json.dumps(fields))
    with pytest.raises(MalformedInputError, match="not a word"):
        read_profile(tmp_path / "p.json")


def test_from_the_command_line(
    llama: Path, statistics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = str(write_text(tmp_path))
    words = ["analyze", "profile", str(llama), FORM, "--text", text, "--windows", "2", "--context", "16"]
    words += ["--types", ",".join(TYPES), "--statistics", str(statistics)]
    assert run([*words, "--bpw", "11", "-o", "mine.json", "--name", "mine"]) == 0
    told = capsys.readouterr().out
    assert "model.layers.1.mlp.gate_proj+up_proj" in told
    assert f"quantize {llama} {FORM} --recipe mine.json\n" in told
    assert Path(f"tiny.{FORM}.profile.json").is_file()
    assert run(["quantize", str(llama), FORM, "--recipe", "mine.json", "--method", "rtn"]) == 0
    assert run(["verify", "tiny-mine", "--source", str(llama)]) == 0
    capsys.readouterr()
    for more, message in (
        (["--preset", "speed"], "no such preset"),
        (["--like", "Q4_0"], "no compressed-tensors level"),
    ):
        assert run([*words, "--overwrite", "-o", "other.json", *more]) == 2
        assert message in capsys.readouterr().err
    assert run([*words[:-2], "--overwrite", "-o", "other.json", "--bpw", "11", "--imatrix", "x.dat"]) == 2
    assert "of no use" in capsys.readouterr().err
    assert run([*words[:3], "gguf", *words[4:-4], "--profile", f"tiny.{FORM}.profile.json", "--bpw", "11"]) == 2
    assert "types of another format" in capsys.readouterr().err


def test_the_command_that_is_advised_makes_the_statistics(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tiny.safetensors"
    assert run(["analyze", "profile", str(llama), FORM, "--imatrix", "x.dat", "--dry-run"]) == 2
    advised = re.search(r"llm-quantize (analyze importance MODEL .*FILE)", capsys.readouterr().err)
    assert advised is not None
    words = [{"MODEL": str(llama), "FILE": str(file)}.get(word, word) for word in advised[1].split()]
    text = str(write_text(tmp_path))
    more = ["--calibration-data", text, "--calibration-samples", "2", "--sequence-length", "32"]
    assert run([*words, *more]) == 0
    shown = ["--windows", "2", "--context", "32", "--text", text, "--dry-run"]
    assert run(["analyze", "profile", str(llama), FORM, "--statistics", str(file), *shown]) == 0


def test_other_statistics_are_not_taken_for_the_same(llama: Path, statistics: Path, tmp_path: Path) -> None:
    other = make_tiny("llama", tmp_path / "other", seed=5)
    with pytest.raises(Exception, match="another model"):
        profile_of(other, statistics)
    source = open_source(str(llama))
    options = CalibrationOptions((str(write_text(tmp_path)),), samples=1, length=16, threads=1)
    with source.checkpoint:
        plain = calibrate(source, options).path
    with pytest.raises(UsageError, match="no Hessians"):
        profile_of(llama, plain)
