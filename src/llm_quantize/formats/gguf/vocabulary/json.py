"""tokenizer.json (owner of the format: Hugging Face ``tokenizers``), read as data and checked item by item."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from llm_quantize.errors import MalformedInputError, UnsupportedError, printable
from llm_quantize.io.json_file import read_json

LIMIT_BYTES = 512 << 20
MAX_TOKENS = 8_000_000


@dataclass(frozen=True)
class AddedToken:
    """One entry of ``added_tokens``: text that is found before the model ever sees it."""

    id: int
    content: str
    special: bool = False
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


@dataclass(frozen=True)
class TokenizerJson:
    """The checked parts of a tokenizer.json. ``tokens``: id -> text of the model's own vocabulary, dense or not."""

    file: Path
    kind: str
    model: Mapping[str, Any]
    tokens: Mapping[int, str]
    ids: Mapping[str, int]
    merges: tuple[tuple[str, str], ...]
    scores: tuple[float, ...]
    added: tuple[AddedToken, ...]
    normalizer: Any = None
    pre_tokenizer: Any = None
    post_processor: Any = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def refuse(
        self, what: str, *, expected: object = None, found: object = None, remedy: str | None = None
    ) -> NoReturn:
        """Raise UnsupportedError about this file."""
        raise UnsupportedError(what, file=self.file, expected=expected, found=found, remedy=remedy)


def malformed(file: Path, what: str, *, expected: object = None, found: object = None) -> NoReturn:
    """Raise MalformedInputError about ``file``."""
    raise MalformedInputError(
        what, file=file, expected=expected, found=found, remedy="fetch the tokenizer files of the model again"
    )


def flag(item: Mapping[str, Any], name: str, default: bool, file: Path, where: str) -> bool:
    """The boolean ``name`` of ``item``; null and absent mean ``default``."""
    value = item.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        malformed(file, f"{where}.{name} is not a boolean", expected="true or false", found=repr(value))
    return value


def check_id(value: object, file: Path, where: str) -> int:
    """``value`` as a token id, or MalformedInputError."""
    if not isinstance(value, int) or isinstance(value, bool):
        malformed(file, f"{where} has an id that is not an integer", expected="an integer", found=repr(value))
    if not 0 <= value < 2**31:
        malformed(file, f"{where} has an id out of range", expected="0 to 2^31 - 1", found=value)
    return value


def check_text(text: object, file: Path, where: str) -> str:
    """``text`` as a token's text: a string without NUL (GGUF readers end strings there)."""
    if not isinstance(text, str):
        malformed(file, f"{where} is not a string", expected="a string", found=repr(text))
    if "\0" in text:
        raise UnsupportedError(
            f"{where} holds a NUL character, which llama.cpp cannot hold in a token",
            file=file,
            found=repr(text),
            remedy="remove that token from the tokenizer, or use another runtime",
        )
    return text


def read_tokenizer_json(path: Path, *, any_model: bool = False) -> TokenizerJson:
    """Read and check ``path``. Raises MalformedInputError (broken), UnsupportedError (a model type without a home in
    GGUF, unless ``any_model``)."""
    data = read_json(path, limit_bytes=LIMIT_BYTES)
    if not isinstance(data, dict):
        malformed(path, "tokenizer.json must hold an object", expected="{...}", found=type(data).__name__)
    model = data.get("model")
    if not isinstance(model, dict):
        malformed(path, "tokenizer.json has no model", expected="an object under 'model'", found=type(model).__name__)
    kind = model.get("type")
    if kind is None:  # files of the first years leave the type out
        kind = "BPE" if "merges" in model else "Unigram" if isinstance(model.get("vocab"), list) else None
    scores: tuple[float, ...] = ()
    merges: tuple[tuple[str, str], ...] = ()
    if kind == "BPE":
        ids = _vocabulary(model.get("vocab"), path)
        merges = _merges(model.get("merges"), ids, path)
    elif kind == "Unigram":
        ids, scores = _unigram(model.get("vocab"), path)
    elif any_model and isinstance(model.get("vocab"), dict):
        ids = _vocabulary(model.get("vocab"), path)
    else:
        raise UnsupportedError(
            "this tokenizer model cannot be expressed in GGUF by this version",
            file=path,
            expected="model.type BPE or Unigram",
            found=kind,
            remedy="use a model whose tokenizer is of one of these kinds, or fetch tokenizer.json again",
        )
    tokens = {index: text for text, index in ids.items()}
    if len(tokens) != len(ids):
        seen: dict[int, str] = {}
        for text, index in ids.items():
            if index in seen:
                malformed(path, f"two tokens have the id {index}", found=f"{seen[index]!r} and {text!r}")
            seen[index] = text
    return TokenizerJson(
        file=path,
        kind=str(kind),
        model=model,
        tokens=tokens,
        ids=ids,
        merges=merges,
        scores=scores,
        added=_added(data.get("added_tokens"), ids, tokens, path),
        normalizer=data.get("normalizer"),
        pre_tokenizer=data.get("pre_tokenizer"),
        post_processor=data.get("post_processor"),
    )


