"""Tokenizer files made of a GGUF file: their ids are those of llama.cpp, and the vocabulary comes back whole."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGUFValueType, Keys
from tokenizers import Tokenizer

from llm_quantize.errors import LlmQuantizeError, MalformedInputError, UnsupportedError
from llm_quantize.formats.gguf.restored.files import restored
from llm_quantize.formats.gguf.restored.said import read_said
from llm_quantize.formats.gguf.restored.tokenizer import merges_of, tokenizer_json
from llm_quantize.formats.gguf.vocabulary.pretokenizers import (
    BEGIN_WITH_BOS,
    OTHER_NAMES,
    RULES,
    canonical_steps,
    rule_named,
    written_steps,
)
from llm_quantize.formats.gguf.vocabulary.reading import read_vocabulary, said_conventions
from llm_quantize.io.gguf_file import MetaValue, read_gguf
from llm_quantize.models.opening import open_source
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
    write_model,
)
from .test_gguf_vocabulary_spm import BPE, WHOLE, trained_over_characters

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


def again(metadata: Mapping[str, MetaValue], place: Path) -> dict[str, MetaValue]:
    """The vocabulary of the files that are made of a GGUF file with this one."""
    with open_source(str(write_model(place / "m.gguf", metadata))).checkpoint as model:
        found = restored(open_source(str(place / "m.gguf")))
        for name, data in found.files:
            (place / name).parent.mkdir(exist_ok=True)
            (place / name).write_bytes(data)
        rows = len(metadata[KEYS.LIST].value)
        said = json.loads((place / "generation_config.json").read_bytes())
        return read_vocabulary(place, model.config, embedding_rows=rows, generation_config=said)


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
    found = differing(metadata, made(metadata, notes))
    if rule_named(name, FILE).exact:
        assert (found, notes) == ([], [])
    else:
        assert len(notes) == 1
        assert found
        assert all(any(unicodedata.category(c).startswith("M") for c in text) for text in found)
    expected = dict(metadata)
    if name == "gpt-4o":  # its twin, which does not cut at combining marks, as the file does not
        expected = with_value(metadata, KEYS.PRE, "granite-embed-multi-97m")
    assert again(metadata, tmp_path) == expected


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
    assert said_conventions(metadata).special[KEYS.ADD_BOS].value is begins


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
    """Hugging Face finds special tokens in plain text, strips U+0085, maps by grapheme (docs/reference/tokenizers.md).
    Of texts that are spaces alone, it has a mark more where runs of them stay."""
    found = set(differing(pieces[name], made(pieces[name])))
    special = {text for text in found if any(token in text for token in ("<s>", "</s>", "<unk>"))}
    assert special
    usual = {"\u0085", *decomposed_texts()} if name == "nmt_nfkc" else set()
    assert all(text in usual or (name == "spaces" and not text.strip(" ")) for text in found - special)


PIECES = ["llama", "gemma", "json-llama", "json-gemma", "ranks", "nmt_nfkc", "identity", "spaces"]


@pytest.mark.parametrize("name", PIECES)
def test_pieces_come_back(name: str, pieces: Any, tmp_path: Path) -> None:
    """All of the vocabulary but trained scores, which become ranks, in the same order."""
    metadata = pieces[name]
    back = again(metadata, tmp_path)
    if name in ("llama", "gemma"):
        before, after = metadata[KEYS.SCORES].value, back[KEYS.SCORES].value
        reached = [i for i, score in enumerate(after) if score > min(after[: len(before) - 3]) and score < 0]
        ranked = sorted(reached, key=lambda i: before[i], reverse=True)
        assert len(reached) > 800
        assert ranked == sorted(reached, key=lambda i: after[i], reverse=True)
        back = with_value(back, KEYS.SCORES, before)
    assert back == dict(metadata)


def test_white_space_after_special_tokens_of_phi3(pieces: Any, tmp_path: Path) -> None:
    """llama.cpp drops it where the model is called so."""
    texts = list(pieces["json-llama"][KEYS.LIST].value)
    types = list(pieces["json-llama"][KEYS.TOKEN_TYPE].value)
    texts[-3:], types[-3:] = ["<|endoftext|>", "<|user|>", "<|end|>"], [3, 3, 3]
    metadata = with_value(with_value(pieces["json-llama"], KEYS.LIST, texts), KEYS.TOKEN_TYPE, types)
    asked = ("<|user|>\n Hello <|end|>  \n<|user|> x", "<s> a </s>  b<|endoftext|> \n c", "plain\n a")
    for name, strips in (("Phi-3 mini", True), ("Other", False)):
        metadata[Keys.General.NAME] = MetaValue(GGUFValueType.STRING, name)
        tokenizer = Tokenizer.from_str(made(metadata).decode())
        runtime = open_vocabulary(metadata, FILE)
        for text in asked:
            ids = hugging_face_ids(tokenizer, text, parse_special=True)
            assert ids == runtime.tokenize(text, add_special=False, parse_special=True)
        assert tokenizer.encode("<|user|>  ", add_special_tokens=False).ids == [len(texts) - 2] or not strips


def array(item: GGUFValueType, *values: object) -> MetaValue:
    return MetaValue(GGUFValueType.ARRAY, list(values), item)


def text(value: str) -> MetaValue:
    return MetaValue(GGUFValueType.STRING, value)


FLOAT, INT, STRING = GGUFValueType.FLOAT32, GGUFValueType.INT32, GGUFValueType.STRING
ABC = ("<unk>", "<s>", "</s>", "a", "b", "ab", "<0x0A>")
SPM: dict[str, MetaValue] = {
    KEYS.MODEL: text("llama"),
    KEYS.LIST: array(STRING, *ABC),
    KEYS.TOKEN_TYPE: array(INT, 2, 3, 3, 1, 1, 1, 6),
    KEYS.SCORES: array(FLOAT, 0.0, 0.0, 0.0, -2.0, -3.0, -1.0, 0.0),
}
BYTES: dict[str, MetaValue] = {
    KEYS.MODEL: text("gpt2"),
    KEYS.PRE: text("qwen2"),
    KEYS.LIST: array(STRING, "<|x|>", "a", "b", "ab"),
    KEYS.TOKEN_TYPE: array(INT, 3, 1, 1, 1),
    KEYS.MERGES: array(STRING, "a b"),
}


@pytest.mark.parametrize(
    ("base", "changes", "words"),
    [
        (SPM, {KEYS.MODEL: text("bert")}, "of the kind 'bert'"),
        (SPM, {KEYS.MODEL: MetaValue(INT, 3)}, "tokenizer.ggml.model of this file is not usable"),
        (SPM, {KEYS.LIST: array(STRING)}, "tokens of this file"),
        (SPM, {KEYS.LIST: text("a")}, "tokens of this file"),
        (SPM, {KEYS.LIST: array(INT, *range(7))}, "tokens of this file"),
        (SPM, {KEYS.LIST: array(STRING, *ABC[:-1], "a")}, "tokens of this file"),
        (SPM, {KEYS.LIST: array(STRING, *ABC[:-1], "a\0")}, "tokens of this file"),
        (SPM, {KEYS.LIST: array(STRING, *(f"t{i}" for i in range(40)))}, "tokens of this file"),
        (SPM, {KEYS.TOKEN_TYPE: array(INT, 1, 1)}, "token_type of this file"),
        (SPM, {KEYS.TOKEN_TYPE: array(INT, 1, 1, 1, 1, 1, 1, 7)}, "token_type of this file"),
        (SPM, {KEYS.TOKEN_TYPE: array(INT, 1, 1, 1, 1, 1, 1, -1)}, "token_type of this file"),
        (SPM, {KEYS.TOKEN_TYPE: array(FLOAT, *[1.0] * 7)}, "token_type of this file"),
        (SPM, {KEYS.SCORES: None}, "scores is not in the metadata"),
        (SPM, {KEYS.SCORES: array(FLOAT, 1.0)}, "scores of this file"),
        (SPM, {KEYS.SCORES: array(FLOAT, *[float("nan")] * 7)}, "scores of this file"),
        (SPM, {KEYS.SCORES: array(FLOAT, *[float("-inf")] * 7)}, "scores of this file"),
        (SPM, {KEYS.BOS_ID: text("1")}, "bos_token_id of this file"),
        (SPM, {KEYS.ADD_BOS: MetaValue(INT, 1)}, "add_bos_token of this file"),
        (SPM, {KEYS.ADD_PREFIX: text("no")}, "add_space_prefix of this file"),
        (SPM, {KEYS.LIST: array(STRING, *ABC[:-1], "a" * (1 << 16))}, "too long to find their merges"),
        (SPM, {KEYS.CHAT_TEMPLATE: MetaValue(INT, 5)}, "chat_template of this file"),
        (SPM, {KEYS.CHAT_TEMPLATE: array(STRING, "a")}, "chat_template of this file"),
        (SPM, {KEYS.CHAT_TEMPLATE: text("a\0b")}, "chat_template of this file"),
        (SPM, {f"{KEYS.CHAT_TEMPLATE}.../../x": text("a")}, "chat_template"),
        (SPM, {f"{KEYS.CHAT_TEMPLATE}.default": text("a"), KEYS.CHAT_TEMPLATE: text("b")}, "chat_template"),
        (BYTES, {KEYS.MERGES: None}, "merges is not in the metadata"),
        (BYTES, {KEYS.MERGES: array(STRING, "ab")}, "merges of this file"),
        (BYTES, {KEYS.MERGES: array(STRING, "a ")}, "merges of this file"),
        (BYTES, {KEYS.MERGES: array(STRING, " b")}, "merges of this file"),
        (BYTES, {KEYS.MERGES: array(STRING, "a c")}, "merges of this file"),
        (BYTES, {KEYS.MERGES: array(STRING, "b a")}, "merges of this file"),
        (BYTES, {KEYS.MERGES: array(INT, 1)}, "merges of this file"),
        (BYTES, {KEYS.PRE: text("nobody")}, "the pre-tokenizer 'nobody' is not known"),
        (BYTES, {KEYS.PRE: MetaValue(INT, 1)}, "tokenizer.ggml.pre of this file"),
        (SPM, {KEYS.MODEL: text("t5"), KEYS.UNK_ID: MetaValue(INT, 99)}, "needs an unknown token"),
        (SPM, {KEYS.MODEL: text("t5"), KEYS.PRECOMPILED_CHARSMAP: text("x")}, "charsmap of this file"),
        (
            SPM,
            {KEYS.MODEL: text("t5"), KEYS.PRECOMPILED_CHARSMAP: array(GGUFValueType.UINT8, 255, 255, 255, 127, 0)},
            "charsmap of this file",
        ),
    ],
)
def test_a_vocabulary_that_breaks_is_refused_by_name(
    base: Mapping[str, MetaValue], changes: Mapping[str, MetaValue | None], words: str
) -> None:
    metadata = {key: value for key, value in {**base, **changes}.items() if value is not None}
    assert made(base)
    with pytest.raises((MalformedInputError, UnsupportedError), match=words) as caught:
        tokenizer_json(read_said(metadata, FILE, rows=32), [].append)
    assert caught.value.file == "m.gguf"
    assert caught.value.remedy


def test_ids_and_texts_that_mean_nothing_are_passed_over() -> None:
    """Roles beyond the vocabulary, tokens without a text, placeholders of rows without a token."""
    kinds = {KEYS.TOKEN_TYPE: array(INT, 2, 3, 3, 1, 1, 5, 5)}
    texts = {KEYS.LIST: array(STRING, "<unk>", "<s>", "</s>", "a", "", "[PAD5]", "[PAD7]")}
    roles = {KEYS.BOS_ID: MetaValue(INT, 4711), KEYS.EOS_ID: MetaValue(INT, -1), KEYS.EOT_ID: MetaValue(INT, 2)}
    said = read_said({**SPM, **kinds, **texts, **roles}, FILE, rows=7)
    assert (said.roles, said.ends, said.add_bos) == ({"unk": 0}, (2,), False)
    assert said.ids == {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "[EMPTY_4]": 4, "[PAD7]": 6}
    assert json.loads(tokenizer_json(said, [].append))["model"]["vocab"] == said.ids


def test_merges_follow_the_scores() -> None:
    texts = {KEYS.LIST: array(STRING, "<unk>", "a", "b", "c", "ab", "bc", "abc", "zz")}
    kinds = {KEYS.TOKEN_TYPE: array(INT, 2, 1, 1, 1, 1, 1, 1, 4)}
    scores = {KEYS.SCORES: array(FLOAT, 0.0, -9.0, -9.0, -9.0, -3.0, -1.0, -2.0, 0.0)}
    said = read_said({**SPM, **texts, **kinds, **scores}, FILE, rows=8)
    assert merges_of(said, [].append) == [("b", "c"), ("a", "bc"), ("ab", "c"), ("a", "b")]


def test_tokens_of_one_score_are_told() -> None:
    notes: list[str] = []
    texts = {KEYS.LIST: array(STRING, "<unk>", "<s>", "</s>", "a", "b", "ab", "ba")}
    kinds = {KEYS.TOKEN_TYPE: array(INT, 2, 3, 3, 1, 1, 1, 1), KEYS.SCORES: array(FLOAT, *[0.0] * 7)}
    made({**SPM, **texts, **kinds}, notes)
    assert len(notes) == 1
    assert notes[0].startswith("tokens with the score of another one: 1;")


def test_control_tokens_by_their_text() -> None:
    """llama.cpp takes them for control tokens, whatever the file says."""
    metadata = {
        **BYTES,
        KEYS.LIST: array(STRING, "<|im_end|>", "a", "b", "ab"),
        KEYS.TOKEN_TYPE: array(INT, 1, 1, 1, 1),
    }
    (token,) = read_said(metadata, FILE, rows=4).added()
    assert (token["content"], token["special"]) == ("<|im_end|>", True)


@pytest.mark.parametrize("name", ["llama", "json-gemma", "ranks", "nmt_nfkc"])
def test_a_damaged_file_is_refused_or_made(name: str, pieces: Any, tmp_path: Path) -> None:
    """Bytes of the metadata changed at random: an error of ours, or a tokenizer that its owner loads."""
    whole = write_model(tmp_path / "m.gguf", pieces[name]).read_bytes()
    start, stop = whole.index(b"tokenizer.ggml.model"), read_gguf(tmp_path / "m.gguf").data_start
    chance, loaded = np.random.Generator(np.random.PCG64(len(name))), 0
    for _ in range(150):
        data = bytearray(whole)
        for at in chance.integers(start, stop, chance.integers(1, 4)):
            data[at] = chance.choice([0, 1, 3, 32, 95, 127, 255, data[at] ^ 1])
        (tmp_path / "x.gguf").write_bytes(data)
        try:
            found = restored(open_source(str(tmp_path / "x.gguf")))
        except LlmQuantizeError:
            continue
        for file, content in found.files:
            if file == "tokenizer.json":
                Tokenizer.from_str(content.decode())
                loaded += 1
            elif file.endswith(".json"):
                json.loads(content)
    assert (1 if name == "ranks" else 20) < loaded < 150  # a token that is another breaks a merge
