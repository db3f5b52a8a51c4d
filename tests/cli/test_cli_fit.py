"""``quantize --fit``: a size in the place of a level, from the command line to what the manifest says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import llm_quantize
from llm_quantize.cli import run
from llm_quantize.evaluation import fitting
from llm_quantize.evaluation.quality import measure_quality
from llm_quantize.formats.recipe_file import read_recipe
from llm_quantize.models.opening import open_source
from tests.oracles.llama_quantize import types_of
from tests.tiny_models import make_tiny

TEXT = (
    "What a size is worth is told by the gradients of the model, and tried on other text before it is believed. " * 90
)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLM_QUANTIZE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fitting, "CONTEXT", 32)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return str(make_tiny("llama", tmp_path / "tiny", hidden_size=256, intermediate_size=256))


def arguments(model: str, size: int | str, *more: str) -> list[str]:
    """With the text that windows are drawn from, and no importance."""
    return ["quantize", model, "gguf", "--fit", str(size), *more]


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_file_fits_and_says_why(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    size = 700_000
    assert run(arguments(model, f"{size}B", "--dry-run")) == 0
    shown = capsys.readouterr().out
    assert "the types will be chosen of q8_0, q6_k" in shown
    assert not Path("cache/sensitivities").exists()

    assert run(arguments(model, f"{size}B", "--json")) == 0
    facts = told(capsys)
    fit, (artifact,) = facts["fit"], facts["artifacts"]
    path = Path(artifact["path"])
    assert path.name == "tiny-fit-700kB.gguf"
    assert 0.93 * size < path.stat().st_size <= size
    assert (fit["size"], fit["file"], fit["way"]) == (size, size, "estimated")
    assert abs(fit["reached"] - path.stat().st_size) < 2048
    assert fit["chosen"] == min(fit["tried"], key=fit["tried"].get)
    assert len(fit["tried"]) >= 2
    found = types_of(path)
    manifest = json.loads(path.with_name(path.name + ".manifest.json").read_bytes())
    recipe = manifest["made"]["recipe"]
    assert {name: found[name] for name in recipe["tensors"]} == recipe["tensors"]
    assert recipe["fit"]["tried"] == fit["tried"]
    assert sum(sum(counts.values()) for counts in fit["types"].values()) == len(recipe["tensors"])
    assert set(fit["types"]) >= {"token_embd", "output", "blk.*.attn_q", "blk.*.ffn_down"}

    # What was tried is what the file loses on the very windows.
    with (source := open_source(model)).checkpoint:
        job = fitting._open(
            source, "gguf", fitting.Asked(size, {"size": size, "file": size}), options(), lambda _: None
        )
        measured = measure_quality(source, [path], job.other, threads=1).artifacts[0].divergence.kld
    assert fit["tried"][fit["chosen"]] == pytest.approx(measured, rel=1e-3)

    # Again: nothing is measured, and the artifact is already there; verify makes it again from its manifest.
    assert run(arguments(model, f"{size}B")) == 0
    shown, noted = capsys.readouterr()
    assert "(already complete)" in shown
    assert "this size was fitted before" in noted
    assert "blk.*.attn_q: " in shown
    assert run(["verify", str(path), "--source", model, "--rederive"]) == 0
    capsys.readouterr()

    # Another size: the figures are known, so that a dry run is exact, and nothing but the trial is run.
    assert run(arguments(model, "600kB", "--dry-run", "--json")) == 0
    assert told(capsys)["artifacts"][0]["size"] <= 600_000


def options() -> Any:
    from llm_quantize.options import Options

    return Options()


def test_sizes_beyond_both_ends(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    for more in ([], ["--dry-run"]):
        assert run(arguments(model, "100kB", *more)) == 5
        error = capsys.readouterr().err
        assert "nothing that can be made of this model fits this size" in error
        assert "every matrix in the smallest type that it can have (q2_k)" in error
        assert "--calibrate" in error
    assert not list(Path().glob("*.gguf"))
    assert run(arguments(model, "1G", "--json")) == 0
    fit = told(capsys)["fit"]
    assert fit["kld"] == 0
    assert fit["tried"]["sensitivities"] == pytest.approx(0, abs=1e-9)
    assert run(arguments(model, "1G", "--context", "512", "--kv", "q8_0", "--dry-run")) == 0
    assert "a cache of 512 tokens in q8_0" in capsys.readouterr().out


def test_importance_makes_room_for_smaller_types(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    size = "310kB"
    assert run(arguments(model, size)) == 5
    capsys.readouterr()
    text = ["--calibration-data", "text.txt", "--calibration-samples", "2", "--sequence-length", "32"]
    assert run(arguments(model, size, *text, "--dry-run")) == 0
    assert "iq2_xxs" in capsys.readouterr().out
    assert run(arguments(model, size, *text, "--json")) == 0
    facts = told(capsys)
    assert facts["artifacts"][0]["size"] <= 310_000
    assert any("iq2" in qtype or "iq3" in qtype for counts in facts["fit"]["types"].values() for qtype in counts)


def test_exact_figures_are_measured(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments(model, "700kB", "--json")) == 0
    estimated = told(capsys)["fit"]
    assert run(arguments(model, "700kB", "--exact", "--overwrite", "--json")) == 0
    measured = told(capsys)["fit"]
    assert measured["way"] == "measured"
    assert measured["kld"] != estimated["kld"]
    assert measured["kld"] == pytest.approx(estimated["kld"], rel=0.5)


def test_a_directory_fits(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["quantize", model, "compressed-tensors", "--fit", "1.2MB", "--method", "rtn", "--json"]
    assert run(words) == 0
    facts = told(capsys)
    (artifact,) = facts["artifacts"]
    files = list(Path(artifact["path"]).glob("*"))
    assert artifact["size"] <= 1_200_000
    card = Path(artifact["path"], "README.md").read_text(encoding="utf-8")
    assert "types chosen to fit 1.20 MB" in card
    assert files
    recipe = json.loads(Path(artifact["path"], "manifest.json").read_bytes())["made"]["recipe"]
    assert recipe["fit"]["size"] == 1_200_000
    kinds = facts["fit"]["types"]
    assert kinds["model.layers.*.self_attn.q_proj"] == kinds["model.layers.*.self_attn.k_proj"]
    assert run(["quantize", model, "compressed-tensors", "--fit", "100kB", "--method", "rtn"]) == 5
    assert "fits this size" in capsys.readouterr().err


def test_a_plain_level_that_leaves_the_output_matrix_is_tried(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own matrix, in 16 bits beside W5A16, in 8 where the sensitivities ask for it."""
    sizes = {"hidden_size": 256, "intermediate_size": 256}
    untied = str(make_tiny("llama", tmp_path / "untied", tie_word_embeddings=False, **sizes))
    words = ["quantize", untied, "compressed-tensors", "--fit", "900kB", "--method", "rtn", "--json"]
    assert run(words) == 0
    facts = told(capsys)
    assert facts["artifacts"][0]["size"] <= 900_000
    assert facts["fit"]["types"]["lm_head"] == {"int8_g128": 1}
    assert facts["fit"]["tried"]["sensitivities"] < facts["fit"]["tried"]["W5A16"]


