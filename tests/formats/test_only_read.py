"""Layouts that are read and not written: ModelOpt, AutoRound, AutoAWQ's gemv, FP8, experts of MXFP4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_quantize.advice.describe import describe
from llm_quantize.artifacts.opening import open_decoded
from llm_quantize.artifacts.verify import verify
from llm_quantize.errors import IntegrityError, LlmQuantizeError, UnsupportedError
from llm_quantize.models.opening import open_model, open_source
from llm_quantize.models.quantized import PackedDirectory
from llm_quantize.options import Options
from llm_quantize.pipeline import plan, quantize
from tests.oracles.peer_layouts import PEERS, write_peer
from tests.tiny_models import make_tiny, row_lengths_of_256

UP = "model.layers.0.mlp.up_proj"  # (512, 256)
SQUARE = "model.layers.0.self_attn.q_proj"  # (256, 256)
KINDS = {
    "ModelOpt NVFP4": "NVFP4",
    "ModelOpt MXFP4": "MXFP4",
    "ModelOpt MXFP8": "MXFP8",
    "ModelOpt FP8 per row": "FP8",
    "AWQ gemv": "AWQ-4bit",
    "AWQ gemv_fast": "AWQ-4bit",
    "AutoRound auto_gptq": "AutoRound-4bit",
    "AutoRound unsaid": "AutoRound-4bit",
    "AutoRound": "AutoRound-4bit",
    "AutoRound gptqmodel": "AutoRound-4bit",
    "AutoRound auto_awq": "AutoRound-4bit",
    "AutoRound llm_compressor": "AutoRound-MXFP4A16",
    "Kimi": "W4A16",
}
"""``Model.kind``; the others are read like floats, with scales."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("models") / "llama", **row_lengths_of_256("llama"))


def changed(place: Path, tensors: dict[str, torch.Tensor], *gone: str) -> None:
    found = {name: value for name, value in load_file(place / "model.safetensors").items() if name not in gone}
    save_file(found | tensors, place / "model.safetensors", {"format": "pt"})


def said(place: Path, **settings: Any) -> None:
    config = json.loads((place / "config.json").read_text())
    config["quantization_config"] |= settings
    (place / "config.json").write_text(json.dumps(config))


def whole(model: Any, name: str) -> np.ndarray:
    return np.asarray(model.read_rows(name, 0, model.matrix(name)[0]))


@pytest.mark.parametrize("peer", PEERS)
def test_its_values_are_what_its_owner_means(peer: str, llama: Path, tmp_path: Path) -> None:
    """As a model to start from, as the float model made of it, as an artifact, and as what is held."""
    place = tmp_path / "peer"
    expected = write_peer(llama, place, peer)
    with open_source(str(place)).checkpoint as model:
        assert model.kind == KINDS.get(peer, "")
        for name, values in expected.items():
            assert np.array_equal(whole(model, name), values), name
            found = model.held_grid(name, 0, len(values))
            assert found is not None
            assert np.array_equal(found[0].decode(found[1]).numpy(), values), name
        assert np.array_equal(np.asarray(model.read_rows(f"{UP}.weight", 37, 101)), expected[f"{UP}.weight"][37:101])
    (floats,) = quantize(str(place), "safetensors", levels=["F32"], output_dir=tmp_path, options=Options(threads=1))
    stored = load_file(floats.path / "model.safetensors")
    for name, values in expected.items():
        assert np.array_equal(stored[name].numpy(), values), name
    assert "quantization_config" not in json.loads((floats.path / "config.json").read_text())
    with PackedDirectory(place) as packed:
        for name, values in expected.items():
            assert np.array_equal(packed.rows(name, 0, len(values)), values), name
            assert np.array_equal(packed.rows(name, 33, 70), values[33:70])
            codes = packed.format.codes(packed.matrices[name], packed.fields(packed.matrices[name]), 0, len(values))
            assert codes.shape == values.shape
    source = open_source(str(floats.path))
    with source.checkpoint:
        artifact = open_decoded(source, place)
        assert torch.equal(artifact.read(f"{UP}.weight"), torch.from_numpy(expected[f"{UP}.weight"]))
        artifact.close()
    for checked in (verify(place), verify(place, source=str(floats.path))):
        if peer != "Kimi":  # its ignore list has the names of a dense model's matrices
            assert not checked.problems
        assert not any(check.problems for check in checked.tensors)
    told = describe(str(place))["quantization"]
    assert told["matrices"] == len(expected)


@pytest.mark.parametrize("peer", ["ModelOpt NVFP4", "FP8 blocks", "AWQ gemv", "AutoRound auto_awq"])
def test_an_artifact_of_another_model_is_told(peer: str, llama: Path, tmp_path: Path) -> None:
    """The values are drawn, so nothing of ``llama`` is in them."""
    write_peer(llama, tmp_path / "peer", peer)
    checked = verify(tmp_path / "peer", source=str(llama))
    assert sum(bool(check.problems) for check in checked.tensors) >= 14


