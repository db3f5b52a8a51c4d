"""Byte-level BPE: ids in real llama.cpp equal Hugging Face's for every rule of the table."""

from __future__ import annotations

import importlib.resources
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from gguf.constants import Keys, TokenType
from tokenizers import Tokenizer

from llm_quantize.errors import MalformedInputError, UnsupportedError
from llm_quantize.formats.gguf.vocabulary.pretokenizers import RULES, canonical_expression, find_rules
from llm_quantize.formats.gguf.vocabulary.reading import read_vocabulary
from llm_quantize.io.gguf_file import MetaValue
from llm_quantize.runtimes.llama_cpp import LlamaCpp

from ..tiny_tokenizers import (
    LLAMA3,
    PRE_TOKENIZERS,
    QWEN2,
    byte_level_json,
    decomposed_texts,
    hugging_face_ids,
    nasty_texts,
    save_tokenizer,
    sequence,
    split,
    write_model,
)

PRE = Keys.Tokenizer.PRE


def differing(
    directory: Path, tokenizer: Tokenizer, metadata: dict[str, MetaValue], texts: tuple[str, ...]
) -> list[str]:
    """The texts whose ids differ between ``tokenizer`` and llama.cpp, special tokens parsed or not."""
    found = []
    with LlamaCpp(write_model(directory / "model.gguf", metadata), context=64, threads=1) as runtime:
        for text in texts:
            for parse in (True, False):
                ours = runtime.tokenize(text, add_special=False, parse_special=parse)
                if ours != hugging_face_ids(tokenizer, text, parse_special=parse):
                    found.append(text)
                    break
    return found


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tokenizer, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("qwen")
    data = byte_level_json(PRE_TOKENIZERS["qwen2"][0])
    return directory, save_tokenizer(directory, data), data


@pytest.mark.parametrize("name", sorted(set(PRE_TOKENIZERS) - {"tekken"}))
def test_ids_are_equal_for_every_rule(name: str, tmp_path: Path) -> None:
    steps, ignore_merges = PRE_TOKENIZERS[name]
    tokenizer = save_tokenizer(tmp_path, byte_level_json(steps, ignore_merges=ignore_merges))
    metadata = read_vocabulary(tmp_path, {}, embedding_rows=None)
    # gpt-4o's own rule in llama.cpp breaks words at combining marks; its twin does not, and serves where it can.
    assert metadata[PRE].value == ("granite-embed-multi-97m" if name == "gpt-4o" else name)
    assert differing(tmp_path, tokenizer, metadata, nasty_texts()) == []


def test_every_rule_has_a_tokenizer_in_these_tests() -> None:
    assert {rule.name for rule in RULES} == set(PRE_TOKENIZERS)


def test_tekken_differs_only_where_there_are_combining_marks(tmp_path: Path) -> None:
    steps, ignore_merges = PRE_TOKENIZERS["tekken"]
    tokenizer = save_tokenizer(tmp_path, byte_level_json(steps, ignore_merges=ignore_merges))
    metadata = read_vocabulary(tmp_path, {}, embedding_rows=None)
    assert metadata[PRE].value == "tekken"
    found = differing(tmp_path, tokenizer, metadata, nasty_texts())
    assert found
    assert all(any(unicodedata.category(c).startswith("M") for c in text) for text in found)


@pytest.mark.parametrize("other", ["default", "gpt-2", "deepseek-v3", "smollm", "qwen35"])
def test_the_texts_tell_rules_apart(other: str, qwen: tuple[Path, Tokenizer, Any], tmp_path: Path) -> None:
    directory, tokenizer, _ = qwen
    metadata = read_vocabulary(directory, {}, embedding_rows=None)
    metadata[PRE] = metadata[PRE]._replace(value=other)
    assert differing(tmp_path, tokenizer, metadata, nasty_texts())


