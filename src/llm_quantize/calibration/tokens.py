"""Token ids of a text, by the model's own tokenizer: its files, or what a GGUF file says.

tokenizer.json goes through ``tokenizers``, tokenizer.model through ``sentencepiece``: the two libraries that own these
formats, and not transformers' tokenizer classes, which run per-model code around them. What begins a text, what ends
it, and the chat template are read as llama.cpp will be told them, also where it lacks the tokenizer itself. The
vocabulary of a GGUF file is llama.cpp's own form, and goes through it.
"""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import numpy.typing as npt
from gguf.constants import Keys, TokenType

from llm_quantize.calibration.documents import Message
from llm_quantize.errors import MalformedInputError, UnsupportedError, printable
from llm_quantize.formats.gguf.describe import carried
from llm_quantize.formats.gguf.vocabulary.json import LIMIT_BYTES
from llm_quantize.formats.gguf.vocabulary.reading import (
    Conventions,
    has_tokenizer,
    no_tokenizer,
    read_conventions,
    said_conventions,
)
from llm_quantize.io.gguf_file import MetaValue
from llm_quantize.io.paths import inside, read_limited
from llm_quantize.models.base import Model
from llm_quantize.models.chat_template import ChatTemplate
from llm_quantize.models.opening import Source

_TODAY = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
"""The date in templates that write one: the same text must give the same ids tomorrow."""

Ids = npt.NDArray[np.int32]


class _Encoder(Protocol):
    def __call__(self, text: str, *, special: bool) -> list[int]: ...
    def plain_batch(self, texts: Sequence[str]) -> list[list[int]]: ...


def need_tokenizer(checkpoint: Model) -> None:
    """Raise MalformedInputError for a model without any tokenizer, whether it can be read or not."""
    if checkpoint.metadata is not None:
        carried(checkpoint)
    elif not has_tokenizer(checkpoint.directory):
        raise no_tokenizer(checkpoint.directory)


class TextTokenizer:
    """The tokenizer of an opened model.

    ``bos``: the token that begins every text, None where the model's texts begin without one. ``eos``: the token that
    ends a text, None where there is none. ``rows``: rows of the token embedding; every id is below it.
    ``has_template``: the model has a chat template. One object serves one thread.

    Raises MalformedInputError where the library that owns the format refuses the file, AccessError for a link out of
    the model directory, MissingExtraError without llama.cpp for a GGUF file.
    """

    def __init__(self, source: Source) -> None:
        checkpoint = source.checkpoint
        self.directory: Path = checkpoint.directory
        if checkpoint.metadata is None:
            conventions = read_conventions(self.directory, checkpoint.config)
        else:
            conventions = said_conventions(carried(checkpoint))
        self._special, tokens = conventions.special, conventions.texts
        embedding = next((o for o in source.tensors.outputs if o.name == "token_embd.weight"), None)
        self.rows = embedding.shape[0] if embedding is not None else len(tokens)
        self.file, self._encode = _encoder(checkpoint, conventions)
        begins = self._value(Keys.Tokenizer.BOS_ID)
        self.bos: int | None = begins if self._value(Keys.Tokenizer.ADD_BOS) else None
        self.eos: int | None = self._value(Keys.Tokenizer.EOS_ID)
        self._bos_text = tokens[begins] if begins is not None else ""
        self._eos_text = tokens[self.eos] if self.eos is not None else ""
        self._template: str | None = self._value(Keys.Tokenizer.CHAT_TEMPLATE)
        self.has_template = self._template is not None
        self._rendering: ChatTemplate | None = None

    def _value(self, key: str) -> Any:
        found: MetaValue | None = self._special.get(key)
        return None if found is None else found.value

    def encode(self, text: str) -> list[int]:
        """Ids of plain ``text``, nothing put before or after it; special tokens spelled inside it are plain text.

        Raises MalformedInputError for an id that the embedding has no row for.
        """
        return self._checked(self._encode(text, special=False))

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """As ``encode`` of each of ``texts``."""
        return [self._checked(ids) for ids in self._encode.plain_batch(texts)]

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation as ``render_chat`` sets it, special tokens as such.

        A begin token that the template writes first is left out: it has its place at the beginning of a window only.
        """
        text = self.render_chat(messages)
        if self._bos_text:
            text = text.removeprefix(self._bos_text)
        return self._checked(self._encode(text, special=True))

    def render_chat(self, messages: Sequence[Message]) -> str:
        """A whole conversation in the model's own template, run in the sandbox, on 1 January 2026 for those that write
        the date. A system message that the template refuses goes before the first user's words.

        Raises UnsupportedError: the model has no template, or it refuses the conversation.
        """
        if self._template is None:
            raise UnsupportedError(
                "this model has no chat template", file=self.directory, remedy="calibrate without --chat"
            )
        try:
            return self._render(self._template, messages)
        except UnsupportedError:
            folded = _without_system(messages)
            if folded is None:
                raise
            return self._render(self._template, folded)

    def _render(self, template: str, messages: Sequence[Message]) -> str:
        if self._rendering is None:
            self._rendering = ChatTemplate(
                template, bos=self._bos_text, eos=self._eos_text, file=self.directory, today=_TODAY
            )
        return self._rendering.render(messages, reply=False)

    def _checked(self, ids: list[int]) -> list[int]:
        if ids and not 0 <= max(ids) < self.rows:
            raise MalformedInputError(
                "the tokenizer gives an id that the embedding has no row for",
                file=self.file,
                expected=f"ids below {self.rows:,}",
                found=max(ids),
                remedy="fetch the model again, all of its files: tokenizer and weights are not of one model",
            )
        return ids


def _without_system(messages: Sequence[Message]) -> list[Message] | None:
    """The conversation with its system message set before the first user's words, None where that changes nothing."""
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return None
    joined = {"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
    return [joined, *messages[2:]]


def _encoder(checkpoint: Model, conventions: Conventions) -> tuple[Path, _Encoder]:
    """What tokenizes for a model, and the file that it comes from."""
    if checkpoint.metadata is not None:
        return checkpoint.config_file, _LlamaCppVocabulary(carried(checkpoint), checkpoint.config_file)
    file = inside(checkpoint.directory, "tokenizer.json")
    if file.exists():
        return file, _TokenizerJson(file)
    file = inside(checkpoint.directory, "tokenizer.model")
    return file, _SentencePiece(file, conventions)


class _LlamaCppVocabulary:
    """The vocabulary of a GGUF file in llama.cpp."""

    def __init__(self, metadata: Mapping[str, MetaValue], file: Path) -> None:
        from llm_quantize.runtimes.llama_cpp_vocabulary import open_vocabulary

        self._model = open_vocabulary(metadata, file)

    def __call__(self, text: str, *, special: bool) -> list[int]:
        return self._model.tokenize(text, add_special=False, parse_special=special)

    def plain_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self(text, special=False) for text in texts]


