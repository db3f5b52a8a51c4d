"""Advice: exact sizes, choices for every priority, exclusions, measured figures, and commands that do what they say."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_quantize import api
from llm_quantize.advice.answer import Advice
from llm_quantize.advice.choice import Choice, with_dominated
from llm_quantize.advice.experience import Experience, Measured
from llm_quantize.advice.footprint import CUDA_CONTEXT
from llm_quantize.advice.machine import Machine
from llm_quantize.advice.recommend import recommend
from llm_quantize.cli import run
from llm_quantize.errors import UsageError
from llm_quantize.formats.gguf.levels import LEVELS
from llm_quantize.measures.grades import GRADES
from llm_quantize.models.opening import Source, open_source
from llm_quantize.options import MethodOptions, Options
from llm_quantize.pipeline import quantize
from llm_quantize.reports.findings import VERSION
from llm_quantize.reports.provenance import model_facts
from tests.models.adapters import factors, write_adapter
from tests.tiny_models import make_tiny, row_lengths_of_256

LIMITS = dict(GRADES)
PLENTY = 64_000_000_000


@pytest.fixture(scope="module")
def demo() -> Iterator[Source]:
    from llm_quantize.data import demo_model

    source = open_source(str(demo_model()), headers_only=True)
    with source.checkpoint:
        yield source


def advise(source: Source, machine: Machine | None = None, **options: Any) -> Advice:
    return recommend(source, machine or Machine("cpu", PLENTY), model="MODEL", **options)


def named(advice: Advice, level: str) -> Choice:
    return next(choice for choice in advice.choices if choice.level == level)


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = run(list(words))
    return code, capsys.readouterr().out


def test_with_plenty_the_smallest_that_nobody_can_tell(demo: Source) -> None:
    advice = advise(demo)
    assert advice.take is not None
    assert advice.better is not None
    assert advice.smaller is not None
    assert (advice.take.level, advice.better.level, advice.smaller.level) == ("Q8_0", "BF16", "Q6_K")
    assert [choice.size for choice in advice.choices] == sorted((c.size for c in advice.choices), reverse=True)
    assert any("not measured on this model" in reason for reason in advice.why)
    assert any("published" in note or "not measured" in note for note in advice.notes)


@pytest.mark.parametrize(("priority", "limit"), [("speed", "good"), ("size", "noticeable loss")])
def test_speed_and_size_keep_a_floor(priority: str, limit: str, demo: Source) -> None:
    advice = advise(demo, priority=priority)
    assert advice.take is not None
    assert advice.take.kld < LIMITS[limit]
    smaller = [choice for choice in advice.choices if choice.size < advice.take.size and choice.dominated is None]
    assert smaller
    assert all(choice.kld >= LIMITS[limit] for choice in smaller)


def test_every_level_is_a_choice_or_excluded_with_a_reason(demo: Source, tmp_path: Path) -> None:
    advice = advise(demo)
    excluded = dict(advice.excluded)
    assert {choice.level for choice in advice.choices} | set(excluded) == set(LEVELS)
    assert set(excluded) == {"F32", "F16", "TQ1_0", "TQ2_0", "Q1_0", "Q2_0", "MXFP4_MOE", "NVFP4"}
    assert "ternary" in excluded["TQ1_0"]
    assert "experts" in excluded["MXFP4_MOE"]
    with (experts := open_source(str(make_tiny("mixtral", tmp_path / "moe")), headers_only=True)).checkpoint:
        advice = advise(experts)
    assert named(advice, "MXFP4_MOE").loss is None
    assert advice.take is not None
    assert advice.take.level != "MXFP4_MOE"


def test_levels_that_another_beats_are_marked_and_not_taken(demo: Source) -> None:
    advice = advise(demo)
    assert named(advice, "Q4_1").dominated is not None
    assert named(advice, "Q5_0").dominated == "Q5_K_S"
    best, other = named(advice, "Q5_K_S"), named(advice, "Q5_0")
    nearly = [replace(best, size=1_000_000), replace(other, size=999_968)]  # a longer name in the metadata
    assert [choice.dominated for choice in with_dominated(nearly)] == [None, "Q5_K_S"]
    smaller = [replace(best, size=1_000_000), replace(other, size=900_000)]
    assert [choice.dominated for choice in with_dominated(smaller)] == [None, None]
    for machine in (20_000_000, 95_000_000, 96_000_000, 97_000_000, 100_000_000):
        found = advise(demo, Machine("cpu", machine))
        chosen = [choice for choice in (found.take, found.better, found.smaller) if choice is not None]
        assert all(choice.dominated is None for choice in chosen)


def test_less_memory_means_fewer_bits(demo: Source) -> None:
    need = named(advise(demo), "Q4_K_M").need.total
    machine = Machine("cpu", need * 8 // 7 + 8)
    assert need <= machine.usable_ram < named(advise(demo), "Q5_K_S").need.total
    advice = advise(demo, machine)
    assert advice.take is not None
    assert advice.take.level == "Q4_K_M"
    assert advice.better is not None
    assert advice.better.placement is None
    assert dict(advice.excluded)[advice.better.level].startswith("takes ")
    longer = advise(demo, machine, context=65_536)
    assert longer.take is None
    assert longer.why == ()
    assert any("was made for 1024 tokens" in note for note in longer.notes)


def test_whole_on_the_gpu_before_split(demo: Source) -> None:
    wanted = named(advise(demo, Machine("cuda", PLENTY, PLENTY)), "Q5_K_M")
    assert wanted.placement is not None
    assert wanted.placement.kind == "gpu"
    machine = Machine("cuda", PLENTY, wanted.placement.gpu)
    advice = advise(demo, machine)
    assert advice.take is not None
    assert advice.take.level == "Q5_K_M"
    better = named(advice, "Q8_0").placement
    assert better is not None
    assert better.kind == "split"
    assert 0 < better.gpu_layers < 7
    assert better.gpu <= machine.vram
    assert shlex.split(advice.commands(named(advice, "Q8_0"))["run"])[-2:] == ["-ngl", str(better.gpu_layers)]
    # Where nothing good is whole there, the best is split.
    cramped = advise(demo, Machine("cuda", PLENTY, CUDA_CONTEXT + named(advice, "IQ2_M").need.compute + 2_000_000))
    assert cramped.take is not None
    assert cramped.take.kld < LIMITS["indistinguishable"]


def test_measured_figures_are_used(demo: Source, tmp_path: Path) -> None:
    measured = {
        ("gguf", "Q8_0"): Measured(0.0005, 40.0, None),
        ("gguf", "Q6_K"): Measured(0.0015, 50.0, None),
        ("gguf", "Q4_K_M"): Measured(0.012, 45.0, None),
        ("gguf", "Q2_K"): Measured(0.02, 44.0, None),
    }
    experience = Experience(measured, tmp_path / "comparison.json")
    quality = advise(demo, experience=experience)
    assert quality.take is not None
    assert quality.take.level == "Q6_K"
    assert any("(measured on this model)" in reason for reason in quality.why)
    fastest = advise(demo, experience=experience, priority="speed").take
    assert fastest is not None
    assert (fastest.level, fastest.speed) == ("Q6_K", 50.0)
    bases = {choice.level: choice.loss.basis for choice in quality.choices if choice.loss is not None}
    assert (bases["Q2_K"], bases["Q5_K_M"], bases["BF16"]) == ("measured", "estimated", "exact")
    assert any("scaled by those measured" in note for note in quality.notes)


@pytest.mark.parametrize(("format", "level", "kind"), [("gptq", "4bit", "GPTQ-4bit"), ("gguf", "Q8_0", "GGUF Q8_0")])
def test_only_float32_is_exact_for_a_quantized_source(
    demo: Source, tmp_path: Path, format: str, level: str, kind: str
) -> None:
    options = Options(method=MethodOptions(method="rtn"))
    (made,) = quantize(str(demo.checkpoint.directory), format, levels=[level], output_dir=tmp_path, options=options)
    source = open_source(str(made.path))
    with source.checkpoint:
        advice = advise(source)
        values = source.checkpoint.read_rows("model.layers.0.mlp.down_proj.weight", 0, 4)
    assert (values != values.astype(np.float16)).any()  # F16 would round them
    exact = {choice.level for choice in advice.choices if choice.loss is not None and choice.loss.basis == "exact"}
    assert exact == {"F32"}
    assert kind in dict(advice.excluded)["BF16"]
    assert any(kind in note for note in advice.notes)


def test_bad_questions_are_refused(demo: Source) -> None:
    with pytest.raises(UsageError, match="priority"):
        advise(demo, priority="beauty")
    with pytest.raises(UsageError, match="context"):
        advise(demo, context=0)


@pytest.mark.parametrize("level", ["Q8_0", "Q4_K_M", "IQ2_XS"])
def test_the_command_makes_a_file_of_this_size(
    level: str, demo: Source, demo_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    advice = replace(advise(demo), model=str(demo_model))
    choice = named(advice, level)
    program, *words = shlex.split(advice.commands(choice)["quantize"])
    code, out = call(capsys, *words, "--dry-run", "--json")
    assert (program, code) == ("llm-quantize", 0)
    assert ("--calibrate" in words) is (level != "Q8_0")
    (artifact,) = json.loads(out)["artifacts"]
    assert (artifact["size"], artifact["level"]) == (choice.size, level)
    assert artifact["files"][0]["name"] == choice.file
    assert choice.need.weights == sum(tensor["bytes"] for tensor in artifact["tensors"])


def test_on_the_command_line(
    demo: Source, demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["recommend", str(demo_model), "--ram", "8G", "--vram", "4G"]
    code, out = call(capsys, *words)
    assert code == 0
    assert "take Q8_0 (6.21 MB)" in out
    assert "llama-server -m out/demo-llama-Q8_0.gguf -c 1024 -ngl 7" in out
    code, out = call(capsys, *words, "--json", "--context", "512", "--priority", "size")
    facts = json.loads(out)
    assert (code, facts["machine"]["device"], facts["context"], facts["priority"]) == (0, "cuda", 512, "size")
    assert facts["take"] in facts["choices"]
    assert facts["take"]["kld_basis"] == "published"
    (tmp_path / "report").mkdir()
    model = asdict(model_facts(demo, ""))
    fingerprint = model["fingerprint"]
    measured = {"format": "gguf", "level": "Q4_K_M", "kld": 0.001}
    text = json.dumps({"version": VERSION, "model": model, "variants": [measured]})
    (tmp_path / "report" / "comparison.json").write_text(text)
    code, out = call(capsys, *words, "--json")
    assert (json.loads(out)["take"]["level"], json.loads(out)["take"]["kld"]) == ("Q4_K_M", 0.001)
    (tmp_path / "other.json").write_text(text.replace(fingerprint, "0" * 64))
    assert run([*words, "--measured", "other.json"]) == 8
    (tmp_path / "report" / "comparison.json").write_text(text.replace(fingerprint, "0" * 64))
    code, out = call(capsys, *words, "--json")
    assert json.loads(out)["take"]["level"] == "Q8_0"


def test_of_a_model_with_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its commands merge it, and figures of the base are not its own."""
    model = make_tiny("llama", tmp_path / "net", **row_lengths_of_256("llama"))
    adapter = write_adapter(tmp_path / "mine", factors({"model.layers.0.self_attn.o_proj": (256, 256)}))
    words = [str(model), "--lora", f"{adapter}=0.5", "--ram", "16G", "--device", "cpu", "--json"]
    code, text = call(capsys, "recommend", *words)
    answer = json.loads(text)
    assert code == 0
    command = shlex.split(answer["take"]["commands"]["quantize"])
    assert command[command.index("--lora") + 1] == f"{adapter}=0.5"
    own = open_source(str(model), lora=[str(adapter)])
    with own.checkpoint, open_source(str(model)).checkpoint:
        facts = {"version": VERSION, "model": asdict(model_facts(own, str(model))), "variants": []}
    (tmp_path / "comparison.json").write_text(json.dumps(facts))
    code, _ = call(capsys, "recommend", *words, "--measured", str(tmp_path / "comparison.json"))
    assert code != 0, "it is of the adapter added whole"
    words[2] = str(adapter)
    code, text = call(capsys, "recommend", *words, "--measured", str(tmp_path / "comparison.json"))
    assert code == 0
    assert api.recommend(model, lora=adapter, ram=16_000_000_000, device="cpu").lora == (str(adapter),)


