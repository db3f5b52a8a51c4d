"""CTranslate2 models: byte for byte what its own converter makes of the same model, and what a plan refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ctranslate2
import pytest
import torch
import transformers
from ctranslate2.converters import TransformersConverter
from safetensors.torch import load_file, save_file
from transformers.models.phi3 import modeling_phi3

from llm_quantize import pipeline
from llm_quantize.calibration.tokens import TextTokenizer
from llm_quantize.errors import LlmQuantizeError, NumericPolicyError, UnsupportedError, UsageError
from llm_quantize.evaluation.quality import measure_quality
from llm_quantize.evaluation.texts import evaluation_text
from llm_quantize.events import ignore
from llm_quantize.formats.ctranslate2.families import FAMILIES
from llm_quantize.formats.ctranslate2.levels import LEVELS
from llm_quantize.formats.ctranslate2.vocabulary import special_tokens, tokens_of
from llm_quantize.formats.gguf.levels import Overrides
from llm_quantize.io.ctranslate2_file import MODEL_FILE, Entry, read_model_file
from llm_quantize.models.opening import open_source
from llm_quantize.options import CalibrationOptions, MethodOptions, Options
from llm_quantize.pipeline import quantize
from tests.tiny_models import THETA, make_tiny, quiet

RTN = Options(threads=1, method=MethodOptions(method="rtn"))
LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": THETA}

# variant: what differs from tests/tiny_models.py, so that the converter takes it
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-bias": {},
    "llama-scaled": {"rope_parameters": LINEAR},
    "mistral": {"sliding_window": 64},
    "qwen2": {},
    "qwen3": {},
    "gemma3_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    },
    "gpt2": {"vocab_size": 265},
    "falcon": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, found = tmp_path_factory.mktemp("models"), {}
    for variant, changes in VARIANTS.items():
        found[variant] = make_tiny(variant.removesuffix("-scaled"), folder / variant, **changes)
        settings = json.loads((found[variant] / "tokenizer_config.json").read_text())
        settings["unk_token"] = "<pad>"
        (found[variant] / "tokenizer_config.json").write_text(json.dumps(settings))
    return found


def converted(model: Path, place: Path, level: str) -> Path:
    """What the owner's converter makes."""
    with quiet():
        TransformersConverter(str(model)).convert(str(place), quantization=level, force=True)
    return place


def made(model: Path, place: Path, level: str, options: Options = RTN) -> Path:
    (result,) = pipeline.quantize(str(model), "ctranslate2", levels=[level], output_dir=place, options=options)
    assert result.size == sum(file.stat().st_size for file in result.path.iterdir() if file.name != "manifest.json")
    return result.path


def variable(folder: Path, entry: Entry) -> bytes:
    return (folder / MODEL_FILE).read_bytes()[entry.offset : entry.offset + entry.nbytes]


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_is_the_converters_file(models: dict[str, Path], level: str, tmp_path: Path) -> None:
    ours, theirs = made(models["llama"], tmp_path / "ours", level), converted(models["llama"], tmp_path / "own", level)
    for name in (MODEL_FILE, "config.json", "vocabulary.json"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "llama"])
def test_every_family_is_the_converters_file(models: dict[str, Path], variant: str, tmp_path: Path) -> None:
    ours = made(models[variant], tmp_path / "ours", "int8_float16")
    theirs = converted(models[variant], tmp_path / "own", "int8_float16")
    assert (ours / MODEL_FILE).read_bytes() == (theirs / MODEL_FILE).read_bytes()
    if variant != "qwen2":  # whose class of tokenizer adds a token of its own to this artificial vocabulary
        assert (ours / "config.json").read_bytes() == (theirs / "config.json").read_bytes()
        assert (ours / "vocabulary.json").read_bytes() == (theirs / "vocabulary.json").read_bytes()