def test_grids_of_several_kinds_in_one_directory(llama: Path, tmp_path: Path) -> None:
    place = tmp_path / "mixed"
    expected = write_peer(llama, place, "ModelOpt NVFP4", mixed="ModelOpt FP8")
    said(place, quant_algo="MIXED_PRECISION")
    with open_source(str(place)).checkpoint as model:
        assert model.kind == "FP8+NVFP4"
        for name, values in expected.items():
            assert np.array_equal(whole(model, name), values), name
    assert describe(str(place))["quantization"]["grids"] == {"e2m1_b16_e4m3": 7, "e4m3_whole": 7}


def test_experts_of_int4_beside_floats(tmp_path: Path) -> None:
    """As Kimi K2 ships them: only experts are packed, by an ignore list of expressions."""
    mixture = make_tiny("qwen3_moe", tmp_path / "model", moe_intermediate_size=64)
    ends = tuple(f".experts.{n}.{word}_proj.weight" for n in range(8) for word in ("gate", "up", "down"))
    expected = write_peer(mixture, tmp_path / "packed", "Kimi", ends=ends)
    said(tmp_path / "packed", ignore=["lm_head", "re:.*self_attn.*", "re:.*mlp\\.gate$"])
    assert expected
    with open_source(str(tmp_path / "packed")).checkpoint as model:
        assert model.kind == "W4A16"
        for name, values in expected.items():
            assert np.array_equal(whole(model, name), values), name
    assert not verify(tmp_path / "packed").problems
    assert plan(str(tmp_path / "packed"), "gguf", levels=["Q8_0"])


def test_modelopt_says_it_in_a_file_beside(llama: Path, tmp_path: Path) -> None:
    place = tmp_path / "peer"
    expected = write_peer(llama, place, "ModelOpt NVFP4")
    config = json.loads((place / "config.json").read_text())
    del config["quantization_config"]
    (place / "config.json").write_text(json.dumps(config))
    beside = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}}
    (place / "hf_quant_config.json").write_text(json.dumps(beside))
    name = "model.layers.0.self_attn.k_proj"
    scales = {f"{name.replace('.0.', f'.{n}.')}.k_scale": torch.tensor(0.5) for n in range(2)}
    scales |= {key.replace("k_proj.k_", "v_proj.v_"): value.clone() for key, value in scales.items()}
    changed(place, scales)
    with open_source(str(place)).checkpoint as model:
        assert np.array_equal(whole(model, f"{UP}.weight"), expected[f"{UP}.weight"])
        assert any("hf_quant_config.json" in note for note in model.notes)
    assert not verify(place).problems


def test_scales_of_inputs_go_into_the_columns(llama: Path, tmp_path: Path) -> None:
    """What AWQ could not fold into a norm: W (x s) is (W s) x."""
    place = tmp_path / "peer"
    expected = write_peer(llama, place, "ModelOpt NVFP4")[f"{UP}.weight"]
    before = torch.rand(256, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    changed(place, {f"{UP}.pre_quant_scale": before})
    said(place, quant_algo="NVFP4_AWQ")
    with open_source(str(place)).checkpoint as model:
        assert np.array_equal(whole(model, f"{UP}.weight"), expected * before.float().numpy())
        assert model.held_grid(f"{UP}.weight", 0, 32) is None
        assert model.left_out == {}
    assert not verify(place).problems
    changed(place, {f"{UP}.pre_quant_scale": before[:-1].clone()})
    with pytest.raises(IntegrityError, match="does not fit"):
        open_model(str(place))


def test_what_adds_to_a_module_is_refused(llama: Path, tmp_path: Path) -> None:
    write_peer(llama, tmp_path / "peer", "ModelOpt NVFP4")
    changed(tmp_path / "peer", {f"{UP}.svdquant_lora_a": torch.ones(256)})
    with pytest.raises(UnsupportedError, match="SVDQuant") as caught:
        open_model(str(tmp_path / "peer"))
    assert caught.value.tensor == f"{UP}.svdquant_lora_a"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"packing_format": "auto_round:exllamav2"}, "exllamav2"),
        ({"packing_format": "auto_round:llm_compressor", "data_type": "int"}, "llm_compressor of int"),
        ({"rotation_config": {"hadamard_type": "x"}}, "rotation_config"),
        ({"packing_format": ["auto_round"]}, "auto_round"),
    ],
)
def test_forms_of_auto_round_that_are_not_known(
    settings: dict[str, Any], words: str, llama: Path, tmp_path: Path
) -> None:
    write_peer(llama, tmp_path / "peer", "AutoRound")
    said(tmp_path / "peer", **settings)
    with pytest.raises(UnsupportedError, match="not decoded by this version") as caught:
        open_model(str(tmp_path / "peer"))
    assert words in str(caught.value.found)


