"""SentencePiece-like vocabularies from tokenizer.json: BPE over characters with byte fallback, and Unigram.

llama.cpp's model ``llama`` joins any two neighbours whose text is a token, best score first. Hugging Face joins listed
pairs, first rank first. The two agree when every way to make a token is listed and the ranks of one token's pairs stand
together; that is checked here, and files for which it does not hold go to llama.cpp's rank-based BPE over characters
(pre-tokenizer ``sarvam-moe``), or are refused. Unigram is llama.cpp's model ``t5``.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gguf.constants import GGUFValueType, Keys, TokenType

from llm_quantize.errors import printable
from llm_quantize.formats.gguf.vocabulary.bytelevel import check_bpe_options
from llm_quantize.formats.gguf.vocabulary.json import TokenizerJson, flag, malformed
from llm_quantize.formats.gguf.vocabulary.pretokenizers import flatten
from llm_quantize.formats.gguf.vocabulary.tokens import RANKED, SPACE_MARK, Vocabulary, array_value, flag_value


@dataclass
class Spaces:
    """What the normalizer and the pre-tokenizer do to spaces. ``prefix``: a mark is put before each piece of text."""

    prefix: bool = False
    replaced: bool = False
    words: bool = False  # merging never crosses the start of a word
    collapse: bool = False  # runs become one space, none at the ends
    charsmap: bytes = b""


def read_spaces(source: TokenizerJson) -> Spaces:
    """The space rules of a SentencePiece-like file. Raises UnsupportedError for any other step."""
    spaces = Spaces()
    for step in flatten(source.normalizer, "normalizers", source.file, "normalizer"):
        _normalizer_step(source, step, spaces)
    for step in flatten(source.pre_tokenizer, "pretokenizers", source.file, "pre_tokenizer"):
        _pre_tokenizer_step(source, step, spaces)
    if not spaces.replaced:
        source.refuse(
            "this tokenizer neither maps bytes nor marks spaces, and llama.cpp has no such rule",
            expected="a ByteLevel or Metaspace pre-tokenizer, or a normalizer that replaces ' ' by '▁'",
            found="neither",
        )
    return spaces


def _pattern(step: Mapping[str, Any]) -> tuple[str | None, str | None]:
    pattern = step.get("pattern")
    if not isinstance(pattern, Mapping):
        return None, None
    return pattern.get("String"), pattern.get("Regex")


def _normalizer_step(source: TokenizerJson, step: Mapping[str, Any], spaces: Spaces) -> None:
    kind = step["type"]
    if kind == "NFC":
        return  # as for byte-level BPE: docs/reference/tokenizers.md
    if kind == "Prepend" and step.get("prepend") == SPACE_MARK and not spaces.replaced:
        spaces.prefix = True
        return
    if kind == "Replace":
        string, expression = _pattern(step)
        content = step.get("content")
        if string == " " and content == SPACE_MARK:
            spaces.replaced = True
            return
        if source.kind == "Unigram" and expression == " {2,}" and content in (" ", SPACE_MARK):
            spaces.collapse = True
            return
        if source.kind == "Unigram" and spaces.collapse and expression == r" \z" and content == "":
            return  # llama.cpp drops spaces at the end when it merges runs
    if source.kind == "Unigram":
        if kind == "Precompiled":
            spaces.charsmap = _charsmap(source, step.get("precompiled_charsmap"))
            return
        if kind == "Strip" and spaces.charsmap and not flag(step, "strip_left", False, source.file, "normalizer"):
            return  # the map has made all white space spaces; llama.cpp drops those at the end when it merges runs
    source.refuse(
        "llama.cpp cannot normalize text as this tokenizer does",
        expected="'▁' prepended, ' ' replaced by '▁', NFC; for Unigram also Precompiled and runs of spaces",
        found=printable(repr(dict(step)), 200),
    )


def _charsmap(source: TokenizerJson, text: object) -> bytes:
    try:
        data = base64.b64decode(text, validate=True) if isinstance(text, str) else None
    except (binascii.Error, ValueError):
        data = None
    if data is None:
        malformed(source.file, "normalizer.precompiled_charsmap is not base64", found=printable(repr(text), 60))
    return checked_charsmap(source, data)


def checked_charsmap(source: TokenizerJson | None, data: bytes) -> bytes:
    """``data`` when its trie fits inside it (llama.cpp reads both by offsets); empty data means no map."""
    if not data:
        return b""
    size = int.from_bytes(data[:4], "little")
    if len(data) >= 5 and size + 4 < len(data) and size % 4 == 0 and data[-1] == 0:
        return data
    if source is None:
        return b""
    malformed(source.file, "normalizer.precompiled_charsmap is cut short", expected=f"over {size + 4}", found=len(data))


def _pre_tokenizer_step(source: TokenizerJson, step: Mapping[str, Any], spaces: Spaces) -> None:
    kind = step["type"]
    if kind == "Metaspace" and step.get("replacement", SPACE_MARK) == SPACE_MARK:
        spaces.replaced = True
        scheme = step.get("prepend_scheme")
        if scheme is None:
            scheme = "always" if flag(step, "add_prefix_space", True, source.file, "pre_tokenizer") else "never"
        if scheme not in ("always", "first", "never"):
            malformed(source.file, "unknown Metaspace prepend_scheme", expected="always, first, never", found=scheme)
        spaces.prefix = spaces.prefix or scheme != "never"
        spaces.words = flag(step, "split", True, source.file, "pre_tokenizer")
        return
    if kind == "Split" and spaces.replaced:
        string, _ = _pattern(step)
        if string == " ":
            return  # no spaces are left to split at (Gemma)
    if kind == "WhitespaceSplit" and source.kind == "Unigram" and spaces.charsmap:
        spaces.collapse = True
        return
    source.refuse(
        "llama.cpp cannot cut text for this kind of model as this tokenizer does",
        expected="Metaspace, or nothing",
        found=printable(repr(dict(step)), 200),
    )


def _check_words(source: TokenizerJson, spaces: Spaces) -> None:
    if not spaces.words:
        return
    for text in source.ids:
        body = text.lstrip(SPACE_MARK) if source.kind == "BPE" else text[1:]
        if SPACE_MARK in body or (text.startswith(SPACE_MARK * 2)):
            source.refuse(
                "this tokenizer cuts at every space yet has a token over a space; llama.cpp would use that token",
                expected="Metaspace with split false, or no such token",
                found=printable(repr(text), 80),
            )


def character_bpe(
    source: TokenizerJson, trained_scores: Callable[[TokenizerJson], dict[int, float] | None]
) -> Vocabulary:
    """BPE over characters with byte fallback. Raises UnsupportedError, MalformedInputError.

    ``trained_scores``: asked where the merges give no scores; those of the model that the file was made from, or None.
    """
    check_bpe_options(source)
    if not flag(source.model, "byte_fallback", False, source.file, "model"):
        source.refuse(
            "llama.cpp has no BPE over characters without byte fallback",
            expected="model.byte_fallback true, or byte-level BPE",
            found="neither",
        )
    if flag(source.model, "ignore_merges", False, source.file, "model"):
        source.refuse("llama.cpp has no BPE over characters with ignore_merges", found="model.ignore_merges true")
    spaces = read_spaces(source)
    _check_words(source, spaces)
    vocabulary = Vocabulary(
        file=source.file, model="llama", pre="default", ids=dict(source.ids), texts=dict(source.tokens)
    )
    vocabulary.mark_bytes()
    unknown = source.model.get("unk_token")
    if isinstance(unknown, str) and unknown in source.ids:
        vocabulary.types[source.ids[unknown]] = TokenType.UNKNOWN
        vocabulary.roles["unk"] = source.ids[unknown]
    reason = _set_scores(source, vocabulary)
    if reason is not None and spaces.prefix:
        vocabulary.scores = trained_scores(source)
        if vocabulary.scores is None:
            source.refuse(
                "llama.cpp would merge this vocabulary in another order than the file says",
                expected="for every token all its pairs, side by side in model.merges",
                found=reason,
            )
    elif reason is not None:
        _set_ranks(source, vocabulary)
    vocabulary.add(source.added)
    vocabulary.flags[Keys.Tokenizer.ADD_PREFIX] = flag_value(spaces.prefix)
    return vocabulary


def _set_scores(source: TokenizerJson, vocabulary: Vocabulary) -> str | None:
    """Scores by which llama.cpp merges as the ranks do; the reason, where there are none."""
    whole = {token.content for token in source.added}  # cut out of the text before any merging
    ids, listed = source.ids, set(source.merges)
    scores: dict[int, float] = {}
    last = ""
    for left, right in source.merges:
        product = left + right
        if product in whole:
            continue
        index = ids[product]
        if product != last and index in scores:
            return f"the pairs of {printable(product, 40)!r} are apart from each other"
        scores.setdefault(index, -float(len(scores)))
        last = product
    lowest = -float(len(scores)) - 1.0
    for text, index in ids.items():
        if text in whole:
            scores[index] = 0.0
            continue
        scores.setdefault(index, lowest)
        if vocabulary.types.get(index) == TokenType.BYTE:
            scores[index] = 0.0
            continue
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in ids and right in ids and (left, right) not in listed:
                return f"{printable(left, 40)!r} + {printable(right, 40)!r} is not in model.merges"
    vocabulary.scores = scores
    return None


def _set_ranks(source: TokenizerJson, vocabulary: Vocabulary) -> None:
    """Hand the merges over as ranks: llama.cpp's BPE over characters, which cuts at runs of newlines."""
    for text in source.ids:
        if "\n" in text and text.strip("\n"):
            source.refuse("llama.cpp's BPE over characters cuts around newlines", found=printable(repr(text), 80))
    for left, right in source.merges:
        if " " in left or " " in right:
            source.refuse("a merge holds a space, which GGUF cannot hold", found=repr((left, right)))
    vocabulary.model, vocabulary.pre, vocabulary.scores = "gpt2", RANKED, None
    vocabulary.merges = [f"{left} {right}" for left, right in source.merges]


