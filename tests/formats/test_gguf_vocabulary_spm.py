"""SentencePiece-like vocabularies: ids in real llama.cpp equal Hugging Face's and SentencePiece's."""

from __future__ import annotations

import base64
import json
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from gguf.constants import Keys, TokenType
from tokenizers import AddedToken, Tokenizer, models, normalizers, trainers

from llm_quantize.errors import LlmQuantizeError, MalformedInputError, UnsupportedError
from llm_quantize.formats.gguf.vocabulary.reading import read_vocabulary, runtime_name
from llm_quantize.formats.gguf.vocabulary.sentencepiece import read_sentencepiece
from llm_quantize.runtimes.llama_cpp import LlamaCpp

from ..tiny_tokenizers import (
    character_bpe_json,
    decomposed_texts,
    hugging_face_ids,
    nasty_texts,
    save_tokenizer,
    sentencepiece_model,
    training_lines,
    write_model,
)

IDENTITY: dict[str, Any] = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
BPE: dict[str, Any] = {"model_type": "bpe", "byte_fallback": True, **IDENTITY}
# Gemma's own whole pieces: runs of spaces and of newlines, tags.
WHOLE = ["▁" * n for n in range(2, 32)] + ["\n" * n for n in range(1, 8)] + ["<table>", "<tr>"]
ALL_TEXTS = nasty_texts() + decomposed_texts()


def differing(
    directory: Path,
    judge: Callable[[str, bool], list[int]],
    *,
    parse: tuple[bool, ...] = (True, False),
    name: str = "tiny",
    equal: Callable[[list[int], list[int]], bool] = operator.eq,
) -> list[str]:
    """The texts whose ids differ between ``judge`` and llama.cpp; ``equal`` says what is no difference."""
    metadata = read_vocabulary(directory, {}, embedding_rows=None)
    found = []
    with LlamaCpp(write_model(directory / "m.gguf", metadata, name=name), context=64, threads=1) as runtime:
        for text in ALL_TEXTS:
            for special in parse:
                ids = list(runtime.tokenize(text, add_special=False, parse_special=special))
                if not equal(ids, judge(text, special)):
                    found.append(text)
    return found


def hugging_face(tokenizer: Tokenizer) -> Callable[[str, bool], list[int]]:
    return lambda text, special: hugging_face_ids(tokenizer, text, parse_special=special)


@pytest.fixture(scope="module")
def llama_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sentencepiece_model(tmp_path_factory.mktemp("llama"), **BPE)


@pytest.fixture(scope="module")
def gemma_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = BPE | {"add_dummy_prefix": False, "split_digits": True, "user_defined_symbols": WHOLE}
    return sentencepiece_model(tmp_path_factory.mktemp("gemma"), allow_whitespace_only_pieces=True, **options)


@pytest.mark.parametrize("style", ["llama", "gemma", "never"])
def test_bpe_with_byte_fallback_from_tokenizer_json(style: str, llama_model: Path, tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path, character_bpe_json(llama_model, style))
    metadata = read_vocabulary(tmp_path, {}, embedding_rows=None)
    assert metadata[Keys.Tokenizer.MODEL].value == "llama"
    assert metadata[Keys.Tokenizer.ADD_PREFIX].value is (style == "llama")
    assert differing(tmp_path, hugging_face(tokenizer)) == []


@pytest.mark.parametrize("style", ["always", "first"])
def test_metaspace_differs_only_at_leading_spaces_and_after_special_tokens(
    style: str, llama_model: Path, tmp_path: Path
) -> None:
    tokenizer = save_tokenizer(tmp_path, character_bpe_json(llama_model, style))
    for text in differing(tmp_path, hugging_face(tokenizer)):
        assert text.startswith(" ") or "<s>" in text or "</s>" in text or "<unk>" in text, text


def test_gemma_like_tokenizer_json(gemma_model: Path, tmp_path: Path) -> None:
    data = character_bpe_json(gemma_model, "gemma", plain=WHOLE)
    tokenizer = save_tokenizer(tmp_path, data)
    assert differing(tmp_path, hugging_face(tokenizer)) == []
    metadata = read_vocabulary(tmp_path, {}, embedding_rows=None)
    index = data["model"]["vocab"]["▁▁▁"]
    assert metadata[Keys.Tokenizer.LIST].value[index] == "   "
    assert metadata[Keys.Tokenizer.TOKEN_TYPE].value[index] == TokenType.USER_DEFINED