def test_text_that_is_not_in_nfc_differs_under_an_nfc_normalizer(tmp_path: Path) -> None:
    data = byte_level_json(PRE_TOKENIZERS["qwen2"][0], normalizer={"type": "NFC"})
    tokenizer = save_tokenizer(tmp_path, data)
    metadata = read_vocabulary(tmp_path, {}, embedding_rows=None)
    assert differing(tmp_path, tokenizer, metadata, nasty_texts()) == []
    assert len(differing(tmp_path, tokenizer, metadata, decomposed_texts())) == len(decomposed_texts())


def test_the_demo_models_tokenizer(tmp_path: Path) -> None:
    directory = Path(str(importlib.resources.files("llm_quantize"))) / "data" / "demo-llama"
    config = json.loads((directory / "config.json").read_text())
    metadata = read_vocabulary(directory, config, embedding_rows=config["vocab_size"])
    assert metadata[PRE].value == "dbrx"  # Llama 3's expression, its merges never ignored
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert differing(tmp_path, tokenizer, metadata, nasty_texts() + decomposed_texts()) == []


def test_an_exact_twin_serves_only_where_ignoring_merges_changes_nothing(tmp_path: Path) -> None:
    data = byte_level_json(PRE_TOKENIZERS["gpt-4o"][0])
    data["model"]["vocab"]["qzxqzx"] = 3000  # no merges lead to it
    for token in data["added_tokens"][-2:]:
        token["id"] += 1
    save_tokenizer(tmp_path / "a", data)
    assert read_vocabulary(tmp_path / "a", {}, embedding_rows=None)[PRE].value == "gpt-4o"
    data["model"]["ignore_merges"] = True
    tokenizer = save_tokenizer(tmp_path / "b", data)
    metadata = read_vocabulary(tmp_path / "b", {}, embedding_rows=None)
    assert metadata[PRE].value == "granite-embed-multi-97m"
    assert differing(tmp_path, tokenizer, metadata, ("qzxqzx", " qzxqzx")) == []
    data["pre_tokenizer"] = PRE_TOKENIZERS["qwen2"][0]
    save_tokenizer(tmp_path / "c", data)
    with pytest.raises(UnsupportedError, match="qzxqzx"):
        read_vocabulary(tmp_path / "c", {}, embedding_rows=None)


def test_llama3_rule_without_ignore_merges_matters(tmp_path: Path) -> None:
    data = byte_level_json(PRE_TOKENIZERS["llama-bpe"][0])
    data["model"]["vocab"]["qzxqzx"] = 3000
    for token in data["added_tokens"][-2:]:
        token["id"] += 1
    for wanted, name in ((True, "llama-bpe"), (False, "dbrx")):
        data["model"]["ignore_merges"] = wanted
        tokenizer = save_tokenizer(tmp_path / name, data)
        metadata = read_vocabulary(tmp_path / name, {}, embedding_rows=None)
        assert metadata[PRE].value == name
        assert differing(tmp_path / name, tokenizer, metadata, ("qzxqzx", "a qzxqzx")) == []


def test_spellings_of_one_rule() -> None:
    file = Path("tokenizer.json")
    possessive = QWEN2.replace("]?\\p{L}", "]?+\\p{L}").replace("]+[\\r", "]++[\\r")
    contractions = QWEN2.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "'(?i:[sdmt]|ll|ve|re)")
    for expression in (QWEN2, possessive, contractions, QWEN2.replace("\\r", "\r").replace("\\n", "\n")):
        assert [rule.name for rule in find_rules(sequence(split(expression)), file)] == ["qwen2"]
        assert canonical_expression(expression) == canonical_expression(QWEN2)
    # A possessive interval is another rule to Oniguruma: a repeated interval. It must not be taken for the plain one.
    with pytest.raises(UnsupportedError):
        find_rules(sequence(split(LLAMA3.replace("{1,3}", "{1,3}+"))), file)