def test_modules_of_auto_round_that_differ(llama: Path, tmp_path: Path) -> None:
    """``extra_config``: a module of 8 bits among those of 4, and one that must not be packed."""
    place = tmp_path / "peer"
    write_peer(llama, place, "AutoRound auto_gptq")
    found = load_file(place / "model.safetensors")
    rows = found[f"{UP}.scales"].shape[1]
    wide = {
        f"{UP}.qweight": torch.full((64, rows), 0x84848484 - (1 << 32), dtype=torch.int32),
        f"{UP}.qzeros": torch.full((4, rows // 4), 0x7F7F7F7F, dtype=torch.int32),
    }
    changed(place, wide)
    down = UP.replace("up", "down")
    each = found[f"{UP}.scales"].float().T.repeat_interleave(64, 1).numpy()
    for key in (UP, r".*layers\.0\.mlp\.up_proj.*"):
        said(place, extra_config={key: {"bits": 8, "sym": True}, down: {"bits": 16}})
        with open_model(str(place)) as model:
            assert np.array_equal(whole(model, f"{UP}.weight"), each * (0x84 - 0x80))
            assert model.kind == "AutoRound-4+8bit"
        assert any(down in problem for problem in verify(place).problems)
    said(place, extra_config={})
    with pytest.raises(LlmQuantizeError):
        open_source(str(place))


@pytest.mark.parametrize(
    ("peer", "field", "value", "words"),
    [
        ("ModelOpt NVFP4", "weight_scale_2", None, "calls for"),
        ("ModelOpt NVFP4", "weight_scale", torch.ones(256, 15).to(torch.float8_e4m3fn), "does not fit"),
        ("ModelOpt NVFP4", "weight", torch.zeros(256, 127, dtype=torch.uint8), "does not fit"),
        ("ModelOpt NVFP4", "weight_scale_2", torch.ones(3), "does not fit"),
        ("ModelOpt MXFP8", "weight", torch.zeros(256, 250).to(torch.float8_e4m3fn), "does not fit"),
        ("FP8 blocks", "weight_scale_inv", torch.ones(2, 3), "does not fit"),
        ("AWQ gemv", "qzeros", torch.zeros(256, 3, dtype=torch.int32), "does not fit"),
        ("AWQ gemv_fast", "scales", torch.ones(15, 256).half(), "does not fit"),
        ("AWQ gemv_fast", "qweight", torch.zeros(64, 250, dtype=torch.int16), "does not fit"),
    ],
)
def test_fields_that_do_not_fit(
    peer: str, field: str, value: torch.Tensor | None, words: str, llama: Path, tmp_path: Path
) -> None:
    place, name = tmp_path / "peer", f"{SQUARE}.{field}"
    write_peer(llama, place, peer)
    changed(place, {} if value is None else {name: value}, name)
    with pytest.raises(IntegrityError, match=words) as caught, PackedDirectory(place):
        pass
    assert (caught.value.tensor or "").startswith(f"{SQUARE}.")


def test_numbers_of_no_sense_are_told(llama: Path, tmp_path: Path) -> None:
    for number, (peer, field, value) in enumerate(
        (
            ("ModelOpt NVFP4", "weight_scale_2", torch.tensor(-1.0)),
            ("ModelOpt MXFP8", "weight_scale", torch.full((256, 8), 255, dtype=torch.uint8)),
            ("ModelOpt MXFP8", "weight", torch.full((256, 256), 127, dtype=torch.uint8).view(torch.float8_e4m3fn)),
            ("FP8 blocks", "weight", torch.full((256, 256), 255, dtype=torch.uint8).view(torch.float8_e4m3fn)),
            ("FP8 blocks", "weight_scale_inv", torch.full((2, 2), torch.nan)),
        )
    ):
        place = tmp_path / str(number)
        write_peer(llama, place, peer)
        name = f"{SQUARE}.{field}"
        assert load_file(place / "model.safetensors")[name].shape == value.shape
        changed(place, {name: value})
        (bad,) = [check for check in verify(place).tensors if check.problems or check.nonfinite]
        assert bad.name == name


def test_fp8_in_forms_that_are_a_model_and_no_artifact(llama: Path, tmp_path: Path) -> None:
    place = tmp_path / "peer"
    write_peer(llama, place, "FP8 blocks")
    found = load_file(place / "model.safetensors")
    named = {name: found[name.removesuffix("_scale_inv")].shape for name in found if name.endswith("_scale_inv")}
    changed(place, {name: torch.ones(-(-rows // 64), -(-columns // 64)) for name, (rows, columns) in named.items()})
    said(place, weight_block_size=[64, 64])
    with open_source(str(place)).checkpoint as model:
        assert whole(model, f"{UP}.weight").any()
    with pytest.raises(UnsupportedError, match="can be a MODEL") as caught:
        verify(place)
    assert caught.value.found == "[64, 64]"


@pytest.mark.parametrize("peer", ["FP8 blocks", "FP8 powers", "FP8 rows"])
def test_fp8_is_what_transformers_makes_of_it(peer: str, llama: Path, tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    write_peer(llama, tmp_path / "peer", peer)
    stored = load_file(tmp_path / "peer" / "model.safetensors")
    suffix = "weight_scale" if peer == "FP8 rows" else "weight_scale_inv"
    with open_model(str(tmp_path / "peer")) as model:
        for name in (UP, SQUARE):
            scales = stored[f"{name}.{suffix}"]
            scales = scales[:, None] if scales.dim() == 1 else scales
            theirs = Fp8Dequantize(None)._dequantize_one(stored[f"{name}.weight"], scales, torch.float32)
            assert np.array_equal(whole(model, f"{name}.weight"), theirs.numpy())


def experts(place: Path, model: Path) -> dict[str, np.ndarray]:
    """gpt-oss' two tensors of experts, and what transformers decodes them to."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    place.mkdir()
    generator = torch.Generator().manual_seed(3)
    tensors, values = load_file(model / "model.safetensors"), dict[str, np.ndarray]()
    for layer in range(2):
        for word, rows, columns in (("gate_up_proj", 96, 64), ("down_proj", 64, 96)):
            name = f"model.layers.{layer}.mlp.experts.{word}"
            blocks = torch.randint(0, 256, (3, rows, columns // 32, 16), dtype=torch.uint8, generator=generator)
            scales = torch.randint(110, 130, (3, rows, columns // 32), dtype=torch.uint8, generator=generator)
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            values[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).numpy()
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    said = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (place / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    return values


def test_experts_of_mxfp4_are_what_transformers_decodes(llama: Path, tmp_path: Path) -> None:
    """The rows that are read are those of (E, out, in), which transformers has turned: (E, in, out)."""
    expected = experts(tmp_path / "oss", llama)
    with PackedDirectory(tmp_path / "oss") as packed:
        assert set(packed.matrices) == set(expected)
        for name, values in expected.items():
            matrix = packed.matrices[name]
            assert matrix.shape == (values.shape[0], values.shape[2], values.shape[1])
            rows = packed.rows(name, 0, matrix.rows)
            assert np.array_equal(rows.reshape(matrix.shape).swapaxes(1, 2), values)
            assert np.array_equal(packed.rows(name, 17, 99), rows[17:99])
        assert (packed.label, packed.layout_name) == ("MXFP4", "blocks")


def test_experts_of_mxfp4_of_a_family_that_is_not_known(llama: Path, tmp_path: Path) -> None:
    """What is refused is the family, not the layout."""
    experts(tmp_path / "oss", llama)
    config = json.loads((tmp_path / "oss" / "config.json").read_text())
    told = {**config, "model_type": "gpt_oss_next", "architectures": ["GptOssNextForCausalLM"]}
    (tmp_path / "oss" / "config.json").write_text(json.dumps(told))
    with pytest.raises(UnsupportedError) as caught:
        open_source(str(tmp_path / "oss"))
    assert "gpt_oss_next" in str(caught.value)
    assert "quantized" not in caught.value.what
    assert describe(str(tmp_path / "oss"))["quantization"]["layout"] == "blocks"


@pytest.mark.parametrize(
    ("suffix", "value"),
    [
        ("_scales", None),
        ("_scales", torch.zeros(3, 96, 3, dtype=torch.uint8)),
        ("_blocks", torch.zeros(3, 96, 2, 8, dtype=torch.uint8)),
        ("_blocks", torch.zeros(96, 2, 16, dtype=torch.uint8)),
        ("_blocks", torch.zeros(0, 96, 2, 16, dtype=torch.uint8)),
        ("_blocks", torch.zeros(3, 96, 2, 16, dtype=torch.int8)),
    ],
)
def test_experts_that_do_not_fit(suffix: str, value: torch.Tensor | None, llama: Path, tmp_path: Path) -> None:
    experts(tmp_path / "oss", llama)
    name = f"model.layers.0.mlp.experts.gate_up_proj{suffix}"
    changed(tmp_path / "oss", {} if value is None else {name: value}, name)
    with pytest.raises(LlmQuantizeError), PackedDirectory(tmp_path / "oss"):
        pass
