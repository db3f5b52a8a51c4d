"""A prompt in the chat template of a model directory, for runtimes that would set no limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from gguf.constants import Keys

from llm_quantize.errors import UnsupportedError
from llm_quantize.formats.gguf.vocabulary.special import chat_templates, read_optional
from llm_quantize.models.chat_template import ChatTemplate


def in_template(directory: Path, talks: Sequence[Sequence[Mapping[str, str]]]) -> tuple[str, ...]:
    """Each of ``talks``, messages with ``role`` and ``content``, in the model's own template, with the assistant's turn
    opened. Special tokens are written out in it.

    Raises UnsupportedError (no template, or it refuses), MalformedInputError (it takes too much time or memory, or is
    no text).
    """
    found = chat_templates(directory).get(Keys.Tokenizer.CHAT_TEMPLATE)
    if found is None:
        raise UnsupportedError("this model has no chat template", file=directory, remedy="run without --chat")
    bos, eos = (_special(directory, name) for name in ("bos_token", "eos_token"))
    with ChatTemplate(str(found.value), bos=bos, eos=eos, file=directory) as template:
        return tuple(template.render(messages) for messages in talks)


def _special(directory: Path, name: str) -> str:
    """A special token as text, "" where the tokenizer has none of this name."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        value = read_optional(directory, file).get(name)
        text = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(text, str):
            return text
    return ""
