"""A quantized directory decoded under its source's names is what was put into it, in every layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_quantize.architectures.rows import to_float32
from llm_quantize.artifacts.decoded import DecodedArtifact
from llm_quantize.artifacts.decoded_directory import DecodedDirectory
from llm_quantize.artifacts.opening import open_decoded
from llm_quantize.errors import IntegrityError, LlmQuantizeError, MalformedInputError, UnsupportedError, UsageError
from llm_quantize.evaluation.tensor_errors import tensor_errors
from llm_quantize.models.opening import Source, open_source
from tests.oracles.packed_formats import Form, is_linear, write_packed
from tests.tiny_models import make_tiny

FORMS = {
    "gptq": Form("gptq"),
    "gptq-row": Form("gptq", group=-1),
    "gptq-asym": Form("gptq", symmetric=False),
    "gptq-v2": Form("gptq", symmetric=False, version="gptq_v2"),
    "gptq-order": Form("gptq", symmetric=False, act_order=True),
    "gptq-2": Form("gptq", bits=2),
    "gptq-3": Form("gptq", bits=3, symmetric=False),
    "gptq-8": Form("gptq", bits=8, symmetric=False),
    "gptq-bf16": Form("gptq", scale=torch.bfloat16),
    "awq": Form("awq", symmetric=False),
    "awq-row": Form("awq", symmetric=False, group=-1),
    "W4A16": Form("compressed-tensors", scale=torch.bfloat16),
    "W4A16-asym": Form("compressed-tensors", scale=torch.bfloat16, symmetric=False),
    "W4A16-order": Form("compressed-tensors", scale=torch.bfloat16, act_order=True),
    "W3A16": Form("compressed-tensors", bits=3, scale=torch.bfloat16),
    "W5A16-asym": Form("compressed-tensors", bits=5, scale=torch.float32, symmetric=False),
    "W8A16": Form("compressed-tensors", bits=8, group=-1, scale=torch.bfloat16),
    "int8": Form("compressed-tensors", bits=8, group=-1, scale=torch.float32, integer=True),
    "int8-asym": Form("compressed-tensors", bits=8, group=32, integer=True, symmetric=False),
}


@pytest.fixture
def opened() -> Iterator[Any]:
    sources: list[Source] = []

    def open_it(path: Path) -> Source:
        sources.append(open_source(str(path)))
        return sources[-1]

    yield open_it
    for source in sources:
        source.checkpoint.close()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("source") / "model")


@pytest.fixture
def packed(llama: Path, tmp_path: Path) -> Path:
    write_packed(llama, tmp_path / "packed", FORMS["gptq-asym"])
    return tmp_path / "packed"


def equal(artifact: Any, expected: dict[str, torch.Tensor]) -> None:
    assert set(artifact.names) == set(expected)
    for name, values in expected.items():
        found = artifact.read(name)
        assert found.dtype == torch.float32
        assert torch.equal(found, values), name


@pytest.mark.parametrize("form", FORMS)
def test_every_layout(form: str, llama: Path, tmp_path: Path, opened: Any) -> None:
    expected = write_packed(llama, tmp_path / "packed", FORMS[form])
    artifact = open_decoded(opened(llama), tmp_path / "packed")
    assert isinstance(artifact, DecodedDirectory)
    equal(artifact, expected)
    assert artifact.notes == ()
    assert artifact.size == (tmp_path / "packed" / "model.safetensors").stat().st_size
    assert artifact.weights == sum(values.numel() for values in expected.values())
    types = artifact.types()
    asked = FORMS[form]
    grid = f"int{asked.bits}" + ("" if asked.group == -1 else f"_g{asked.group}") + ("" if asked.symmetric else "_asym")
    assert {types[name] for name in expected if is_linear(name)} == {grid}
    assert types["lm_head.weight"] == "bf16"
    artifact.close()


@pytest.mark.parametrize("variant", ["llama", "gemma2", "gpt2", "phi3", "qwen3_moe", "gpt_neox", "falcon", "olmoe"])
def test_every_way_of_reading(variant: str, tmp_path: Path, opened: Any) -> None:
    model = make_tiny(variant, tmp_path / "model")
    source = opened(model)
    turned = {piece.source for output in source.tensors.outputs for piece in output.pieces if piece.transpose}
    form = Form("gptq", group=16, symmetric=False, act_order=True)
    expected = write_packed(model, tmp_path / "packed", form, transposed=lambda name: name in turned)
    artifact = open_decoded(source, tmp_path / "packed")
    expected = {name: value for name, value in expected.items() if name in artifact.names}
    equal(artifact, expected)
    rows = torch.tensor([0, 3, 4, 5, 40])
    for weights in (artifact, artifact.for_head()):
        for name, whole in expected.items():
            for dtype in (torch.float32, torch.bfloat16):
                into = torch.full(whole.shape, torch.nan, dtype=dtype)
                weights.read_into(name, into)
                assert torch.equal(into, whole.to(dtype)), name
    for name, whole in expected.items():
        if whole.ndim == 2 and len(whole) > 40:
            assert torch.equal(artifact.read_rows(name, rows), whole[rows]), name
            assert artifact.read_rows(name, rows[:0]).shape == (0, whole.shape[1])


def fused(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts stacked, gate and up joined, as transformers 5 has them in memory."""
    found = {name: value for name, value in values.items() if ".experts." not in name}
    layers = sorted({name.split(".experts.")[0] for name in values if ".experts." in name})
    for layer in layers:
        count = len({name.split(".")[5] for name in values if name.startswith(f"{layer}.experts.")})
        each = [f"{layer}.experts.{index}" for index in range(count)]
        both = [torch.cat([values[f"{one}.gate_proj.weight"], values[f"{one}.up_proj.weight"]]) for one in each]
        found[f"{layer}.experts.gate_up_proj"] = torch.stack(both)
        found[f"{layer}.experts.down_proj"] = torch.stack([values[f"{one}.down_proj.weight"] for one in each])
    return found


