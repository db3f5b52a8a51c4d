"""Benchmarks of tasks (questions with right answers) on a GGUF artifact, through EleutherAI's lm-evaluation-harness.

The harness (``lm_eval``, the extra ``tasks``) brings the tasks, their prompts and their metrics; the artifact runs in
the real llama.cpp. Three requests are all a model must answer: how likely is this continuation, how likely is this
text, and what comes next until a stop text. ``Answers`` is that, with no harness in it.

Four-bit artifacts move such scores by less than a point, which is within the noise of most tasks: to tell artifacts
apart, measure the divergence (``analyze quality``). Tasks show what is broken altogether.
"""

from __future__ import annotations

import difflib
import functools
import importlib.metadata
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_quantize.errors import MissingExtraError, NetworkError, UnsupportedError, UsageError, printable
from llm_quantize.events import EventSink, ignore
from llm_quantize.measures.perplexity import log_softmax
from llm_quantize.runtimes import open_model
from llm_quantize.runtimes.base import OpenModel
from llm_quantize.runtimes.chat_template import render

_BOOTSTRAP = 1000
_DEFAULT_ANSWER = 256  # tokens, where a task names no limit; as the harness's own models do


@dataclass(frozen=True)
class Score:
    """One metric of one task. ``error``: standard error, None where the harness gives none."""

    task: str
    metric: str
    value: float
    error: float | None
    samples: int
    higher_is_better: bool | None


@dataclass(frozen=True)
class TaskReport:
    """What ``run_tasks`` measured. ``truncated``: requests whose beginning did not fit the context."""

    artifact: str
    scores: tuple[Score, ...]
    truncated: int
    harness: str
    seconds: float

    def to_dict(self) -> dict[str, object]:
        return {
            "artifact": self.artifact,
            "harness": self.harness,
            "seconds": round(self.seconds, 1),
            "truncated": self.truncated,
            "scores": [vars(score) for score in self.scores],
        }


class Answers:
    """What a harness asks of a model, from ``model``'s logits. Log-probabilities are natural, summed in float64."""

    def __init__(self, model: OpenModel, *, chat: bool = False) -> None:
        self._model, self._chat = model, chat
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
        bos, eos = self._spelled(self._bos), self._spelled(self._id("eos"))
        return render(template, messages, bos=bos, eos=eos, file=self._model.path, reply=reply)


def run_tasks(
    artifact: str | Path,
    tasks: Sequence[str],
    *,
    shots: int | None = None,
    limit: int | None = None,
    context: int = 2048,
    chat: bool = False,
    include: str | Path | None = None,
    threads: int | None = None,
    on_event: EventSink = ignore,
) -> TaskReport:
    """Run the harness's ``tasks`` on a GGUF ``artifact``. ``shots``: examples before each question (None: the task's
    own number). ``limit``: the first questions of each task. ``include``: a directory of task files of your own; code
    that they name is run.

    Raises MissingExtraError (no lm_eval, or no xllamacpp), UsageError (no such task or artifact), NetworkError (the
    data of a task cannot be fetched), and what ``open_model`` raises.
    """
    if find_spec("lm_eval") is None:
        raise MissingExtraError("running benchmark tasks", "tasks")
    os.environ.setdefault("TQDM_DISABLE", "1")  # its bars would stand between our lines; read when tqdm is imported
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from lm_eval.evaluator import simple_evaluate

    from llm_quantize.evaluation.tasks_harness import harness_model

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _task_manager(tasks, include)
    started = time.monotonic()
    with open_model(artifact, context=context, threads=threads) as model:
        answers = Answers(model, chat=chat)
        if chat:
            answers.render([{"role": "user", "content": "?"}])  # refuse before any work
        with _DataErrors():
            found = simple_evaluate(
                model=harness_model(answers, str(artifact), context, on_event),
                tasks=list(tasks),
                num_fewshot=shots,
                limit=limit,
                task_manager=manager,
                apply_chat_template=chat,
                bootstrap_iters=_BOOTSTRAP,
                log_samples=False,
            )
    if answers.truncated:
        text = (
            f"{answers.truncated:,} requests were longer than the context of {context:,}: their beginning is left out"
        )
        on_event({"event": "warning", "text": text})
    version = f"lm_eval {importlib.metadata.version('lm_eval')}"
    scores = tuple(_scores(found or {}))
    return TaskReport(str(artifact), scores, answers.truncated, version, time.monotonic() - started)


@functools.lru_cache(maxsize=2)
def _manager(include: str | None) -> Any:
    """The harness's index of tasks; it reads some ten thousand files."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include)


def _task_manager(tasks: Sequence[str], include: str | Path | None) -> Any:
    if include is not None and not Path(include).is_dir():
        raise UsageError("there is no such directory of tasks", file=include, remedy="check --include")
    manager = _manager(None if include is None else str(include))
    known = set(manager.all_tasks)
    if not tasks:
        raise UsageError("no task was named", remedy="for example --tasks arc_easy")
    for name in tasks:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            raise UsageError(
                f"the harness has no task {printable(name, 60)!r}",
                expected=", ".join(near) or None,
                remedy="lm_eval ls tasks lists them; --include DIR adds your own",
            )
    return manager


_CLIENTS = ("aiohttp", "datasets", "httpcore", "httpx", "huggingface_hub", "requests")


class _DataErrors:
    """Failures to fetch or read a task's data become NetworkError; any other passes as it is."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _CLIENTS:
            raise NetworkError(
                "the data of a task cannot be read or fetched",
                found=printable(f"{type(error).__name__}: {error}", 300),
                remedy="check the network, or the paths in your own task file; what the hub gave once is kept",
            ) from error


def _scores(found: Mapping[str, Any]) -> Iterator[Score]:
    """Every number of the harness's result, in its order: {task: {"metric,filter": value}}."""
    for task, metrics in found.get("results", {}).items():
        better = found.get("higher_is_better", {}).get(task, {})
        samples = found.get("n-samples", {}).get(task, {}).get("effective", 0)
        for key, value in metrics.items():
            name, _, kind = key.partition(",")
            if name.endswith("_stderr") or not isinstance(value, (int, float)) or isinstance(value, bool) or not kind:
                continue
            error = metrics.get(f"{name}_stderr,{kind}")
            yield Score(
                task,
                name if kind == "none" else f"{name} ({kind})",
                float(value),
                float(error) if isinstance(error, (int, float)) else None,
                int(samples),
                better.get(name),
            )


def stop_texts(options: Mapping[str, Any]) -> tuple[list[str], int, float]:
    """(stop texts, most tokens, temperature) of a task's generation options."""
    until = options.get("until") or []
    stops = [until] if isinstance(until, str) else [mark for mark in _texts(until) if mark]
    most = next((options[k] for k in ("max_gen_toks", "max_new_tokens", "max_tokens") if options.get(k)), None)
    warm = bool(options.get("do_sample")) and options.get("temperature")
    return stops, int(most or _DEFAULT_ANSWER), float(warm or 0.0)


def _texts(values: object) -> Iterable[str]:
    return (value for value in values if isinstance(value, str)) if isinstance(values, Iterable) else ()
