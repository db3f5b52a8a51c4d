"""A conversation with a model that stays loaded: what was said, and what of it still fits."""

from __future__ import annotations

from collections.abc import Callable, Generator

from llm_quantize.errors import UsageError
from llm_quantize.events import Caution, EventSink, ignore
from llm_quantize.runtimes.base import Answered, Prompt, Session


class Conversation:
    """Messages of a user and of the model in turn, after a ``system`` message if there is one.

    Every answer is asked for with all that was said. When prompt and answer do not fit the context any more, the oldest
    exchanges are left out, so many that the rest takes at most half of it, and ``on_event`` hears a warning; the system
    message stays. An answer has ``max_tokens`` at most, and what the context leaves.
    """

    def __init__(
        self,
        session: Session,
        *,
        system: str | None = None,
        max_tokens: int | None = None,
        on_event: EventSink = ignore,
    ) -> None:
        self._session, self.system, self._most, self._on_event = session, system, max_tokens, on_event
        self._said: list[dict[str, str]] = []

    @property
    def context(self) -> int:
        """Tokens of a prompt and its answer at most."""
        return self._session.context

    @property
    def messages(self) -> list[dict[str, str]]:
        """What was said, with ``role`` and ``content``, the system message first."""
        own = [] if self.system is None else [{"role": "system", "content": self.system}]
        return own + [dict(message) for message in self._said]

    def reset(self) -> None:
        """Forget all that was said; the system message stays."""
        self._said.clear()

    def say(self, text: str, stop: Callable[[], bool] = lambda: False) -> Generator[str, None, Answered]:
        """Pieces of the answer to ``text``, as they are written. It ends when ``stop()`` is true; what was said until
        then, or until this is closed, is part of the conversation. Of an answer without a word, neither it nor ``text``
        is.

        Raises UsageError (``text`` alone does not fit the context), UnsupportedError (the template refuses it, or the
        runtime fails).
        """
        before = list(self._said)
        self._said.append({"role": "user", "content": text})
        pieces: list[str] = []
        try:
            prompt = self._fitted()
            room = self.context - prompt.tokens
            writing = self._session.answer(prompt, min(room, self._most or room), stop)
            while True:
                try:
                    piece = next(writing)
                except StopIteration as ended:
                    answered: Answered = ended.value
                    return answered
                pieces.append(piece)
                yield piece
        finally:
            if pieces:
                self._said.append({"role": "assistant", "content": "".join(pieces)})
            else:
                self._said = before

    def _fitted(self) -> Prompt:
        """The prompt of what was said, or of as much of its end as leaves room for an answer."""
        prompt = self._session.prompt(self.messages)
        wanted = min(self._most or self.context, self.context // 4)
        if self.context - prompt.tokens >= wanted:
            return prompt
        exchanges = 0
        while len(self._said) > 1 and prompt.tokens > self.context // 2:
            del self._said[:2]
            exchanges += 1
            prompt = self._session.prompt(self.messages)
        if prompt.tokens >= self.context:
            raise UsageError(
                "the message does not fit the context",
                expected=f"fewer than {self.context} tokens, with the system message",
                found=prompt.tokens,
                remedy="say it in fewer words, or begin again with a larger --context",
            )
        if exchanges:
            text = f"the context of {self.context} tokens is full; exchanges left out from the beginning: {exchanges}"
            self._on_event(Caution(text))
        return prompt
