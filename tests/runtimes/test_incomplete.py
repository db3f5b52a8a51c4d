"""A directory that lacks a weight is refused by every runtime: none computes with what happens to stand there."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from llm_quantize.cli import run
from llm_quantize.errors import IntegrityError, LlmQuantizeError, MalformedInputError, UnsupportedError
from llm_quantize.io.gguf_file import read_gguf
from llm_quantize.models.opening import open_source
from llm_quantize.pipeline import quantize
from llm_quantize.runtimes import generate, transformers, vllm
from llm_quantize.runtimes.base import Request, refuse_incomplete
from llm_quantize.runtimes.workers.telling import IncompleteError, refuse_unfilled
from tests.oracles.reference_directories import Layout, write_directory
from tests.tiny_models import make_tiny

UP = "model.layers.1.mlp.up_proj"
ASK = Request(prompts=("Once",), max_tokens=2, threads=1)


def without(model: Path, *names: str) -> Path:
    """The same directory less some tensors."""
    file = model / "model.safetensors"
    values = {name: value for name, value in load_file(file).items() if name not in names}
    save_file(values, file, {"format": "pt"})
    return model


def stranger(folder: Path) -> Path:
    """A model of a family that no reader here knows, with the tokenizer of another."""
    make_tiny("llama", folder)
    (folder / "model.safetensors").unlink()
    config = hf.OPTConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=2, ffn_dim=64, num_attention_heads=2, word_embed_proj_dim=32
    )
    hf.OPTForCausalLM(config).save_pretrained(folder)
    with pytest.raises(UnsupportedError):
        open_source(str(folder))
    return folder


@pytest.mark.parametrize("name", [f"{UP}.weight", "model.norm.weight", "lm_head.weight"])
def test_a_plain_directory(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = without(make_tiny("llama", tmp_path / "model"), name)
    monkeypatch.setenv("LLM_QUANTIZE_VLLM", sys.executable)  # refused before it is asked
    for answer in (lambda: list(generate(model, "Once", max_tokens=2, threads=1)), lambda: transformers.run(model, ASK),
                   lambda: vllm.run(model, ASK)):  # fmt: skip
        with pytest.raises(MalformedInputError, match="not in the checkpoint") as caught:
            answer()
        assert caught.value.tensor == name


@pytest.mark.parametrize(
    ("layout", "names", "kind"),
    [
        (Layout("gptq", group=32), [f"{UP}.scales"], IntegrityError),
        (Layout("awq", group=32, symmetric=False), [f"{UP}.qzeros"], IntegrityError),
        (Layout("compressed-tensors", group=32, symmetric=False), [f"{UP}.weight_zero_point"], IntegrityError),
        (Layout("compressed-tensors", group=32), ["model.norm.weight"], MalformedInputError),
        (
            Layout("compressed-tensors", group=32),
            [f"{UP}.weight_packed", f"{UP}.weight_scale", f"{UP}.weight_shape"],
            MalformedInputError,
        ),
    ],
    ids=lambda value: value.format if isinstance(value, Layout) else "",
)
def test_a_quantized_directory(
    layout: Layout, names: list[str], kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLM_QUANTIZE_VLLM", sys.executable)
    write_directory(make_tiny("llama", tmp_path / "model", intermediate_size=128), tmp_path / "packed", layout)
    packed = without(tmp_path / "packed", *names)
    for runtime in (transformers.run, vllm.run):
        with pytest.raises(kind):
            runtime(packed, ASK)


def reconfigured(model: Path, **settings: object) -> Path:
    """The same directory with other words in its quantization_config, or in all of its groups."""
    config = json.loads((model / "config.json").read_text())
    block = config["quantization_config"]
    for group in block.get("config_groups", {}).values():
        group["weights"] |= settings
    config["quantization_config"] = block if "config_groups" in block else block | settings
    (model / "config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize(
    ("layout", "settings", "field"),
    [
        (Layout("gptq", group=32), {"desc_act": True}, "g_idx"),
        (Layout("compressed-tensors", group=32), {"actorder": "group"}, "weight_g_idx"),
        (Layout("compressed-tensors", group=32), {"symmetric": False}, "weight_zero_point"),
    ],
)
def test_a_field_that_only_the_configuration_calls_for(
    layout: Layout, settings: dict[str, object], field: str, tmp_path: Path
) -> None:
    """Without it the values would be others, in silence."""
    source = make_tiny("llama", tmp_path / "model", intermediate_size=128)
    write_directory(source, tmp_path / "packed", layout)
    packed = reconfigured(tmp_path / "packed", **settings)
    if field == "g_idx":
        names = [name for name in load_file(packed / "model.safetensors") if name.endswith(".g_idx")]
        open_source(str(packed)).checkpoint.close()
        without(packed, names[-1])
    with pytest.raises(IntegrityError, match="that the configuration calls for") as caught:
        transformers.run(packed, ASK)
    assert str(caught.value.tensor).endswith(f".{field}")
    if field == "g_idx":  # in the order of the columns, or one group: nothing is lost
        open_source(str(reconfigured(packed, static_groups=True))).checkpoint.close()


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_quantized_family_that_is_not_known_here(symmetric: bool, tmp_path: Path) -> None:
    """transformers tells, also where it decodes the matrices while it loads them."""
    source = make_tiny("llama", tmp_path / "model", intermediate_size=128)
    packed = tmp_path / "packed"
    write_directory(source, packed, Layout("compressed-tensors", group=32, symmetric=symmetric))
    config = json.loads((packed / "config.json").read_text())
    config |= {"model_type": "helium", "architectures": ["HeliumForCausalLM"], "head_dim": 16}
    (packed / "config.json").write_text(json.dumps(config))
    without(packed, *[name for name in load_file(packed / "model.safetensors") if name.startswith(f"{UP}.")])
    with pytest.raises(IntegrityError, match="missing from its files") as caught:
        transformers.run(packed, ASK)
    assert UP in str(caught.value.found)


def test_a_family_that_is_not_known_here(tmp_path: Path) -> None:
    """What transformers tells of its loading is all there is: in this process, and in one of its own."""
    model = stranger(tmp_path / "model")
    assert "".join(generate(model, "Once", max_tokens=2, threads=1)) is not None
    name = "model.decoder.layers.1.fc1.weight"
    without(model, name)
    refuse_incomplete(model)
    for answer in (
        lambda: list(generate(model, "Once", max_tokens=2, threads=1)),
        lambda: transformers.run(model, ASK),
    ):
        with pytest.raises(IntegrityError, match="missing from its files") as caught:
            answer()
        assert name in str(caught.value.found)


ALL = ("generate", "run", "vllm")


def ask(runtime: str, model: Path) -> object:
    """What ``llm-quantize run`` does, transformers in a process of its own, and vLLM."""
    if runtime == "generate":
        return list(generate(model, "Once", max_tokens=2, threads=1))
    return (transformers.run if runtime == "run" else vllm.run)(model, ASK)


@pytest.mark.parametrize("beside", ["quant_config.json", "quantize_config.json", None])
@pytest.mark.parametrize("format", ["awq", "gptq"])
def test_codes_that_the_configuration_says_nothing_of(
    format: str, beside: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in 2023, when settings stood in a file of their own: every runtime would make up the matrices."""
    monkeypatch.setenv("LLM_QUANTIZE_VLLM", sys.executable)
    source = make_tiny("llama", tmp_path / "model", intermediate_size=128)
    packed = tmp_path / "packed"
    write_directory(source, packed, Layout(format, group=32, symmetric=format == "gptq"))
    config = json.loads((packed / "config.json").read_text())
    config.pop("quantization_config")
    (packed / "config.json").write_text(json.dumps(config))
    if beside is not None:
        said = {"w_bit": 4, "q_group_size": 32, "bits": 4, "group_size": 32, "zero_point": True, "version": "GEMM"}
        (packed / beside).write_text(json.dumps(said))
    for runtime in ALL:
        with pytest.raises(UnsupportedError, match=r"already quantized \(GPTQ or AWQ\)") as caught:
            ask(runtime, packed)
        assert "quantization_config" in (caught.value.remedy or "")


