"""CTranslate2 models as models to start from: the configuration is derived from their numbers, and proved."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from llm_quantize.advice.describe import describe
from llm_quantize.architectures import open_architecture
from llm_quantize.artifacts.verify import verify
from llm_quantize.errors import LlmQuantizeError, MalformedInputError, UnsupportedError
from llm_quantize.formats.ctranslate2.families import FAMILIES
from llm_quantize.io.ctranslate2_file import MODEL_FILE, read_model_file
from llm_quantize.models.opening import open_model, open_source
from llm_quantize.options import CalibrationOptions, MethodOptions, Options
from llm_quantize.pipeline import plan, quantize
from tests.formats.test_ctranslate2 import VARIANTS as CONVERTED
from tests.hearing import into
from tests.tiny_models import THETA, make_tiny, quiet

RTN = Options(threads=1, method=MethodOptions(method="rtn"))
VARIANTS: dict[str, dict[str, Any]] = {
    **CONVERTED,
    "llama3": {},
    "mistral-wide": {"sliding_window": None, "head_dim": 24},
    "phi3": {"sliding_window": None},
    "gpt_neox": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "gpt_neox-serial": {},
    "qwen3-tied": {},
}
SAME = {
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "tie_word_embeddings", "vocab_size"),
    *("rms_norm_eps", "layer_norm_eps", "sliding_window"),
}
SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def net(variant: str, place: Path) -> Path:
    name = variant.removesuffix("-scaled").removesuffix("-wide").removesuffix("-tied")
    return make_tiny(name, place, **VARIANTS[variant])


def made(model: str | Path, place: Path, format: str, level: str, **how: Any) -> Path:
    (result,) = quantize(str(model), format, levels=[level], output_dir=place, options=RTN, **how)
    return result.path


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_family_comes_back(variant: str, tmp_path: Path) -> None:
    """Names, shapes and values of the checkpoint, and a configuration that says the same of the network."""
    model = net(variant, tmp_path / "net")
    ours = made(model, tmp_path, "ctranslate2", "float32")
    original = json.loads((model / "config.json").read_text())
    with open_source(str(ours)).checkpoint as found, open_source(str(model)).checkpoint as wanted:
        used = {name: info for name, info in wanted.tensors.items() if name in found.tensors}
        assert {name: info.shape for name, info in found.tensors.items()} == {n: i.shape for n, i in used.items()}
        assert not {name for name in wanted.tensors if name not in used and "lm_head" not in name}
        for name in found.tensors:
            rows = found.matrix(name)[0]
            expected = np.asarray(wanted.read_rows(name, 0, rows))
            if expected.dtype == np.uint16:
                expected = (expected.astype(np.uint32) << 16).view(np.float32)
            assert np.array_equal(found.read_rows(name, 0, rows), expected), name
        assert found.kind == ""
        one, other = open_architecture(found.config), open_architecture(original)
        for name in SAME:
            assert one.config.get(name) == other.config.get(name), name
        assert one.hyper.head_dim == other.hyper.head_dim
        assert one.sliding == other.sliding
        for name in ("kind", "theta", "share", "local_theta"):
            assert getattr(one.rope, name, None) == getattr(other.rope, name, None), name
        for name in SCALING:
            assert one.rope is None or other.rope is None or one.rope.scaling.get(name) == other.rope.scaling.get(name)
        words, said = (json.loads((ours / name).read_text()) for name in ("vocabulary.json", "config.json"))
        for role in ("bos", "eos"):
            number = found.config[f"{role}_token_id"]
            assert number is None or words[number] == said[f"{role}_token"]


@pytest.mark.parametrize("variant", ["llama", "gemma3_text", "gpt2", "falcon"])
def test_a_float_model_of_it_computes_the_same(variant: str, tmp_path: Path) -> None:
    """A directory made of the converter's own file and one made of the model have the same logits in transformers."""
    from ctranslate2.converters import TransformersConverter

    from tests.tiny_models import reference_logits, reference_model

    model = net(variant, tmp_path / "net")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "unk_token": "<pad>"}))
    with quiet():
        TransformersConverter(str(model), copy_files=["tokenizer.json", "tokenizer_config.json"]).convert(
            str(tmp_path / "ct2"), quantization="float32"
        )
    back = made(tmp_path / "ct2", tmp_path / "back", "safetensors", "F32")
    tokens = [3, 14, 15, 9, 26, 5, 35]
    ours, theirs = (reference_logits(reference_model(place), tokens) for place in (back, model))
    assert np.allclose(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("level", ["int8", "int8_float16", "int16", "float16", "bfloat16"])
def test_rounded_ones_are_what_the_runtime_computes_with(level: str, tmp_path: Path) -> None:
    model = net("llama", tmp_path / "net")
    ours = made(model, tmp_path, "ctranslate2", level)
    name = "model.layers.1.mlp.down_proj.weight"
    heard: list[dict[str, Any]] = []
    with open_source(str(ours), on_event=into(heard)).checkpoint as found:
        assert (found.kind != "") == level.startswith("int")
        assert any("already quantized" in str(event.get("text")) for event in heard) == level.startswith("int")
        file = read_model_file(ours / MODEL_FILE)
        entry = file.find("decoder/layer_1/ffn/linear_1/weight")
        assert entry is not None
        data = (ours / MODEL_FILE).read_bytes()
        stored = data[entry.offset : entry.offset + entry.nbytes]
        if level.startswith("int"):
            scale = file.find(f"{entry.name}_scale")
            assert scale is not None
            scales = np.frombuffer(data[scale.offset : scale.offset + scale.nbytes], np.float32).reshape(-1, 1)
            codes = np.frombuffer(stored, np.int8 if level.startswith("int8") else np.int16).reshape(entry.shape)
            expected = codes.astype(np.float32) / scales
        else:
            expected = np.frombuffer(stored, np.float16 if level == "float16" else np.uint16).reshape(entry.shape)
        values = np.asarray(found.read_rows(name, 0, entry.shape[0]))
        assert values.dtype == expected.dtype == found.stored_dtype(name)
        assert np.array_equal(values, expected)
        assert np.array_equal(np.asarray(found.read_rows(name, 3, 9, transpose=True)), expected.T[3:9])
        whole = np.empty(values.nbytes, np.uint8)
        assert found.raw_rows(name, 0, entry.shape[0], buffer=whole.data).tobytes() == whole.tobytes()
        assert whole.tobytes() == values.tobytes()
    plain = made(ours, tmp_path / "out", "safetensors", "F32")
    stored_values = load_file(plain / "model.safetensors")[name].numpy()
    as_floats = (expected.astype(np.uint32) << 16).view(np.float32) if level == "bfloat16" else expected
    assert np.array_equal(stored_values, as_floats)
    assert not verify(plain, source=str(ours)).problems


def test_it_becomes_a_gguf_where_its_tokenizer_lies_beside(tmp_path: Path) -> None:
    model = net("llama", tmp_path / "net")
    ours = made(model, tmp_path, "ctranslate2", "int8")
    path = made(ours, tmp_path / "out", "gguf", "Q8_0")
    assert not verify(path, source=str(ours)).problems
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (ours / name).unlink()
    with pytest.raises(LlmQuantizeError, match="no tokenizer"):
        plan(str(ours), "gguf", levels=["Q8_0"])
    assert describe(str(ours))["format"] == "ctranslate2"


def test_text_goes_through_it(tmp_path: Path) -> None:
    """A calibrated run, block by block, with norms that are bfloat16 and matrices that are decoded."""
    model = net("llama", tmp_path / "net")
    ours = made(model, tmp_path, "ctranslate2", "int8")
    (result,) = quantize(
        str(ours),
        "gptq",
        levels=["4bit"],
        output_dir=tmp_path,
        options=Options(
            threads=1,
            method=MethodOptions(group_size=32),
            calibration=CalibrationOptions(samples=2, length=64),
        ),
    )
    assert not verify(result.path, source=str(ours)).problems


def test_what_is_not_kept_is_told(tmp_path: Path) -> None:
    model = net("llama", tmp_path / "net")
    ours = made(model, tmp_path, "ctranslate2", "int8")
    with open_model(str(ours)) as found:
        assert any("how many tokens it was trained for" in note for note in found.notes)
    settings = json.loads((ours / "tokenizer_config.json").read_text())
    (ours / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 777}))
    with open_model(str(ours)) as found:
        assert found.config["max_position_embeddings"] == 777
    with open_model(str(made(net("gpt2", tmp_path / "gpt2"), tmp_path, "ctranslate2", "int8"))) as found:
        assert found.notes == ()
        assert found.config["max_position_embeddings"] == 512


