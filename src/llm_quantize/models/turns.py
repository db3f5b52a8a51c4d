"""A chat template as fixed texts around turns, for programs that cannot run Jinja."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from llm_quantize.errors import UnsupportedError
from llm_quantize.models.chat_template import ChatTemplate

Messages = Sequence[Mapping[str, str]]

_WORDS = ("Kqzuba", "Wjxofe", "Vhmigo", "Zpluda", "Xcrena", "Fgtosi", "Bndyla")
"""Contents that no template holds: first of the system message, then of user and assistant in turn."""

_DAYS = (datetime.datetime(2001, 2, 3, 4, 5, 6), datetime.datetime(2024, 11, 12, 13, 14, 15))

_CONTENTS = ("Hello there", 'a "quote"\nand {{ braces }} \\ `code`', "<b>日本語</b> 1\n\n2", "x", "don't | 50 %", "é")
"""Of the conversations on which a fit is proved. No blanks at an edge: templates that trim them still fit."""


@dataclass(frozen=True)
class Turns:
    """The text of a conversation that a user begins and in which both speak in turn:

    ``before_system`` SYSTEM ``after_system`` (without a system message: ``opening``) USER ``answer`` ASSISTANT ``turn``
    USER ... USER ``reply``. ``takes_system``: whether the template has a place for a system message of its own; where
    not, it is put before the first user's.
    """

    before_system: str
    after_system: str
    opening: str
    answer: str
    turn: str
    reply: str
    takes_system: bool = True

    def render(self, messages: Messages) -> str:
        """``messages``, of which the first may be the system's and the last is a user's, with the assistant's turn
        opened."""
        said = list(messages)
        text = self.opening
        if said[0]["role"] == "system":
            text = self.before_system + said.pop(0)["content"] + self.after_system
        for index, message in enumerate(said):
            if message["role"] == "user":
                text += (self.turn if index else "") + message["content"]
            else:
                text += self.answer + message["content"]
        return text + self.reply


def fit_turns(opened: Callable[[datetime.datetime], ChatTemplate]) -> Turns:
    """The template that ``opened`` gives (for a day that it may write) as ``Turns``, proved on conversations of one to
    three exchanges, with and without a system message.

    Raises UnsupportedError where it is no such template, and says why. MalformedInputError, ResourceError as
    ``ChatTemplate.render``.
    """
    with opened(_DAYS[0]) as template, opened(_DAYS[1]) as later:
        takes_system = _takes_system(template)
        turns = _fitted(template, takes_system)
        talks = [
            _talk(_CONTENTS[first:] + _CONTENTS[:first], count, system)
            for first in range(len(_CONTENTS))
            for count in (1, 3, 5)
            for system in ((False, True) if takes_system else (False,))
        ]
        for messages in talks:
            text = template.render(messages)
            if text != turns.render(messages):
                raise _unfit(f"a conversation of {len(messages)} messages has other words around them")
            if later.render(messages) != text:
                raise _unfit("it writes the date")
    return turns


def _takes_system(template: ChatTemplate) -> bool:
    """Whether the template renders a system message."""
    try:
        return _WORDS[0] in template.render(_talk(_WORDS[1:], 1, _WORDS[0]))
    except UnsupportedError:
        return False


def _fitted(template: ChatTemplate, takes_system: bool) -> Turns:
    """What stands around the contents of three exchanges."""
    opening, *between, reply = _around(template.render(_talk(_WORDS[1:], 5)), _WORDS[1:6])
    answer, turn = between[:2]
    if not takes_system:
        return Turns(opening, "\n\n", opening, answer, turn, reply, takes_system=False)
    texts = _around(template.render(_talk(_WORDS[1:], 5, _WORDS[0])), _WORDS[:6])
    return Turns(texts[0], texts[1], opening, answer, turn, reply)


def _around(text: str, words: Sequence[str]) -> list[str]:
    """The parts of ``text`` before, between and behind ``words``, each of which stands there once, in order."""
    parts = []
    for word in words:
        before, found, text = text.partition(word)
        if not found or word in text:
            raise _unfit("a message stands there not exactly once, in its place")
        parts.append(before)
    return [*parts, text]


def _talk(contents: Sequence[str], count: int, system: str | bool | None = None) -> list[dict[str, str]]:
    """``count`` messages that a user begins and ends, behind a ``system`` message (True: the last of ``contents``)."""
    said = [
        {"role": "assistant" if index % 2 else "user", "content": content}
        for index, content in enumerate(contents[:count])
    ]
    text = contents[-1] if system is True else system
    return [{"role": "system", "content": text}, *said] if text else said


def _unfit(why: str) -> UnsupportedError:
    return UnsupportedError(f"the chat template is not one of fixed texts around turns: {why}")