def test_experts_stacked_in_the_source_only(tmp_path: Path, opened: Any) -> None:
    """A tool quantizes each expert alone; the source has them in one tensor."""
    model = make_tiny("qwen3_moe", tmp_path / "model")
    expected = write_packed(model, tmp_path / "packed", Form("gptq", group=16))
    save_file(fused(load_file(model / "model.safetensors")), model / "model.safetensors", {"format": "pt"})
    source = opened(model)
    artifact = open_decoded(source, tmp_path / "packed")
    equal(artifact, fused(expected))
    found = {loss.name: loss for loss in tensor_errors(source, artifact, threads=1)}
    loss = found["model.layers.0.mlp.experts.*.gate_proj.weight"]
    assert (loss.layer, loss.role, loss.qtype) == (0, "ffn_gate_exps", "int4_g16")
    assert 0.02 < loss.relative < 0.2
    exact = load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    half = exact[name].shape[1] // 2
    w = exact[name][:, :half].double().numpy()
    e = (fused(expected)[name][:, :half].double() - exact[name][:, :half].double()).numpy()
    h = np.random.default_rng(2).exponential(1, (len(w), w.shape[-1])).astype(np.float32)
    (loss,) = (
        one
        for one in tensor_errors(source, artifact, importance={"blk.0.ffn_gate_exps.weight": h}, threads=1)
        if one.weighted is not None
    )
    weighted = np.sqrt((h[:, None] * e**2).sum() / (h[:, None] * w**2).sum())
    assert loss.weighted == pytest.approx(weighted, rel=1e-6)


def test_experts_stacked_in_the_artifact_only(tmp_path: Path, opened: Any) -> None:
    """A tool that passes over stacked experts leaves them as they are: told apart by their type."""
    model = make_tiny("qwen3_moe", tmp_path / "model")
    values = load_file(model / "model.safetensors")
    write_packed(model, tmp_path / "packed", Form("gptq", group=16), tensors=fused(values))
    source = opened(model)
    artifact = open_decoded(source, tmp_path / "packed")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    assert torch.equal(artifact.read(name), values[name].float())
    assert artifact.types()["model.layers.1.mlp.experts.gate_up_proj"] == "bf16"
    found = {loss.name: loss for loss in tensor_errors(source, artifact, threads=1)}
    assert found["model.layers.1.mlp.experts.gate_up_proj"].relative == 0
    assert found["model.layers.1.self_attn.q_proj.weight"].relative > 0.02


