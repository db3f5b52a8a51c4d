"""Hugging Face directories made of a GGUF file: transformers loads them as they are, and the file comes back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import ctranslate2
import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf.constants import GGUFValueType, Keys
from safetensors.torch import load_file

from llm_quantize.architectures import ARCHITECTURES
from llm_quantize.artifacts.verify import verify
from llm_quantize.cli import run
from llm_quantize.data import demo_model
from llm_quantize.errors import LlmQuantizeError, MalformedInputError, UnsupportedError, UsageError
from llm_quantize.formats.directory_check import compare_small_files
from llm_quantize.io.gguf_file import MetaValue, read_gguf
from llm_quantize.models.opening import open_model, open_source
from llm_quantize.options import CalibrationOptions, MethodOptions
from llm_quantize.pipeline import Options, plan, quantize
from llm_quantize.runtimes.llama_cpp import LlamaCpp
from tests.models.test_gguf import carried, made, number, rewritten, text
from tests.test_import_rules import loaded_after
from tests.tiny_models import (
    STREAMED,
    VOCABULARY,
    make_tiny,
    quiet,
    reference_logits,
    reference_model,
    row_lengths_of_256,
)
from tests.tiny_tokenizers import nasty_texts

TOKENS = np.random.Generator(np.random.PCG64(7)).integers(0, VOCABULARY, 300).tolist()
SMALL = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
KEYS = Keys.Tokenizer
QWENS = ("qwen2", "qwen3_5_text", "qwen3_5_moe_text")


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def directory(model: Path, place: Path, format: str = "safetensors", level: str = "F32", **options: Any) -> Path:
    chosen = Options(threads=1, **options)
    return quantize(str(model), format, levels=[level], output_dir=place, options=chosen)[0].path


def stored(path: Path) -> dict[str, tuple[str, bytes]]:
    """{tensor: its type and bytes}, by the owner of the format."""
    return {t.name: (t.tensor_type.name, t.data.tobytes()) for t in gguf.GGUFReader(path).tensors}


def assert_stored_alike(ours: dict[str, tuple[str, bytes]], theirs: dict[str, tuple[str, bytes]]) -> None:
    """The same bytes, but for decays: checkpoints have their logarithms, which round."""
    bent = {name for name in theirs if name.endswith(".ssm_a")}
    assert {k: v for k, v in ours.items() if k not in bent} == {k: v for k, v in theirs.items() if k not in bent}
    for name in bent:
        got, expected = (np.frombuffer(one[name][1], np.float32) for one in (ours, theirs))
        np.testing.assert_allclose(got, expected, rtol=3e-7, err_msg=name)


def loaded(path: Path) -> Any:
    """The directory in transformers, with no arguments but one that tells of the loading: every weight had a place."""
    with quiet():
        model, told = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    return model.eval()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("llama")
    return made(make_tiny("llama", place / "net", **row_lengths_of_256("llama")), place / "out", "F32")[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model at BF16: its very values."""
    return made(demo_model(), tmp_path_factory.mktemp("trained"), "BF16")[0]