def test_a_tab_may_stand_for_its_byte(llama_model: Path, tmp_path: Path) -> None:
    """Gemma's first tokenizer.json has a tab where the model has <0x09>."""
    data = character_bpe_json(llama_model, "gemma")
    vocab = data["model"]["vocab"]
    vocab["\u0500"] = vocab.pop("\t", len(vocab))
    vocab["\t"] = vocab.pop("<0x09>")
    tokenizer = save_tokenizer(tmp_path, data)
    assert differing(tmp_path, hugging_face(tokenizer)) == []
    vocab["Ж"] = vocab.pop("<0x0A>")
    save_tokenizer(tmp_path, data)
    with pytest.raises(UnsupportedError, match="<0x0A>"):
        read_vocabulary(tmp_path, {}, embedding_rows=None)


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_bpe_from_tokenizer_model_alone(kind: str, llama_model: Path, gemma_model: Path) -> None:
    model = {"llama": llama_model, "gemma": gemma_model}[kind]
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert differing(model.parent, lambda text, _: list(processor.encode(text)), parse=(False,)) == []
    metadata = read_vocabulary(model.parent, {}, embedding_rows=None)
    assert metadata[Keys.Tokenizer.ADD_BOS].value is True
    keys = Keys.Tokenizer
    assert [metadata[key].value for key in (keys.UNK_ID, keys.BOS_ID, keys.EOS_ID)] == [0, 1, 2]