def test_errors_of_tensors_are_the_plain_formula(tmp_path: Path, llama: Path, opened: Any) -> None:
    expected = write_packed(llama, tmp_path / "packed", FORMS["awq"])
    source = opened(llama)
    artifact = open_decoded(source, tmp_path / "packed")
    exact = load_file(llama / "model.safetensors")
    random = np.random.default_rng(0)
    importance = {"blk.1.ffn_down.weight": random.exponential(1, (1, 96)).astype(np.float32)}
    losses = tensor_errors(source, artifact, importance=importance, threads=2)
    for loss in losses:
        w, q = exact[loss.name].double().numpy(), expected[loss.name].double().numpy()
        assert loss.relative == pytest.approx(np.linalg.norm(q - w) / np.linalg.norm(w), rel=1e-6, abs=1e-12)
    name = "model.layers.1.mlp.down_proj.weight"
    (loss,) = (one for one in losses if one.name == name)
    h, w, e = importance["blk.1.ffn_down.weight"], exact[name].double().numpy(), (expected[name] - exact[name]).double()
    weighted = np.sqrt((h * e.numpy() ** 2).sum() / (h * w**2).sum())
    assert loss.weighted == pytest.approx(weighted, rel=1e-6)
    assert loss.qtype == "int4_g32_asym"
    assert loss.bits_per_weight == pytest.approx(4 + 16 / 32 + 4 / 32)


def test_sharded_with_a_changed_norm(llama: Path, tmp_path: Path, opened: Any) -> None:
    """AWQ divides norms: what stands in the artifact counts, in whatever float type."""
    folder = tmp_path / "packed"
    expected = write_packed(llama, folder, FORMS["awq"])
    values = load_file(folder / "model.safetensors")
    name = "model.layers.0.input_layernorm.weight"
    values[name] = (values[name] * 0.7).to(torch.bfloat16)
    expected[name] = values[name].float()
    (folder / "model.safetensors").unlink()
    names = sorted(values)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({one: values[one] for one in part}, folder / file, {"format": "pt"})
    index = {"weight_map": {one: file for file, part in parts.items() for one in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    artifact = open_decoded(opened(llama), folder)
    equal(artifact, expected)
    assert artifact.types()[name] == "bf16"


def changed(folder: Path, change: Any) -> None:
    values = load_file(folder / "model.safetensors")
    change(values)
    save_file({name: value.contiguous() for name, value in values.items()}, folder / "model.safetensors")


def settings(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "tensor", "words"),
    [
        (lambda v: v.pop(f"{Q}.qzeros"), f"{Q}.qzeros", "is absent"),
        (lambda v: v.pop("model.norm.weight"), "model.norm.weight", "not made from this reference"),
        (lambda v: [v.pop(f"{Q}.{s}") for s in ("qweight", "qzeros", "scales", "g_idx")], f"{Q}.weight", "no such"),
        (lambda v: v.update({f"{Q}.scales": v[f"{Q}.scales"][1:]}), f"{Q}.scales", "does not fit"),
        (lambda v: v.update({f"{Q}.qzeros": v[f"{Q}.qzeros"][:, 1:]}), f"{Q}.qzeros", "does not fit"),
        (lambda v: v.update({f"{Q}.qweight": v[f"{Q}.qweight"][:-1]}), f"{Q}.qweight", "does not fit"),
        (lambda v: v.update({f"{Q}.qweight": v[f"{Q}.qweight"].long()}), f"{Q}.qweight", "does not fit"),
        (lambda v: v.update({f"{Q}.qweight": v[f"{Q}.qweight"][None]}), f"{Q}.qweight", "does not fit"),
        (lambda v: v.update({f"{Q}.scales": torch.ones(0, 64).half()}), f"{Q}.scales", "does not fit"),
        (lambda v: v.update({f"{Q}.scales": torch.ones(()).half()}), f"{Q}.qweight", "does not fit"),
        (lambda v: v.update({f"{Q}.weight": torch.ones(64, 64)}), f"{Q}.weight", "there twice"),
        (lambda v: v.update({"model.extra.weight": torch.ones(3)}), "model.extra.weight", "does not have"),
        (lambda v: v.update({f"{Q}.bias": torch.ones(64)}), f"{Q}.bias", "does not have"),
        (lambda v: v.update({"model.norm.weight": torch.ones(63)}), "model.norm.weight", "shape"),
    ],
)
def test_fields_that_do_not_fit(change: Any, tensor: str, words: str, packed: Path, llama: Path, opened: Any) -> None:
    changed(packed, change)
    with pytest.raises(IntegrityError, match=words) as caught:
        open_decoded(opened(llama), packed)
    assert caught.value.tensor == tensor
    assert caught.value.expected is not None
    assert caught.value.found is not None


@pytest.mark.parametrize("value", [-1, 2, 1 << 30])
def test_a_group_that_does_not_exist(value: int, packed: Path, llama: Path, opened: Any) -> None:
    def change(values: dict[str, torch.Tensor]) -> None:
        values[f"{Q}.g_idx"][5] = value

    changed(packed, change)
    artifact = open_decoded(opened(llama), packed)
    with pytest.raises(IntegrityError, match="group that does not exist") as caught:
        artifact.read(f"{Q}.weight")
    assert (caught.value.tensor, caught.value.found) == (f"{Q}.g_idx", str(value))


@pytest.mark.parametrize("shape", [(64, 64, 1), (-64, 64), (64, 1 << 62), (0, 64), (64, 65)])
def test_a_hostile_weight_shape(shape: tuple[int, ...], llama: Path, tmp_path: Path, opened: Any) -> None:
    write_packed(llama, tmp_path / "packed", FORMS["W4A16"])
    changed(tmp_path / "packed", lambda v: v.update({f"{Q}.weight_shape": torch.tensor(shape)}))
    with pytest.raises(IntegrityError):
        open_decoded(opened(llama), tmp_path / "packed")


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"quant_method": "hqq"}, UnsupportedError, "hqq"),
        ({"quant_method": None}, UnsupportedError, "None"),
        ({"quant_method": ["gptq"]}, UnsupportedError, "gptq"),
        ({"checkpoint_format": "marlin"}, UnsupportedError, "marlin"),
        ({"pack_dtype": "int64"}, UnsupportedError, "gptq"),
        ({"quant_method": "awq", "version": "marlin"}, UnsupportedError, "marlin"),
        ({"quant_method": "awq", "version": "gemv"}, IntegrityError, "does not fit"),
        ({"quant_method": "compressed-tensors", "format": "mxfp8-quantized"}, UnsupportedError, "mxfp8"),
        ({"quant_method": "compressed-tensors", "config_groups": [1]}, LlmQuantizeError, ""),
        ({"bits": 8}, IntegrityError, "8 bits"),
        ({"group_size": 16}, IntegrityError, "does not fit"),
        ({"group_size": "128"}, MalformedInputError, "group_size"),
        ({"group_size": -7}, MalformedInputError, "group_size"),
        ({"sym": 3}, MalformedInputError, "sym"),
    ],
)
def test_configurations(changes: Any, kind: Any, words: str, packed: Path, llama: Path, opened: Any) -> None:
    settings(packed, **changes)
    with pytest.raises(kind) as caught:
        open_decoded(opened(llama), packed)
    assert words in str(caught.value)


