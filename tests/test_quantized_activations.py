"""Levels whose runtimes round activations: measured as transformers computes them, and smoothed by SmoothQuant."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llm_quantize.architectures.scaling import scale_groups
from llm_quantize.artifacts.opening import open_decoded
from llm_quantize.artifacts.verify import verify
from llm_quantize.cli import run
from llm_quantize.data import demo_model
from llm_quantize.errors import IntegrityError, NumericPolicyError, UsageError
from llm_quantize.grids.inputs import rounded_inputs
from llm_quantize.models.opening import open_source
from llm_quantize.options import CalibrationOptions, MethodOptions, Options
from llm_quantize.pipeline import plan, quantize
from llm_quantize.qtypes.inputs import InputGrid
from llm_quantize.streams.network import open_network
from llm_quantize.streams.weights import CheckpointWeights
from llm_quantize.transforms.applying import apply_all
from tests.oracles.rounded_inputs import rounding
from tests.oracles.whole_model import load_decoded
from tests.streams.networks import streamed_logits
from tests.tiny_models import make_tiny

NORM = "model.norm.weight"
IDS = torch.arange(5, 69)[None]


def made(model: Path, out: Path, level: str, **method: str | None) -> Path:
    options = Options(
        threads=1,
        calibration=CalibrationOptions(samples=8, length=128),
        method=MethodOptions(**{"method": "rtn", **method}),
    )
    (result,) = quantize(str(model), "compressed-tensors", levels=[level], output_dir=out, options=options)
    return result.path


def ours(model: Path, artifact: Path | None, ids: torch.Tensor = IDS) -> torch.Tensor:
    """float32 logits (length, vocabulary): of ``model``, or of an artifact of it."""
    source = open_source(str(model))
    with source.checkpoint:
        network = open_network(source, dtype="float32")
        if artifact is None:
            return streamed_logits(network, CheckpointWeights(source.checkpoint), ids)[0]
        with closing(open_decoded(source, artifact)) as decoded:
            return streamed_logits(network, decoded, ids)[0]


def theirs(artifact: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32)
    with torch.inference_mode():
        return model(input_ids=IDS).logits[0].float()


def kld(base: torch.Tensor, other: torch.Tensor) -> float:
    wanted, found = (torch.log_softmax(one.double(), -1) for one in (base, other))
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


@pytest.mark.parametrize("level", ["W8A8", "W4AFP8", "FP8_DYNAMIC", "FP8_BLOCK", "FP8"])
def test_logits_are_those_of_transformers(level: str, tmp_path: Path) -> None:
    artifact = made(demo_model(), tmp_path, level, method="gptq" if level == "FP8" else "rtn")
    base, found = ours(demo_model(), None), ours(demo_model(), artifact)
    assert kld(found, theirs(artifact)) < 1e-9
    config = artifact / "config.json"
    said = json.loads(config.read_text())
    said["quantization_config"]["config_groups"]["group_0"]["input_activations"] = None
    config.write_text(json.dumps(said))
    assert 0 < kld(base, ours(demo_model(), artifact)) < 0.98 * kld(base, found)


@pytest.mark.parametrize("variant", ["demo", "phi3", "gemma3"])
def test_keys_and_values_are_rounded_as_transformers_rounds_them(variant: str, tmp_path: Path) -> None:
    """Its logits with the scales that stand there, and with others, so small that large keys are cut off."""
    model = demo_model() if variant == "demo" else make_tiny(variant, tmp_path / "model", dtype="float32")
    artifact = made(model, tmp_path, "FP8_DYNAMIC", method="gptq", kv_cache="fp8")
    base, found = ours(model, None), ours(model, artifact)
    assert kld(found, theirs(artifact)) < 1e-9
    file = artifact / "model.safetensors"
    tensors = load_file(file)
    changed = {name: one / 50 if name.endswith("k_scale") else one for name, one in tensors.items()}
    save_file(changed, file, {"format": "pt"})
    cut = ours(model, artifact)
    assert kld(cut, theirs(artifact)) < 1e-9
    assert kld(base, cut) > 1.5 * kld(base, found)


def test_keys_and_values_without_a_scale(tmp_path: Path) -> None:
    """One that is not stored is 1; one of no sense is named; a scheme that is not followed is said, and not counted."""
    artifact = made(demo_model(), tmp_path, "FP8_DYNAMIC", method="gptq", kv_cache="fp8")
    file = artifact / "model.safetensors"
    tensors = load_file(file)
    save_file({name: one for name, one in tensors.items() if not name.endswith(("k_scale", "v_scale"))}, file)
    absent = ours(demo_model(), artifact)
    ones = {
        name: torch.ones_like(one) if name.endswith(("k_scale", "v_scale")) else one for name, one in tensors.items()
    }
    save_file(ones, file)
    assert torch.equal(ours(demo_model(), artifact), absent)
    save_file({**ones, "model.layers.0.self_attn.v_scale": torch.tensor([-1.0], dtype=torch.bfloat16)}, file)
    with pytest.raises(NumericPolicyError, match="a scale of keys or values") as refusal:
        ours(demo_model(), artifact)
    assert refusal.value.tensor == "model.layers.0.self_attn.v_scale"


@pytest.mark.parametrize("level", ["NVFP4", "MXFP4"])
def test_four_bits_are_those_of_transformers(level: str, tmp_path: Path) -> None:
    """It unpacks weights in bfloat16, which rounds those of NVFP4: they are put in again as they are stored."""
    artifact = made(demo_model(), tmp_path, level, method="gptq")
    base, found = ours(demo_model(), None), ours(demo_model(), artifact)
    model = AutoModelForCausalLM.from_pretrained(artifact)
    source = open_source(str(demo_model()))
    with torch.no_grad(), source.checkpoint, closing(open_decoded(source, artifact)) as decoded:
        model(input_ids=IDS)  # unpacks
        for name, value in model.named_parameters():
            wide = decoded.read(name) if name in decoded.names else value.data.float()
            if name in decoded.names:
                torch.testing.assert_close(value.data.float(), wide, rtol=2**-7, atol=0)
            value.data = wide
        other = model(input_ids=IDS).logits[0]
    assert kld(found, other) < 1e-6 * kld(base, found)


def test_calibrated_scales_are_the_largest_inputs(tmp_path: Path) -> None:
    """What reads one input has one scale, which the source's own inputs explain but for earlier layers' errors."""
    artifact = made(demo_model(), tmp_path, "FP8", method="gptq")
    tensors = load_file(artifact / "model.safetensors")
    scales = {name: one for name, one in tensors.items() if name.endswith(".input_scale")}
    assert {one.dtype for one in scales.values()} == {load_file(demo_model() / "model.safetensors")[NORM].dtype}
    for joined in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        assert len({float(scales[f"model.layers.2.{one}.input_scale"]) for one in joined}) == 1
    source = open_source(str(demo_model()))
    with source.checkpoint:
        network, weights = open_network(source, dtype="float32"), CheckpointWeights(source.checkpoint)
        (state,) = network.embed(weights, IDS)
        largest: dict[str, float] = {}
        with (
            network.block(0, weights) as block,
            block.observe(lambda tap, _matrix, x: largest.update({tap.name: float(x.abs().max())})),
        ):
            block(state)
    own = {name: float(scales[f"{name}.input_scale"]) * 448 for name in largest}
    assert all(0.7 * largest[name] < own[name] < 3 * largest[name] for name in largest), (own, largest)


def test_what_analyze_quality_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = made(demo_model(), tmp_path, "W8A8")
    command = [
        "analyze",
        "quality",
        str(artifact),
        "--reference",
        str(demo_model()),
        "--windows",
        "1",
        "--context",
        "64",
    ]
    assert run([*command, "--threads", "1"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert (
        f"{artifact.name}: inputs of matrices rounded too, as its runtime does: 8-bit integers, a scale for each"
        in told
    )
    assert run([*command, "--threads", "1", "--json"]) == 0
    (one,) = json.loads(capsys.readouterr().out)["artifacts"]
    assert one["inputs"] == "8-bit integers, a scale for each token"
    assert one["notes"] == []
    assert run(["info", str(artifact), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["quantization"]["activations"] == "8-bit integers, a scale for each token"
    assert "| Activations | 8-bit integers, a scale for each token |" in (artifact / "README.md").read_text()


@pytest.mark.parametrize("variant", ["qwen3_moe", "mixtral"])
def test_experts(variant: str, tmp_path: Path) -> None:
    """Every matrix that is quantized, and no router, has its inputs rounded: transformers' own forward agrees."""
    model = make_tiny(variant, tmp_path / "model", dtype="float32")
    artifact = made(model, tmp_path / "out", "W8A8")
    source = open_source(str(model))
    ids = torch.arange(5, 45)[None]
    with source.checkpoint, closing(open_decoded(source, artifact)) as decoded:
        whole = load_decoded(decoded, tmp_path / "whole", model)
        network = open_network(source, dtype="float32")
        found = streamed_logits(network, decoded, ids)[0]
    whole.set_experts_implementation("eager")
    names = [n for n, v in whole.named_parameters() if "layers" in n and v.ndim >= 2 and "gate.weight" not in n]
    with torch.inference_mode():
        plain = whole(input_ids=ids).logits[0]
        with rounding(whole, names, lambda x: rounded_inputs(x, InputGrid("int8"))):
            wanted = whole(input_ids=ids).logits[0]
    assert kld(wanted, found) < 1e-3 * kld(plain, wanted)


