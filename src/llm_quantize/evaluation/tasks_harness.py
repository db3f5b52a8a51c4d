"""The one class that the evaluation harness knows: its ``LM`` over ``Answers``. Imported only where lm_eval is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from llm_quantize import events
from llm_quantize.evaluation.answers import Answers, stop_texts
from llm_quantize.events import EventSink


def harness_model(answers: Answers, name: str, context: int, on_event: EventSink) -> Any:
    """``answers`` as a model of the harness; ``on_event`` hears how many requests of a kind are done."""
    return _Model(answers, name, context, on_event)


class _Model(TemplateLM):  # type: ignore[misc]
    def __init__(self, answers: Answers, name: str, context: int, on_event: EventSink) -> None:
        super().__init__()
        self._answers, self._name, self._context, self._on_event = answers, name, context, on_event

    @property
    def eot_token_id(self) -> int:
        return self._answers.prefix

    @property
    def tokenizer_name(self) -> str:
        return self._name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_options: Any) -> list[int]:
        return self._answers.encode(string, begin=add_special_tokens)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_options: Any) -> list[tuple[float, bool]]:
        found = []
        for done, (_, context, continuation) in enumerate(requests, 1):
            found.append(self._answers.score(context, continuation))
            self._tell(done, len(requests))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        found = []
        for done, request in enumerate(requests, 1):
            windows = get_rolling_token_windows(
                token_list=self._answers.encode(request.args[0], begin=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._context,
                context_len=1,
            )
            found.append(sum(self._answers.score(*make_disjoint_window(window))[0] for window in windows))
            self._tell(done, len(requests))
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        found = []
        for done, request in enumerate(requests, 1):
            prompt, options = request.args
            stops, most, temperature = stop_texts(options)
            found.append(self._answers.complete(prompt, stop=stops, most=most, temperature=temperature))
            self._tell(done, len(requests))
        return found

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True, **_options: Any
    ) -> str:
        return self._answers.render(chat_history, reply=add_generation_prompt)

    def _tell(self, done: int, total: int) -> None:
        self._on_event(events.Measure(done=done, total=total))
