"""What a GGUF file says of its tokenizer, checked: nothing here trusts a length, a type or a number of the file.

What it leaves out is what llama.cpp takes for it (``src/llama-vocab.cpp``, as of its vocabularies ``gpt2``, ``llama``
and ``t5``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from gguf.constants import GGUFValueType, Keys, TokenType

from llm_quantize.errors import MalformedInputError, UnsupportedError, printable
from llm_quantize.formats.gguf.vocabulary.around import MARKERS
from llm_quantize.formats.gguf.vocabulary.pretokenizers import begins_with_bos
from llm_quantize.formats.gguf.vocabulary.reading import PHI3_NAMES, PHI3_TOKENS
from llm_quantize.formats.gguf.vocabulary.special import ROLES
from llm_quantize.io.gguf_file import MetaValue

BYTE_LEVEL, PIECES, UNIGRAM = "gpt2", "llama", "t5"
KINDS = (BYTE_LEVEL, PIECES, UNIGRAM)
MOST_ADDED = 1 << 18
_KEYS = Keys.Tokenizer
_INTEGERS = frozenset(kind for kind in GGUFValueType if kind.name.startswith(("INT", "UINT")))
_REMEDY = "make the file again with a current llama.cpp, or start from the original model"
_PLACEHOLDER = re.compile(r"\[PAD(\d+)(\|unused)?\]")
_TEMPLATE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_USUAL: Mapping[str, Mapping[str, int]] = {PIECES: {"bos": 1, "eos": 2, "unk": 0}, UNIGRAM: {"eos": 1, "unk": 2}}
"""The ids of roles that a file does not name."""
_MARKING = (TokenType.CONTROL, TokenType.UNKNOWN)
_NOT_STRIPPED = frozenset(("<unk>", "<s>", "<|endoftext|>"))


@dataclass(frozen=True)
class Said:
    """A vocabulary. ``texts``, ``types`` (gguf's TokenType): by id. ``ids``: of the tokens that the tokenizer has:
    all but placeholders for rows without a token. ``scores``: by id, empty of ``gpt2``. ``merges``: of ``gpt2``, in
    order. ``roles``: ids of "bos", "eos", "unk", ...; ``ends``: at which a generation ends. ``prefix``: a space goes
    before a text; ``collapse``: runs of spaces become one. ``strips``: white space after special tokens is dropped.
    ``templates``: of chats, by name, "default" among them."""

    file: Path
    model: str
    pre: str
    texts: Sequence[str]
    types: Sequence[int]
    ids: Mapping[str, int]
    scores: Sequence[float]
    merges: Sequence[tuple[str, str]]
    roles: Mapping[str, int]
    ends: tuple[int, ...]
    add_bos: bool
    add_eos: bool
    prefix: bool
    collapse: bool
    charsmap: bytes
    strips: bool
    templates: Mapping[str, str]

    def refuse(self, what: str, *, expected: object, found: object) -> NoReturn:
        """Raise UnsupportedError: no tokenizer.json can be made of this vocabulary."""
        remedy = "start from the directory of the original model, or make a GGUF file"
        raise UnsupportedError(what, file=self.file, expected=expected, found=found, remedy=remedy)

    def added(self) -> list[dict[str, Any]]:
        """The tokens that are found in a text before anything else, as tokenizer.json lists them.

        Raises UnsupportedError for more than MOST_ADDED.
        """
        found = []
        for text, index in self.ids.items():
            kind = self.types[index]
            marks = kind in _MARKING or (kind == TokenType.NORMAL and text in MARKERS)
            if not (marks or kind == TokenType.USER_DEFINED):
                continue
            strips = self.strips and marks and text not in _NOT_STRIPPED
            flags = {"single_word": False, "lstrip": False, "rstrip": strips, "normalized": False}
            found.append({"id": index, "content": text, **flags, "special": marks})
        if len(found) > MOST_ADDED:
            self.refuse("too many special tokens", expected=f"at most {MOST_ADDED:,}", found=len(found))
        return found


class _Reader:
    """Typed questions to the metadata. Each raises MalformedInputError by key."""

    def __init__(self, metadata: Mapping[str, MetaValue], file: Path) -> None:
        self.metadata, self.file = metadata, file

    def wrong(self, key: str, expected: object, found: object) -> NoReturn:
        raise MalformedInputError(
            f"{key} is not in the metadata" if found is None else f"{key} of this file is not usable",
            file=self.file,
            expected=expected,
            found=None if found is None else printable(str(found), 80),
            remedy=_REMEDY,
        )

    def text(self, key: str, default: str | None = None) -> str:
        entry = self.metadata.get(key)
        value = default if entry is None else entry.value
        if not isinstance(value, str):
            self.wrong(key, "a string", None if value is None else f"{type(value).__name__} {value!r}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        entry = self.metadata.get(key)
        if entry is None:
            return default
        if not isinstance(entry.value, bool):
            self.wrong(key, "true or false", repr(entry.value))
        return entry.value

    def index(self, key: str, count: int) -> int | None:
        """A token id; None where there is none, or none such: llama.cpp does not heed it either."""
        entry = self.metadata.get(key)
        if entry is None:
            return None
        if type(entry.value) is not int:
            self.wrong(key, "a token id", repr(entry.value))
        return entry.value if 0 <= entry.value < count else None

    def array(self, key: str, items: str, kinds: frozenset[GGUFValueType], count: int | None = None) -> list[Any]:
        """The items of an array (``items`` says which), ``count`` if it is given; empty where there is no such key."""
        entry = self.metadata.get(key)
        if entry is None:
            return []
        if entry.type != GGUFValueType.ARRAY or entry.item not in kinds:
            self.wrong(key, items, f"{entry.type.name} of {getattr(entry.item, 'name', 'nothing')}")
        found = list(entry.value)
        if count is not None and len(found) != count:
            self.wrong(key, f"one for each of {count:,} tokens", f"{len(found):,}")
        return found


def read_said(metadata: Mapping[str, MetaValue], file: Path, *, rows: int) -> Said:
    """The vocabulary in ``metadata`` of ``file``; ``rows``: of the embedding.

    Raises MalformedInputError (a value is absent, of a wrong type or length, or contradicts another), UnsupportedError
    (a kind of vocabulary that tokenizer.json is not made of here).
    """
    read = _Reader(metadata, file)
    model = read.text(_KEYS.MODEL)
    if model not in KINDS:
        raise UnsupportedError(
            f"tokenizer.json cannot be made of a vocabulary of the kind {model[:40]!r}",
            file=file,
            expected=", ".join(KINDS),
            found=printable(model, 80),
            remedy="start from the directory of the original model, or make a GGUF file",
        )
    texts = _texts(read, rows)
    count = len(texts)
    types = (
        read.array(_KEYS.TOKEN_TYPE, "an array of whole numbers", _INTEGERS, count) or [int(TokenType.NORMAL)] * count
    )
    bad = next((index for index, kind in enumerate(types) if not 0 <= kind <= TokenType.BYTE), None)
    if bad is not None:
        read.wrong(_KEYS.TOKEN_TYPE, f"types from 1 to {int(TokenType.BYTE)}", f"{types[bad]} of the token {bad}")
    ids = _ids(read, texts, types)
    pre = read.text(_KEYS.PRE, "default")
    roles, ends = _roles(read, model, types)
    add_bos = read.flag(_KEYS.ADD_BOS, begins_with_bos(model, pre))
    add_eos = read.flag(_KEYS.ADD_EOS, model == UNIGRAM)
    name = read.text(Keys.General.NAME, "").lower()
    return Said(
        file=file,
        model=model,
        pre=pre,
        texts=texts,
        types=types,
        ids=ids,
        scores=() if model == BYTE_LEVEL else _scores(read, count),
        merges=_merges(read, ids) if model == BYTE_LEVEL else (),
        roles=roles,
        ends=ends,
        add_bos=add_bos and "bos" in roles,
        add_eos=add_eos and "eos" in roles,
        prefix=read.flag(_KEYS.ADD_PREFIX, model == PIECES),
        collapse=read.flag(_KEYS.REMOVE_EXTRA_WS, False),
        charsmap=_charsmap(read) if model == UNIGRAM else b"",
        strips=any(word in name for word in PHI3_NAMES) and ids.keys() >= PHI3_TOKENS,
        templates=read_templates(metadata, file),
    )


def _texts(read: _Reader, rows: int) -> list[str]:
    """Token texts by id; an empty one has the name that llama.cpp gives it."""
    texts = read.array(_KEYS.LIST, "an array of strings", frozenset((GGUFValueType.STRING,)))
    if not texts:
        read.wrong(_KEYS.LIST, "the texts of the tokens", "none")
    if len(texts) > rows:
        read.wrong(_KEYS.LIST, f"at most {rows:,} tokens, the rows of the embedding", f"{len(texts):,}")
    nul = next((index for index, text in enumerate(texts) if "\0" in text), None)
    if nul is not None:
        read.wrong(_KEYS.LIST, "texts without NUL characters", f"{texts[nul]!r}, the token {nul}")
    return [text or f"[EMPTY_{index}]" for index, text in enumerate(texts)]


def _ids(read: _Reader, texts: Sequence[str], types: Sequence[int]) -> dict[str, int]:
    ids: dict[str, int] = {}
    for index, text in enumerate(texts):
        if text in ids:
            read.wrong(_KEYS.LIST, "each text once", f"{text[:40]!r} for the ids {ids[text]} and {index}")
        ids[text] = index
    for text, index in list(ids.items()):
        found = _PLACEHOLDER.fullmatch(text) if types[index] == TokenType.UNUSED else None
        if found is not None and found[1] == str(index):
            del ids[text]
    if not ids:
        read.wrong(_KEYS.LIST, "tokens that are used", "placeholders alone")
    return ids


def _roles(read: _Reader, model: str, types: Sequence[int]) -> tuple[dict[str, int], tuple[int, ...]]:
    """The ids of the roles, and those that end a generation."""
    roles: dict[str, int] = {}
    for role, key in ROLES.items():
        index = read.index(key, len(types))
        usual = _USUAL.get(model, {}).get(role) if key not in read.metadata else None
        if usual is not None and usual < len(types) and types[usual] in _MARKING:
            index = usual
        if index is not None:
            roles[role] = index
    others = (read.index(key, len(types)) for key in (_KEYS.EOT_ID, _KEYS.EOM_ID))
    ends = dict.fromkeys(index for index in (roles.get("eos"), *others) if index is not None)
    return roles, tuple(ends)


def _scores(read: _Reader, count: int) -> list[float]:
    key = _KEYS.SCORES
    if key not in read.metadata:
        read.wrong(key, "a score for each token", None)
    scores = read.array(key, "an array of numbers", frozenset((GGUFValueType.FLOAT32, GGUFValueType.FLOAT64)), count)
    bad = next((index for index, score in enumerate(scores) if not math.isfinite(score)), None)
    if bad is not None:
        read.wrong(key, "finite scores", f"{scores[bad]} of the token {bad}")
    return scores


def _merges(read: _Reader, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    key = _KEYS.MERGES
    if key not in read.metadata:
        read.wrong(key, "the merges of the vocabulary", None)
    found = []
    for index, text in enumerate(read.array(key, "an array of strings", frozenset((GGUFValueType.STRING,)))):
        at = text.find(" ", 1)
        left, right = text[:at], text[at + 1 :]
        if at < 0 or not right:
            read.wrong(key, "pairs of tokens with a space between them", f"{text[:40]!r}, the merge {index}")
        absent = next((part for part in (left, right, left + right) if part not in ids), None)
        if absent is not None:
            read.wrong(key, "merges of tokens that there are", f"{absent[:40]!r} in the merge {index}")
        found.append((left, right))
    return found


def _charsmap(read: _Reader) -> bytes:
    """The precompiled map; its trie lies inside it. Empty where there is none."""
    key = _KEYS.PRECOMPILED_CHARSMAP
    values = read.array(key, "an array of bytes", frozenset((GGUFValueType.UINT8, GGUFValueType.INT8)))
    data = bytes(value & 0xFF for value in values)
    if data:
        size = int.from_bytes(data[:4], "little")
        if len(data) < 5 or size % 4 or size + 4 >= len(data) or data[-1] != 0:
            read.wrong(key, f"a trie of {size:,} bytes and its texts", f"{len(data):,} bytes")
        try:
            data[4 + size :].decode("utf-8")
        except UnicodeDecodeError as error:
            read.wrong(key, "texts in UTF-8", f"the byte {data[4 + size + error.start]:#04x} in them")
    return data


def read_templates(metadata: Mapping[str, MetaValue], file: Path) -> dict[str, str]:
    """The chat templates by name. Raises MalformedInputError for one that is no text, or a name that is no file's."""
    read, found = _Reader(metadata, file), dict[str, str]()
    before = _KEYS.CHAT_TEMPLATE_N.format(name="")
    for key in sorted(metadata):
        if key != _KEYS.CHAT_TEMPLATE and not key.startswith(before):
            continue
        name = "default" if key == _KEYS.CHAT_TEMPLATE else key.removeprefix(before)
        template = read.text(key)
        if not _TEMPLATE_NAME.fullmatch(name):
            read.wrong(printable(key, 80), "a name of letters, digits and _", repr(name))
        if "\0" in template:
            read.wrong(key, "a text without NUL characters", f"one at {template.index(chr(0)):,}")
        if name in found:
            read.wrong(printable(key, 80), "one template of a name", "two")
        found[name] = template
    return found
