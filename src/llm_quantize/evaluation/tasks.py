"""Benchmarks of tasks (questions with right answers) on an artifact, through lm-evaluation-harness.

The harness (``lm_eval``, the extra ``tasks``) brings the tasks, their prompts and their metrics; the artifact runs in
the real llama.cpp. Three requests are all a model must answer: how likely is this continuation, how likely is this
text, and what comes next until a stop text (answers.py).

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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llm_quantize import events
from llm_quantize.errors import MissingExtraError, NetworkError, UsageError, printable
from llm_quantize.evaluation.answers import Answers
from llm_quantize.events import EventSink, ignore
from llm_quantize.runtimes import open_model

_BOOTSTRAP = 1000


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
        on_event(events.Caution(text))
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