def test_every_class_is_the_one_of_transformers() -> None:
    from transformers.models.auto import modeling_auto as auto

    known = {**auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, **auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    for model_type, family in ARCHITECTURES.items():
        if not family.nested:
            assert family.generator == known[model_type]


@pytest.mark.parametrize("variant", STREAMED)
def test_every_family_goes_there_and_back(variant: str, tmp_path: Path) -> None:
    net = make_tiny(variant, tmp_path / "net")
    expected = reference_logits(reference_model(net), TOKENS)
    (origin,) = made(net, tmp_path / "out", "F32")
    with open_model(str(origin)) as opened:
        assert (opened.kind, opened.revision, opened.left_out, opened.name) == ("", None, {}, "net")
    path = directory(origin, tmp_path / "directory")
    assert {file.name for file in path.iterdir()} == {*SMALL, "README.md", "manifest.json", "model.safetensors"}
    config = json.loads((path / "config.json").read_text())
    known = transformers.AutoConfig.for_model(config["model_type"])
    undeclared = {"head_dim", "attn_output_gate"}  # the first is read by some, the second fixed in those that have it
    assert {key for key in config if not hasattr(known, key)} <= undeclared
    model = loaded(path)
    assert (type(model).__name__, model.dtype) == (config["architectures"][0], torch.float32)
    assert model.generation_config.eos_token_id == model.config.eos_token_id == 263
    got = reference_logits(model, TOKENS)
    with LlamaCpp(origin, context=512, threads=1) as runtime:
        assert np.abs(got - runtime.logits(TOKENS)).max() < 1e-3 * np.ptp(expected)
        # transformers 5.23 gives models of these types a class that puts Qwen's own rule in the place of the file's.
        kind = transformers.PreTrainedTokenizerFast if config["model_type"] in QWENS else transformers.AutoTokenizer
        tokenizer = kind.from_pretrained(path)
        for words in nasty_texts():
            for special in (True, False):
                ids = tokenizer(words, add_special_tokens=special).input_ids
                assert ids == runtime.tokenize(words, add_special=special, parse_special=True), words
    assert np.ptp(expected) > 4, "flat logits prove nothing"
    assert np.abs(got - expected).max() < 1e-4 * np.ptp(expected)
    (again,) = made(path, tmp_path / "again", "F32")
    assert_stored_alike(stored(again), stored(origin))
    before, after = carried(read_gguf(origin)), carried(read_gguf(again))
    named = {Keys.General.NAME, Keys.General.TAGS}  # of the directory and its card
    assert {k: v for k, v in after.items() if k not in named} == {k: v for k, v in before.items() if k not in named}


@pytest.mark.parametrize("variant", ["llama", "gemma3", "gpt2", "granitemoe"])
@pytest.mark.parametrize("level", ["F16", "BF16"])
def test_halves_go_there_and_back(variant: str, level: str, tmp_path: Path) -> None:
    dtype = {"F16": "float16", "BF16": "bfloat16"}[level]
    (origin,) = made(make_tiny(variant, tmp_path / "net", dtype=dtype), tmp_path / "out", level)
    path = directory(origin, tmp_path / "directory", level=level)
    assert json.loads((path / "config.json").read_text())["dtype"] == dtype
    assert verify(path, source=str(origin)).ok
    (again,) = made(path, tmp_path / "again", level)
    assert stored(again) == stored(origin)
    assert loaded(path).dtype == getattr(torch, dtype)


@pytest.mark.parametrize("level", ["Q8_0", "Q4_K_M"])
def test_quantized_values_are_those_of_gguf_py(level: str, llama: Path, tmp_path: Path) -> None:
    (origin,) = made(llama, tmp_path, level)
    path = directory(origin, tmp_path / "directory")
    (again,) = made(path, tmp_path / "again", "F32")
    found = {t.name: t.data for t in gguf.GGUFReader(again).tensors}
    for tensor in gguf.GGUFReader(origin).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        assert np.array_equal(found[tensor.name].reshape(values.shape), values)


@pytest.mark.parametrize("variant", ["llama", "qwen2", "phi3"])
def test_transformers_own_reader_agrees(variant: str, tmp_path: Path) -> None:
    """Of families that it reads whole: of others it leaves out values (rotary bases, head sizes, scales of scores)."""
    (origin,) = made(make_tiny(variant, tmp_path / "net"), tmp_path / "out", "F32")
    path = directory(origin, tmp_path / "directory")
    with quiet():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(origin.parent, gguf_file=origin.name)
    ours = loaded(path)
    one, other = theirs.config.to_dict(), ours.config.to_dict()
    free = {"architectures", "dtype", "quantization_config", "_name_or_path", "_model_name_or_path", "rms_norm_eps"}
    assert {k: v for k, v in other.items() if k not in free} == {k: v for k, v in one.items() if k not in free}
    assert one["rms_norm_eps"] == pytest.approx(other["rms_norm_eps"], rel=1e-6)
    assert np.abs(reference_logits(theirs.eval(), TOKENS) - reference_logits(ours, TOKENS)).max() < 1e-4


PACKED = {
    "gptq": "4bit",
    "awq": "4bit",
    "compressed-tensors": "W4A16",
    "bitsandbytes": "nf4",
    "mlx": "4bit",
    "safetensors": "BF16",
    "ctranslate2": "int8",
}


@pytest.mark.parametrize("format", PACKED)
def test_every_directory_format(format: str, llama: Path, tmp_path: Path) -> None:
    """The small files are the same in all of them, ``verify`` knows them, and what they hold is the source."""
    rounded = MethodOptions(method="rtn", transform="none") if format != "safetensors" else MethodOptions()
    path = directory(llama, tmp_path, format, PACKED[format], method=rounded)
    assert {file.name for file in path.iterdir()} >= SMALL
    plain = directory(llama, tmp_path / "plain")
    for name in SMALL - {"config.json"}:
        assert (path / name).read_bytes() == (plain / name).read_bytes()
    assert verify(path, source=str(llama)).ok
    assert verify(path).ok
    for name in ("tokenizer.json", "generation_config.json"):
        whole = (path / name).read_bytes()
        (path / name).write_bytes(whole.replace(b"<s>", b"<S>").replace(b"263", b"262"))
        assert not verify(path).ok
        (path / name).write_bytes(whole)
    assert verify(path).ok
    assert run(["info", str(path), "--json"]) == 0


def test_a_tokenizer_that_is_not_made_of_the_source_is_told(llama: Path, tmp_path: Path) -> None:
    """Where the manifest's own hashes are in order."""
    path = directory(llama, tmp_path)
    other = rewritten(llama, tmp_path / "net-F32.gguf", changes={"tokenizer.chat_template": text("{{ 1 }}")})
    assert verify(path, source=str(other)).ok  # another file: its tokenizer is another matter
    source = open_source(str(other))
    with source.checkpoint as model:
        facts = [[fact.name, fact.size, fact.header_sha256] for fact in model.fingerprint()]
        assert compare_small_files(path, source, {"identity": {"source_files": facts[:0]}}) == []
        assert compare_small_files(path, source, None) == []
        whole = (path / "tokenizer.json").read_bytes()
        (path / "tokenizer.json").write_bytes(whole + b" ")
        assert compare_small_files(path, source, {"identity": {"source_files": facts}}) == [
            "chat_template.jinja, which is made of the source, is missing from the artifact",
            "tokenizer.json is not what is made of the source, byte for byte",
        ]


def test_ctranslate2_runs_it(trained: Path, tmp_path: Path) -> None:
    path = directory(trained, tmp_path, "ctranslate2", "float32", method=MethodOptions())
    origin = directory(demo_model(), tmp_path / "origin", "ctranslate2", "float32", method=MethodOptions())
    for name in ("vocabulary.json", "config.json"):
        assert json.loads((path / name).read_text()) == json.loads((origin / name).read_text())
    prompt = transformers.AutoTokenizer.from_pretrained(path).tokenize("Once upon a time")
    found = [
        ctranslate2.Generator(str(one)).generate_batch([prompt], max_length=12)[0].sequences_ids
        for one in (path, origin)
    ]
    assert found[0] == found[1]


def test_a_calibrated_directory_of_a_file_is_that_of_its_model(trained: Path, tmp_path: Path) -> None:
    """The same values and token ids: nearly the same codes where the inputs are those of the first block, whose norm
    is stored in another type. Plainly rounded, they are all others."""
    chosen = {"method": MethodOptions(transform="none"), "calibration": CalibrationOptions(samples=2, length=32)}
    plain = {"method": MethodOptions(method="rtn", transform="none")}
    places = (("one", trained, chosen), ("other", demo_model(), chosen), ("plain", demo_model(), plain))
    found = []
    for place, model, options in places:
        path = directory(model, tmp_path / place, "gptq", "4bit", **options)
        found.append(load_file(path / "model.safetensors")["model.layers.0.self_attn.q_proj.qweight"])
    one, other, rounded = found
    assert float((one == other).float().mean()) > 0.95
    assert float((one == rounded).float().mean()) < 0.9


def test_compressed_tensors_in_transformers(trained: Path, tmp_path: Path) -> None:
    path = directory(trained, tmp_path, "compressed-tensors", "W8A16", method=MethodOptions(method="rtn"))
    plain = directory(trained, tmp_path, "safetensors", "F32")
    expected = reference_logits(loaded(plain), TOKENS)
    got = reference_logits(loaded(path), TOKENS)
    assert 0 < np.abs(got - expected).max() < 0.05 * np.ptp(expected)


def test_bitsandbytes_in_transformers(trained: Path, tmp_path: Path) -> None:
    """It runs no mixture of types, so the norms, which are float32 in the file, are not."""
    path = directory(trained, tmp_path, "bitsandbytes", "nf4", method=MethodOptions(method="rtn"))
    got = reference_logits(loaded(path), TOKENS)
    expected = reference_logits(loaded(directory(trained, tmp_path, "safetensors", "F32")), TOKENS)
    assert np.corrcoef(got.ravel(), expected.ravel())[0, 1] > 0.95


def test_kept_tensors_of_a_quantized_file_are_in_the_type_of_the_model(llama: Path, tmp_path: Path) -> None:
    (origin,) = made(llama, tmp_path, "Q8_0")
    path = directory(origin, tmp_path, "gptq", "4bit", method=MethodOptions(method="rtn", transform="none"))
    config = json.loads((path / "config.json").read_text())
    assert verify(path, source=str(origin)).ok
    kept = {t["name"]: t["type"] for t in json.loads((path / "manifest.json").read_text())["tensors"]}
    assert config["dtype"] == "bfloat16"
    assert kept["model.embed_tokens.weight"] == kept["lm_head.weight"] == kept["model.norm.weight"] == "bf16"


TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }} 日本</s>\n{% endfor %}"