def test_the_owners_llama_3_has_lost_its_scaling(tmp_path: Path) -> None:
    """The converter leaves the factor out, and nothing brings it back."""
    from ctranslate2.converters import TransformersConverter

    model = net("llama3", tmp_path / "net")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "unk_token": "<pad>"}))
    with quiet():
        TransformersConverter(str(model)).convert(str(tmp_path / "ct2"), quantization="int8")
    with pytest.raises(UnsupportedError, match="no model to start from"):
        open_model(str(tmp_path / "ct2"))


def test_a_network_of_another_kind(tmp_path: Path) -> None:
    ours = made(net("llama", tmp_path / "net"), tmp_path, "ctranslate2", "int8")
    data = (ours / MODEL_FILE).read_bytes()
    for number, (old, new, words) in enumerate(
        (
            (b"TransformerDecoderSpec", b"TransformerEncoderSpec", "no decoder that continues text"),
            (b"decoder/layer_0/", b"decoder/layer_9/", "of no family"),
            (b"ffn/linear_0_noact", b"ffn/linear_0_noacts"[:18].replace(b"t", b"x"), "of no family"),
        )
    ):
        place = Path(shutil.copytree(ours, tmp_path / str(number)))
        assert len(old) == len(new)
        (place / MODEL_FILE).write_bytes(data.replace(old, new))
        with pytest.raises(UnsupportedError, match=words) as caught:
            open_model(str(place))
        assert caught.value.file == str(place / MODEL_FILE)


