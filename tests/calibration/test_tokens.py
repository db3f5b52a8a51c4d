"""Ids as the runtime gives them, from the checkpoint's own files; chats in the model's own template."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import sentencepiece
from gguf.constants import Keys
from tokenizers import Tokenizer

from llm_quantize.calibration.tokens import TextTokenizer
from llm_quantize.data import evaluation_text
from llm_quantize.errors import LlmQuantizeError, MalformedInputError, UnsupportedError
from llm_quantize.formats.gguf.describe import describe
from llm_quantize.formats.gguf.vocabulary.reading import read_vocabulary
from llm_quantize.models.opening import Source, open_source
from llm_quantize.runtimes.llama_cpp import LlamaCpp
from tests.tiny_tokenizers import (
    QWEN2,
    byte_level_json,
    nasty_texts,
    save_tokenizer,
    sentencepiece_model,
    sequence,
    split,
    write_model,
)

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
TALK = [{"role": "user", "content": "Hi <|im_end|>"}, {"role": "assistant", "content": "Hello."}]
BPE = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
SPACES = {"remove_extra_whitespaces": False, "split_digits": True}


def opened(directory: Path, rows: int | None = None) -> Source:
    """What TextTokenizer sees of a source: a directory with a tokenizer, without weights."""
    metadata = read_vocabulary(directory, {}, embedding_rows=None)
    size = rows or len(metadata[Keys.Tokenizer.LIST].value)
    output = SimpleNamespace(name="token_embd.weight", shape=(size, 32))
    fake = SimpleNamespace(
        checkpoint=SimpleNamespace(directory=directory, config={}, metadata=None),
        tensors=SimpleNamespace(outputs=(output,)),
    )
    return cast(Source, fake)


@pytest.fixture(scope="module")
def qwen() -> dict[str, Any]:
    return byte_level_json(sequence(split(QWEN2)))


@pytest.fixture(scope="module")
def llama_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sentencepiece_model(tmp_path_factory.mktemp("llama"), **BPE, **SPACES)


def test_the_demo_model_as_llama_cpp_reads_it(demo_model: Path, tmp_path: Path) -> None:
    source = open_source(str(demo_model))
    tokenizer = TextTokenizer(source)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.rows, tokenizer.has_template) == (None, 0, 2048, False)
    words = {key: value for key, value in describe(source).items() if key.startswith("tokenizer.")}
    path = write_model(tmp_path / "m.gguf", words)
    texts = [evaluation_text()[:20_000], evaluation_text()[-9000:], *nasty_texts(), "a<|endoftext|>b"]
    with LlamaCpp(path, context=64, threads=1) as runtime:
        for text in texts:
            assert tokenizer.encode(text) == runtime.tokenize(text, add_special=False, parse_special=False)
    assert 0 not in tokenizer.encode("a<|endoftext|>b")


def test_chats_as_llama_cpp_reads_them(qwen: dict[str, Any], tmp_path: Path) -> None:
    save_tokenizer(tmp_path, qwen, {"chat_template": CHATML, "eos_token": "<|im_end|>"})
    source = opened(tmp_path)
    tokenizer = TextTokenizer(source)
    text = tokenizer.render_chat(TALK)
    assert text.endswith("<|im_start|>assistant\nHello.<|im_end|>\n")
    words = read_vocabulary(tmp_path, {}, embedding_rows=None)
    with LlamaCpp(write_model(tmp_path / "m.gguf", words), context=64, threads=1) as runtime:
        bare = text.removeprefix("<|im_end|>")  # bos_token stands in for eos here, and CHATML writes it first
        assert tokenizer.encode_chat(TALK) == runtime.tokenize(bare, add_special=False, parse_special=True)
    assert tokenizer.encode_chat(TALK).count(2) == 3  # a special token in a message is one, as in the runtime


def test_a_system_message_that_the_template_refuses_goes_to_the_user(qwen: dict[str, Any], tmp_path: Path) -> None:
    save_tokenizer(tmp_path, qwen, {"chat_template": NO_SYSTEM, "bos_token": "<|endoftext|>"})
    tokenizer = TextTokenizer(opened(tmp_path))
    text = tokenizer.render_chat([{"role": "system", "content": "Be brief."}, *TALK])
    assert "<|im_start|>user\nBe brief.\n\nHi <|im_end|><|im_end|>" in text
    with pytest.raises(UnsupportedError, match="chat template"):
        tokenizer.render_chat([{"role": "system", "content": "Be brief."}])


def test_the_date_in_a_template_is_always_the_same(qwen: dict[str, Any], tmp_path: Path) -> None:
    save_tokenizer(tmp_path, qwen, {"chat_template": "{{ strftime_now('%d %b %Y') }}{{ messages[0].content }}"})
    assert TextTokenizer(opened(tmp_path)).render_chat([{"role": "user", "content": "!"}]) == "01 Jan 2026!"


def test_templates_that_are_absent_or_break(qwen: dict[str, Any], tmp_path: Path) -> None:
    save_tokenizer(tmp_path, qwen)
    with pytest.raises(UnsupportedError, match="no chat template"):
        TextTokenizer(opened(tmp_path)).render_chat(TALK)
    for template in ("{{ ''.__class__.__mro__ }}", "{{ messages[9].content.x }}", "{% for %}"):
        save_tokenizer(tmp_path, qwen, {"chat_template": template})
        with pytest.raises(UnsupportedError, match="cannot be rendered"):
            TextTokenizer(opened(tmp_path)).encode_chat(TALK)


def test_truncation_and_padding_in_the_file_do_nothing(qwen: dict[str, Any], tmp_path: Path) -> None:
    cut = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    pad = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    plain = save_tokenizer(tmp_path, qwen).encode("one two three " * 40, add_special_tokens=False).ids
    save_tokenizer(tmp_path, qwen | {"truncation": cut, "padding": pad})
    assert TextTokenizer(opened(tmp_path)).encode("one two three " * 40) == plain


def test_bos_is_what_the_tokenizer_itself_adds(qwen: dict[str, Any], tmp_path: Path) -> None:
    ids = {token["content"]: token["id"] for token in qwen["added_tokens"]}
    one = {"id": "<|im_start|>", "ids": [ids["<|im_start|>"]], "tokens": ["<|im_start|>"]}
    single = [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    processor = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": one},
    }
    save_tokenizer(tmp_path, qwen | {"post_processor": processor}, {"chat_template": CHATML})
    tokenizer = TextTokenizer(opened(tmp_path))
    assert tokenizer.bos == ids["<|im_start|>"]
    assert tokenizer.bos not in tokenizer.encode("Hello")
    save_tokenizer(tmp_path, qwen, {"bos_token": "<|im_start|>"})
    assert TextTokenizer(opened(tmp_path)).bos is None


def test_tokenizer_model_alone(llama_model: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(llama_model.read_bytes())
    processor = sentencepiece.SentencePieceProcessor(model_file=str(llama_model))
    size = processor.get_piece_size()
    added = {str(size): {"content": "<|user|>", "special": True}, str(size + 1): {"content": "<fn>", "special": False}}
    template = "<s>{% for m in messages %}<|user|>{{ m.content }}</s>{% endfor %}"
    config = {"added_tokens_decoder": added, "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = TextTokenizer(opened(tmp_path))
    assert (tokenizer.bos, tokenizer.eos) == (1, 2)
    for text in ("Hello world", " a  b", "日本語 <s> </s>", "<|user|>"):
        assert tokenizer.encode(text) == list(processor.encode(text))
    assert tokenizer.encode("a<fn>b") == [*processor.encode("a"), size + 1, *processor.encode("b")]
    assert tokenizer.encode_chat(TALK[1:]) == [size, *processor.encode("Hello."), 2]


def test_an_id_without_a_row_is_refused(qwen: dict[str, Any], tmp_path: Path) -> None:
    save_tokenizer(tmp_path, qwen)
    with pytest.raises(MalformedInputError, match="no row") as caught:
        TextTokenizer(opened(tmp_path, rows=40)).encode("Hello")
    assert caught.value.file == str(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff\xfe", b'{"model": {"type": "WordPiece"}}', b"[1, 2"])
def test_a_tokenizer_that_its_library_refuses(qwen: dict[str, Any], tmp_path: Path, data: bytes) -> None:
    """As when the file changes after the source was opened: the source itself refuses such a file too."""
    save_tokenizer(tmp_path, qwen)
    source = opened(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(LlmQuantizeError) as caught:
        TextTokenizer(source)
    assert caught.value.file == str(tmp_path / "tokenizer.json")


def test_a_damaged_tokenizer_model(llama_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(llama_model.read_bytes())
    source = opened(tmp_path)
    path.write_bytes(b"\x0a\xff\xff")
    with pytest.raises(MalformedInputError, match="SentencePiece"):
        TextTokenizer(source)


def test_it_is_tokenizers_itself(demo_model: Path) -> None:
    tokenizer = TextTokenizer(open_source(str(demo_model)))
    judge = Tokenizer.from_file(str(demo_model / "tokenizer.json"))
    text = evaluation_text()[:5000]
    assert tokenizer.encode(text) == judge.encode(text, add_special_tokens=False).ids


def test_an_expression_that_backtracks_too_far(qwen: dict[str, Any], tmp_path: Path) -> None:
    """The library panics, which is no Exception: it must not end as a bug of ours."""
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    save_tokenizer(tmp_path, qwen)
    source = opened(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(qwen | {"pre_tokenizer": split}))
    tokenizer = TextTokenizer(source)
    assert tokenizer.encode("aaa")
    with pytest.raises(MalformedInputError, match="tokenizers does not read this tokenizer") as caught:
        tokenizer.encode("a" * 60 + "!")
    assert "retry-limit" in str(caught.value.found)
