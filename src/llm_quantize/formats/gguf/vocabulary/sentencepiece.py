"""tokenizer.model (owner of the format: google/sentencepiece, ``sentencepiece_model.proto``), without protobuf.

A small reader of the wire format: only the fields below, every length inside its message, nothing recursive.
ModelProto: 1 pieces {1 piece, 2 score, 3 type}, 2 trainer_spec {3 model_type, 24 treat_whitespace_as_suffix,
40 unk_id, 41 bos_id, 42 eos_id, 43 pad_id}, 3 normalizer_spec {2 precompiled_charsmap, 3 add_dummy_prefix,
4 remove_extra_whitespaces, 5 escape_whitespaces}.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gguf.constants import Keys, TokenType

from llm_quantize.errors import MalformedInputError, UnsupportedError, printable
from llm_quantize.formats.gguf.vocabulary.json import LIMIT_BYTES, MAX_TOKENS, AddedToken, TokenizerJson, check_text
from llm_quantize.formats.gguf.vocabulary.spm import Spaces, checked_charsmap, unigram_flags
from llm_quantize.formats.gguf.vocabulary.tokens import SPACE_MARK, Vocabulary, flag_value
from llm_quantize.io.paths import read_limited

UNIGRAM, BPE = 1, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass
class SentencePieceModel:
    """The fields of a ModelProto that matter here, with the proto's defaults."""

    pieces: list[tuple[str, float, int]] = field(default_factory=list)
    model_type: int = UNIGRAM
    suffix: bool = False
    unk: int = 0
    bos: int = 1
    eos: int = 2
    pad: int = -1
    charsmap: bytes = b""
    dummy_prefix: bool = True
    collapse: bool = True
    escape: bool = True