@pytest.mark.parametrize("variant", ["gpt_neox", "gpt_neox-serial"])
def test_gpt_neox_is_the_converters_file(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The converter asks for two names that GPT-NeoX had in transformers 4."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    model = make_tiny(variant, tmp_path / "model", rope_parameters=rope)
    share = property(lambda config: config.rope_parameters["partial_rotary_factor"])
    monkeypatch.setattr(transformers.GPTNeoXConfig, "rotary_pct", share, raising=False)
    head = property(lambda model: model.lm_head)
    monkeypatch.setattr(transformers.GPTNeoXForCausalLM, "embed_out", head, raising=False)
    ours, theirs = made(model, tmp_path / "ours", "int8"), converted(model, tmp_path / "own", "int8")
    assert (ours / MODEL_FILE).read_bytes() == (theirs / MODEL_FILE).read_bytes()


@pytest.mark.parametrize("window", [None, 64])
def test_phi_3_is_the_converters_file(window: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The converter asks for what Phi-3 had in transformers 4."""
    rope = {"rope_type": "default", "rope_theta": 1e4}
    model = make_tiny("phi3", tmp_path / "model", rope_parameters=rope, sliding_window=window)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "unk_token": "<pad>"}))
    monkeypatch.setattr(transformers.Phi3Config, "rope_scaling", property(lambda config: None), raising=False)
    rotary = property(lambda attention: SimpleNamespace(long_factor=None, short_factor=None))
    monkeypatch.setattr(modeling_phi3.Phi3Attention, "rotary_emb", rotary, raising=False)
    theirs, ours = converted(model, tmp_path / "own", "int8"), made(model, tmp_path / "ours", "int8")
    for name in (MODEL_FILE, "config.json", "vocabulary.json"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    (plan,) = pipeline.plan(str(model), "ctranslate2", levels=["int8"], options=RTN)
    assert any("sliding window" in text for text in plan.warnings) == (window is not None)


def test_all_families_are_held_against_the_converter() -> None:
    with_oracle = {name.partition("-")[0] for name in VARIANTS}
    # gemma3 is gemma3_text under other names; gpt_neox and phi3 have tests of their own.
    assert set(FAMILIES) - with_oracle == {"gemma3", "gpt_neox", "phi3"}


def test_what_the_converter_forgets_of_llama_3(tmp_path: Path) -> None:
    """The scaling's factor and context, without which the runtime computes no scaling at all."""
    model = make_tiny("llama3", tmp_path / "llama3")
    ours, theirs = made(model, tmp_path / "ours", "int8"), converted(model, tmp_path / "own", "int8")
    found, wanted = read_model_file(ours / MODEL_FILE), read_model_file(theirs / MODEL_FILE)
    more = {name.rpartition("/")[2] for name in found.variables.keys() - wanted.variables.keys()}
    assert more == {"rotary_scaling_factor", "original_max_position_embeddings"}
    assert found.aliases == wanted.aliases == {"decoder/projection/weight": "decoder/embeddings/weight"}
    for name, entry in wanted.variables.items():
        assert variable(ours, found.variables[name]) == variable(theirs, entry), name


def test_aliases_are_of_the_same_weight_only(models: dict[str, Path], tmp_path: Path) -> None:
    """The converter also joins two norms that happen to be equal."""
    model = Path(shutil.copytree(models["llama"], tmp_path / "model"))
    values = load_file(model / "model.safetensors")
    for name in values:
        if name.endswith("norm.weight"):
            values[name] = torch.ones_like(values[name])
    save_file(values, model / "model.safetensors", {"format": "pt"})
    ours, theirs = made(model, tmp_path / "ours", "float32"), converted(model, tmp_path / "own", "float32")
    found, wanted = read_model_file(ours / MODEL_FILE), read_model_file(theirs / MODEL_FILE)
    assert len(wanted.aliases) == 4
    assert not found.aliases
    for name in found.variables:
        one, other = found.find(name), wanted.find(name)
        assert one is not None
        assert other is not None
        assert variable(ours, one) == variable(theirs, other), name


def test_rows_of_zeros_and_of_tiny_numbers(models: dict[str, Path], tmp_path: Path) -> None:
    model = Path(shutil.copytree(models["llama"], tmp_path / "model"))
    values = load_file(model / "model.safetensors")
    weight = values["model.layers.0.mlp.up_proj.weight"]
    weight[3], weight[5] = 0, weight[5].clamp(-1, 1) * 1e-38
    save_file(values, model / "model.safetensors", {"format": "pt"})
    ours, theirs = made(model, tmp_path / "ours", "int8"), converted(model, tmp_path / "own", "int8")
    assert (ours / MODEL_FILE).read_bytes() == (theirs / MODEL_FILE).read_bytes()
    for name in [name for name in values if name.endswith("down_proj.weight")]:
        values[name] = torch.zeros_like(values[name])
    save_file(values, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(NumericPolicyError, match="has no scale in int16"):
        made(model, tmp_path / "wide", "int16")


def test_another_type_than_the_configuration_says_is_told(models: dict[str, Path], tmp_path: Path) -> None:
    model = Path(shutil.copytree(models["llama"], tmp_path / "model"))
    values = {name: value.float() * 1.001 for name, value in load_file(model / "model.safetensors").items()}
    save_file(values, model / "model.safetensors", {"format": "pt"})
    (plan,) = pipeline.plan(str(model), "ctranslate2", levels=["int8"], options=RTN)
    assert any("stored in f32, the configuration says bf16" in text for text in plan.warnings)
    gamma = read_model_file(made(model, tmp_path / "out", "int8") / MODEL_FILE).variables["decoder/layer_norm/gamma"]
    assert gamma.dtype == "bfloat16"


@pytest.mark.parametrize("number", range(5))
def test_any_threads_give_the_same_bytes(models: dict[str, Path], tmp_path: Path, number: int) -> None:
    level = ("int8", "int16", "float16", "int8_bfloat16", "float32")[number]
    options = [Options(threads=threads, method=MethodOptions(method="rtn")) for threads in (1, 3)]
    files = [made(models["qwen2"], tmp_path / str(one.threads), level, one) / MODEL_FILE for one in options]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("variant", "changes", "what"),
    [
        ("qwen3_moe", {}, "models of type qwen3_moe are not written as CTranslate2"),
        ("starcoder2", {}, "models of type starcoder2"),
        ("llama-yarn", {}, "rotary scaling"),
        ("phi3-longrope", {}, "rotary scaling"),
        ("llama-dynamic", {}, "rotary scaling"),
        ("llama", {"head_dim": 32}, "size of a head"),
        ("falcon-new", {}, "new_decoder_architecture"),
        ("gemma3_text", {"query_pre_attn_scalar": 32}, "divides scores"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ],
)
def test_what_ctranslate2_does_not_compute_is_refused(
    tmp_path: Path, variant: str, changes: dict[str, Any], what: str
) -> None:
    model = make_tiny(variant, tmp_path / "model", **changes)
    with pytest.raises(UnsupportedError, match=what) as caught:
        pipeline.plan(str(model), "ctranslate2", levels=["int8"], options=RTN)
    assert caught.value.remedy is not None
    assert "gguf" in caught.value.remedy
    assert caught.value.file == str(model / "config.json")


@pytest.mark.parametrize(
    "options",
    [
        Options(method=MethodOptions(transform="awq")),
        Options(method=MethodOptions(group_size=64)),
        Options(method=MethodOptions(symmetric=False)),
        Options(method=MethodOptions(ignore=("q_proj",))),
        Options(method=MethodOptions(shard_size=10**6)),
        Options(method=MethodOptions(compute_dtype="float16")),
        Options(overrides=Overrides(pure=True)),
        Options(split_max_size=10**6),
    ],
)
def test_options_of_other_formats_are_refused(models: dict[str, Path], options: Options) -> None:
    with pytest.raises(UsageError, match="ctranslate2"):
        pipeline.plan(str(models["llama"]), "ctranslate2", levels=["int8"], options=options)


@pytest.mark.parametrize("level", ["int4", "Q4_K_M", ""])
def test_unknown_levels_are_refused(models: dict[str, Path], level: str) -> None:
    with pytest.raises(UsageError, match="no ctranslate2 level"):
        pipeline.plan(str(models["llama"]), "ctranslate2", levels=[level], options=RTN)


def test_levels_without_codes_need_no_text(models: dict[str, Path], tmp_path: Path) -> None:
    """Error feedback is the format's own method, but there is nothing for it to choose."""
    own = Options(threads=1)
    for level in ("float16", "int16"):
        assert (made(models["llama"], tmp_path / "own", level, own) / MODEL_FILE).read_bytes() == (
            made(models["llama"], tmp_path / "rtn", level) / MODEL_FILE
        ).read_bytes()
    (plan,) = pipeline.plan(str(models["llama"]), "ctranslate2", levels=["int8"], options=own)
    assert any("run through the model" in text for text in plan.notes), plan.notes
    assert plan.identity["method"] == "gptq"


def test_a_token_that_there_is_not_is_no_null(tmp_path: Path) -> None:
    """The converter's null is nothing that the runtime loads."""
    model = make_tiny("mistral", tmp_path / "model")
    for name in ("bos_token", "eos_token"):
        settings = json.loads((model / "tokenizer_config.json").read_text())
        settings.pop(name)
        (model / "tokenizer_config.json").write_text(json.dumps(settings))
    path = made(model, tmp_path / "ours", "float32")
    config = json.loads((path / "config.json").read_text())
    assert [config[f"{role}_token"] for role in ("bos", "eos", "unk")] == ["", "", ""]
    assert ctranslate2.Generator(str(path)).generate_batch([["t"]], max_length=3)


def test_tokens_and_special_tokens(models: dict[str, Path], tmp_path: Path) -> None:
    """What the tokenizer has no text for is named; a class has its own special tokens where files say nothing."""
    tokens = tokens_of(models["llama"], 320)
    assert tokens[262:268] == ["<s>", "</s>", "<pad>", "<extra_id_0>", "<extra_id_1>", "<extra_id_2>"]
    assert len(tokens) == 320
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Qwen2TokenizerFast", "eos_token": {"content": "<|im_end|>"}, "bos_token": None})
    )
    assert special_tokens(tmp_path, "qwen2") == {
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    with pytest.raises(UnsupportedError, match=r"texts of tokens") as caught:
        tokens_of(tmp_path, 3)
    assert isinstance(caught.value, LlmQuantizeError)


def test_int8_with_feedback_is_nearer_to_the_source_than_rounding(demo_model: Path, tmp_path: Path) -> None:
    """Held by the run itself, on windows that it was not calibrated on; embedding and head are rounded in both."""
    calibration = CalibrationOptions(samples=12, length=256)
    fed = made(demo_model, tmp_path / "gptq", "int8", Options(threads=1, calibration=calibration))
    plain = made(demo_model, tmp_path / "rtn", "int8")
    one, other = read_model_file(fed / MODEL_FILE), read_model_file(plain / MODEL_FILE)
    name = "decoder/embeddings/weight"
    assert variable(fed, one.variables[name]) == variable(plain, other.variables[name])
    source = open_source(str(demo_model))
    with source.checkpoint:
        text = evaluation_text(TextTokenizer(source), (), context=256, limit=3, on_event=ignore)
        found = measure_quality(source, [fed, plain], text.windows, threads=1).artifacts
    assert found[0].divergence.kld < 0.9 * found[1].divergence.kld


def test_a_level_that_needs_no_text_is_complete_beside_one_that_does(demo_model: Path, tmp_path: Path) -> None:
    """int8 feeds errors back, int16 is only rounded: the same command again makes nothing anew."""
    few = CalibrationOptions(samples=1, length=32)
    options = Options(threads=1, calibration=few)
    first, again = (
        quantize(str(demo_model), "ctranslate2", levels=["int8", "int16"], output_dir=tmp_path, options=options)
        for _ in range(2)
    )
    assert [result.status for result in first] == ["written"] * 2
    assert [result.status for result in again] == ["already complete"] * 2
    alone = quantize(str(demo_model), "ctranslate2", levels=["int16"], output_dir=tmp_path, options=Options(threads=1))
    assert [result.status for result in alone] == ["already complete"]