def test_nothing_fits(demo_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["recommend", str(demo_model), "--ram", "20M", "--device", "cpu"]
    code = run(words)
    shown = capsys.readouterr()
    assert code == 5
    assert "no level of this model fits" in shown.err
    assert "does not fit" in shown.out
    code, out = call(capsys, *words, "--json")
    facts = json.loads(out)
    assert (code, facts["take"], facts["error"], facts["exit_code"]) == (5, None, "resources", 5)
    assert len(facts["excluded"]) == len(LEVELS)


def test_figures_of_a_base_are_not_those_of_its_fine_tune(
    demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Headers, names, sizes and times are the same: one weight, the rotary base or the tokenizer is not."""
    monkeypatch.chdir(tmp_path)
    base = shutil.copytree(demo_model, tmp_path / "base")
    with (source := open_source(str(base), headers_only=True)).checkpoint:
        model = asdict(model_facts(source, str(base)))
    measured = {"format": "gguf", "level": "Q4_K_M", "kld": 0.0002}
    (tmp_path / "report").mkdir()
    report = {"version": VERSION, "model": model, "variants": [measured]}
    (tmp_path / "report" / "comparison.json").write_text(json.dumps(report))

    def taken(name: str) -> Any:
        code, out = call(capsys, "recommend", str(tmp_path / name), "--ram", "8G", "--device", "cpu", "--json")
        assert code == 0
        return next(one["kld_basis"] for one in json.loads(out)["choices"] if one["level"] == "Q4_K_M")

    for name, change in (("tuned", one_weight), ("rope", rope), ("words", tokenizer)):
        other = shutil.copytree(base, tmp_path / name)
        change(other)
        for file in base.iterdir():
            os.utime(other / file.name, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
        assert taken(name) == "published", name
        assert run(["recommend", str(other), "--ram", "8G", "--measured", "report"]) == 8
        capsys.readouterr()
    assert taken("base") == "measured"
    shutil.copytree(base, tmp_path / "moved")
    assert taken("moved") == "measured"


def one_weight(model: Path) -> None:
    file = model / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[3 * len(data) // 7] ^= 1  # neither in the first nor in the last row of its tensor
    file.write_bytes(data)


def rope(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rope_theta": 12345.0}))


def tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes() + b"\n")


def test_a_guess_does_not_win_against_a_measurement(demo: Source, tmp_path: Path) -> None:
    """Only Q4_K_M and Q2_K were measured, one so well that the estimates of all others are better still."""
    measured = {
        ("gguf", "Q4_K_M"): Measured(0.0021, 10.0, None),
        ("gguf", "Q2_K"): Measured(0.002, 12.0, None),
    }
    advice = advise(demo, experience=Experience(measured, tmp_path / "comparison.json"))
    assert advice.take is not None
    assert advice.take.level == "Q2_K"
    assert {named(advice, level).dominated for level in ("Q4_K_M", "Q2_K")} == {"Q2_K", None}
    assert {choice.dominated for choice in advice.choices if choice.loss and choice.loss.basis == "estimated"} & {
        "Q2_K"
    }
    assert advice.untried is not None
    assert advice.untried.loss is not None
    assert advice.untried.loss.basis == "estimated"
    assert any(f"gguf:{advice.untried.level},gguf:Q2_K" in note for note in advice.notes)


def test_the_command_makes_the_file_that_was_measured(demo: Source) -> None:
    words = ("gguf", "-q", "Q4_K_M", "--imatrix", "i.gguf", "--revision", "abc")
    advice = advise(demo, experience=Experience({("gguf", "Q4_K_M"): Measured(0.001, None, None, words)}))
    assert advice.take is not None
    command = shlex.split(advice.commands(advice.take)["quantize"])
    assert command == ["llm-quantize", "quantize", "MODEL", *words, "-o", "out"]


def test_the_answer_comes_first_with_its_rule(demo_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = call(capsys, "recommend", str(demo_model), "--ram", "16", "--device", "cpu")
    assert code == 0
    assert out.startswith("take Q8_0 (6.21 MB)\n")
    assert "\nto make it: llm-quantize quantize " in out
    assert "\nto try it: llm-quantize run out/demo-llama-Q8_0.gguf " in out
    assert "of 14.0 GB" in out  # 16 GB, less what the system keeps
    assert out.index("The rule: ") < out.index("level\tfile")
