"""A quantized directory as a model to start from: decoded as everywhere, told as what it is, else refused."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_quantize.advice.describe import describe
from llm_quantize.architectures.rows import read_output_rows, to_float32
from llm_quantize.artifacts import preflight
from llm_quantize.artifacts.manifest import read_manifest
from llm_quantize.artifacts.opening import open_decoded
from llm_quantize.artifacts.verify import verify
from llm_quantize.calibration.statistics import collecting_sizes
from llm_quantize.errors import IntegrityError, MalformedInputError, UnsupportedError, UsageError
from llm_quantize.io.artifact_paths import manifest_path
from llm_quantize.models.identity import content_digest
from llm_quantize.models.opening import open_model, open_source
from llm_quantize.models.safetensors import open_checkpoint
from llm_quantize.options import MethodOptions
from llm_quantize.pipeline import Options, plan, quantize
from llm_quantize.streams.sizes import from_headers
from tests.hearing import into
from tests.oracles.packed_formats import Form, write_packed
from tests.oracles.reference_directories import Layout, write_directory
from tests.safetensors_by_hand import write_tensors
from tests.tiny_models import make_tiny, row_lengths_of_256


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("source") / "tiny", **row_lengths_of_256("llama"))


def made(model: Path, place: Path, format: str, level: str, **method: Any) -> Path:
    options = Options(threads=1, method=MethodOptions(method="rtn", **method) if format != "gguf" else MethodOptions())
    (result,) = quantize(str(model), format, levels=[level], output_dir=place, options=options)
    return result.path


@pytest.mark.parametrize(
    ("format", "level", "kind"),
    [("gptq", "4bit", "GPTQ-4bit"), ("awq", "4bit", "AWQ-4bit"), ("compressed-tensors", "W4A16_ASYM", "W4A16_ASYM")],
)
def test_our_directory_becomes_a_gguf_of_its_values(
    llama: Path, tmp_path: Path, format: str, level: str, kind: str
) -> None:
    directory = made(llama, tmp_path, format, level, group_size=32)
    events: list[dict[str, Any]] = []
    with open_source(str(directory), on_event=into(events)).checkpoint as model:
        assert (model.kind, model.left_out) == (kind, {})
        assert any(f"already quantized ({kind})" in str(event.get("text")) for event in events)
        assert "quantization_config" not in model.config
        assert {info.dtype for info in model.tensors.values()} == {
            "BF16",
            "int4_g32" if format == "gptq" else "int4_g32_asym",
        }
        assert set(model.folded.values()) < set(model.tensors)
    path = made(directory, tmp_path / "out", "gguf", "F32")
    source, original = open_source(str(directory)), open_source(str(llama))
    decoded = open_decoded(original, directory)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for output in original.tensors.outputs:
        if output.constant is None:
            rows = int(np.prod(output.shape[:-1], dtype=np.int64))
            expected = np.concatenate([part for _, part in decoded.stored_rows(output.name, 0, rows)])
            assert np.array_equal(found[output.name].data.reshape(expected.shape), expected), output.name
            again = to_float32(read_output_rows(source.checkpoint, output, 0, rows))
            assert np.array_equal(again, expected)
    decoded.close()
    source.checkpoint.close()
    original.checkpoint.close()
    manifest = read_manifest(path.with_name(f"{path.name}.manifest.json")) or read_manifest(path / "manifest.json")
    assert manifest is not None
    assert manifest["identity"]["source_kind"] == kind
    assert verify(path, source=str(directory)).ok
    assert describe(str(directory))["quantization"]["format"] == format


def test_a_directory_of_another_writer_is_quantized_again(llama: Path, tmp_path: Path) -> None:
    expected = write_directory(llama, tmp_path / "packed", Layout("gptq", group=32, symmetric=False))
    with open_model(str(tmp_path / "packed")) as model:
        for name, values in expected.items():
            rows, columns = model.matrix(name)
            assert model.stored_dtype(name) == np.float32
            assert np.array_equal(model.read_rows(name, 3, rows - 1), values[3 : rows - 1])
            assert np.array_equal(model.read_rows(name, 1, columns, transpose=True), values.T[1:])
            digest = hashlib.sha256()
            model.read_rows(name, 0, 5, digest=digest)
            assert digest.digest() == hashlib.sha256(model.raw_rows(name, 0, 5)).digest()
    made(tmp_path / "packed", tmp_path / "again", "awq", "4bit", group_size=32)
    (again,) = (tmp_path / "again").iterdir()
    assert verify(again, source=str(tmp_path / "packed")).ok


def test_the_digest_follows_the_codes(llama: Path, tmp_path: Path) -> None:
    write_directory(llama, tmp_path / "packed", Layout("gptq", group=32))
    with open_model(str(tmp_path / "packed")) as model:
        before = content_digest(model)
        info = next(info for name, info in model.tensors.items() if name.endswith("q_proj.weight"))
    data = bytearray(info.file.read_bytes())
    data[info.offset] ^= 16
    info.file.write_bytes(data)
    with open_model(str(tmp_path / "packed")) as model:
        assert content_digest(model) != before


def test_headers_are_enough_to_plan(llama: Path, tmp_path: Path) -> None:
    write_directory(llama, tmp_path / "packed", Layout("compressed-tensors", group=32))
    (planned,) = plan(str(tmp_path / "packed"), "gguf", levels=["Q8_0"], options=Options())
    assert planned.identity["source_kind"] == "W4A16"
    with open_model(str(tmp_path / "packed"), headers_only=True) as model:
        for read in (model.read_rows, model.raw_rows):
            with pytest.raises(UsageError, match="headers only"):
                read("model.layers.0.mlp.up_proj.weight", 0, 1)


def test_what_is_not_decoded_is_refused(llama: Path, tmp_path: Path) -> None:
    place = tmp_path / "packed"
    write_directory(llama, place, Layout("gptq", group=32))
    config = json.loads((place / "config.json").read_text())
    write = lambda **changes: (place / "config.json").write_text(  # noqa: E731
        json.dumps(config | {"quantization_config": config["quantization_config"] | changes})
    )
    write(checkpoint_format="marlin")
    with pytest.raises(UnsupportedError, match="marlin"):
        open_model(str(place))
    write(quant_method="hqq")
    with pytest.raises(UnsupportedError, match=r"already quantized[\s\S]*hqq"):
        open_model(str(place))
    write()
    with pytest.raises(UnsupportedError, match="already quantized"):
        open_checkpoint(str(place))
    write_tensors(place / "model.safetensors", {"model.norm.weight": np.ones(4, np.float32)})
    with pytest.raises(IntegrityError, match="none of its tensors is"):
        open_model(str(place))


def with_biases(place: Path, value: float) -> Path:
    """The directory with a bias for every matrix that is quantized, as AutoGPTQ writes them."""
    tensors = load_file(place / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".qweight")]:
        tensors[name.replace(".qweight", ".bias")] = torch.full((tensors[name].shape[1],), value, dtype=torch.float16)
    save_file(tensors, place / "model.safetensors", {"format": "pt"})
    return place


def test_biases_of_zeros_are_left_out_and_told(llama: Path, tmp_path: Path) -> None:
    write_directory(llama, tmp_path / "packed", Layout("gptq", group=32))
    with open_model(str(tmp_path / "packed")) as model:
        wanted = set(model.tensors)
    place = with_biases(tmp_path / "packed", 0.0)
    heard: list[dict[str, Any]] = []
    with open_source(str(place), on_event=into(heard)).checkpoint as model:
        assert set(model.tensors) == wanted
        assert len(model.left_out) == 14
    assert any("14 biases that this model does not have" in str(event.get("text")) for event in heard)
    path = made(place, tmp_path, "gguf", "Q8_0")
    assert verify(path, source=str(place)).ok
    manifest = read_manifest(path.with_name(f"{path.name}.manifest.json"))
    assert manifest is not None
    assert manifest["left_out"]["model.layers.0.mlp.up_proj.bias"] == "a bias of zeros, where the model has none"
    with pytest.raises(MalformedInputError, match="does not have"):
        open_source(str(with_biases(place, 0.5)))


def test_a_bias_that_the_model_has_stays_even_where_it_is_zero(tmp_path: Path) -> None:
    model = make_tiny("llama-bias", tmp_path / "model", hidden_size=128, intermediate_size=128)
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.bias"
    tensors[name].zero_()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    write_directory(model, tmp_path / "packed", Layout("gptq", group=32))
    with open_source(str(tmp_path / "packed")).checkpoint as opened:
        assert name in opened.tensors
        assert opened.left_out == {}


@pytest.mark.parametrize("format", ["gguf", "safetensors"])
def test_matrices_that_the_model_has_the_other_way_round(tmp_path: Path, format: str) -> None:
    """GPT-2 stores (in, out); its quantized directories (out, in) like all others."""
    model = make_tiny("gpt2", tmp_path / "gpt2")
    expected = write_packed(
        model,
        tmp_path / "packed",
        Form("gptq"),
        transposed=lambda name: re.search(r"\.c_\w+\.weight", name) is not None,
    )
    with open_source(str(tmp_path / "packed")).checkpoint as opened:
        for name, values in expected.items():
            rows = opened.matrix(name)[0]
            assert np.array_equal(to_float32(opened.read_rows(name, 0, rows)).reshape(values.shape), values.numpy())
        largest = max(values.numel() for name, values in expected.items() if ".c_" in name and values.ndim == 2)
        assert opened.scratch > 4 * largest
    path = made(tmp_path / "packed", tmp_path / "out", format, "F32")
    assert verify(path, source=str(tmp_path / "packed")).ok
    if format == "safetensors":
        found = load_file(path / "model.safetensors")
        assert all(torch.equal(found[name], values) for name, values in expected.items())


@pytest.mark.parametrize(
    ("format", "level", "method"),
    [
        ("awq", "4bit", {"group_size": 32, "ignore": ("down_proj",)}),
        ("safetensors", "BF16", {}),
        ("gguf", "Q4_K_M", {}),
    ],
)
def test_what_is_made_of_a_quantized_directory(
    llama: Path, tmp_path: Path, format: str, level: str, method: dict[str, Any]
) -> None:
    source = made(llama, tmp_path / "gptq", "gptq", "4bit", group_size=32)
    path = made(source, tmp_path / "out", format, level, **method)
    outcome = verify(path, source=str(source))
    assert outcome.ok, outcome.all_problems()
    manifest = read_manifest(manifest_path(path))
    assert manifest is not None
    assert manifest["identity"]["source_kind"] == "GPTQ-4bit"
    if format == "awq":
        kept = [check for check in outcome.tensors if check.name.endswith("down_proj.weight")]
        assert {(check.type, check.relative_error) for check in kept} == {("f32", 0.0)}
        config = json.loads((path / "config.json").read_text())
        assert config["quantization_config"]["quant_method"] == "awq"
    if format == "safetensors":
        assert "quantization_config" not in json.loads((path / "config.json").read_text())
        assert describe(str(path))["made_from"] == {"model": source.name, "kind": "GPTQ-4bit", "level": "BF16"}
        assert "made_from" not in describe(str(llama))


def test_what_a_thread_holds_while_it_decodes_is_planned(llama: Path, tmp_path: Path) -> None:
    write_directory(llama, tmp_path / "packed", Layout("gptq", group=32))
    with open_source(str(tmp_path / "packed")).checkpoint as opened:
        scratch = opened.scratch
    sizes = {}
    for model in (llama, tmp_path / "packed"):
        planned = plan(str(model), "gguf", levels=["F32"])
        sizes[model] = preflight.rounding_sizes([replace(one, source_itemsize=4) for one in planned]).each
    assert sizes[tmp_path / "packed"] - sizes[llama] == scratch > 16 << 20
    network, plain = (
        from_headers(open_source(str(model), headers_only=True)) for model in (tmp_path / "packed", llama)
    )
    for kinds in (["imatrix"], ["hessian"]):
        each = [
            collecting_sizes(one, kinds, (4, 32), device="cpu").each for one in (network, replace(network, scratch=0))
        ]
        assert each[0] - each[1] == scratch
    assert plain.scratch == 0
