"""Every layout of quantized weights that people hold is named, with what to do; none is taken for a damaged model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_quantize.advice.describe import describe
from llm_quantize.artifacts.verify import verify
from llm_quantize.cli import run
from llm_quantize.errors import LlmQuantizeError, MalformedInputError, UnsupportedError
from llm_quantize.formats.foreign import KINDS
from llm_quantize.formats.packed_formats import READ
from llm_quantize.models.opening import open_source
from llm_quantize.runtimes.base import refuse_incomplete
from tests.hearing import into
from tests.oracles.reference_directories import Layout, write_directory
from tests.tiny_models import make_tiny

LAYER = "model.layers.0.mlp.up_proj"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("models") / "llama", intermediate_size=128)


def altered(model: Path, place: Path, tensors: Tensors, **config: Any) -> Path:
    """A copy of ``model`` in which ``tensors`` stand in the place of one matrix."""
    place.mkdir()
    for path in model.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    found = load_file(place / "model.safetensors")
    if tensors:
        del found[f"{LAYER}.weight"]
    save_file(found | tensors, place / "model.safetensors", {"format": "pt"})
    said = json.loads((place / "config.json").read_text()) | config
    (place / "config.json").write_text(json.dumps(said))
    return place


def refused(model: Path) -> LlmQuantizeError:
    """The one error of whoever opens the model."""
    with pytest.raises(UnsupportedError) as caught:
        open_source(str(model))
    for look in (describe, verify):
        with pytest.raises(UnsupportedError) as again:
            look(str(model))
        assert again.value.what == caught.value.what
    assert "already quantized" in caught.value.what
    assert "not known" not in caught.value.what
    assert caught.value.remedy
    return caught.value


def codes(bits: int = 4) -> torch.Tensor:
    return torch.zeros((128, 64 * bits // 32), dtype=torch.uint32)


def mlx() -> Tensors:
    groups = torch.zeros((128, 1), dtype=torch.bfloat16)
    return {f"{LAYER}.weight": codes(), f"{LAYER}.scales": groups, f"{LAYER}.biases": groups.clone()}


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"group_size": 64, "bits": 4}},
        {},
    ],
    ids=["without its own key", "tensors alone"],
)
def test_mlx(config: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    error = refused(altered(llama, tmp_path / "mlx", mlx(), **config))
    assert "(MLX)" in error.what
    assert "--dequantize" in (error.remedy or "")


def one(suffix: str, dtype: torch.dtype = torch.uint8) -> Tensors:
    return {f"{LAYER}{suffix}": torch.zeros((8, 4), dtype=dtype)}


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("bitsandbytes, 4 bit", one(".weight") | one(".weight.absmax") | one(".weight.quant_state.bitsandbytes__nf4")),
        ("bitsandbytes, 8 bit", one(".weight", torch.int8) | one(".SCB")),
        ("MXFP4", {"model.layers.0.mlp.experts.gate_up_proj_blocks": torch.zeros(4, dtype=torch.uint8)}),
        ("HQQ", one(".W_q")),
        ("EETQ", one(".weight", torch.int8) | one(".weight_scales", torch.float16)),
        ("quanto", one(".weight._data", torch.int8) | one(".weight._scale", torch.float16)),
        ("torchao", one("._weight_qdata", torch.int8)),
        ("AQLM", one(".codes", torch.int8) | one(".codebooks", torch.float16)),
        ("VPTQ", one(".centroids.weight", torch.float16)),
        ("SpQR", one(".dense_weights", torch.int32)),
        ("HIGGS", one(".weight") | one(".tables")),
        ("QuIP#", one(".Qidxs", torch.int64)),
        ("EXL2", one(".q_weight", torch.int32)),
        ("EXL3", one(".trellis", torch.int16)),
        ("FP-Quant", one(".dqweight")),
        ("NVFP4 or FP8 of ModelOpt", one(".weight") | one(".weight_scale_2", torch.float32)),
        ("NVFP4", one(".weight_packed") | one(".weight_global_scale", torch.float32)),
        ("compressed-tensors", one(".weight_packed", torch.int32)),
        ("GPTQ or AWQ", one(".qweight", torch.int32)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tensors_tell_a_layout_where_the_configuration_does_not(
    name: str, tensors: Tensors, llama: Path, tmp_path: Path
) -> None:
    error = refused(altered(llama, tmp_path / "model", tensors))
    assert f"({name})" in error.what
    assert error.tensor in tensors


def test_integers_of_an_unknown_kind_are_no_damaged_shape(llama: Path, tmp_path: Path) -> None:
    model = altered(llama, tmp_path / "model", one(".weight"))
    with pytest.raises(UnsupportedError, match="a kind that is not known here") as caught:
        open_source(str(model))
    assert caught.value.tensor == f"{LAYER}.weight"


def test_every_method_that_transformers_loads_is_named(llama: Path, tmp_path: Path) -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    known = {method for kind in KINDS for method in kind.methods}
    assert set(AUTO_QUANTIZATION_CONFIG_MAPPING) - {"gemma"} <= known
    decoded = set(READ)
    for number, method in enumerate(sorted(known - decoded)):
        block = {"quant_method": method.upper() if number % 2 else method}
        assert refused(altered(llama, tmp_path / f"{number}", {}, quantization_config=block)).file


def test_bitsandbytes_of_8_bit_and_without_a_name(llama: Path, tmp_path: Path) -> None:
    for number, (block, bits) in enumerate(
        (
            ({"quant_method": "bnb", "load_in_8bit": True, "load_in_4bit": False}, 8),
            ({"quant_method": "bnb", "load_in_4bit": True}, 4),
            ({"load_in_8bit": True, "load_in_4bit": False}, 8),
            ({"load_in_4bit": True}, 4),
        )
    ):
        error = refused(altered(llama, tmp_path / f"{number}", {}, quantization_config=block))
        assert f"(bitsandbytes, {bits} bit)" in error.what


SIDE_FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "awq": (
        "quant_config.json",
        {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM", "modules_to_not_convert": None},
    ),
    "gptq": (
        "quantize_config.json",
        {"bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False, "sym": True},
    ),
}


def of_2023(format: str, model: Path, place: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """A directory whose config.json says nothing, without the file beside it, and its values."""
    values = write_directory(model, place, Layout(format, group=32, symmetric=format == "gptq"))
    config = json.loads((place / "config.json").read_text())
    config.pop("quantization_config")
    (place / "config.json").write_text(json.dumps(config))
    return place, values


@pytest.mark.parametrize("format", ["awq", "gptq"])
def test_a_directory_of_2023_is_read(format: str, llama: Path, tmp_path: Path) -> None:
    """Its settings are in a file of their own, which is read with a note; without it, the message says what to add."""
    place, values = of_2023(format, llama, tmp_path / "packed")
    assert "give its config.json a quantization_config" in (refused(place).remedy or "")
    name, said = SIDE_FILES[format]
    (place / name).write_text(json.dumps(said))
    heard: list[dict[str, Any]] = []
    with open_source(str(place), on_event=into(heard)).checkpoint as model:
        assert model.kind == f"{format.upper()}-4bit"
        assert "quantization_config" not in model.config
        assert any(name in str(event.get("text")) for event in heard)
        for weight, expected in values.items():
            assert np.array_equal(model.read_rows(weight, 0, len(expected)), expected)
    assert describe(str(place))["quantization"]["bits"] == 4
    assert not verify(place).problems
    with pytest.raises(UnsupportedError, match="already quantized") as caught:
        refuse_incomplete(place)
    block = json.loads((caught.value.remedy or "").partition('"quantization_config": ')[2])
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"quantization_config": block}))
    refuse_incomplete(place)
    (place / "config.json").write_text(json.dumps(config))
    (place / name).write_text('{"what": 1}')
    with pytest.raises(MalformedInputError, match="name no width"):
        open_source(str(place))


@pytest.mark.parametrize("name", ["quant_config.json", "quantize_config.json", "hf_quant_config.json"])
def test_a_side_file_that_was_left_lying_beside_floats_says_nothing(name: str, llama: Path, tmp_path: Path) -> None:
    place = altered(llama, tmp_path / "floats", {})
    (place / name).write_text(json.dumps({"bits": 4, "quantization": {"quant_algo": "NVFP4"}}))
    with open_source(str(place)).checkpoint as model:
        assert model.kind == ""
    refuse_incomplete(place)


def fp8(model: Path, place: Path, scale: str, config: dict[str, Any], suffix: str = "_scale_inv", **extra: Any) -> Path:
    """A copy whose matrices of blocks are E4M3 with a scale for each "block" of 32, "row" or "tensor"."""
    found: Tensors = {}
    for name, value in load_file(model / "model.safetensors").items():
        if not name.endswith("proj.weight"):
            found[name] = value
            continue
        found[name] = value.float().clamp(-4, 4).to(torch.float8_e4m3fn)
        rows, columns = value.shape
        shape = {"block": (-(-rows // 32), -(-columns // 32)), "row": (rows, 1), "tensor": ()}[scale]
        found[f"{name}{suffix}"] = torch.ones(shape)
        for word in extra.get("activations", ()):
            found[f"{name.removesuffix('.weight')}.{word}"] = torch.tensor(1.0)
    place.mkdir()
    for path in model.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    save_file(found, place / "model.safetensors", {"format": "pt"})
    said = json.loads((place / "config.json").read_text()) | config
    (place / "config.json").write_text(json.dumps(said))
    return place


def named(**settings: Any) -> dict[str, Any]:
    return {"quantization_config": settings}


def compressed(**weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "symmetric": True, **weights}}
    return named(quant_method="compressed-tensors", format="float-quantized", config_groups={"group_0": group})


FP8: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "block": ("block", named(quant_method="fp8", weight_block_size=[32, 32]), {}),
    "per tensor": ("tensor", named(quant_method="fp8", activation_scheme="static"), {"suffix": "_scale"}),
    "per row": ("row", named(quant_method="fbgemm_fp8"), {"suffix": "_scale"}),
    "Mistral": ("tensor", named(quant_method="fp8", activation_scheme="static", weight_block_size=None),
                {"activations": ("activation_scale",)}),
    "compressed-tensors": ("row", compressed(strategy="channel"), {"suffix": "_scale"}),
    "compressed-tensors block": ("block", compressed(strategy="block", block_structure=[32, 32]),
                                 {"suffix": "_scale"}),
    "ModelOpt": ("tensor", named(quant_method="modelopt", quant_algo="FP8"),
                 {"suffix": "_scale", "activations": ("input_scale",)}),
    "ModelOpt beside": ("tensor", {}, {"suffix": "_scale", "activations": ("input_scale",)}),
}  # fmt: skip


@pytest.mark.parametrize("form", FP8)
def test_info_of_an_fp8_source_that_quantize_reads(
    form: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scale, config, extra = FP8[form]
    model = fp8(llama, tmp_path / "fp8", scale, config, **extra)
    assert run(["info", str(model), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["dtypes"]["F8_E4M3"]["tensors"] == 14
    assert facts["layers"] == 2
    assert len(facts["left_out"]) == 14 * len(extra.get("activations", ()))
    with open_source(str(model)).checkpoint as checkpoint:
        name = f"{LAYER}.weight"
        expected = load_file(llama / "model.safetensors")[name].float().clamp(-4, 4).to(torch.float8_e4m3fn).float()
        assert np.array_equal(checkpoint.read_rows(name, 0, 128), expected.numpy())