def unigram(source: TokenizerJson) -> Vocabulary:
    """A Unigram file. Raises UnsupportedError, MalformedInputError."""
    if flag(source.model, "byte_fallback", False, source.file, "model"):
        source.refuse(
            "llama.cpp's Unigram tokenizer has no byte fallback: unknown characters would be lost",
            expected="model.byte_fallback false",
            found="true",
        )
    unknown = source.model.get("unk_id")
    if not isinstance(unknown, int) or isinstance(unknown, bool) or unknown not in source.tokens:
        malformed(source.file, "model.unk_id is not the id of a token", expected="a token id", found=repr(unknown))
    spaces = read_spaces(source)
    _check_words(source, spaces)
    vocabulary = Vocabulary(
        file=source.file,
        model="t5",
        pre="default",
        ids=dict(source.ids),
        texts=dict(source.tokens),
        types={unknown: int(TokenType.UNKNOWN)},
        scores=dict(enumerate(source.scores)),
        roles={"unk": unknown},
    )
    vocabulary.add(source.added)
    unigram_flags(vocabulary, spaces)
    return vocabulary


def unigram_flags(vocabulary: Vocabulary, spaces: Spaces) -> None:
    """What llama.cpp's ``t5`` model reads besides the tokens."""
    keys = Keys.Tokenizer
    vocabulary.flags[keys.ADD_PREFIX] = flag_value(spaces.prefix)
    vocabulary.flags[keys.REMOVE_EXTRA_WS] = flag_value(spaces.collapse)
    if spaces.charsmap:
        vocabulary.flags[keys.PRECOMPILED_CHARSMAP] = array_value(GGUFValueType.UINT8, spaces.charsmap)