def test_added_tokens_beside_tokenizer_model(llama_model: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(llama_model.read_bytes())
    size = sentencepiece.SentencePieceProcessor(model_file=str(llama_model)).get_piece_size()
    added = {str(size): {"content": "<|user|>", "special": True}, str(size + 1): {"content": "<fn>", "special": False}}
    config = {"added_tokens_decoder": added, "add_bos_token": False, "eos_token": "<|user|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    metadata = read_vocabulary(tmp_path, {}, embedding_rows=size + 4)
    assert metadata[Keys.Tokenizer.TOKEN_TYPE].value[-4:] == [
        TokenType.CONTROL,
        TokenType.USER_DEFINED,
        TokenType.UNUSED,
        TokenType.UNUSED,
    ]
    assert metadata[Keys.Tokenizer.EOS_ID].value == size
    assert metadata[Keys.Tokenizer.ADD_BOS].value is False
    config["added_tokens_decoder"] = {"5": {"content": "<fn>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(MalformedInputError, match="does not agree"):
        read_vocabulary(tmp_path, {}, embedding_rows=None)


def test_merges_that_are_not_all_pairs_go_over_as_ranks(tmp_path: Path) -> None:
    data = trained_over_characters()
    tokenizer = save_tokenizer(tmp_path / "a", data)
    metadata = read_vocabulary(tmp_path / "a", {}, embedding_rows=None)
    assert (metadata[Keys.Tokenizer.MODEL].value, metadata[Keys.Tokenizer.PRE].value) == ("gpt2", "sarvam-moe")
    assert differing(tmp_path / "a", hugging_face(tokenizer)) == []
    # With a space put before the text there is no such way out.
    steps = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, data["normalizer"]]}
    save_tokenizer(tmp_path / "b", data | {"normalizer": steps})
    with pytest.raises(UnsupportedError, match="is not in model"):
        read_vocabulary(tmp_path / "b", {}, embedding_rows=None)


def trained_over_characters() -> dict[str, Any]:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False, limit_alphabet=500
    )
    tokenizer.train_from_iterator([line for text in training_lines() for line in text.split("\n")], trainer)
    data: dict[str, Any] = json.loads(tokenizer.to_str())
    vocab = data["model"]["vocab"]
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    data["model"]["byte_fallback"] = True
    return data


def test_phi3_strips_after_special_tokens_when_the_name_says_so(llama_model: Path, tmp_path: Path) -> None:
    data = character_bpe_json(llama_model, "llama")
    size = len(data["model"]["vocab"])
    for offset, text in enumerate(["<|endoftext|>", "<|assistant|>", "<|end|>", "<|user|>"]):
        flags = {"single_word": False, "lstrip": False, "rstrip": text != "<|endoftext|>", "normalized": False}
        data["added_tokens"].append({"id": size + offset, "content": text, "special": True, **flags})
    for token in data["added_tokens"]:
        token["rstrip"] = token["rstrip"] or token["content"] == "</s>"
    tokenizer = save_tokenizer(tmp_path, data)
    metadata = read_vocabulary(tmp_path, {}, embedding_rows=None)
    texts = ("<|user|>\nHello <|end|>\n <|assistant|>\n\n x", "<s> a </s>  b<|endoftext|> \n c", "plain\n a")
    for name, equal in (("tiny", False), (runtime_name("tiny", tmp_path, metadata), True)):
        with LlamaCpp(write_model(tmp_path / "m.gguf", metadata, name=name), context=64, threads=1) as runtime:
            same = [
                runtime.tokenize(text, add_special=False, parse_special=True)
                == hugging_face_ids(tokenizer, text, parse_special=True)
                for text in texts
            ]
        assert all(same) is equal, name
    assert runtime_name("My-Phi-3", tmp_path, metadata) == "My-Phi-3"


def test_a_name_that_would_break_another_tokenizer_is_changed(llama_model: Path) -> None:
    metadata = read_vocabulary(llama_model.parent, {}, embedding_rows=None)
    assert runtime_name("tiny-phi3", llama_model.parent, metadata) == "tiny-Phi 3"
    assert runtime_name("tiny", llama_model.parent, metadata) == "tiny"
    name = runtime_name("Phi-3.5-x", llama_model.parent, metadata)
    with LlamaCpp(write_model(llama_model.parent / "n.gguf", metadata, name=name), context=64, threads=1):
        pass
    with pytest.raises(LlmQuantizeError):
        LlamaCpp(write_model(llama_model.parent / "n.gguf", metadata, name="Phi-3.5-x"), context=64, threads=1)


@pytest.mark.parametrize("rule", ["nmt_nfkc", "nmt_nfkc_cf", "identity"])
def test_unigram(rule: str, tmp_path: Path) -> None:
    options = {"model_type": "unigram", "normalization_rule_name": rule}
    model = sentencepiece_model(tmp_path / "model", **options)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))

    def equal(ours: list[int], theirs: list[int]) -> bool:
        """The same ids, or two ways to cut one text that the model finds equally likely: either may be taken."""
        score, other = (sum(processor.get_score(piece) for piece in ids) for ids in (ours, theirs))
        tied = abs(score - other) < 1e-4 and processor.decode(ours) == processor.decode(theirs)
        return ours == theirs or tied

    encode = processor.encode
    assert differing(model.parent, lambda text, _: list(encode(text)), parse=(False,), equal=equal) == []
    read = read_sentencepiece(model)
    if not read.charsmap:
        return
    tokenizer = Tokenizer(models.Unigram([(text, score) for text, score, _ in read.pieces], unk_id=read.unk))
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>")])
    data = json.loads(tokenizer.to_str())
    charsmap = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(read.charsmap).decode()}
    strip = {"type": "Strip", "strip_left": False, "strip_right": True}
    runs = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    words = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace]}
    for name, steps, cut in (("new", [charsmap, strip, runs], metaspace), ("t5", [charsmap], words)):
        data |= {"normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": cut}
        fast = save_tokenizer(tmp_path / name, data)
        found = differing(tmp_path / name, hugging_face(fast), parse=(True,))
        # Strip knows one space more than the map; Hugging Face applies the map by grapheme, SentencePiece and
        # llama.cpp by longest match.
        assert set(found) <= {"\u0085", *decomposed_texts()}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model_type": "unigram", "byte_fallback": True}, "byte_fallback"),
        ({"model_type": "bpe", "byte_fallback": False, **IDENTITY}, "lacks byte tokens"),
        ({"model_type": "bpe", "byte_fallback": True}, "normalizer"),
        ({"model_type": "char"}, "model_type"),
        ({"model_type": "unigram", "treat_whitespace_as_suffix": True}, "spaces"),
    ],
)
def test_models_that_llama_cpp_cannot_follow_are_refused(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    sentencepiece_model(tmp_path, **options)
    with pytest.raises(UnsupportedError, match=words):
        read_vocabulary(tmp_path, {}, embedding_rows=None)


def test_the_wire_reader_agrees_with_sentencepiece(gemma_model: Path) -> None:
    from transformers.convert_slow_tokenizer import import_protobuf

    proto = import_protobuf().ModelProto()
    proto.ParseFromString(gemma_model.read_bytes())
    read = read_sentencepiece(gemma_model)
    assert read.pieces == [(piece.piece, piece.score, piece.type) for piece in proto.pieces]
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    assert (read.model_type, read.unk, read.bos, read.eos, read.pad) == (2, 0, 1, 2, -1)
    assert (trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id) == (0, 1, 2, -1)
    assert (read.dummy_prefix, read.collapse) == (normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces)


@pytest.mark.parametrize("style", ["llama", "gemma", "ranks"])
def test_ids_become_the_text_again(style: str, llama_model: Path, tmp_path: Path) -> None:
    data = trained_over_characters() if style == "ranks" else character_bpe_json(llama_model, style)
    save_tokenizer(tmp_path, data)
    metadata = read_vocabulary(tmp_path, {}, embedding_rows=None)
    with LlamaCpp(write_model(tmp_path / "m.gguf", metadata), context=64, threads=1) as runtime:
        for text in ALL_TEXTS:
            ids = runtime.tokenize(text, add_special=False, parse_special=False)
            assert runtime.detokenize(ids, special=True) == text


def test_the_trained_models_scores_serve_where_the_merges_give_none(llama_model: Path, tmp_path: Path) -> None:
    """Converters of the first years left out the pairs of the one token whose score is 0."""
    data = character_bpe_json(llama_model, "llama")
    del data["model"]["merges"][0]
    save_tokenizer(tmp_path, data)
    with pytest.raises(UnsupportedError, match="another order"):
        read_vocabulary(tmp_path, {}, embedding_rows=None)
    (tmp_path / "tokenizer.model").write_bytes(llama_model.read_bytes())
    processor = sentencepiece.SentencePieceProcessor(model_file=str(llama_model))
    assert differing(tmp_path, lambda text, _: list(processor.encode(text)), parse=(False,)) == []
    (tmp_path / "tokenizer.model").unlink()
    sentencepiece_model(tmp_path, **BPE, split_digits=True)
    with pytest.raises(UnsupportedError, match="another order"):
        read_vocabulary(tmp_path, {}, embedding_rows=None)