@pytest.mark.parametrize(
    "name", ["num_heads", "activation", "layer_0/self_attention/rotary_base", "layer_1/self_attention/num_heads_kv"]
)
@pytest.mark.parametrize("value", [0, 1, 3, -1, 255])
def test_numbers_that_lie(name: str, value: int, tmp_path: Path) -> None:
    """A network that would be another model's is refused, never guessed at."""
    ours = made(net("llama", tmp_path / "net"), tmp_path, "ctranslate2", "int8")
    entry = read_model_file(ours / MODEL_FILE).variables[f"decoder/{name}"]
    data = bytearray((ours / MODEL_FILE).read_bytes())
    form = {1: "<B", 2: "<H", 4: "<I"}[entry.nbytes]
    struct.pack_into(form, data, entry.offset, value % (1 << (8 * entry.nbytes)))
    (ours / MODEL_FILE).write_bytes(data)
    try:
        with open_source(str(ours)).checkpoint as found:
            told = found.config
    except LlmQuantizeError:
        return
    original = json.loads((tmp_path / "net" / "config.json").read_text())
    assert told["hidden_size"] == original["hidden_size"]
    assert name in ("num_heads", "activation") or "rotary_base" in name
    if name == "num_heads":
        assert told["num_attention_heads"] == value


@pytest.mark.parametrize("name", ["vocabulary.json", "tokenizer_config.json"])
def test_damage_beside_the_network_is_named(tmp_path: Path, name: str) -> None:
    directory = made(net("llama", tmp_path / "net"), tmp_path, "ctranslate2", "int8")
    (directory / name).write_bytes(b'{"a"')
    with pytest.raises(MalformedInputError, match="not JSON") as caught:
        open_model(str(directory))
    assert caught.value.file == str(directory / name)


def test_the_configuration_does_not_depend_on_the_run(tmp_path: Path) -> None:
    """Nor on the order in which this interpreter keeps sets."""
    directory = made(net("llama", tmp_path / "net"), tmp_path, "ctranslate2", "int8")
    code = (
        "import json, sys; from llm_quantize.models.opening import open_model; "
        "print(json.dumps(open_model(sys.argv[1]).config))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code, str(directory)],
            env={**os.environ, "PYTHONHASHSEED": seed}, check=True, capture_output=True,
        ).stdout
        for seed in "012345"
    }  # fmt: skip
    assert len(found) == 1
    assert json.loads(found.pop())["model_type"] == "llama"


def test_every_family_of_the_format_is_tried() -> None:
    tried = {net.partition("-")[0].rstrip("3") if net == "llama3" else net.partition("-")[0] for net in VARIANTS}
    assert tried == set(FAMILIES) - {"gemma3"}, THETA
