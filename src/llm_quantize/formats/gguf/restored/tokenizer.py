"""tokenizer.json of a vocabulary as llama.cpp has it: the same ids for the same text.

Byte-level BPE has its merges in the file, and its rule by name. Pieces with scores (SentencePiece's BPE) are joined by
llama.cpp wherever two neighbours make a token, best score first: those are the merges, in that order. Unigram has its
scores. Every token stands in the model's own vocabulary, so that ids never depend on the order of added tokens.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from typing import Any

from gguf.constants import TokenType

from llm_quantize.formats.gguf.restored.said import BYTE_LEVEL, PIECES, UNIGRAM, Said
from llm_quantize.formats.gguf.vocabulary.pretokenizers import rule_named, written_steps
from llm_quantize.formats.gguf.vocabulary.tokens import RANKED, SPACE_MARK

MOST_CUTS = 1 << 30
"""Characters that all ways to cut all tokens in two have together: Gemma's 262,144 tokens have 13 million."""

_Json = dict[str, Any]
Note = Callable[[str], None]
_BYTES_AROUND = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
_MARK = {"type": "Prepend", "prepend": SPACE_MARK}
_SPACES_MARKED = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}


def tokenizer_json(said: Said, note: Note) -> bytes:
    """The file, UTF-8; ``note`` is told where llama.cpp may give other ids.

    Raises UnsupportedError for what tokenizer.json cannot say, or would say with other ids.
    """
    parts = _KINDS[said.model](said, note)
    whole: _Json = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": said.added(),
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": _around(said),
        "decoder": None,
    } | parts
    return json.dumps(whole, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _bpe(said: Said, merges: list[tuple[str, str]], **options: object) -> _Json:
    spaced = any(" " in left or " " in right for left, right in merges)
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        **options,
        "vocab": dict(said.ids),
        "merges": [list(pair) for pair in merges] if spaced else [f"{left} {right}" for left, right in merges],
    }


def _byte_level(said: Said, note: Note) -> _Json:
    if said.pre == RANKED:
        return _ranked(said)
    rule = rule_named(said.pre, said.file)
    if not rule.exact:
        note(
            f"llama.cpp's rule {said.pre} cuts words at combining marks (Thai, Hindi, vowelled Arabic), tokenizer.json "
            "does not: such text gets the ids of the original model's tokenizer"
        )
    return {
        "pre_tokenizer": written_steps(rule),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(said, list(said.merges), ignore_merges=rule.ignore_merges),
    }


def _ranked(said: Said) -> _Json:
    """BPE over characters by ranks; llama.cpp never merges newlines with other characters."""
    mixed = next(
        (left + right for left, right in said.merges if "\n" in left + right and (left + right).strip("\n")), None
    )
    if mixed is not None:
        said.refuse("llama.cpp cuts this vocabulary around newlines", expected="no such merge", found=repr(mixed[:40]))
    return _characters(said, list(said.merges), prefix=False)


def _characters(said: Said, merges: list[tuple[str, str]], *, prefix: bool) -> _Json:
    unknown = said.texts[said.roles["unk"]] if "unk" in said.roles else None
    steps: list[_Json] = [{"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}]
    steps += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": [_MARK, _SPACES_MARKED]} if prefix else dict(_SPACES_MARKED),
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": _bpe(said, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True),
    }


def _pieces(said: Said, note: Note) -> _Json:
    return _characters(said, merges_of(said, note), prefix=said.prefix)


def merges_of(said: Said, note: Note) -> list[tuple[str, str]]:
    """The pairs that make each token of two others, best score first; pairs of one token by their ids.

    ``note`` is told where tokens have one score: among them llama.cpp takes what stands first in the text. Raises
    UnsupportedError where the tokens are so long that they have too many pairs.
    """
    if (cuts := sum(len(text) ** 2 for text in said.ids)) > MOST_CUTS:
        longest = max(said.ids, key=len)
        said.refuse(
            "the tokens are too long to find their merges",
            expected=f"{MOST_CUTS:,} characters in all ways to cut them in two",
            found=f"{cuts:,}; the longest token has {len(longest):,}",
        )
    ids, scores, found = said.ids, said.scores, list[tuple[str, str]]()
    last: float | None = None
    equal = 0
    for text, index in sorted(ids.items(), key=lambda entry: (-scores[entry[1]], entry[1])):
        if said.types[index] == TokenType.BYTE:
            continue
        cuts_of = ((text[:at], text[at:]) for at in range(1, len(text)))
        pairs = sorted(
            (pair for pair in cuts_of if pair[0] in ids and pair[1] in ids), key=lambda p: (ids[p[0]], ids[p[1]])
        )
        if pairs and said.types[index] == TokenType.NORMAL:
            equal += scores[index] == last
            last = scores[index]
        found += pairs
    if equal:
        note(
            f"tokens with the score of another one: {equal:,}; where two of them compete, llama.cpp takes the first in "
            "the text, tokenizer.json the one of the lower id"
        )
    return found


def _unigram(said: Said, note: Note) -> _Json:
    del note
    if "unk" not in said.roles:
        said.refuse(
            "a Unigram vocabulary needs an unknown token", expected="tokenizer.ggml.unknown_token_id", found="none"
        )
    steps: list[_Json] = []
    if said.charsmap:
        text = base64.b64encode(said.charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": text})
    if said.collapse:
        if said.charsmap:
            steps.append({"type": "Strip", "strip_left": False, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
        if not said.charsmap:
            steps.append({"type": "Replace", "pattern": {"Regex": r" \z"}, "content": ""})
    first = said.prefix and not said.collapse  # Metaspace puts no mark before a space, which llama.cpp does
    scheme = "always" if said.prefix and not first else "never"
    spaces = {"type": "Metaspace", "replacement": SPACE_MARK, "prepend_scheme": scheme, "split": False}
    steps += [dict(_MARK), dict(_SPACES_MARKED)] if first else []
    last = max(said.ids.values())
    pieces = [[said.texts[index], float(said.scores[index])] for index in range(last + 1)]
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps} if steps else None,
        "pre_tokenizer": spaces,
        "decoder": spaces | {"prepend_scheme": "always" if said.prefix else "never"},
        "model": {"type": "Unigram", "unk_id": said.roles["unk"], "vocab": pieces, "byte_fallback": False},
    }


_KINDS: Mapping[str, Callable[[Said, Note], _Json]] = {
    BYTE_LEVEL: _byte_level,
    PIECES: _pieces,
    UNIGRAM: _unigram,
}


def _around(said: Said) -> _Json | None:
    """What is put before and after a text."""
    if not (said.add_bos or said.add_eos):
        return dict(_BYTES_AROUND) if said.model == BYTE_LEVEL and said.pre != RANKED else None
    first = said.texts[said.roles["bos"]] if said.add_bos else None
    final = said.texts[said.roles["eos"]] if said.add_eos else None

    def around(sequence: str, number: int) -> list[_Json]:
        middle = {"Sequence": {"id": sequence, "type_id": number}}
        special = [
            None if text is None else {"SpecialToken": {"id": text, "type_id": number}} for text in (first, final)
        ]
        return [part for part in (special[0], middle, special[1]) if part is not None]

    used = [text for text in (first, final) if text is not None]
    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": around("A", 0) + around("B", 1),
        "special_tokens": {text: {"id": text, "ids": [said.ids[text]], "tokens": [text]} for text in sorted(set(used))},
    }
