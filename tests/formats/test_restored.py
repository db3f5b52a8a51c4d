"""Tokenizer files made of the vocabulary of a GGUF file: their ids are llama.cpp's, and a vocabulary comes back whole."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from gguf.constants import GGUFValueType, Keys, TokenType
from tokenizers import Tokenizer

from llm_quantize.errors import LlmQuantizeError, MalformedInputError, UnsupportedError
from llm_quantize.formats.gguf.restored.said import read_said, read_templates
from llm_quantize.formats.gguf.restored.tokenizer import tokenizer_json
from llm_quantize.formats.gguf.vocabulary.pretokenizers import (
    BEGIN_WITH_BOS,
    OTHER_NAMES,
    RULES,
    canonical_steps,
    rule_named,
    written_steps,
)
from llm_quantize.formats.gguf.vocabulary.reading import read_vocabulary
from llm_quantize.io.gguf_file import MetaValue
from llm_quantize.runtimes.llama_cpp_vocabulary import open_vocabulary

from ..tiny_tokenizers import (
    PRE_TOKENIZERS,
    byte_level_json,
    character_bpe_json,
    decomposed_texts,
    hugging_face_ids,
    nasty_texts,
    save_tokenizer,
    sentencepiece_model,
)
from .test_gguf_vocabulary_spm import BPE, IDENTITY, WHOLE, trained_over_characters

KEYS = Keys.Tokenizer
TEXTS = (*nasty_texts(), *decomposed_texts(), "<s>a</s> b <|im_start|>x<|im_end|>  \ny", "a<unk>b<tool_call> c")
FILE = Path("m.gguf")


def made(metadata: Mapping[str, MetaValue], notes: list[str] | None = None) -> bytes:
    """tokenizer.json."""
    said = read_said(metadata, FILE, rows=len(metadata[KEYS.LIST].value) + 8)
    return tokenizer_json(said, [].append if notes is None else notes.append)


def differing(metadata: Mapping[str, MetaValue], data: bytes, *, add_special: bool = False) -> list[str]:
    """The texts of which the file has other ids than llama.cpp, special tokens parsed or not."""
    tokenizer, found = Tokenizer.from_str(data.decode()), []
    runtime = open_vocabulary(metadata, FILE)
    for text in TEXTS:
        for parse in (True, False):
            ours = hugging_face_ids(tokenizer, text, parse_special=parse, add_special=add_special)
            if ours != runtime.tokenize(text, add_special=add_special, parse_special=parse):
                found.append(text)
                break
    return found


def again(data: bytes, metadata: Mapping[str, MetaValue], place: Path) -> dict[str, MetaValue]:
    """The vocabulary that is read of the file."""
    place.mkdir(exist_ok=True)
    (place / "tokenizer.json").write_bytes(data)
    return read_vocabulary(place, {}, embedding_rows=len(metadata[KEYS.LIST].value))


def with_value(metadata: Mapping[str, MetaValue], key: str, value: object) -> dict[str, MetaValue]:
    return {**metadata, key: metadata[key]._replace(value=value)}


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, MetaValue]]:
    """The vocabulary of a tokenizer that was trained with a rule."""
    kept: dict[str, dict[str, MetaValue]] = {}

    def of(rule: str) -> dict[str, MetaValue]:
        if rule not in kept:
            place = tmp_path_factory.mktemp(rule)
            steps, ignore_merges = PRE_TOKENIZERS[rule]
            save_tokenizer(place, byte_level_json(steps, ignore_merges=ignore_merges))
            rows = json.loads((place / "tokenizer.json").read_text())["added_tokens"][-1]["id"] + 5
            kept[rule] = read_vocabulary(place, {"bos_token_id": 1, "eos_token_id": 2}, embedding_rows=rows)
            kept[rule] = with_value(kept[rule], KEYS.PRE, rule)
        return kept[rule]

    return of


def test_steps_are_written_as_they_are_read() -> None:
    for rule in RULES:
        assert canonical_steps(written_steps(rule), FILE) == rule.steps
        assert all(rule_named(name, FILE) is rule for name in (rule.name, *OTHER_NAMES.get(rule.name, ())))


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_byte_level_bpe_of_every_rule(name: str, byte_level: Any, tmp_path: Path) -> None:
    metadata, notes = byte_level(name), list[str]()
    data = made(metadata, notes)
    found = differing(metadata, data)
    if rule_named(name, FILE).exact:
        assert (found, notes) == ([], [])
    else:
        assert len(notes) == 1
        assert found
        assert all(any(unicodedata.category(c).startswith("M") for c in text) for text in found)
    back = again(data, metadata, tmp_path)
    expected = dict(metadata)
    if name == "gpt-4o":  # its twin, which does not cut at combining marks, as the file does not
        expected = with_value(metadata, KEYS.PRE, "granite-embed-multi-97m")
    roles = {KEYS.BOS_ID, KEYS.EOS_ID, KEYS.EOT_ID}  # they stand in tokenizer_config.json
    assert {k: v for k, v in back.items() if k not in roles} == {k: v for k, v in expected.items() if k not in roles}


@pytest.mark.parametrize("name", sorted({name for names in OTHER_NAMES.values() for name in names} | {"default"}))
def test_other_names_of_a_rule(name: str, byte_level: Any) -> None:
    """llama.cpp has the same ids by them, and begins a text as we say where the file does not."""
    rule = rule_named(name, FILE)
    known = byte_level(rule.name if rule.name in PRE_TOKENIZERS else "falcon")
    metadata = with_value(known, KEYS.PRE, name)
    del metadata[KEYS.ADD_BOS], metadata[KEYS.ADD_EOS]
    found = differing(metadata, made(metadata), add_special=True)
    assert all(any(unicodedata.category(c).startswith("M") for c in text) for text in found)
    assert rule.exact is (not found)
    assert read_said(metadata, FILE, rows=9999).add_bos == (name in BEGIN_WITH_BOS)


@pytest.mark.parametrize("name", ["llama-bpe", "tekken", "qwen2", "gpt-2"])
def test_texts_begin_as_in_llama_cpp_where_the_file_does_not_say(name: str, byte_level: Any) -> None:
    metadata = dict(byte_level(name))
    del metadata[KEYS.ADD_BOS], metadata[KEYS.ADD_EOS]
    begins = open_vocabulary(metadata, FILE).tokenize("", add_special=True) == [1]
    assert read_said(metadata, FILE, rows=9999).add_bos is begins is (name in BEGIN_WITH_BOS)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, MetaValue]]:
    """Vocabularies of pieces: of tokenizer.json files and of tokenizer.model."""
    place = tmp_path_factory.mktemp("pieces")
    llama = sentencepiece_model(place / "llama", **BPE)
    options = BPE | {"add_dummy_prefix": False, "split_digits": True, "user_defined_symbols": WHOLE}
    gemma = sentencepiece_model(place / "gemma", allow_whitespace_only_pieces=True, **options)
    rules = {"nmt_nfkc": {}, "identity": {}, "spaces": {"remove_extra_whitespaces": False}}
    for rule, more in rules.items():
        name = {"spaces": "identity"}.get(rule, rule)
        sentencepiece_model(place / rule, model_type="unigram", normalization_rule_name=name, **more)
    files = {"json-llama": (llama, "llama", ()), "json-gemma": (gemma, "gemma", WHOLE)}
    for name, (model, style, whole) in files.items():
        save_tokenizer(place / name, character_bpe_json(model, style, plain=whole))
    save_tokenizer(place / "ranks", trained_over_characters())
    names = ("llama", "gemma", *rules, *files, "ranks")
    found = {}
    for name in names:
        rows = len(read_vocabulary(place / name, {}, embedding_rows=None)[KEYS.LIST].value) + 3
        found[name] = read_vocabulary(place / name, {}, embedding_rows=rows)
    return found


@pytest.mark.parametrize("name", ["llama", "gemma", "json-llama", "json-gemma", "ranks"])
@pytest.mark.parametrize("special", [True, False])
def test_bpe_over_characters(name: str, special: bool, pieces: Any) -> None:
    notes: list[str] = []
    data = made(pieces[name], notes)
    assert differing(pieces[name], data, add_special=special) == []
    assert notes == []


@pytest.mark.parametrize("name", ["nmt_nfkc", "identity", "spaces"])
def test_unigram(name: str, pieces: Any) -> None:
    """Hugging Face finds special tokens in plain text, strips U+0085, and maps by grapheme: docs/reference/tokenizers.md.
    Of texts that are spaces alone, it has a mark more where runs of them stay."""
    found = set(differing(pieces[name], made(pieces[name])))
    special = {text for text in found if any(token in text for token in ("<s>", "</s>", "<unk>"))}
    assert special
    usual = {"\u0085", *decomposed_texts()} if name == "nmt_nfkc" else set()
    assert all(text in usual or (name == "spaces" and not text.strip(" ")) for text in found - special)


@pytest.mark.parametrize("name", ["llama", "gemma", "json-llama", "json-gemma", "ranks", "nmt_nfkc", "identity", "spaces"])
def test_pieces_come_back(name: str, pieces: Any, tmp_path: Path) -> None:
    """All of the vocabulary, but that scores become ranks, and that roles stand in tokenizer_config.json."""
    metadata = pieces[name]
    data = made(metadata)
    back = again(data, metadata, tmp_path)
    print({k for k in {*metadata, *back} if metadata.get(k) != back.get(k)})
    for k in {k for k in {*metadata, *back} if metadata.get(k) != back.get(k)}:
        a, b = metadata.get(k), back.get(k)
        print(k, a and str(a.value)[:200], b and str(b.value)[:200])
        if a and b and isinstance(a.value, list): print([(i, x, y) for i, (x, y) in enumerate(zip(a.value, b.value)) if x != y][:10])
    assert 0
