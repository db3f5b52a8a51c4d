"""The small files of a directory that is made of a GGUF file: tokenizer, its settings, chat templates, generation.

    tokenizer.json          from the vocabulary (tokenizer.py)
    tokenizer_config.json   special tokens, and a class that transformers 4 and 5 load without code of their own
    generation_config.json  where a generation ends, and how to sample
    chat_template.jinja     the chat template; additional_chat_templates/NAME.jinja: those that have a name

The metadata is the truth, whatever else lies beside the file. Bytes follow from it alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from gguf.constants import Keys

from llm_quantize.formats.gguf.metadata import SAMPLING
from llm_quantize.formats.gguf.restored.said import Said, read_said
from llm_quantize.formats.gguf.restored.tokenizer import tokenizer_json
from llm_quantize.io.gguf_file import MetaValue

if TYPE_CHECKING:
    from llm_quantize.models.opening import Source

_CARD = {
    "license": Keys.General.LICENSE,
    "license_name": Keys.General.LICENSE_NAME,
    "license_link": Keys.General.LICENSE_LINK,
    "language": Keys.General.LANGUAGES,
}
_MOST_WORDS = 1000


@dataclass(frozen=True)
class Restored:
    """``files``: (name, bytes), none where the file has no tokenizer. ``warnings``: what a user should know of them.
    ``front``: what the model card says of licence and languages. ``settings``: tokenizer_config.json. ``texts``: of the
    tokens, by id. ``chats``: whether there is a chat template."""

    files: tuple[tuple[str, bytes], ...] = ()
    warnings: tuple[str, ...] = ()
    front: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    texts: Mapping[int, str] = field(default_factory=dict)
    chats: bool = False


_KEPT: WeakKeyDictionary[Source, Restored] = WeakKeyDictionary()  # a run plans more than once; vocabularies are large


def restored(source: Source) -> Restored:
    """The small files of the GGUF model ``source``.

    Raises MalformedInputError (metadata that contradicts itself), UnsupportedError (a vocabulary of which no
    tokenizer.json can be made with the ids of llama.cpp).
    """
    if source not in _KEPT:
        _KEPT[source] = _restore(source)
    return _KEPT[source]


def _restore(source: Source) -> Restored:
    checkpoint = source.checkpoint
    metadata: Mapping[str, MetaValue] = checkpoint.metadata or {}
    front = _front(metadata)
    if Keys.Tokenizer.MODEL not in metadata or Keys.Tokenizer.LIST not in metadata:
        return Restored(warnings=("the GGUF file has no tokenizer, so the directory has none",), front=front)
    hyper = source.architecture.hyper
    said = read_said(metadata, checkpoint.config_file, rows=hyper.vocab_size)
    told: list[str] = []
    made = tokenizer_json(said, told.append)
    settings = _settings(said, hyper.context_length)
    files = [("tokenizer.json", made), ("tokenizer_config.json", _readable(settings))]
    files.append(("generation_config.json", _readable(_generation(said, metadata))))
    for name, template in said.templates.items():
        place = "chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja"
        files.append((place, template.encode()))
    return Restored(
        files=tuple(sorted(files)),
        warnings=tuple(told),
        front=front,
        settings=settings,
        texts={index: text for text, index in said.ids.items()},
        chats=bool(said.templates),
    )


def _readable(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"


def _settings(said: Said, context: int) -> dict[str, Any]:
    """tokenizer_config.json."""
    decoder = {str(token.pop("id")): token for token in said.added()}
    return {
        "add_bos_token": said.add_bos,
        "add_eos_token": said.add_eos,
        "added_tokens_decoder": decoder,
        **{f"{role}_token": said.texts[index] for role, index in said.roles.items()},
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _generation(said: Said, metadata: Mapping[str, MetaValue]) -> dict[str, Any]:
    """generation_config.json."""
    found: dict[str, Any] = {}
    for role in ("bos", "pad"):
        if role in said.roles:
            found[f"{role}_token_id"] = said.roles[role]
    if said.ends:
        found["eos_token_id"] = said.ends[0] if len(said.ends) == 1 else list(said.ends)
    sampling = {}
    for name, (key, _) in SAMPLING.items():
        value = getattr(metadata.get(key), "value", None)
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e6:
            sampling[name] = round(value, 6)
    return found | ({"do_sample": True, **sampling} if sampling else {})


def _front(metadata: Mapping[str, MetaValue]) -> dict[str, Any]:
    """Licence and languages as a model card's front matter has them."""
    found: dict[str, Any] = {}
    for name, key in _CARD.items():
        value = getattr(metadata.get(key), "value", None)
        words = value if isinstance(value, list) else [value]
        if all(isinstance(word, str) for word in words) and sum(map(len, words)) < _MOST_WORDS:
            found[name] = value
    return found