@pytest.mark.parametrize(
    "steps",
    [
        sequence(split(QWEN2), split("x")),
        sequence(split(QWEN2, "Removed")),
        sequence(split(QWEN2, "Isolated", True)),
        sequence(split(QWEN2), regex=True),
        sequence({"type": "WhitespaceSplit"}),
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        sequence({"type": "Digits", "individual_digits": False}, regex=True),
    ],
)
def test_unknown_rules_are_refused_with_the_nearest(
    steps: dict[str, Any], qwen: tuple[Path, Tokenizer, dict[str, Any]], tmp_path: Path
) -> None:
    save_tokenizer(tmp_path, qwen[2] | {"pre_tokenizer": steps})
    with pytest.raises(UnsupportedError) as refused:
        read_vocabulary(tmp_path, {}, embedding_rows=None)
    assert refused.value.exit_code == 4
    assert refused.value.file == str(tmp_path / "tokenizer.json")
    assert "nearest" in str(refused.value.expected)
    assert refused.value.found


@pytest.mark.parametrize("kind", ["NFD", "NFKC", "Lowercase", "StripAccents", "Nmt"])
def test_other_normalizers_are_refused_by_name(
    kind: str, qwen: tuple[Path, Tokenizer, dict[str, Any]], tmp_path: Path
) -> None:
    save_tokenizer(tmp_path, qwen[2] | {"normalizer": {"type": "Sequence", "normalizers": [{"type": kind}]}})
    with pytest.raises(UnsupportedError, match=kind):
        read_vocabulary(tmp_path, {}, embedding_rows=None)


def template(before: list[str], after: list[str], ids: dict[str, int]) -> dict[str, Any]:
    def special(text: str) -> dict[str, Any]:
        return {"SpecialToken": {"id": text, "type_id": 0}}

    single = [*map(special, before), {"Sequence": {"id": "A", "type_id": 0}}, *map(special, after)]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    table = {text: {"id": text, "ids": [ids[text]], "tokens": [text]} for text in {*before, *after}}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": table}


@pytest.mark.parametrize(
    ("before", "after"),
    [([], []), (["<|im_start|>"], []), ([], ["<|im_end|>"]), (["<|im_start|>"], ["<|endoftext|>"])],
)
def test_tokens_around_a_text(
    before: list[str], after: list[str], qwen: tuple[Path, Tokenizer, dict[str, Any]], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    ids = {token["content"]: token["id"] for token in qwen[2]["added_tokens"]}
    # transformers ignores add_bos_token beside a tokenizer.json: only what that file does counts.
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, "eos_token": "<|im_end|>"}
    save_tokenizer(tmp_path, qwen[2] | {"post_processor": template(before, after, ids)}, config)
    metadata = read_vocabulary(tmp_path, {}, embedding_rows=None)
    judge = AutoTokenizer.from_pretrained(tmp_path)
    with LlamaCpp(write_model(tmp_path / "m.gguf", metadata), context=64, threads=1) as runtime:
        for text in ("", "Hello", " x\n"):
            assert runtime.tokenize(text, add_special=True) == judge(text).input_ids
    assert metadata[Keys.Tokenizer.ADD_BOS].value is bool(before)
    assert metadata[Keys.Tokenizer.ADD_EOS].value is bool(after)


def test_two_tokens_before_a_text_are_refused(qwen: tuple[Path, Tokenizer, dict[str, Any]], tmp_path: Path) -> None:
    ids = {token["content"]: token["id"] for token in qwen[2]["added_tokens"]}
    save_tokenizer(tmp_path, qwen[2] | {"post_processor": template(["<|im_start|>", "<|im_end|>"], [], ids)})
    with pytest.raises(UnsupportedError, match="at most one token"):
        read_vocabulary(tmp_path, {}, embedding_rows=None)