class _TokenizerJson:
    """tokenizer.json in ``tokenizers``, without the truncation and padding that a file may ask for."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads are none of those that the user allowed
        try:
            self._tokenizer = Tokenizer.from_str(read_limited(path, LIMIT_BYTES).decode("utf-8"))
        except Exception as error:  # tokenizers raises Exception itself; anything narrower is not its refusal
            if type(error) is not Exception and not isinstance(error, UnicodeDecodeError):
                raise
            _refused(path, "tokenizers", error)
        self._file = path
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def __call__(self, text: str, *, special: bool) -> list[int]:
        self._tokenizer.encode_special_tokens = not special
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        except BaseException as error:  # a panic of the library is none: an expression that backtracks too far
            if type(error).__name__ != "PanicException" and type(error) is not Exception:
                raise
            _refused(self._file, "tokenizers", error)
        return ids

    def plain_batch(self, texts: Sequence[str]) -> list[list[int]]:
        self._tokenizer.encode_special_tokens = True
        return [found.ids for found in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]


class _SentencePiece:
    """tokenizer.model in ``sentencepiece``; added tokens, which it does not know, are found in the text first."""

    def __init__(self, path: Path, conventions: Conventions) -> None:
        import sentencepiece

        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(read_limited(path, LIMIT_BYTES))
        except RuntimeError as error:
            _refused(path, "sentencepiece", error)
        size = self._processor.GetPieceSize()
        kinds, texts = conventions.types, conventions.texts
        control = {text: i for i, text in texts.items() if kinds.get(i) == TokenType.CONTROL}
        added = {text: i for i, text in texts.items() if kinds.get(i) == TokenType.USER_DEFINED and i >= size}
        self._plain, self._special = added, {**control, **added}

    def __call__(self, text: str, *, special: bool) -> list[int]:
        known = self._special if special else self._plain
        if not known:
            return self._pieces(text)
        longest_first = sorted(known, key=len, reverse=True)
        ids: list[int] = []
        for part in re.split(f"({'|'.join(map(re.escape, longest_first))})", text):
            if part:
                ids.extend([known[part]] if part in known else self._pieces(part))
        return ids

    def plain_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self(text, special=False) for text in texts]

    def _pieces(self, text: str) -> list[int]:
        ids: list[int] = self._processor.EncodeAsIds(text)
        return ids


def _refused(path: Path, library: str, error: BaseException) -> NoReturn:
    raise MalformedInputError(
        f"{library} does not read this tokenizer",
        file=path,
        found=printable(str(error), 200),
        remedy="fetch the tokenizer files of the model again",
    ) from error