class _Wire:
    """Fields of one protobuf message that lies in ``data[start:end]``."""

    def __init__(self, file: Path, data: bytes, start: int, end: int) -> None:
        self._file, self._data, self._at, self._end = file, data, start, end

    def _fail(self, what: str) -> MalformedInputError:
        return MalformedInputError(
            f"not a SentencePiece model: {what}",
            file=self._file,
            offset=self._at,
            expected="a protobuf message (ModelProto)",
            remedy="fetch the file again",
        )

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            if self._at >= self._end:
                raise self._fail("a number is cut short")
            byte = self._data[self._at]
            self._at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise self._fail("a number is longer than 10 bytes")

    def fields(self) -> Iterator[tuple[int, int, int, int]]:
        """(field number, wire type, number or start, end) of each field, in file order."""
        while self._at < self._end:
            tag = self._varint()
            kind = tag & 7
            if kind == _VARINT:
                yield tag >> 3, kind, self._varint(), 0
                continue
            length = {_FIXED64: 8, _FIXED32: 4}.get(kind)
            if kind == _BYTES:
                length = self._varint()
            if length is None or tag >> 3 == 0:
                raise self._fail(f"a field of number {tag >> 3} and unknown kind {kind}")
            if length > self._end - self._at:
                raise self._fail(f"a field of {length:,} bytes ends beyond its message")
            start, self._at = self._at, self._at + length
            yield tag >> 3, kind, start, self._at


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read ``path``. Raises MalformedInputError, UnsupportedError (NUL in a piece)."""
    data = read_limited(path, LIMIT_BYTES)
    model = SentencePieceModel()
    for number, kind, start, end in _Wire(path, data, 0, len(data)).fields():
        if number == 1 and kind == _BYTES:
            if len(model.pieces) >= MAX_TOKENS:
                raise MalformedInputError("too many pieces", file=path, expected=f"at most {MAX_TOKENS:,}")
            model.pieces.append(_piece(path, data, start, end, len(model.pieces)))
        elif number == 2 and kind == _BYTES:
            _trainer(model, _Wire(path, data, start, end))
        elif number == 3 and kind == _BYTES:
            _normalizer(model, _Wire(path, data, start, end), data)
    if not model.pieces:
        raise MalformedInputError("a SentencePiece model without pieces", file=path, remedy="fetch the file again")
    return model


def _piece(path: Path, data: bytes, start: int, end: int, index: int) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, int(TokenType.NORMAL)
    for number, wire, value, stop in _Wire(path, data, start, end).fields():
        if number == 1 and wire == _BYTES:
            try:
                text = data[value:stop].decode("utf-8")
            except UnicodeDecodeError as error:
                raise MalformedInputError(
                    f"piece {index} is not UTF-8", file=path, offset=value + error.start, remedy="fetch the file again"
                ) from error
        elif number == 2 and wire == _FIXED32:
            score = struct.unpack_from("<f", data, value)[0]
        elif number == 3 and wire == _VARINT:
            kind = value
    if not math.isfinite(score) or kind not in range(1, 7):
        raise MalformedInputError(
            f"piece {index} has no finite score or an unknown type",
            file=path,
            offset=start,
            expected="a finite score, a type from 1 to 6",
            found=f"score {score}, type {kind}",
        )
    return check_text(text, path, f"piece {index}"), score, kind


def _trainer(model: SentencePieceModel, wire: _Wire) -> None:
    for number, kind, value, _ in wire.fields():
        if kind != _VARINT:
            continue
        if number == 3:
            model.model_type = value
        elif number == 24:
            model.suffix = bool(value)
        elif number in (40, 41, 42, 43):
            setattr(model, {40: "unk", 41: "bos", 42: "eos", 43: "pad"}[number], _signed(value))


def _normalizer(model: SentencePieceModel, wire: _Wire, data: bytes) -> None:
    for number, kind, value, stop in wire.fields():
        if number == 2 and kind == _BYTES:
            model.charsmap = data[value:stop]
        elif kind == _VARINT and number in (3, 4, 5):
            setattr(model, {3: "dummy_prefix", 4: "collapse", 5: "escape"}[number], bool(value))


def sentencepiece_vocabulary(path: Path, added: tuple[AddedToken, ...]) -> Vocabulary:
    """The vocabulary of a tokenizer.model with the ``added`` tokens of its neighbours.

    Raises UnsupportedError where llama.cpp has no word for the model's kind or normalizer, MalformedInputError.
    """
    model = read_sentencepiece(path)
    _check(path, model)
    ids: dict[str, int] = {}
    for index, (text, _, _) in enumerate(model.pieces):
        if text in ids:
            raise MalformedInputError(
                "a piece stands twice", file=path, found=f"{printable(text, 60)!r}, ids {ids[text]} and {index}"
            )
        ids[text] = index
    vocabulary = Vocabulary(
        file=path,
        model="llama" if model.model_type == BPE else "t5",
        pre="default",
        ids=ids,
        texts={
            i: text.replace(SPACE_MARK, " ") if kind == TokenType.USER_DEFINED else text
            for i, (text, _, kind) in enumerate(model.pieces)
        },
        types={i: kind for i, (_, _, kind) in enumerate(model.pieces)},
        scores={i: score for i, (_, score, _) in enumerate(model.pieces)},
    )
    spaces = Spaces(prefix=model.dummy_prefix, replaced=True, collapse=model.collapse)
    if model.model_type == BPE:
        vocabulary.mark_bytes()
        vocabulary.flags[Keys.Tokenizer.ADD_PREFIX] = flag_value(spaces.prefix)
    else:
        spaces.charsmap = checked_charsmap(None, model.charsmap)
        unigram_flags(vocabulary, spaces)
    _check_added(path, vocabulary, added)
    vocabulary.add(added)
    own = {"unk": model.unk, "bos": model.bos, "eos": model.eos, "pad": model.pad}
    vocabulary.roles = {role: index for role, index in own.items() if 0 <= index < len(model.pieces)}
    return vocabulary


def trained_scores(path: Path, source: TokenizerJson) -> dict[int, float] | None:
    """Scores of the BPE model at ``path`` when ``source`` was made from it: the same pieces under the same ids."""
    if not path.exists():
        return None
    model = read_sentencepiece(path)
    same = all(source.ids.get(text) == index for index, (text, _, _) in enumerate(model.pieces))
    if model.model_type != BPE or not same:
        return None
    return {index: score for index, (_, score, _) in enumerate(model.pieces)}


def _check(path: Path, model: SentencePieceModel) -> None:
    byte_pieces = any(kind == TokenType.BYTE for _, _, kind in model.pieces)
    problem = None
    if model.model_type not in (UNIGRAM, BPE):
        problem = ("model_type", "UNIGRAM or BPE", {3: "WORD", 4: "CHAR"}.get(model.model_type, model.model_type))
    elif model.suffix or not model.escape:
        problem = ("spaces", "spaces escaped, before words", "spaces as suffix, or not escaped")
    elif model.model_type == UNIGRAM and byte_pieces:
        problem = ("byte_fallback", "a Unigram model without byte fallback", "byte pieces")
    elif model.model_type == BPE and (model.charsmap or model.collapse):
        problem = ("normalizer", "identity, with remove_extra_whitespaces false", "a normalizer, or spaces removed")
    if problem is not None:
        raise UnsupportedError(
            f"llama.cpp cannot tokenize as this SentencePiece model does ({problem[0]})",
            file=path,
            expected=problem[1],
            found=problem[2],
            remedy="another runtime",
        )


def _check_added(path: Path, vocabulary: Vocabulary, added: tuple[AddedToken, ...]) -> None:
    by_id = {index: text for text, index in vocabulary.ids.items()}
    for token in added:
        known, other = vocabulary.ids.get(token.content), by_id.get(token.id)
        if known not in (None, token.id) or other not in (None, token.content):
            raise MalformedInputError(
                "an added token does not agree with tokenizer.model",
                file=path.with_name("tokenizer_config.json"),
                expected=f"the id {known}" if known is not None else f"{printable(str(other), 60)!r} as id {token.id}",
                found=f"{printable(token.content, 60)!r} with the id {token.id}",
            )