def test_what_was_tried_is_told_in_japanese(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--lang", "ja", *arguments(model, "700kB")]) == 0
    shown = capsys.readouterr().out
    assert "推定した感度による KLD の和" in shown
    assert "トークンでの平均 KLD：感度 0." in shown
    assert "sensitivit" not in shown
    assert "estimated" not in shown


def test_figures_of_a_directory_are_of_error_feedback(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = ["--calibration-data", "text.txt", "--calibration-samples", "2", "--sequence-length", "64"]
    words = ["quantize", model, "compressed-tensors", "--fit", "1.2MB", *text, "--json"]
    assert run([*words, "--dry-run"]) == 0
    assert told(capsys)["fit"]["limit"] == 1_200_000
    assert run(words) == 0
    facts = told(capsys)
    assert facts["artifacts"][0]["size"] <= 1_200_000
    assert list(Path("cache/statistics").glob("*.safetensors")), "Hessians were collected for it"
    assert facts["fit"]["kld"] > 0


def test_the_recipe_can_be_kept_and_used(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments(model, "700kB")) == 0
    capsys.readouterr()
    (kept,) = Path("cache/sensitivities").glob("*.recipe.json")
    recipe = read_recipe(kept)
    assert recipe.fit is not None
    assert llm_quantize.fit(model, size=700_000) == recipe
    assert recipe.notes()[0].startswith("types chosen to fit 700 kB")
    assert run(["quantize", model, "--recipe", str(kept), "-o", "other", "--json"]) == 0
    assert told(capsys)["artifacts"][0]["size"] == Path("tiny-fit-700kB.gguf").stat().st_size
    fields = json.loads(kept.read_bytes())
    for wrong in ({**fields["fit"], "size": "8G"}, {**fields["fit"], "more": 1}, [], {"size": 1}):
        kept.write_text(json.dumps({**fields, "fit": wrong}), encoding="utf-8")
        assert run(["quantize", model, "--recipe", str(kept), "--dry-run"]) == 3
        assert "the recipe's size is not what this version writes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["-q", "Q4_K_M"], "--fit and -q"),
        (["--recipe", "r.json"], "--fit and --recipe"),
        (["--tensor-type", "ffn=q6_k"], "a size chooses the type of every tensor"),
        (["--kv", "q8_0"], "without its length"),
        (["--context", "64k"], "so long a context"),
        (["--context", "many"], "is not a number of tokens"),
    ],
)
def test_what_contradicts_itself(model: str, capsys: pytest.CaptureFixture[str], more: list[str], message: str) -> None:
    Path("r.json").write_text("{}", encoding="utf-8")
    assert run(["quantize", model, "gguf", "--fit", "1G", *more]) in (2, 3)
    assert message in capsys.readouterr().err


def test_what_means_nothing_without_a_size(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["quantize", model, "gguf", "-q", "Q8_0", "--context", "8k", "--exact"]) == 2
    assert "--context and --exact means nothing without a size" in capsys.readouterr().err
    assert run(["quantize", model, "gptq", "--fit", "1G"]) == 2
    assert "recipes are not measured for this format" in capsys.readouterr().err
