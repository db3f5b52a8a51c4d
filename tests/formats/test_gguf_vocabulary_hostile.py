"""Tokenizer files from strangers: each ends in an error of ours that names file and item, within a second."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_quantize.errors import AccessError, LlmQuantizeError, MalformedInputError, UnsupportedError
from llm_quantize.formats.gguf.vocabulary.reading import read_vocabulary

from ..tiny_tokenizers import PRE_TOKENIZERS, byte_level_json, sentencepiece_model

BASE = byte_level_json(PRE_TOKENIZERS["gpt-2"][0], size=300)
LAST = max(BASE["model"]["vocab"].values())


def edited(change: Callable[[dict[str, Any]], object]) -> bytes:
    data = json.loads(json.dumps(BASE))
    change(data)
    return json.dumps(data).encode()


def vocab(**tokens: object) -> bytes:
    return edited(lambda d: d["model"]["vocab"].update(tokens))


def hole(index: int) -> bytes:
    def change(data: dict[str, Any]) -> None:
        data["model"]["vocab"]["qq"] = index
        data["added_tokens"] = data["added_tokens"][:3]

    return edited(change)


def added(**token: object) -> bytes:
    return edited(lambda d: d["added_tokens"].append({"id": LAST + 1, "content": "<new>"} | token))


def model(**fields: object) -> bytes:
    return edited(lambda d: d["model"].update(fields))


def unigram(items: object, unk: object = 0) -> bytes:
    return json.dumps({"model": {"type": "Unigram", "unk_id": unk, "vocab": items}}).encode()


NAN = json.dumps(BASE).encode().replace(b'"dropout": null', b'"dropout": NaN')
CASES: dict[str, tuple[bytes, type[LlmQuantizeError], str]] = {
    "empty": (b"", MalformedInputError, "JSON"),
    "not JSON": (b"{'model': 1}", MalformedInputError, "JSON"),
    "a list": (b"[]", MalformedInputError, "object"),
    "BOM": (b"\xef\xbb\xbf" + json.dumps(BASE).encode(), MalformedInputError, "byte order mark"),
    "not UTF-8": (b'{"model": "\xff"}', MalformedInputError, "UTF-8"),
    "deep": (b'{"model":' * 200_000, MalformedInputError, "deep"),
    "NaN": (NAN, MalformedInputError, "NaN"),
    "no model": (b"{}", MalformedInputError, "no model"),
    "model a string": (b'{"model": "BPE"}', MalformedInputError, "no model"),
    "word piece": (b'{"model": {"type": "WordPiece", "vocab": {}}}', UnsupportedError, "WordPiece"),
    "vocab a list": (model(vocab=["a"]), MalformedInputError, "model.vocab"),
    "no vocab": (model(vocab={}), MalformedInputError, "model.vocab"),
    "id a string": (vocab(qq="1"), MalformedInputError, "qq"),
    "id a float": (vocab(qq=1.5), MalformedInputError, "qq"),
    "id a boolean": (vocab(qq=True), MalformedInputError, "qq"),
    "id negative": (vocab(qq=-1), MalformedInputError, "qq"),
    "id huge": (vocab(qq=2**40), MalformedInputError, "qq"),
    "a hole": (hole(LAST + 7), MalformedInputError, f"a token {LAST + 1}"),
    "a hole of a billion": (hole(2**31 - 1), MalformedInputError, f"a token {LAST + 1}"),
    "one id twice": (vocab(qq=5), MalformedInputError, "qq"),
    "NUL": (vocab(**{"q\0q": LAST + 1}), UnsupportedError, "NUL"),
    "merges a string": (model(merges="a b"), MalformedInputError, "model.merges"),
    "merge of three": (model(merges=["a b c"]), MalformedInputError, r"model.merges\[0\]"),
    "merge of a number": (model(merges=[[1, "b"]]), MalformedInputError, r"model.merges\[0\]"),
    "merge of nothing": (model(merges=[["", "b"]]), MalformedInputError, r"model.merges\[0\]"),
    "unknown merge": (model(merges=[["q", "zq"]]), MalformedInputError, "'zq'"),
    "merge to nothing known": (model(merges=[["q", "z"]]), MalformedInputError, "'qz'"),
    "added not a list": (edited(lambda d: d.update(added_tokens={})), MalformedInputError, "added_tokens"),
    "added a string": (edited(lambda d: d.update(added_tokens=["x"])), MalformedInputError, r"added_tokens\[0\]"),
    "added without id": (added(id=None), MalformedInputError, r"added_tokens\[5\]"),
    "added without text": (added(content=None), MalformedInputError, r"added_tokens\[5\]"),
    "added with NUL": (added(content="a\0"), UnsupportedError, "NUL"),
    "added flag a number": (added(special=1), MalformedInputError, "special"),
    "added on a taken id": (added(id=7), MalformedInputError, "id 7"),
    "added text of another id": (added(content="a"), MalformedInputError, "'a'"),
    "added after a gap": (added(id=LAST + 9), MalformedInputError, f"expected: {LAST + 3}"),
    "ignore_merges a string": (model(ignore_merges="yes"), MalformedInputError, "ignore_merges"),
    "dropout": (model(dropout=0.5), UnsupportedError, "dropout"),
    "subword prefix": (model(continuing_subword_prefix="##"), UnsupportedError, "continuing_subword_prefix"),
    "no pre-tokenizer": (edited(lambda d: d.update(pre_tokenizer=None)), UnsupportedError, "byte fallback"),
    "pre-tokenizer a number": (edited(lambda d: d.update(pre_tokenizer=3)), MalformedInputError, "pre_tokenizer"),
    "sequence of nothing": (
        edited(lambda d: d.update(pre_tokenizer={"type": "Sequence"})),
        MalformedInputError,
        "pretokenizers",
    ),
    "normalizer a list": (edited(lambda d: d.update(normalizer=[])), MalformedInputError, "normalizer"),
    "post-processor a list": (edited(lambda d: d.update(post_processor=[])), MalformedInputError, "post_processor"),
    "post-processor unknown": (edited(lambda d: d.update(post_processor={"type": "X"})), UnsupportedError, "'X'"),
    "template without table": (
        edited(lambda d: d.update(post_processor={"type": "TemplateProcessing", "single": []})),
        MalformedInputError,
        "special_tokens",
    ),
    "template with an unknown id": (
        edited(lambda d: d.update(post_processor={"type": "RobertaProcessing", "cls": ["a", 99999], "sep": ["b", 1]})),
        MalformedInputError,
        "99999",
    ),
    "unigram pair": (unigram([["a"]]), MalformedInputError, r"vocab\[0\]"),
    "unigram score": (unigram([["a", "b"]]), MalformedInputError, r"vocab\[0\]"),
    "unigram huge score": (unigram([["a", 1e39]]), MalformedInputError, r"vocab\[0\]"),
    "unigram twice": (unigram([["a", 0], ["a", 0]]), MalformedInputError, "twice"),
    "unigram unk": (unigram([["a", 0]], unk=4), MalformedInputError, "unk_id"),
    "unigram bare": (unigram([["a", 0]]), UnsupportedError, "Metaspace"),
    "charsmap": (
        json.dumps(
            {
                "model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0]]},
                "normalizer": {"type": "Precompiled", "precompiled_charsmap": "////////"},
            }
        ).encode(),
        MalformedInputError,
        "charsmap",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_broken_tokenizer_json_is_named(name: str, tmp_path: Path) -> None:
    data, kind, words = CASES[name]
    path = tmp_path / "tokenizer.json"
    path.write_bytes(data)
    start = time.monotonic()
    with pytest.raises(kind, match=words) as caught:
        read_vocabulary(tmp_path, {}, embedding_rows=None)
    assert time.monotonic() - start < 5  # a second, with room for a loaded machine
    assert caught.value.file == str(path)
    assert caught.value.exit_code in (3, 4)


def test_the_base_of_these_cases_is_sound(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(BASE))
    assert read_vocabulary(tmp_path, {}, embedding_rows=None)


def test_no_tokenizer_and_other_formats(tmp_path: Path) -> None:
    with pytest.raises(MalformedInputError, match="no tokenizer"):
        read_vocabulary(tmp_path, {}, embedding_rows=None)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(UnsupportedError, match="save_pretrained"):
        read_vocabulary(tmp_path, {}, embedding_rows=None)


def test_a_sparse_giant_is_refused_before_it_is_read(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer.model"):
        path = tmp_path / name
        with path.open("wb") as file:
            file.truncate(600 << 20)
        with pytest.raises(LlmQuantizeError) as caught:
            read_vocabulary(tmp_path, {}, embedding_rows=None)
        assert caught.value.file == str(path)
        path.unlink()


def test_nothing_outside_the_directory_is_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(json.dumps(BASE))
    directory = tmp_path / "model"
    directory.mkdir()
    for name in ("tokenizer.json", "tokenizer.model", "chat_template.jinja", "tokenizer_config.json"):
        if name.startswith(("chat", "tokenizer_")):
            (directory / "tokenizer.json").write_text(json.dumps(BASE))
        link = directory / name
        link.symlink_to(tmp_path / "secret")
        with pytest.raises(AccessError):
            read_vocabulary(directory, {}, embedding_rows=None)
        link.unlink()


def test_a_pipe_does_not_hang_us(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(LlmQuantizeError):
        read_vocabulary(tmp_path, {}, embedding_rows=None)


@pytest.mark.parametrize("value", [3, {"a": 1}, [{"name": "x"}], {"default": "a\0b"}])
def test_chat_templates_that_are_no_text(value: object, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(BASE))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    with pytest.raises(MalformedInputError, match="chat_template"):
        read_vocabulary(tmp_path, {}, embedding_rows=None)


def test_ids_in_config_that_do_not_exist_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(BASE))
    config = {"bos_token_id": 2**40, "eos_token_id": [], "pad_token_id": "1", "text_config": 5}
    metadata = read_vocabulary(tmp_path, config, embedding_rows=None)
    assert metadata["tokenizer.ggml.bos_token_id"].value == 0
    assert "tokenizer.ggml.padding_token_id" not in metadata


@pytest.fixture(scope="module")
def model_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    options = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "vocab_size": 900}
    path = sentencepiece_model(tmp_path_factory.mktemp("m"), remove_extra_whitespaces=False, **options)
    return path.read_bytes()


def test_a_tokenizer_model_cut_short_or_bent(model_bytes: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    dice = random.Random(7)
    refused = []
    for trial in range(120):
        data = bytearray(model_bytes)
        if trial % 2:
            del data[dice.randrange(len(data)) :]
        else:
            for _ in range(3):
                data[dice.randrange(len(data))] = dice.randrange(256)
        path.write_bytes(bytes(data))
        try:
            read_vocabulary(tmp_path, {}, embedding_rows=None)
        except (MalformedInputError, UnsupportedError) as error:
            refused.append(error.file)
    assert set(refused) == {str(path)}
    assert len(refused) > 60


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x0a",
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        b"\x0b",
        b"\xff" * 40,
        b"\x0a\x05\x0a\x03\xff\xfe\xfd",
        b"\x0a\x07\x0a\x00\x15\x00\x00\xc0\x7f",
        b"\x0a\x05\x0a\x01a\x18\x09",
    ],
)
def test_hand_made_wire_errors(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(MalformedInputError):
        read_vocabulary(tmp_path, {}, embedding_rows=None)


def bent(value: Any, dice: random.Random) -> Any:
    """A copy of ``value`` with one node somewhere inside replaced or removed."""
    strange: list[Any] = [None, True, -1, 2**70, 1.5, "", "x", [], {}, [None], {"type": 3}, {"type": "Sequence"}, [[]]]
    if not isinstance(value, dict | list) or not value or dice.random() < 0.15:
        return dice.choice(strange)
    copy = value.copy()
    key = dice.choice(list(value)) if isinstance(value, dict) else dice.randrange(len(value))
    if dice.random() < 0.1:
        del copy[key]
    else:
        copy[key] = bent(value[key], dice)
    return copy


@pytest.mark.parametrize("kind", ["bytes", "characters", "unigram"])
def test_a_node_of_the_wrong_kind_anywhere(kind: str, tmp_path: Path) -> None:
    around = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    special = [{"id": 1, "content": "<s>", "special": True, "normalized": False}]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if kind == "bytes":
        base = BASE | {"post_processor": around, "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]}}
        base = base | {"pre_tokenizer": PRE_TOKENIZERS["deepseek-coder"][0]}
        base["added_tokens"] = base["added_tokens"][:2]
    else:
        texts = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a"]
        bpe = {"type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "merges": [["▁", "a"]]}
        bpe["vocab"] = {text: index for index, text in enumerate(texts)}
        scores = {"type": "Unigram", "unk_id": 0, "vocab": [[text, -1.0] for text in texts]}
        metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}
        base = {"model": scores if kind == "unigram" else bpe, "added_tokens": special, "post_processor": around}
        base |= {"pre_tokenizer": metaspace} if kind == "unigram" else {"normalizer": space}
    (tmp_path / "tokenizer.json").write_text(json.dumps(base))
    read_vocabulary(tmp_path, {}, embedding_rows=None)
    settings = {
        "bos_token": "<s>",
        "chat_template": [{"name": "default", "template": "x"}],
        "pad_token": {"content": "a"},
    }
    dice = random.Random(11)
    refused = 0
    for _ in range(120):
        (tmp_path / "tokenizer.json").write_text(json.dumps(bent(base, dice)))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(bent(settings, dice) if dice.random() < 0.3 else {}))
        try:
            read_vocabulary(tmp_path, {}, embedding_rows=400)
        except (MalformedInputError, UnsupportedError):
            refused += 1
    assert refused > 40