def test_modules_that_differ(packed: Path, llama: Path, opened: Any) -> None:
    """GPTQModel's ``dynamic``: the shapes say which bits and group a matrix has."""
    other = packed.with_name("other")
    expected = write_packed(llama, other, Form("gptq", bits=8, group=16))
    taken = load_file(other / "model.safetensors")

    def change(values: dict[str, torch.Tensor]) -> None:
        values |= {name: value for name, value in taken.items() if name.startswith(f"{Q}.")}

    changed(packed, change)
    settings(packed, dynamic={"+:.*q_proj": {"bits": 8, "group_size": 16}})
    artifact = open_decoded(opened(llama), packed)
    assert torch.equal(artifact.read(f"{Q}.weight"), expected[f"{Q}.weight"])
    assert artifact.types()[f"{Q}.weight"] == "int8_g16_asym"
    assert artifact.types()["model.layers.0.self_attn.k_proj.weight"] == "int4_g32_asym"


def test_biases_of_zeros_are_left_out(packed: Path, llama: Path, opened: Any) -> None:
    changed(packed, lambda v: v.update({f"{Q}.bias": torch.zeros(64)}))
    artifact = open_decoded(opened(llama), packed)
    assert f"{Q}.bias" not in artifact.types()
    assert artifact.notes == ("1 biases that the reference has not are in the artifact, all zeros",)


