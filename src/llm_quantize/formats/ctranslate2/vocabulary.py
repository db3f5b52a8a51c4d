"""The tokens of a model by id, and its special ones, as CTranslate2 wants them: texts, from the tokenizer's files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_quantize.errors import UnsupportedError
from llm_quantize.formats.gguf.restored.files import Restored
from llm_quantize.formats.gguf.vocabulary.json import read_tokenizer_json
from llm_quantize.formats.gguf.vocabulary.reading import added_beside
from llm_quantize.formats.gguf.vocabulary.sentencepiece import read_sentencepiece
from llm_quantize.formats.gguf.vocabulary.special import chat_templates, read_optional
from llm_quantize.io.paths import inside

_TOKENIZERS: Mapping[str, Mapping[str, str]] = {
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    "GPTNeoXTokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    "Qwen2Tokenizer": dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>"),
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GemmaTokenizer": {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"},
}
"""The special tokens that a class of Transformers (5.23) has where the files name none."""


def tokens_of(directory: Path, rows: int, made: Restored | None = None) -> list[str]:
    """The text of each of ``rows`` tokens, by id; <extra_id_N> for the N-th that the tokenizer has none for. ``made``:
    what a GGUF file says instead of the files of ``directory``, of this and of what follows.

    Raises UnsupportedError where there is neither tokenizer.json nor tokenizer.model, MalformedInputError.
    """
    texts = _texts(directory) if made is None else made.texts
    if not texts:
        raise UnsupportedError(
            "CTranslate2 needs the texts of tokens, which are in none of the model's files",
            file=directory,
            expected="tokenizer.json or tokenizer.model",
            remedy="AutoTokenizer.from_pretrained(M).save_pretrained(M) of transformers writes tokenizer.json",
        )
    missing = (index for index in range(rows) if index not in texts)
    names = {index: f"<extra_id_{number}>" for number, index in enumerate(missing)}
    return [texts.get(index) or names[index] for index in range(rows)]


def _texts(directory: Path) -> dict[int, str]:
    """The texts in the tokenizer's files, by id; empty where there is none."""
    path, model = inside(directory, "tokenizer.json"), inside(directory, "tokenizer.model")
    beside = added_beside(directory, read_optional(directory, "tokenizer_config.json"))
    if path.exists():
        read = read_tokenizer_json(path, any_model=True)
        return dict(read.tokens) | {token.id: token.content for token in (*read.added, *beside)}
    if model.exists():
        texts = {index: piece[0] for index, piece in enumerate(read_sentencepiece(model).pieces)}
        return texts | {token.id: token.content for token in beside}
    return {}


def has_template(directory: Path, made: Restored | None = None) -> bool:
    """Whether the model has a chat template."""
    return bool(chat_templates(directory)) if made is None else made.chats


def special_tokens(directory: Path, model_type: str, made: Restored | None = None) -> dict[str, str]:
    """{bos_token, eos_token, unk_token, pad_token: text} of those that the tokenizer has."""
    settings = read_optional(directory, "tokenizer_config.json") if made is None else made.settings
    mapped = read_optional(directory, "special_tokens_map.json") if made is None else {}
    kind = str(settings.get("tokenizer_class", "")).removesuffix("Fast")
    found: dict[str, str] = dict(_TOKENIZERS.get(kind, _BY_TYPE.get(model_type, {}) if not kind else {}))
    for named in (mapped, settings):
        for role in ("bos_token", "eos_token", "unk_token", "pad_token"):
            if role in named:
                text = _text(named[role])
                found.pop(role, None)
                found |= {role: text} if text is not None else {}
    return found


_BY_TYPE: Mapping[str, Mapping[str, str]] = {
    "gpt2": _TOKENIZERS["GPT2Tokenizer"],
    "gpt_neox": _TOKENIZERS["GPTNeoXTokenizer"],
    "qwen2": _TOKENIZERS["Qwen2Tokenizer"],
    "qwen3": _TOKENIZERS["Qwen2Tokenizer"],
}


def _text(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, Mapping) else value
    return text if isinstance(text, str) else None
