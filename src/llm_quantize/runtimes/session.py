"""A model that stays loaded in a real runtime of another process, asked again and again.

The process is one of isolated.py. Questions and answers are lines of JSON, in two pipes; the telling of them in the
script's side is ``serve`` of workers/telling.py:

    to it     {"text", "special": whether special tokens are put before it, "most": tokens of answer; 0: count only}
    from it   {"ready": {"trained"}} once; then for each question {"read": tokens of the text}, {"said": text}, ...,
              {"done": figures}

A file ``stop-N`` in the folder ends the answer to the question N (from 0): no signal could be late for one question and
meant for the next.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llm_quantize import events
from llm_quantize.events import EventSink
from llm_quantize.models.chat_template import ChatTemplate
from llm_quantize.runtimes.base import TALK_CONTEXT, Answered, Prompt, Request, warn_beyond
from llm_quantize.runtimes.chat import in_template, template_of
from llm_quantize.runtimes.isolated import Worker, basics, failure, started
from llm_quantize.runtimes.threads import idle_threads

POLL_SECONDS = 0.1


class _Asked:
    """The process, and the lines to and from it."""

    def __init__(
        self, runtime: Worker, directory: Path, folder: Path, child: subprocess.Popen[bytes], answers: int, threads: int
    ) -> None:
        self._runtime, self._directory, self._folder, self._child = runtime, directory, folder, child
        self._answers, self._held, self._count = answers, b"", 0
        self._sign: Path | None = None  # of an answer that nobody has heard to its end
        self.threads = threads
        self.trained = int(self._line(_never)["ready"]["trained"] or 0)

    def count(self, text: str, *, special: bool) -> int:
        """How many tokens ``text`` has. Raises as ``written``."""
        self._ask({"text": text, "special": special, "most": 0})
        return int(self._line(_never)["read"])

    def written(
        self, text: str, most: int, stop: Callable[[], bool], *, special: bool, read: Callable[[int], object]
    ) -> Generator[str, None, Answered]:
        """Pieces of text after ``text``; ``read`` hears how many tokens that has. Closed early, the answer is stopped.

        Raises what the runtime's failure is (``isolated.failure``)."""
        self._ask({"text": text, "special": special, "most": most})
        sign = self._sign = self._folder / f"stop-{self._count - 1}"
        try:
            read(int(self._line(stop, sign)["read"]))
            while "said" in (line := self._line(stop, sign)):
                yield line["said"]
            self._sign = None
        finally:
            if self._sign is not None:
                sign.touch()
        done = line["done"]
        told = events.Generated(
            done["tokens"], done["seconds"], self.threads, done["prompt"] - done["reused"], done["prompt_seconds"]
        )
        end = "stopped" if done["stopped"] else "limit" if done["tokens"] >= most else "end"
        return Answered(told, end, done["reused"])

    def _ask(self, question: Mapping[str, Any]) -> None:
        while self._sign is not None:
            if "done" in self._line(_never):
                self._sign = None
        self._count += 1
        if self._child.stdin is None:
            return
        view = memoryview(json.dumps(question).encode() + b"\n")
        try:
            while view:
                view = view[os.write(self._child.stdin.fileno(), view) :]
        except BrokenPipeError:  # it has ended, which the next line tells
            return

    def _line(self, stop: Callable[[], bool], sign: Path | None = None) -> dict[str, Any]:
        """The next line; ``sign`` is set as soon as ``stop()``."""
        while b"\n" not in self._held:
            if sign is not None and stop():
                sign.touch()
                sign = None
            if select.select([self._answers], [], [], POLL_SECONDS)[0]:
                data = os.read(self._answers, 1 << 16)
                if not data:
                    self._child.wait()
                    raise failure(self._runtime, self._folder, self._directory, self._child.returncode)
                self._held += data
        line, _, self._held = self._held.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found


class WorkerSession:
    """A conversation with the model of ``asked``, as ``Session`` has it."""

    def __init__(self, asked: _Asked, template: ChatTemplate, context: int) -> None:
        self.context = context
        self._asked, self._template = asked, template

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> Prompt:
        """As ``Session.prompt``."""
        text = self._template.render(messages)
        return Prompt(text, self._asked.count(text, special=False))

    def answer(self, prompt: Prompt, most: int, stop: Callable[[], bool]) -> Generator[str, None, Answered]:
        """As ``Session.answer``. Raises UnsupportedError with the runtime's own words where it fails."""
        return self._asked.written(prompt.text, most, stop, special=False, read=int)


@contextmanager
def talking(
    runtime: Worker,
    directory: Path,
    request: Request,
    *,
    settings: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
    trained: int = 0,
) -> Iterator[WorkerSession]:
    """A conversation with the model in ``directory``, in ``runtime``. ``trained``: the context that the model is known
    to be trained for; 0: what its runtime says.

    Raises UnsupportedError (no chat template), and as ``isolated.run``.
    """
    limit = request.context or min(trained or TALK_CONTEXT, TALK_CONTEXT)
    with (
        template_of(directory) as template,
        _opened(runtime, directory, request, settings or {}, {"context": limit, **(options or {})}) as asked,
    ):
        context = limit if request.context or not asked.trained else min(limit, asked.trained)
        yield WorkerSession(asked, template, context)


def written_once(
    runtime: Worker,
    directory: Path,
    request: Request,
    on_event: EventSink,
    *,
    settings: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Iterator[str]:
    """Pieces of the text that continues the first prompt of ``request``, as they are written. ``on_event`` hears a
    warning where prompt and answer may pass what the model was trained for, and the figures at the end. Raises as
    ``isolated.run``."""
    (text,) = request.prompts
    if request.chat:
        (text,) = in_template(directory, [request.messages(text)])
    with _opened(runtime, directory, request, settings or {}, options or {}) as asked:

        def read(tokens: int) -> None:
            warn_beyond(tokens, request.max_tokens, asked.trained, on_event)

        answered = yield from asked.written(text, request.max_tokens, _never, special=not request.chat, read=read)
    on_event(answered.told)


@contextmanager
def _opened(
    runtime: Worker, directory: Path, request: Request, settings: Mapping[str, str], options: Mapping[str, Any]
) -> Iterator[_Asked]:
    """The process with the model loaded."""
    threads = request.threads or idle_threads()
    with tempfile.TemporaryDirectory(prefix="llm-quantize-") as name:
        answers, theirs = os.pipe()
        try:
            asked = {**basics(directory, request, threads), "answers": theirs, **options}
            starting = started(runtime, Path(name), asked, settings, stdin=subprocess.PIPE, pass_fds=(theirs,))
            with starting as child:
                os.close(theirs)
                theirs = -1
                try:
                    yield _Asked(runtime, directory, Path(name), child, answers, threads)
                finally:
                    if child.stdin is not None:
                        child.stdin.close()
        finally:
            os.close(answers)
            if theirs >= 0:
                os.close(theirs)


def _never() -> bool:
    return False