def test_codes_of_mlx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_QUANTIZE_VLLM", sys.executable)
    model = make_tiny("llama", tmp_path / "model")
    values = load_file(model / "model.safetensors")
    values |= {f"{UP}.weight": torch.zeros((96, 8), dtype=torch.uint32), f"{UP}.scales": torch.zeros((96, 1))}
    save_file(values, model / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    said = {"group_size": 64, "bits": 4}
    for settings, kind, words in (
        ({}, UnsupportedError, "MLX"),
        ({"quantization_config": said}, UnsupportedError, "MLX"),
        ({"quantization": said}, IntegrityError, "a field of a quantized matrix is absent"),
    ):
        (model / "config.json").write_text(json.dumps(config | settings))
        for runtime in ALL:
            with pytest.raises(kind, match=words):
                ask(runtime, model)


def test_a_quantized_family_that_is_not_known_here_is_not_for_a_runtime_that_does_not_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLM_QUANTIZE_VLLM", sys.executable)
    model = stranger(tmp_path / "model")
    refuse_incomplete(model, tells=True)
    config = json.loads((model / "config.json").read_text())
    block = {"quant_method": "hqq"}
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": block}))
    with pytest.raises(UnsupportedError, match="whether this model is whole cannot be known") as caught:
        vllm.run(model, ASK)
    assert "--runtime transformers" in (caught.value.remedy or "")


def test_a_stray_file_that_transformers_would_take_for_the_model(tmp_path: Path) -> None:
    """It reads model.safetensors first, our reader and vLLM what the index names."""
    model = make_tiny("llama", tmp_path / "model")
    values = load_file(model / "model.safetensors")
    save_file(values, model / "model-00001-of-00001.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(values, "model-00001-of-00001.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    without(model, f"{UP}.weight")
    for runtime in ("generate", "run"):
        with pytest.raises(IntegrityError, match="missing from its files") as caught:
            ask(runtime, model)
        assert f"{UP}.weight" in str(caught.value.found)


def test_a_gguf_file(tmp_path: Path) -> None:
    """llama.cpp refuses by itself what lacks a tensor that its graph needs."""
    (result,) = quantize(str(make_tiny("llama", tmp_path / "model")), levels=["F16"], output_dir=tmp_path)
    file = read_gguf(result.path)
    reader = gguf.GGUFReader(result.path)
    for left_out in ("blk.1.ffn_up.weight", "output_norm.weight", "token_embd.weight"):
        broken = tmp_path / f"{left_out}.gguf"
        writer = gguf.GGUFWriter(broken, "llama")
        for key, value in file.metadata.items():
            if key != "general.architecture":
                writer.add_key_value(key, value.value, value.type, value.item)
        for tensor in reader.tensors:
            if tensor.name != left_out:
                writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(LlmQuantizeError) as caught:
            ask("generate", broken)
        assert left_out in str(caught.value)


def test_what_is_there_under_another_name_is_the_runtimes_limit() -> None:
    refuse_unfilled({"missing_keys": [], "unexpected_keys": ["left.over"]})
    with pytest.raises(IncompleteError, match=r"2 parameters \(a, b\)"):
        refuse_unfilled({"missing_keys": ["b", "a"], "unexpected_keys": []})
    with pytest.raises(RuntimeError, match=r"1 tensors of the file were not used \(c\)") as caught:
        refuse_unfilled({"missing_keys": ["a"], "unexpected_keys": ["c"]})
    assert not isinstance(caught.value, IncompleteError)
    with pytest.raises(RuntimeError, match=r"1 tensors were left at random values \(d\)"):
        refuse_unfilled({"missing_keys": [], "unexpected_keys": [], "mismatched_keys": {("d", (1,), (2,))}})


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = without(make_tiny("llama", tmp_path / "model"), f"{UP}.weight")
    assert run(["run", str(model), "Once", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["tensor"] == f"{UP}.weight"


def test_what_only_our_reader_does_not_understand_runs(tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "model")
    values = load_file(model / "model.safetensors") | {"model.layers.0.extra.weight": torch.zeros(4)}
    save_file(values, model / "model.safetensors", {"format": "pt"})
    assert "".join(generate(model, "Once", max_tokens=2, threads=1))
