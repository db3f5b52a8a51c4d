"""Chats in the template of a model directory, for runtimes that would set no limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from gguf.constants import Keys

from llm_quantize.errors import UnsupportedError
from llm_quantize.formats.gguf.vocabulary.special import chat_templates, read_optional
from llm_quantize.models.chat_template import ChatTemplate


def template_of(directory: Path) -> ChatTemplate:
    """The model's own chat template, to be closed. Special tokens are written out in what it renders.

    Raises UnsupportedError (there is none), MalformedInputError (it is no text), MissingExtraError (no Jinja).
    """
    found = chat_templates(directory).get(Keys.Tokenizer.CHAT_TEMPLATE)
    if found is None:
        raise UnsupportedError("this model has no chat template", file=directory, remedy="run without --chat")
    bos, eos = (_special(directory, name) for name in ("bos_token", "eos_token"))
    return ChatTemplate(str(found.value), bos=bos, eos=eos, file=directory)


def in_template(directory: Path, talks: Sequence[Sequence[Mapping[str, str]]]) -> tuple[str, ...]:
    """Each of ``talks``, messages with ``role`` and ``content``, in the model's own template, with the assistant's turn
    opened. Raises as ``template_of`` and ``ChatTemplate.render``.
    """
    with template_of(directory) as template:
        return tuple(template.render(messages) for messages in talks)


def _special(directory: Path, name: str) -> str:
    """A special token as text, "" where the tokenizer has none of this name."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        value = read_optional(directory, file).get(name)
        text = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(text, str):
            return text
    return ""