def _vocabulary(vocab: object, path: Path) -> dict[str, int]:
    if not isinstance(vocab, dict) or not vocab:
        malformed(path, "model.vocab must be an object of token texts and ids", found=type(vocab).__name__)
    if len(vocab) > MAX_TOKENS:
        malformed(path, "model.vocab is too large", expected=f"at most {MAX_TOKENS:,} tokens", found=len(vocab))
    for text, index in vocab.items():
        if type(index) is not int or not 0 <= index < 2**31:
            check_id(index, path, f"the token {printable(text, 60)!r}")
        if "\0" in text:
            check_text(text, path, f"the token of id {index}")
    return vocab


def _unigram(vocab: object, path: Path) -> tuple[dict[str, int], tuple[float, ...]]:
    if not isinstance(vocab, list) or not vocab:
        malformed(path, "model.vocab must be a list of [text, score]", found=type(vocab).__name__)
    ids: dict[str, int] = {}
    scores: list[float] = []
    for index, item in enumerate(vocab):
        if not isinstance(item, list) or len(item) != 2:
            malformed(path, f"model.vocab[{index}] must be [text, score]", found=printable(repr(item), 80))
        text = check_text(item[0], path, f"model.vocab[{index}]")
        score = item[1]
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not abs(score) < 3e38:
            malformed(path, f"model.vocab[{index}] has no finite score", expected="a number", found=repr(score))
        if text in ids:
            malformed(path, f"the token {printable(text, 60)!r} stands twice", found=f"ids {ids[text]} and {index}")
        ids[text] = index
        scores.append(float(score))
    return ids, tuple(scores)


def _merges(merges: object, ids: Mapping[str, int], path: Path) -> tuple[tuple[str, str], ...]:
    if not isinstance(merges, list):
        malformed(path, "model.merges must be a list", found=type(merges).__name__)
    pairs: list[tuple[str, str]] = []
    for index, item in enumerate(merges):
        parts = item.split(" ") if type(item) is str else item
        if type(parts) is list and len(parts) == 2:
            left, right = parts
            if (
                type(left) is str
                and type(right) is str
                and left
                and right
                and left in ids
                and right in ids
                and left + right in ids
            ):
                pairs.append((left, right))
                continue
        _explain_merge(index, parts, ids, path)
    return tuple(pairs)


def _explain_merge(index: int, parts: object, ids: Mapping[str, int], path: Path) -> NoReturn:
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(p, str) and p for p in parts):
        malformed(
            path,
            f"model.merges[{index}] is not a pair of tokens",
            expected="'left right' or ['left', 'right']",
            found=printable(repr(parts), 80),
        )
    absent = next(part for part in (*parts, parts[0] + parts[1]) if part not in ids)
    malformed(
        path,
        f"model.merges[{index}] names a token that is not in model.vocab",
        expected="tokens of model.vocab",
        found=printable(repr(absent), 80),
    )


def _added(items: object, ids: Mapping[str, int], tokens: Mapping[int, str], path: Path) -> tuple[AddedToken, ...]:
    if items is None:
        return ()
    if not isinstance(items, list):
        malformed(path, "added_tokens must be a list", found=type(items).__name__)
    result: list[AddedToken] = []
    by_text: dict[str, int] = {}
    by_id: dict[int, str] = {}
    for index, item in enumerate(items):
        where = f"added_tokens[{index}]"
        if not isinstance(item, dict):
            malformed(path, f"{where} must be an object", found=printable(repr(item), 80))
        token = added_token(item, check_id(item.get("id"), path, where), path, where)
        if not token.content:
            continue  # an empty text is never found in a text; tokenizers skips it too
        for known, meaning in ((ids.get(token.content), "model.vocab"), (by_text.get(token.content), "added_tokens")):
            if known is not None and known != token.id:
                malformed(
                    path, f"{where} gives {token.content!r} the id {token.id}", expected=f"{known}, as in {meaning}"
                )
        for text in (tokens.get(token.id), by_id.get(token.id)):
            if text is not None and text != token.content:
                malformed(path, f"two tokens have the id {token.id}", found=f"{text!r} and {token.content!r}")
        _check_number(token, ids, by_text, path, where)
        by_text[token.content], by_id[token.id] = token.id, token.content
        result.append(token)
    return tuple(result)


def _check_number(
    token: AddedToken, ids: Mapping[str, int], by_text: Mapping[str, int], path: Path, where: str
) -> None:
    """``tokenizers`` numbers added tokens outside the vocabulary by itself: on from its end, whatever the file says.

    A file that says otherwise has one id on paper and another in every program that loads it.
    """
    if token.content in ids or token.content in by_text:
        return
    given = max(len(ids), max(by_text.values(), default=-1) + 1)
    if token.id != given:
        malformed(
            path,
            f"{where} ({printable(token.content, 60)!r}) gets another id than the file says when it is loaded",
            expected=f"{given}, the next after the vocabulary",
            found=token.id,
        )


def added_token(item: Mapping[str, Any], index: int, path: Path, where: str) -> AddedToken:
    """One AddedToken of tokenizer.json or of ``added_tokens_decoder`` in tokenizer_config.json."""
    special = flag(item, "special", False, path, where)
    return AddedToken(
        id=index,
        content=check_text(item.get("content"), path, where),
        special=special,
        normalized=flag(item, "normalized", not special, path, where),
        lstrip=flag(item, "lstrip", False, path, where),
        rstrip=flag(item, "rstrip", False, path, where),
        single_word=flag(item, "single_word", False, path, where),
    )