def test_chats_roles_and_sampling_go_along(llama: Path, tmp_path: Path) -> None:
    changes = {
        KEYS.CHAT_TEMPLATE: text(TEMPLATE),
        f"{KEYS.CHAT_TEMPLATE}.tool_use": text("{{ tools }}"),
        KEYS.CHAT_TEMPLATES: MetaValue(GGUFValueType.ARRAY, ["tool_use"], GGUFValueType.STRING),
        KEYS.ADD_BOS: MetaValue(GGUFValueType.BOOL, True),
        KEYS.ADD_EOS: MetaValue(GGUFValueType.BOOL, True),
        KEYS.EOT_ID: number(264),
        Keys.General.SAMPLING_TEMP: MetaValue(GGUFValueType.FLOAT32, 0.7),
        Keys.General.SAMPLING_TOP_K: MetaValue(GGUFValueType.INT32, 20),
        Keys.General.LICENSE: text("apache-2.0"),
        Keys.General.LANGUAGES: MetaValue(GGUFValueType.ARRAY, ["en", "ja"], GGUFValueType.STRING),
    }
    origin = rewritten(llama, tmp_path / "chat.gguf", changes=changes)
    path = directory(origin, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    words = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(words, tokenize=False) == "<s>user: Hi 日本</s>\n"
    assert tokenizer.apply_chat_template(words, chat_template="tool_use", tools=[], tokenize=False) == "[]"
    with LlamaCpp(origin, context=64, threads=1) as runtime:
        for words_ in ("", "the 12", " x</s>"):
            assert tokenizer(words_).input_ids == runtime.tokenize(words_, add_special=True, parse_special=True)
    said = transformers.GenerationConfig.from_pretrained(path)
    assert (said.eos_token_id, said.bos_token_id, said.pad_token_id) == ([263, 264], 262, 264)
    assert (said.do_sample, said.temperature, said.top_k) == (True, 0.7, 20)
    assert (path / "README.md").read_text().startswith("---\nlicense: apache-2.0\nlanguage:\n- en\n- ja\n")
    (again,) = made(path, tmp_path / "again", "F32")
    before, after = carried(read_gguf(origin)), carried(read_gguf(again))
    named = {Keys.General.NAME, Keys.General.TAGS}
    assert {k: v for k, v in after.items() if k not in named} == {k: v for k, v in before.items() if k not in named}


def test_without_a_tokenizer_there_are_no_files_of_one(llama: Path, tmp_path: Path) -> None:
    path = rewritten(llama, tmp_path / "x.gguf", changes={KEYS.MODEL: None})
    (planned,) = plan(str(path), "safetensors", levels=["F32"], options=Options())
    assert any("no tokenizer" in warning for warning in planned.warnings)
    assert {file.name for file in planned.files} == {"config.json", "README.md", "model.safetensors"}
    made_of = directory(path, tmp_path)
    assert verify(made_of, source=str(path)).ok


@pytest.mark.parametrize(
    ("key", "value", "kind", "words"),
    [
        (KEYS.PRE, text("nobody"), UnsupportedError, "'nobody' is not known"),
        (KEYS.MODEL, text("bert"), UnsupportedError, "of the kind 'bert'"),
        (KEYS.CHAT_TEMPLATE, number(1), MalformedInputError, "chat_template of this file"),
        (KEYS.MERGES, None, MalformedInputError, "merges is not in the metadata"),
        (KEYS.BOS_ID, text("x"), MalformedInputError, "bos_token_id of this file"),
    ],
)
def test_what_cannot_be_made_is_refused_by_the_plan(
    key: str, value: MetaValue | None, kind: type[LlmQuantizeError], words: str, llama: Path, tmp_path: Path
) -> None:
    path = rewritten(llama, tmp_path / "x.gguf", changes={key: value})
    for format, level in PACKED.items():
        with pytest.raises(kind, match=words):
            plan(str(path), format, levels=[level], options=Options(method=MethodOptions(method="rtn")))
        assert run(["plan", str(path), format, "-q", level, "--method", "rtn"]) == kind.exit_code
    (planned,) = plan(str(path), "gguf", levels=["Q8_0"], options=Options())  # which carries it over as it is
    assert planned.files


def test_files_beside_it_are_not_copied(llama: Path, tmp_path: Path) -> None:
    shutil.copy(llama, tmp_path / "m.gguf")
    (tmp_path / "tokenizer.json").write_text("another one")
    path = directory(tmp_path / "m.gguf", tmp_path / "out")
    assert (path / "tokenizer.json").read_text() != "another one"
    with pytest.raises(UsageError, match="--include copies files of a model directory"):
        directory(llama, tmp_path, method=MethodOptions(include=("*.txt",)))


def test_planning_a_directory_loads_neither_torch_nor_transformers(llama: Path) -> None:
    command = ["plan", str(llama), "gptq", "-q", "4bit", "--method", "rtn"]
    loaded = loaded_after(f"from llm_quantize.cli import run; assert run({command!r}) == 0")
    assert not loaded & {"torch", "transformers", "xllamacpp"}


def test_the_bytes_do_not_depend_on_the_run(llama: Path, tmp_path: Path) -> None:
    """Nor on the order in which this interpreter keeps sets."""
    found = []
    for seed in "12":
        words = ["quantize", str(llama), "safetensors", "-q", "F32", "-o", str(tmp_path / seed), "--quiet"]
        subprocess.run(
            [sys.executable, "-m", "llm_quantize", *words], env={**os.environ, "PYTHONHASHSEED": seed}, check=True
        )
        found.append({file.name: file.read_bytes() for file in (tmp_path / seed / "net-F32").iterdir()})
    assert found[0].keys() >= SMALL
    assert found[0] == found[1]
