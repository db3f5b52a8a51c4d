"""Scales of keys and values: the package's names, transformers' own cache as the twin, and what is refused."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from llm_quantize.artifacts.opening import open_decoded
from llm_quantize.artifacts.verify import verify
from llm_quantize.calibration.collect import calibrate
from llm_quantize.cli import run
from llm_quantize.data import demo_model
from llm_quantize.errors import UnsupportedError, UsageError
from llm_quantize.formats.kv_cache import args_of
from llm_quantize.models.opening import open_source
from llm_quantize.models.quantized import PackedDirectory
from llm_quantize.options import CalibrationOptions, MethodOptions, Options
from llm_quantize.pipeline import plan, quantize
from llm_quantize.plan import ArtifactPlan
from tests.blockwise.tiny import ids_of
from tests.oracles.keys_and_values import largest
from tests.oracles.whole_model import load_decoded
from tests.tiny_models import STREAMED, auto_class, make_tiny, quiet

ENDS = ("k_scale", "v_scale")
WINDOWS = CalibrationOptions(samples=3, length=64)
OTHERS = {
    "gpt2": "cannot be packed",
    **dict.fromkeys(("gpt_neox", "gpt_neox-serial"), "attention of gpt_neox has no projections"),
    **dict.fromkeys(("falcon", "falcon-new"), "attention of falcon has no projections"),
}
"""Families whose attention the package knows no cache of."""
SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}


def options(**method: Any) -> Options:
    return Options(threads=1, method=MethodOptions(**{"kv_cache": "fp8", **method}), calibration=WINDOWS)


def planned(model: Path, format: str = "compressed-tensors", level: str = "W4A16", **method: Any) -> ArtifactPlan:
    (found,) = plan(str(model), format, levels=[level], options=options(**method))
    return found


def made(model: Path, out: Path, level: str = "W4A16", **method: Any) -> Path:
    (found,) = quantize(str(model), "compressed-tensors", levels=[level], output_dir=out, options=options(**method))
    return found.path


def scales_of(artifact: Path) -> dict[str, torch.Tensor]:
    return {name: one for name, one in load_file(artifact / "model.safetensors").items() if name.endswith(ENDS)}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(demo_model(), tmp_path_factory.mktemp("kv"))


@pytest.mark.parametrize("variant", STREAMED)
def test_names_types_and_shapes_are_the_packages(variant: str, tmp_path: Path) -> None:
    """In every family it knows a cache of; the others are refused by name."""
    model = make_tiny(variant, tmp_path / "model")
    with torch.device("meta"):
        empty = auto_class(model).from_config(AutoConfig.from_pretrained(model), dtype=torch.bfloat16)
    config = QuantizationConfig(
        config_groups={}, kv_cache_scheme=QuantizationArgs(**args_of("e4m3")), quantization_status="compressed"
    )
    apply_quantization_config(empty, config, show_progress=False)
    state = {name: one for name, one in empty.state_dict().items() if name.endswith(ENDS)}
    theirs = {name: (tuple(one.shape), str(one.dtype).removeprefix("torch.")) for name, one in state.items()}
    ignored = {"granitemoe": (r"block_sparse_moe",), "gpt_oss": (r"experts",)}.get(variant, ())
    if variant in OTHERS:
        assert not theirs
        with pytest.raises(UnsupportedError, match=OTHERS[variant]):
            planned(model, group_size=8)
        return
    tensors = planned(model, group_size=8, ignore=ignored).tensors
    moved = ("language_model.model.", "model.language_model.")  # transformers renames them as it loads
    if variant in ("qwen3_5", "qwen3_5_moe"):  # loaded without their towers
        moved = ("model.language_model.", "model.")
    ours = {one.name.replace(*moved): (one.output.shape, one.qtype) for one in tensors if one.name.endswith(ENDS)}
    assert ours == theirs


@pytest.mark.parametrize(
    ("variant", "level", "dtype"),
    [("llama", "W4A16", "float32"), ("qwen3", "FP8", "bfloat16"), ("phi3", "W8A8", "float16"),
     ("gemma3", "FP8_DYNAMIC", "bfloat16"), ("mixtral", "W4A16", "bfloat16")],
)  # fmt: skip
def test_loaded_by_transformers(variant: str, level: str, dtype: str, tmp_path: Path) -> None:
    model = make_tiny(variant, tmp_path / "model", dtype=dtype)
    artifact = made(model, tmp_path, level, group_size=16 if level == "W4A16" else None)
    outcome = verify(artifact, source=str(model))
    assert outcome.ok, outcome.all_problems()
    stored = scales_of(artifact)
    assert {one.dtype for one in stored.values()} == {getattr(torch, dtype)}
    with quiet():
        loaded, told = AutoModelForCausalLM.from_pretrained(artifact, output_loading_info=True)
    assert not told["missing_keys"], told
    assert not told["unexpected_keys"], told
    held = {name: one for name, one in loaded.named_parameters() if name.endswith(ENDS)}
    assert len(held) == len(stored) == 2 * loaded.config.get_text_config().num_hidden_layers
    for name, value in stored.items():
        assert torch.equal(held[name.replace("language_model.model.", "model.language_model.")].cpu(), value), name


@pytest.mark.parametrize("inputs", ["sequential", "source"])
def test_scales_are_those_of_transformers_own_cache(inputs: str, tmp_path: Path) -> None:
    """Keys after their rotary positions, over the windows that are calibrated on. Layer by layer the model is what the
    artifact has before it; with inputs of the source, the source itself."""
    model = make_tiny("llama", tmp_path / "model", dtype="float32")
    artifact = made(model, tmp_path, level="W8A16", group_size=16, inputs=inputs)
    source = open_source(str(model))
    with source.checkpoint, closing(open_decoded(source, artifact)) as decoded:
        ids = ids_of(source, options())[: WINDOWS.samples]
        whole = load_decoded(decoded, tmp_path / "whole", model)
    if inputs == "source":
        whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found, args = scales_of(artifact), QuantizationArgs(**SCHEME)
    for layer, pair in enumerate(largest(whole, ids)):
        for letter, most in zip("kv", pair, strict=True):
            wanted, _ = calculate_qparams(torch.tensor([-most]), torch.tensor([most]), args)
            torch.testing.assert_close(
                found[f"model.layers.{layer}.self_attn.{letter}_scale"], wanted.float(), rtol=1e-4, atol=0
            )


def test_values_of_nothing_have_a_positive_scale(tmp_path: Path) -> None:
    """float16 holds no scale of values so small; and none is divided by zero."""
    model = make_tiny("llama", tmp_path / "model", dtype="float16")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.self_attn.v_proj.weight"].zero_()
    tensors["model.layers.1.self_attn.v_proj.weight"].mul_(2.0**-12)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    artifact = made(model, tmp_path, "W8A8")
    found = scales_of(artifact)
    assert float(found["model.layers.0.self_attn.v_scale"]) == 1.0
    assert float(found["model.layers.1.self_attn.v_scale"]) == torch.finfo(torch.float16).tiny
    assert verify(artifact).ok


def test_what_is_refused() -> None:
    with pytest.raises(UsageError, match="without text there are none") as refusal:
        planned(demo_model(), method="rtn")
    assert "--method gptq calibrates" in str(refusal.value)
    with pytest.raises(UsageError, match="this one is left as it is") as refusal:
        planned(demo_model(), ignore=(r"layers\.1\.self_attn",))
    assert refusal.value.tensor == "model.layers.1.self_attn.o_proj"
    with pytest.raises(UsageError, match="unknown --kv-cache"):
        MethodOptions(kv_cache="int4")


def test_statistics_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_QUANTIZE_CACHE", str(tmp_path / "cache"))
    model = make_tiny("llama", tmp_path / "model")
    chosen = replace(WINDOWS, collect=("imatrix", "hessian"), threads=1)
    with (source := open_source(str(model))).checkpoint:
        statistics = calibrate(source, chosen).path
    asked = replace(options(inputs="source", group_size=16), statistics=statistics)
    with pytest.raises(UsageError, match="without text there are none") as refusal:
        plan(str(model), "compressed-tensors", levels=["W4A16"], options=asked)
    assert refusal.value.found == "--statistics"


def test_what_is_told(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert artifact.name == "demo-llama-W4A16-kv-fp8"
    scheme = json.loads((artifact / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert SCHEME.items() <= scheme.items()
    QuantizationArgs(**scheme)
    card = (artifact / "README.md").read_text()
    assert "| Keys and values | 8-bit floats, one calibrated scale" in card
    assert "Measured with keys and values as they are" in card
    assert json.loads((artifact / "manifest.json").read_text())["measured"]["kv_cache"] == "as it is"
    assert run(["info", str(artifact), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["quantization"]["keys_and_values"] == "8-bit floats, calibrated scales"
    command = ["analyze", "quality", str(artifact), "--reference", str(demo_model()), "--windows", "1"]
    assert run([*command, "--context", "64", "--threads", "1", "--json"]) == 0
    (one,) = json.loads(capsys.readouterr().out)["artifacts"]
    assert (one["notes"], one["cache"]) == ([], "8-bit floats, calibrated scales")
    config = json.loads((artifact / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"]["dynamic"] = True
    other = shutil.copytree(artifact, tmp_path / "other")
    (other / "config.json").write_text(json.dumps(config))
    assert run([*command[:2], str(other), *command[3:], "--context", "64", "--threads", "1", "--json"]) == 0
    (one,) = json.loads(capsys.readouterr().out)["artifacts"]
    assert one["notes"] == [
        "a runtime keeps keys and values as 8-bit floats, scales found as it runs; here they are measured as they are"
    ]
    assert one["cache"] == ""


def altered(artifact: Path, folder: Path, tensors: dict[str, torch.Tensor | None], scheme: Any = ...) -> Path:
    """The artifact as another writer may have made it: with other ``tensors``, without a manifest."""
    shutil.copytree(artifact, folder)
    (folder / "manifest.json").unlink()
    own: dict[str, torch.Tensor | None] = {**load_file(folder / "model.safetensors"), **tensors}
    kept = {name: one for name, one in own.items() if one is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    if scheme is not ...:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["kv_cache_scheme"] = scheme
        (folder / "config.json").write_text(json.dumps(config))
    return folder


SCALE = "model.layers.1.self_attn.v_scale"


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_of_no_sense_are_found(value: float, artifact: Path, tmp_path: Path) -> None:
    folder = altered(artifact, tmp_path / "bad", {SCALE: torch.tensor([value], dtype=torch.bfloat16)})
    problems = verify(folder).all_problems()
    assert [SCALE in text and "not a positive number" in text for text in problems] == [True], problems


def test_a_flipped_byte_is_found(artifact: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(artifact, tmp_path / "flipped"))
    with PackedDirectory(folder) as packed:
        info = packed.caches[SCALE]
    data = bytearray(info.file.read_bytes())
    data[info.offset] ^= 1
    info.file.write_bytes(data)
    assert any(SCALE in text for text in verify(folder).all_problems())


def test_configuration_and_scales_that_contradict_each_other(artifact: Path, tmp_path: Path) -> None:
    absent = altered(artifact, tmp_path / "absent", {SCALE: None})
    assert verify(absent).all_problems() == [f"{SCALE} is absent, but kv_cache_scheme says that it was calibrated"]
    none = altered(artifact, tmp_path / "none", dict.fromkeys(scales_of(artifact)))
    (problem,) = verify(none).all_problems()
    assert "no scale of keys and values is stored" in problem
    unsaid = altered(artifact, tmp_path / "unsaid", {}, None)
    (problem,) = verify(unsaid).all_problems()
    assert "12 scales of keys and values are stored" in problem


def test_directories_of_other_writers(artifact: Path, tmp_path: Path) -> None:
    """Older names, scales of queries, scalars, a scale for each head: read, measured and started from."""
    scales = scales_of(artifact)
    older: dict[str, torch.Tensor | None] = dict.fromkeys(scales)
    for name, one in scales.items():
        parent, letter = name.rsplit(".", 1)[0], name[-7]
        older[f"{parent}.{letter}_proj.output_scale"] = one.float().reshape(())
        older[f"{parent}.q_scale"] = torch.ones(4, 1, 1)
    folder = altered(artifact, tmp_path / "older", older)
    outcome = verify(folder, source=str(demo_model()))
    assert outcome.ok, outcome.all_problems()
    with PackedDirectory(folder) as packed:
        assert len(packed.caches) == 18
        assert not packed.caches.keys() & packed.plain.keys()
    source = open_source(str(demo_model()))
    with source.checkpoint, closing(open_decoded(source, folder)) as decoded:
        assert not any(name.endswith(("_scale",)) for name in decoded.names)
    (found,) = quantize(str(folder), "gguf", levels=["Q8_0"], output_dir=tmp_path, options=Options(threads=1))
    assert found.path.is_file()
