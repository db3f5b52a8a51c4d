"""Hardware → runtime → format → level: machines × models with the expected answer, and what must hold of all."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from llm_quantize.advice.answer import Advice
from llm_quantize.advice.elsewhere import ELSEWHERE, ROUNDS_INPUTS
from llm_quantize.advice.experience import Experience, Measured
from llm_quantize.advice.machine import detect
from llm_quantize.advice.recommend import recommend
from llm_quantize.advice.ways import WAYS, ways_for
from llm_quantize.cli import run
from llm_quantize.errors import UsageError
from llm_quantize.formats.base import SchemeOptions
from llm_quantize.formats.packed_formats import PACKED
from llm_quantize.formats.table import FORMATS
from llm_quantize.models.opening import Source, open_source
from llm_quantize.pipeline import plan
from llm_quantize.runtimes import RUNTIMES
from tests.advice.large_models import large_model
from tests.tiny_models import make_tiny

GB = 10**9
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, Source]]:
    place = tmp_path_factory.mktemp("large")
    sources = {
        size: open_source(str(large_model(size, place / size)), headers_only=True) for size in ("1B", "8B", "70B")
    }
    yield sources
    for source in sources.values():
        source.checkpoint.close()


def advised(source: Source, runtime: str | None = None, *, experience: Any = None, **machine: Any) -> Advice:
    ram = machine.pop("ram", 32) * GB
    vram = machine.pop("vram", None)
    found = detect(machine.pop("device", "auto"), ram=ram, vram=vram and int(vram * GB), gpus=tuple,
                   is_apple=lambda: False, **machine)  # fmt: skip
    return recommend(source, found, model="MODEL", runtime=runtime, experience=experience)


FP8, W8A16, NVFP4A16 = (f"compressed-tensors {level}" for level in ("FP8_DYNAMIC", "W8A16", "NVFP4A16"))
EXPECTED: list[tuple[str, dict[str, Any], str, str | None]] = [
    # A laptop without GPU, and a server of that kind.
    ("8B", {"device": "cpu", "ram": 16}, "llama.cpp", "Q8_0"),
    ("8B", {"device": "cpu", "ram": 8}, "llama.cpp", "Q5_K_M"),
    ("1B", {"device": "cpu", "ram": 16}, "ctranslate2", "ctranslate2 int8"),
    ("8B", {"device": "cpu", "ram": 16}, "ctranslate2", None),
    ("8B", {"device": "cpu", "ram": 64}, "ctranslate2", "ctranslate2 int8"),
    ("8B", {"device": "cpu", "ram": 16}, "vllm", "awq 4bit"),
    ("8B", {"device": "cpu", "ram": 64}, "vllm", "safetensors BF16"),
    ("70B", {"device": "cpu", "ram": 64}, "vllm", "awq 4bit"),
    ("8B", {"device": "cpu", "ram": 16}, "transformers", "bitsandbytes NF4"),
    # Apple silicon.
    ("8B", {"device": "apple", "ram": 16}, "llama.cpp", "Q8_0"),
    ("8B", {"device": "apple", "ram": 16}, "mlx", "mlx 6bit"),
    ("70B", {"device": "apple", "ram": 64}, "mlx", "mlx 4bit"),
    ("70B", {"device": "apple", "ram": 16}, "mlx", None),
    # One NVIDIA GPU of 8, 12, 16, 24, 48 and 80 GB.
    ("8B", {"gpu": "RTX 4060"}, "vllm", NVFP4A16),
    ("8B", {"gpu": "RTX 3060"}, "vllm", W8A16),
    ("8B", {"gpu": "T4"}, "vllm", W8A16),
    ("8B", {"gpu": "RTX 4080"}, "vllm", W8A16),
    ("8B", {"gpu": "8.9", "vram": 10.48}, "vllm", FP8),
    ("8B", {"gpu": "RTX 3090"}, "vllm", W8A16),
    ("8B", {"gpu": "RTX 4090"}, "vllm", W8A16),
    ("70B", {"gpu": "RTX 4090"}, "vllm", None),
    ("70B", {"gpu": "L40S"}, "vllm", NVFP4A16),
    ("70B", {"gpu": "A100 80GB"}, "vllm", W8A16),
    ("70B", {"gpu": "H100"}, "vllm", W8A16),
    ("8B", {"gpu": "RTX 4060"}, "transformers", "bitsandbytes NF4"),
    ("8B", {"gpu": "RTX 3060"}, "transformers", "bitsandbytes INT8"),
    ("8B", {"gpu": "RTX 4060"}, "llama.cpp", "Q6_K"),
]


@pytest.mark.parametrize(("size", "machine", "runtime", "expected"), EXPECTED)
def test_machines_and_models(
    size: str, machine: dict[str, Any], runtime: str, expected: str | None, models: Mapping[str, Source]
) -> None:
    take = advised(models[size], runtime, **machine).take
    assert (None if take is None else take.name) == expected


def test_the_usual_runtime_answers_first_and_the_others_follow(models: Mapping[str, Source]) -> None:
    for machine, runtimes in (
        ({"device": "cpu"}, ["llama.cpp", "ctranslate2", "vllm", "transformers"]),
        ({"gpu": "L4"}, ["llama.cpp", "vllm", "transformers"]),
        ({"device": "apple"}, ["llama.cpp", "mlx"]),
    ):
        advice = advised(models["1B"], **machine)
        assert [answer.runtime for answer in advice.answers] == runtimes
        assert {choice.runtime for answer in advice.answers for choice in answer.choices} == set(runtimes)
        assert sum(row["take"] for row in advice.rows()) == 1
    # Where nothing of GGUF fits, another runtime that does answers first.
    tight = advised(models["8B"], device="cpu", ram=2)
    assert (tight.runtime, tight.take) == ("llama.cpp", None)


def test_every_row_is_of_the_tables() -> None:
    devices = {way.device for way in WAYS}
    assert devices == {"cpu", "cuda", "apple"}
    assert {way.runtime for way in WAYS} == set(RUNTIMES)
    for way in WAYS:
        for level in getattr(way.find, "levels", ()):
            assert level.level in FORMATS[level.format].levels, (level.format, level.level)


def test_kernels_decide_what_a_gpu_runs(models: Mapping[str, Source]) -> None:
    for gpu, lacks in (
        ("7.5", {"safetensors BF16", "compressed-tensors FP8_DYNAMIC", "compressed-tensors MXFP4"}),
        ("RTX 3090", {"compressed-tensors FP8_DYNAMIC", "compressed-tensors MXFP4"}),
        ("RTX 4090", {"compressed-tensors MXFP4"}),
        ("B200", set()),
    ):
        advice = advised(models["1B"], "vllm", gpu=gpu, vram=24)
        shown = {choice.name for choice in advice.choices}
        assert {name for name, _ in advice.excluded if name not in shown} == lacks
        assert all("compute capability" in dict(advice.excluded)[name] for name in lacks)
    unnamed = advised(models["1B"], "vllm", vram=24)
    assert "nobody has named this GPU (--gpu NAME)" in dict(unnamed.excluded)["compressed-tensors FP8_DYNAMIC"]
    assert any("--gpu NAME tells" in note for note in unnamed.notes)


def test_what_the_cpu_kernels_of_vllm_refuse(tmp_path: Path) -> None:
    with (experts := open_source(str(make_tiny("mixtral", tmp_path / "moe")), headers_only=True)).checkpoint:
        advice = advised(experts, "vllm", device="cpu")
    assert dict(advice.excluded)["compressed-tensors W8A8"] == "vLLM does not run packed experts here"
    odd = {"hidden_size": 80, "intermediate_size": 176}
    with (source := open_source(str(make_tiny("llama", tmp_path / "odd", **odd)), headers_only=True)).checkpoint:
        advice = advised(source, "vllm", device="cpu")
    assert "rows in steps of 32" in dict(advice.excluded)["compressed-tensors W8A8"]


@pytest.mark.parametrize("runtime", ["llama.cpp", "vllm", "transformers", "ctranslate2", "mlx"])
def test_more_memory_never_gives_a_worse_answer(runtime: str, models: Mapping[str, Source]) -> None:
    """Of all machines that have the runtime."""
    for way in (way for way in WAYS if way.runtime == runtime):
        for source in (models["8B"],):
            lost, took, split = float("inf"), False, True
            for size in (2, 6, 8, 10, 12, 16, 24, 80):
                memory = {"vram": size, "gpu": "9.0"} if way.device == "cuda" else {"ram": size}
                take = advised(source, runtime, device=way.device, **memory).take
                assert take is not None or not took
                if take is not None:
                    took = True
                    # llama.cpp takes a good one that lies whole on the GPU before a better one that is split: faster.
                    lost = lost if split == (take.placement is not None and take.placement.kind == "split") else 1.0
                    split = take.placement is not None and take.placement.kind == "split"
                    # Once the smallest indistinguishable one fits it stays; until then less is lost.
                    assert take.offer().judged <= max(lost, 0.002)
                    lost = min(lost, take.offer().judged)
            assert took


def test_sizes_and_weights_are_those_of_the_plans(demo_model: Path) -> None:
    with (source := open_source(str(demo_model), headers_only=True)).checkpoint:
        advice = advised(source, gpu="H100")
        cpu = advised(source, device="cpu")
        apple = advised(source, device="apple")
    checked = set()
    for choice in (c for one in (advice, cpu, apple) for answer in one.others for c in answer.choices):
        (planned,) = plan(str(demo_model), choice.format, levels=[choice.level])
        assert (choice.size, choice.file) == (planned.size, planned.name)
        assert choice.need.weights == sum(tensor.nbytes for tensor in planned.tensors)
        checked.add(choice.format)
    assert checked == set(FORMATS) - {"gguf"}


@pytest.mark.parametrize(
    ("machine", "runtime", "made", "run_by"),
    [
        ({"gpu": "L4"}, "vllm", "out/8B-", "vllm serve out/8B-"),
        ({"gpu": "L4"}, "transformers", "out/8B-", "python3 -c "),
        ({"device": "cpu"}, "vllm", "out/8B-", "VLLM_CPU_KVCACHE_SPACE=1 vllm serve out/8B-"),
        ({"device": "cpu", "ram": 64}, "ctranslate2", "out/8B-CT2-int8", "llm-quantize run out/8B-CT2-int8 "),
        ({"device": "apple"}, "mlx", "out/8B-MLX-", "mlx_lm.server --model out/8B-MLX-"),
    ],
)
def test_one_command_makes_it_and_one_runs_it(
    machine: dict[str, Any], runtime: str, made: str, run_by: str, models: Mapping[str, Source]
) -> None:
    advice = advised(models["8B"], runtime, **machine)
    assert advice.take is not None
    commands = advice.commands(advice.take)
    words = shlex.split(commands["quantize"])
    assert words == ["llm-quantize", "quantize", "MODEL", advice.take.format, "-q", advice.take.level, "-o", "out"]
    assert made in f"out/{advice.take.file}"
    assert commands["run"].startswith(run_by)
    if "-c" in shlex.split(commands["run"]):
        compile(shlex.split(commands["run"])[-1], "run", "exec")


def test_a_loss_that_is_not_known_is_not_guessed(models: Mapping[str, Source]) -> None:
    advice = advised(models["8B"], "vllm", gpu="B200")
    unknown = [choice.level for choice in advice.choices if choice.loss is None]
    assert unknown == ["W8A8", "MXFP4"]
    found = {choice.loss.basis for choice in advice.choices if choice.loss is not None}
    assert found == {"elsewhere", "exact"}
    assert any("say little of this model" in note for note in advice.notes)
    small = advised(models["8B"], "vllm", gpu="B200", vram=8)
    assert small.take is not None
    assert small.take.loss is not None
    assert any("not known of this model: measured on the built-in one" in reason for reason in small.why)
    assert not any(word in reason for reason in small.why for word in ("good, ", "excellent, ", "indistinguishable, "))


def test_what_was_measured_on_this_model_wins(models: Mapping[str, Source], tmp_path: Path) -> None:
    measured = {("awq", "4BIT"): Measured(0.004, None, None, ("awq", "-q", "4bit", "--chat"))}
    experience = Experience(measured, tmp_path / "comparison.json")
    advice = advised(models["8B"], "vllm", gpu="RTX 4060", experience=experience)
    assert advice.take is not None
    assert advice.take.name == "awq 4bit"
    assert any("(measured on this model)" in reason for reason in advice.why)
    assert shlex.split(advice.commands(advice.take)["quantize"])[3:7] == ["awq", "-q", "4bit", "--chat"]
    # Speeds of another runtime say nothing of this one.
    timed = {("gptq", "4BIT"): Measured(0.004, 12.5, None, None, "transformers")}
    found = advised(models["8B"], device="cpu", experience=Experience(timed))
    speeds = {(c.runtime, c.speed) for a in found.answers for c in a.choices if c.speed}
    assert speeds == set()


def test_runtimes_that_a_machine_has_not(models: Mapping[str, Source]) -> None:
    with pytest.raises(UsageError, match="no such runtime") as caught:
        advised(models["8B"], "mlx", device="cpu")
    assert caught.value.expected == "llama.cpp, ctranslate2, vllm, transformers"
    assert [way.runtime for way in ways_for("cpu", "vllm")] == ["vllm"]


def test_figures_are_those_of_the_benchmark() -> None:
    """Every row is one that was measured, under the level that made it."""
    facts = json.loads((RESULTS / "formats.json").read_text())
    rows = {(row["format"], row["level"]): row.get("runtime_kld", row["kld"]) for row in facts["rows"]}
    levels = {(level.format, level.level) for way in WAYS for level in getattr(way.find, "levels", ())}
    assert set(ELSEWHERE) <= set(rows)
    assert {key: rows[key] for key in ELSEWHERE} == {key: pytest.approx(at, rel=0.01) for key, at in ELSEWHERE.items()}
    assert levels - set(ELSEWHERE) == {("compressed-tensors", level) for level in ("W8A8", "MXFP4")}
    run_too = {(row["format"], row["level"]) for row in facts["rows"] if "runtime_kld" in row}
    assert run_too - {key for key in run_too if _rounded(*key)} == ROUNDS_INPUTS & set(rows)


def _rounded(form: str, level: str) -> bool:
    """Whether ``compare`` rounds the inputs of its matrices as the runtime does."""
    return form in PACKED and PACKED[form].inputs(PACKED[form].scheme(level, SchemeOptions())) is not None


def test_on_the_command_line(demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["recommend", str(demo_model), "--ram", "16", "--gpu", "geforce rtx 4090"]
    assert run([*words, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["runtime"], facts["machine"]["capability"]) == ("llama.cpp", 8.9)
    assert [one["runtime"] for one in facts["others"]] == ["vllm", "transformers"]
    for one in [facts, *facts["others"]]:
        assert one["take"] in one["choices"]
        assert {"quantize", "run"} <= set(one["take"]["commands"])
    assert run([*words, "--runtime", "vllm"]) == 0
    out = capsys.readouterr().out
    assert out.index("\nto make it: ") < out.index("\nto serve it: vllm serve ") < out.index("runtime\tformat\tlevel")
    assert "GPU 25.8 GB (compute capability 8.9)" in out
    assert "not compressed-tensors MXFP4: vLLM has kernels for it from compute capability 10.0 on" in out
    assert run(["recommend", str(demo_model), "--gpu", "Voodoo 2"]) == 2
    assert "RTX 4090" in capsys.readouterr().err