def loud(folder: Path) -> Path:
    """The demo model with one loud channel at the inputs of every group of matrices; its function is the same."""
    source = open_source(str(demo_model()))
    with source.checkpoint:
        groups = [g for layer in range(source.architecture.hyper.n_layer) for g in scale_groups(source, layer)]
    scales = []
    for number, group in enumerate(groups):
        own = torch.ones(group.channels)
        own[7 * number % group.channels] = 1 / 64
        scales.append(own if group.spread is None else own[torch.from_numpy(group.spread)])
    shutil.copytree(demo_model(), folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    changed = apply_all(groups, scales, tensors)
    save_file(
        {name: changed[name].to(one.dtype) if name in changed else one for name, one in tensors.items()},
        file,
        {"format": "pt"},
    )
    return folder


def test_smoothquant_takes_loud_channels_away(tmp_path: Path) -> None:
    model = loud(tmp_path / "model")
    base = ours(demo_model(), None)
    assert kld(base, ours(model, None)) < 1e-5
    losses = []
    for transform in ("none", "smoothquant"):
        artifact = made(model, tmp_path / transform, "W8A8", method="gptq", transform=transform)
        outcome = verify(artifact, source=str(model))
        assert outcome.ok, outcome.all_problems()
        losses.append(kld(base, ours(model, artifact)))
        assert kld(ours(model, artifact), theirs(artifact)) < 1e-9
    assert losses[1] < 0.2 * losses[0]


@pytest.mark.parametrize(("format", "level"), [("compressed-tensors", "W4A16"), ("gptq", "4bit"), ("awq", "4bit")])
def test_smoothquant_is_refused_where_activations_stay(format: str, level: str) -> None:
    options = Options(method=MethodOptions(transform="smoothquant"))
    with pytest.raises(UsageError, match="does not") as refusal:
        plan(str(demo_model()), format, levels=[level], options=options)
    assert "--transform awq" in str(refusal.value)


def static(folder: Path, field: str, value: torch.Tensor | None) -> Path:
    """A W8A8 directory as others write it, with one scale for all inputs of a module."""
    tensors = load_file(folder / "model.safetensors")
    modules = [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]
    if value is not None:
        tensors |= {f"{module}.{field}": value.clone() for module in modules}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "manifest.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    args = config["quantization_config"]["config_groups"]["group_0"]["input_activations"]
    args |= {"strategy": "tensor", "dynamic": False}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_calibrated_scales_of_other_writers(tmp_path: Path) -> None:
    artifact = static(made(demo_model(), tmp_path, "W8A8"), "input_scale", torch.tensor([0.05], dtype=torch.bfloat16))
    assert kld(ours(demo_model(), artifact), theirs(artifact)) < 1e-9
    assert kld(ours(demo_model(), None), theirs(artifact)) > 1e-4


def test_calibrated_scales_of_no_sense(tmp_path: Path) -> None:
    artifact = made(demo_model(), tmp_path, "W8A8")
    shutil.copytree(artifact, tmp_path / "absent")
    with pytest.raises(IntegrityError, match="calls for"):
        ours(demo_model(), static(tmp_path / "absent", "", None))
    for number, value in enumerate((0.0, -1.0, float("nan"), float("inf"))):
        folder = Path(shutil.copytree(artifact, tmp_path / str(number)))
        assert any(
            "not a positive number" in text
            for text in verify(static(folder, "input_scale", torch.tensor([value]))).all_problems()
        )
        with pytest.raises(NumericPolicyError, match="of no sense"):
            ours(demo_model(), folder)
