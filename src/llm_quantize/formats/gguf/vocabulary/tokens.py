"""A vocabulary on its way into GGUF: token texts, types, scores, merges and the flags llama.cpp reads with them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gguf.constants import GGUFValueType, TokenType

from llm_quantize.errors import MalformedInputError, UnsupportedError, printable
from llm_quantize.formats.gguf.vocabulary.json import AddedToken
from llm_quantize.io.gguf_file import MetaValue

RANKED = "sarvam-moe"  # the pre-tokenizer of llama.cpp's BPE over characters, by ranks
SPACE_MARK = "\u2581"  # SentencePiece writes a space as this character
MAX_ROWS = 16_000_000
# Added tokens that mark structure though their files do not call them special: by shape, and these by text.
_LOOK_SPECIAL = frozenset(("<pad>", "<mask>", "<2mass>", "[@BOS@]"))


def text_value(text: str) -> MetaValue:
    return MetaValue(GGUFValueType.STRING, text)


def number_value(number: int) -> MetaValue:
    return MetaValue(GGUFValueType.UINT32, number)


def flag_value(value: bool) -> MetaValue:
    return MetaValue(GGUFValueType.BOOL, value)


def array_value(item: GGUFValueType, values: Sequence[object] | bytes) -> MetaValue:
    return MetaValue(GGUFValueType.ARRAY, values, item)


@dataclass
class Vocabulary:
    """``model`` and ``pre``: llama.cpp's names. Dictionaries are keyed by token id.

    ``ids`` gives the id of a text as the model's own files spell it. ``add_bos`` and ``add_eos`` are what the
    tokenizer itself does around a text, None where it does not say. ``roles``: ids of "unk", "bos", "eos", "pad" as the
    model's own file gives them.
    """

    file: Path
    model: str
    pre: str
    ids: dict[str, int]
    texts: dict[int, str]
    types: dict[int, int] = field(default_factory=dict)
    scores: dict[int, float] | None = None
    merges: list[str] | None = None
    flags: dict[str, MetaValue] = field(default_factory=dict)
    controls: set[int] = field(default_factory=set)
    roles: dict[str, int] = field(default_factory=dict)
    add_bos: bool | None = None
    add_eos: bool | None = None

    def add(self, tokens: Iterable[AddedToken]) -> None:
        """Enter added tokens: control tokens where they mark structure, user-defined ones otherwise.

        llama.cpp cuts user-defined tokens out of the raw text, so where spaces are marked theirs are written as spaces.
        """
        for token in tokens:
            text = token.content if self.merges is not None and self.pre != RANKED else self._raw(token)
            self.ids[token.content] = token.id
            if token.special or looks_special(token.content):
                self.texts[token.id] = token.content
                if self.types.get(token.id) != TokenType.UNKNOWN:
                    self.types[token.id] = TokenType.CONTROL
                self.controls.add(token.id)
            else:
                self.texts[token.id] = text
                self.types[token.id] = TokenType.USER_DEFINED
            if self.scores is not None:
                self.scores.setdefault(token.id, -1000.0)

    def _raw(self, token: AddedToken) -> str:
        text = token.content.replace(SPACE_MARK, " ")
        return text if self.ids.get(text, token.id) == token.id else token.content

    def arrays(self, rows: int | None) -> tuple[list[str], list[int], list[float]]:
        """Texts, types and scores of all ids from 0, holes and rows beyond the tokenizer filled with unused tokens.

        ``rows``: rows of the embedding, None = not known (then the ids must be dense).
        """
        count = max(self.texts) + 1
        if rows is not None and count > rows:
            last = self.texts[count - 1]
            raise MalformedInputError(
                "a token's id is beyond the rows of the embedding",
                file=self.file,
                expected=f"ids below {rows:,} (the embedding's rows)",
                found=f"{printable(last, 60)!r} has the id {count - 1:,}",
                remedy="take the tokenizer that belongs to this checkpoint",
            )
        total = count if rows is None else rows
        if rows is None and count != len(self.texts):
            hole = next(i for i in range(count) if i not in self.texts)
            raise MalformedInputError(
                "the token ids have a hole", file=self.file, expected=f"a token {hole}", found="none"
            )
        if total > MAX_ROWS:
            raise UnsupportedError("too many tokens", file=self.file, expected=f"at most {MAX_ROWS:,}", found=total)
        texts = [self.texts.get(index, "") for index in range(total)]
        types = [int(self.types.get(index, TokenType.NORMAL)) for index in range(total)]
        known = self.scores
        scores = [] if known is None else [known.get(index, -1000.0) for index in range(total)]
        taken = set(texts)
        for index in range(total):
            if index not in self.texts:
                text = f"[PAD{index}]"
                texts[index] = text if text not in taken else f"[PAD{index}|unused]"
                types[index] = int(TokenType.UNUSED)
        self._check_unique(texts)
        return texts, types, scores

    def _check_unique(self, texts: list[str]) -> None:
        if len(set(texts)) == len(texts):
            return
        seen: dict[str, int] = {}
        for index, text in enumerate(texts):
            if text in seen:
                raise UnsupportedError(
                    "two tokens would have one text in GGUF, which llama.cpp refuses to load",
                    file=self.file,
                    found=f"{printable(text, 60)!r} for the ids {seen[text]} and {index}",
                )
            seen[text] = index

    def mark_bytes(self) -> None:
        """Give ``<0x00>`` to ``<0xFF>`` their type. Raises UnsupportedError unless every byte has a token.

        llama.cpp ends the process when it needs a byte that has none; an ASCII character may stand for its byte
        (Gemma's tokenizer.json spells 0x09 as a tab).
        """
        missing = []
        for byte in range(256):
            index = self.ids.get(f"<0x{byte:02X}>")
            if index is not None:
                self.types[index] = TokenType.BYTE
            elif byte > 127 or chr(byte) not in self.ids:
                missing.append(f"<0x{byte:02X}>")
        if missing:
            raise UnsupportedError(
                "this SentencePiece vocabulary lacks byte tokens, without which llama.cpp fails on unknown characters",
                file=self.file,
                expected="256 tokens <0x00> to <0xFF>",
                found=f"{len(missing)} missing, {missing[0]} first",
            )


def looks_special(text: str) -> bool:
    """Whether an added token marks structure by its text, as llama.cpp's converter decides it."""
    return (
        text in _LOOK_SPECIAL
        or (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<｜") and text.endswith("｜>"))
        or (text.startswith("<unused") and text.endswith(">"))
    )