@pytest.mark.parametrize("untied", [True, False])
def test_a_head_of_its_own(untied: bool, tmp_path: Path, opened: Any) -> None:
    """Tools that quantize the head of a tied model untie it; where the configuration still ties it, nobody reads it."""
    model = make_tiny("llama3", tmp_path / "model")
    values = load_file(model / "model.safetensors")
    table = values["model.embed_tokens.weight"]
    form = Form("gptq", group=16, symmetric=False)
    tensors = {**values, "lm_head.weight": table.clone()}
    chosen = lambda name: is_linear(name) or name == "lm_head.weight"  # noqa: E731
    expected = write_packed(model, tmp_path / "packed", form, tensors=tensors, chosen=chosen)
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    (tmp_path / "packed" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": not untied}))
    artifact = open_decoded(opened(model), tmp_path / "packed")
    name = "model.embed_tokens.weight"
    assert torch.equal(artifact.read(name), table.float())
    assert torch.equal(artifact.for_head().read(name), expected["lm_head.weight"] if untied else table.float())
    into = torch.empty(table.shape)
    artifact.for_head().read_into(name, into)
    assert torch.equal(into, expected["lm_head.weight"] if untied else table.float())
    assert bool(artifact.notes) == (not untied)


def test_another_model(packed: Path, tmp_path: Path, opened: Any) -> None:
    stranger = make_tiny("qwen2", tmp_path / "other")
    with pytest.raises(IntegrityError, match="not made from this reference"):
        open_decoded(opened(stranger), packed)
    wider = make_tiny("llama", tmp_path / "wider", intermediate_size=128)
    with pytest.raises(IntegrityError, match="not made from this reference"):
        open_decoded(opened(wider), packed)


def test_other_hyper_parameters_are_told(packed: Path, llama: Path, opened: Any) -> None:
    config = json.loads((packed / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 77.0
    (packed / "config.json").write_text(json.dumps(config))
    notes = open_decoded(opened(llama), packed).notes
    assert notes == ("llama.rope.freq_base is 77.0 in the artifact, 50.0 in the reference",)


def test_which_is_opened(llama: Path, tmp_path: Path, opened: Any) -> None:
    source = opened(llama)
    with closing(open_decoded(source, llama)) as plain:
        assert isinstance(plain, DecodedDirectory)
        name = "model.norm.weight"
        assert (plain.decode(name) == to_float32(source.checkpoint.read_rows(name, 0, 1))[0]).all()
    with pytest.raises(UsageError):
        open_decoded(source, tmp_path / "absent")
    from llm_quantize.pipeline import Options, quantize

    (result,) = quantize(str(llama), "gguf", levels=["F16"], output_dir=tmp_path, options=Options(threads=1))
    assert isinstance(open_decoded(source, result.path), DecodedArtifact)


def test_every_failure_is_of_the_tree(packed: Path, llama: Path, opened: Any) -> None:
    """Any byte of header, indices or configuration flipped: an error of ours, or values that can be read."""
    source = opened(llama)
    wholes = {name: (packed / name).read_bytes() for name in ("model.safetensors", "config.json")}
    random = np.random.default_rng(1)
    for name, whole in wholes.items():
        for at in random.integers(0, min(len(whole), 4000), 60).tolist():
            damaged = bytearray(whole)
            damaged[at] ^= 1 << int(random.integers(0, 7))
            (packed / name).write_bytes(damaged)
            try:
                artifact = open_decoded(source, packed)
                artifact.read(f"{Q}.weight")
                artifact.close()
            except LlmQuantizeError:
                continue
        (packed / name).write_bytes(whole)


def test_compressed_tensors_own_reader_agrees(llama: Path, tmp_path: Path, opened: Any) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    write_packed(llama, tmp_path / "packed", FORMS["W3A16"])
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    words, shape = stored[f"{Q}.weight_packed"], stored[f"{Q}.weight_shape"]
    codes = helpers.unpack_from_int32(words, 3, torch.Size(shape.tolist()))
    scale = stored[f"{Q}.weight_scale"].float().repeat_interleave(32, dim=1)
    artifact = open_decoded(opened(llama), tmp_path / "packed")
    assert torch.equal(artifact.read(f"{Q}.weight"), codes.float() * scale)


def test_the_source_itself_is_not_touched(packed: Path, llama: Path, opened: Any, tmp_path: Path) -> None:
    """Nothing is written beside what is read."""
    copy = Path(shutil.copytree(packed, tmp_path / "copy"))
    before = sorted(path.name for path in copy.iterdir())
    open_decoded(opened(llama), copy).read(f"{Q}.weight")
    assert sorted(path.name for path in copy.iterdir()) == before
