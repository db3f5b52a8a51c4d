"""A model's own chat template, rendered without trusting it: in a process of its own that has few seconds and bytes.

The template is a Jinja program from a downloaded file. The process (``template_child.py``) runs it in Jinja's sandbox,
under limits that the system keeps; it is started once for a template, and renders any number of conversations.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from llm_quantize.engine.limited import LimitedProcess
from llm_quantize.errors import MalformedInputError, MissingExtraError, ResourceError, UnsupportedError, printable

CPU_SECONDS = 5.0  # for the process, Jinja and the template's own code
CPU_SECONDS_EACH = 0.1  # more with each conversation; real templates take less than a hundredth of this
MEMORY = 1 << 30  # bytes of address space
MAX_CHARACTERS = 16 << 20

_CHILD = "llm_quantize.models.template_child"


class ChatTemplate:
    """A template that is ready to render. ``bos`` and ``eos``: the tokens as text; ``file``: where it comes from;
    ``today``: the date that it may write (None: the clock's); ``seconds``: of CPU, to begin with (None: CPU_SECONDS).

    One object serves one thread. Close it, or use it as a context manager; the process ends with the object, too.

    Raises MissingExtraError (Jinja is not installed).
    """

    def __init__(
        self,
        template: str,
        *,
        bos: str,
        eos: str,
        file: Path,
        today: datetime.datetime | None = None,
        seconds: float | None = None,
    ) -> None:
        if find_spec("jinja2") is None:
            raise MissingExtraError("rendering this model's chat template", "llamacpp")
        self._file, self._seconds = file, CPU_SECONDS if seconds is None else seconds
        self._first = {
            "template": template,
            "bos": bos,
            "eos": eos,
            "today": (today or datetime.datetime.now().astimezone()).isoformat(),
            "characters": MAX_CHARACTERS,
        }
        self._process: LimitedProcess | None = None

    def __enter__(self) -> ChatTemplate:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process, if there is one; the next conversation would start another."""
        if self._process is not None:
            self._process.close()
        self._process = None

    def render(self, messages: Sequence[Mapping[str, str]], *, reply: bool = True) -> str:
        """The text of ``messages``, followed by the opening of the assistant's turn if ``reply``.

        Raises UnsupportedError (the template fails or breaks the sandbox), MalformedInputError (it takes too much time
        or memory), ResourceError (the system gives no process).
        """
        if self._process is None:
            self._process = LimitedProcess(_CHILD, self._first, memory=MEMORY)
        process = self._process
        self._seconds += CPU_SECONDS_EACH
        process.ask({"messages": [dict(message) for message in messages], "reply": reply}, cpu=self._seconds)
        said = process.answer(12 * MAX_CHARACTERS + 1000)
        if said is None:
            raise self._died(process)
        if "refused" in said:
            raise UnsupportedError(
                "the model's chat template cannot be rendered",
                file=self._file,
                found=said["refused"],
                remedy="run without --chat",
            )
        if "too_much" in said:
            raise self._too_much(said["too_much"])
        return str(said["text"])

    def _died(self, process: LimitedProcess) -> MalformedInputError | ResourceError:
        """The error for a process that ended without an answer, or wrote too much."""
        limited, how = process.why()
        self._process = None
        if limited:
            return self._too_much(how)
        return ResourceError(
            "the process that renders the chat template ended",
            file=self._file,
            found=how,
            remedy="check that this Python can start (memory limits), or give text without conversations",
        )

    def _too_much(self, found: str) -> MalformedInputError:
        self.close()
        return MalformedInputError(
            "the model's chat template takes too much time or memory",
            file=self._file,
            expected=f"at most {int(self._seconds)} seconds of CPU so far, {MEMORY >> 20:,} MiB and "
            f"{MAX_CHARACTERS:,} characters",
            found=printable(found, 200),
            remedy="do without it: remove it from the model's files, or give text without conversations",
        )


def render(
    template: str,
    messages: Sequence[Mapping[str, str]],
    *,
    bos: str,
    eos: str,
    file: Path,
    reply: bool = True,
    seconds: float | None = None,
) -> str:
    """One conversation in ``template``. Raises as ``ChatTemplate`` and its ``render``."""
    with ChatTemplate(template, bos=bos, eos=eos, file=file, seconds=seconds) as chat:
        return chat.render(messages, reply=reply)
