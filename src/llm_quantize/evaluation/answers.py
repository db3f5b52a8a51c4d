"""What a harness of tasks asks of a model, answered from its logits; no harness is known here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_quantize.errors import UnsupportedError, UsageError
from llm_quantize.measures.perplexity import log_softmax
from llm_quantize.models.chat_template import ChatTemplate
from llm_quantize.runtimes.base import OpenModel

_DEFAULT_ANSWER = 256  # tokens, where a task names no limit; as the harness's own models do


class Answers:
    """What a harness asks of a model, from ``model``'s logits. Log-probabilities are natural, summed in float64."""

    def __init__(self, model: OpenModel, *, chat: bool = False) -> None:
        self._model, self._chat = model, chat
        self._rendering: ChatTemplate | None = None
        self._kept: tuple[tuple[int, ...], int, npt.NDArray[np.float64]] | None = None
        self.truncated = 0
        self._bos = self._id("bos")
        self.begins = model.metadata("tokenizer.ggml.add_bos_token") == "true"
        found = self._bos if self.begins else self._id("eos")
        self.prefix: int = next((i for i in (found, self._bos) if i is not None), 0)
        """The token that stands before a text that has nothing before it."""

    def _id(self, role: str) -> int | None:
        value = self._model.metadata(f"tokenizer.ggml.{role}_token_id")
        return None if value is None else int(value)

    def encode(self, text: str, *, begin: bool | None = None) -> list[int]:
        """Ids of ``text``. ``begin``: with what the model puts before a text (None: yes, unless the text begins with
        it). Special tokens are read as such in chats only, whose template writes them."""
        if begin is None:
            begin = not (self._bos is not None and text.startswith(self._spelled(self._bos)))
        return self._model.tokenize(text, add_special=begin, parse_special=self._chat)

    def _spelled(self, token: int | None) -> str:
        return "" if token is None else self._model.detokenize([token], special=True)

    def score(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        """(log-probability of ``continuation`` after ``context``, whether each of its tokens is the likeliest).

        The beginning of a context that is too long is left out, and counted. Raises UsageError for a continuation
        that is longer than the model's context, or empty.
        """
        room = self._model.context + 1  # the last token is only predicted
        if not 0 < len(continuation) < room:
            raise UsageError(
                "a continuation does not fit the context",
                expected=f"1 to {room - 1} tokens",
                found=len(continuation),
                remedy="a larger --context",
            )
        ids = [*context, *continuation]
        if len(ids) > room:
            ids = ids[-room:]
            self.truncated += 1
        targets = np.asarray(ids[-len(continuation) :])
        rows = self._rows(ids[:-1], len(ids) - 1 - len(continuation))
        chosen = rows[np.arange(len(targets)), targets]
        return float(chosen.sum()), bool((rows.argmax(axis=1) == targets).all())

    def _rows(self, ids: Sequence[int], first: int) -> npt.NDArray[np.float64]:
        """Log-probabilities after token ``first`` of ``ids`` and each that follows. The last answer is kept: the
        choices of one question often share everything but their last token."""
        if self._kept is not None and self._kept[0] == tuple(ids) and self._kept[1] <= first:
            return self._kept[2][first - self._kept[1] :]
        rows = log_softmax(self._model.logits(ids, first))
        self._kept = (tuple(ids), first, rows)
        return rows

    def complete(self, prompt: str, *, stop: Sequence[str], most: int, temperature: float = 0.0) -> str:
        """What follows ``prompt`` up to the first of the texts ``stop`` (left out), the model's own end, or ``most``
        tokens. The beginning of a prompt that leaves no room for the answer is left out, and counted."""
        ids = self.encode(prompt)
        room = max(1, self._model.context - most)
        if len(ids) > room:
            ids = ids[-room:]
            self.truncated += 1
        text = ""
        for piece in self._model.generate(ids, max_tokens=most, temperature=temperature):
            text += piece
            if any(mark in text for mark in stop):
                break
        return text[: min((text.index(mark) for mark in stop if mark in text), default=len(text))]

    def render(self, messages: Sequence[Mapping[str, str]], *, reply: bool = True) -> str:
        """A conversation in the artifact's own template. Raises UnsupportedError where it has none."""
        template = self._model.metadata("tokenizer.chat_template")
        if template is None:
            raise UnsupportedError("this model has no chat template", file=self._model.path, remedy="leave out --chat")
        if self._rendering is None:
            bos, eos = self._spelled(self._bos), self._spelled(self._id("eos"))
            self._rendering = ChatTemplate(template, bos=bos, eos=eos, file=self._model.path)
        return self._rendering.render(messages, reply=reply)


def stop_texts(options: Mapping[str, Any]) -> tuple[list[str], int, float]:
    """(stop texts, most tokens, temperature) of a task's generation options."""
    until = options.get("until") or []
    stops = [until] if isinstance(until, str) else [mark for mark in _texts(until) if mark]
    most = next((options[k] for k in ("max_gen_toks", "max_new_tokens", "max_tokens") if options.get(k)), None)
    warm = bool(options.get("do_sample")) and options.get("temperature")
    return stops, int(most or _DEFAULT_ANSWER), float(warm or 0.0)


def _texts(values: object) -> Iterable[str]:
    return (value for value in values if isinstance(value, str)) if isinstance(values, Iterable) else ()