def test_special_ids_types_and_padding(qwen: tuple[Path, Tokenizer, dict[str, Any]], tmp_path: Path) -> None:
    config = {"eos_token": {"content": "<|im_end|>"}, "pad_token": "<|endoftext|>", "unk_token": None}
    save_tokenizer(tmp_path, qwen[2], config)
    metadata = read_vocabulary(
        tmp_path, {"bos_token_id": 1, "eos_token_id": [0, 2], "pad_token_id": 99}, embedding_rows=3010
    )
    keys = Keys.Tokenizer
    assert [metadata[k].value for k in (keys.BOS_ID, keys.EOS_ID, keys.PAD_ID, keys.EOT_ID)] == [1, 2, 0, 2]
    assert keys.UNK_ID not in metadata
    texts, types = metadata[keys.LIST].value, metadata[keys.TOKEN_TYPE].value
    assert len(texts) == len(types) == 3010
    assert texts[3000:3003] == ["<tool_call>", "  TWO", "[PAD3002]"]
    assert types[:4] == [TokenType.CONTROL] * 3 + [TokenType.NORMAL]
    assert types[3000:3003] == [TokenType.USER_DEFINED, TokenType.USER_DEFINED, TokenType.UNUSED]
    assert types[3009] == TokenType.UNUSED
    assert keys.SCORES not in metadata
    with pytest.raises(MalformedInputError, match="beyond the rows"):
        read_vocabulary(tmp_path, {}, embedding_rows=3000)


def test_a_model_without_bos_or_eos_does_not_get_token_11(
    qwen: tuple[Path, Tokenizer, dict[str, Any]], tmp_path: Path
) -> None:
    save_tokenizer(tmp_path, qwen[2])
    metadata = read_vocabulary(tmp_path, {}, embedding_rows=None)
    assert metadata[Keys.Tokenizer.EOS_ID].value == metadata[Keys.Tokenizer.BOS_ID].value == 0
    assert metadata[Keys.Tokenizer.ADD_BOS].value is False


def test_chat_templates(qwen: tuple[Path, Tokenizer, dict[str, Any]], tmp_path: Path) -> None:
    keys = Keys.Tokenizer
    named = [{"name": "default", "template": "A"}, {"name": "tool use", "template": "B"}]
    save_tokenizer(tmp_path, qwen[2], {"chat_template": named})
    metadata = read_vocabulary(tmp_path, {}, embedding_rows=None)
    assert metadata[keys.CHAT_TEMPLATE].value == "A"
    assert metadata[keys.CHAT_TEMPLATES].value == ["tool_use"]
    assert metadata["tokenizer.chat_template.tool_use"].value == "B"
    (tmp_path / "chat_template.jinja").write_text("C 日本", encoding="utf-8")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("D")
    metadata = read_vocabulary(tmp_path, {}, embedding_rows=None)
    assert metadata[keys.CHAT_TEMPLATE].value == "C 日本"
    assert metadata[keys.CHAT_TEMPLATES].value == ["rag"]
    assert "tokenizer.chat_template.tool_use" not in metadata


def test_holes_are_filled_up_to_the_embedding(qwen: tuple[Path, Tokenizer, dict[str, Any]], tmp_path: Path) -> None:
    data = json.loads(json.dumps(qwen[2]))
    data["added_tokens"] = data["added_tokens"][:3]
    data["model"]["vocab"]["[PAD3005]"] = 3007
    tokenizer = save_tokenizer(tmp_path, data)
    metadata = read_vocabulary(tmp_path, {}, embedding_rows=3010)
    texts, types = metadata[Keys.Tokenizer.LIST].value, metadata[Keys.Tokenizer.TOKEN_TYPE].value
    assert texts[3000] == "[PAD3000]"
    assert types[3000] == TokenType.UNUSED
    assert len(set(texts)) == 3010  # llama.cpp refuses two tokens of one text
    assert differing(tmp_path, tokenizer, metadata, nasty_texts()[:60]) == []
    with pytest.raises(MalformedInputError, match="hole"):
        read_vocabulary(tmp_path, {}, embedding_rows=None)


def test_a_space_mark_is_no_space_to_byte_level_bpe(
    qwen: tuple[Path, Tokenizer, dict[str, Any]], tmp_path: Path
) -> None:
    data = json.loads(json.dumps(qwen[2]))
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    data["added_tokens"].append({"id": 3002, "content": "a\u2581b", **plain})
    tokenizer = save_tokenizer(tmp_path, data)
    metadata = read_vocabulary(tmp_path, {}, embedding_rows=None)
    assert differing(tmp_path, tokenizer, metadata, ("a\u2581b", "xa\u2581by", "a b")) == []
