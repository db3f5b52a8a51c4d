"""A model's own chat template, rendered without trusting it: in a process of its own that has few seconds and bytes.

The template is a Jinja program from a downloaded file. The process (``template_child.py``) runs it in Jinja's sandbox,
under limits that the system keeps; it is started once for a template, and renders any number of conversations.
"""

from __future__ import annotations

import datetime
import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llm_quantize.errors import MalformedInputError, MissingExtraError, ResourceError, UnsupportedError, printable

CPU_SECONDS = 5.0  # for the process, Jinja and the template's own code
CPU_SECONDS_EACH = 0.1  # more with each conversation; real templates take less than a hundredth of this
MEMORY = 1 << 30  # bytes of address space
MAX_CHARACTERS = 16 << 20

_SCRIPT = Path(__file__).with_name("template_child.py")
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "TZ")


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
            "path": [str(Path(place).absolute()) for place in sys.path],
            "template": template,
            "bos": bos,
            "eos": eos,
            "today": (today or datetime.datetime.now().astimezone()).isoformat(),
            "memory": MEMORY,
            "characters": MAX_CHARACTERS,
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._end: Any = None

    def __enter__(self) -> ChatTemplate:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process, if there is one; the next conversation would start another."""
        if self._end is not None:
            self._end()
        self._process = self._end = None

    def render(self, messages: Sequence[Mapping[str, str]], *, reply: bool = True) -> str:
        """The text of ``messages``, followed by the opening of the assistant's turn if ``reply``.

        Raises UnsupportedError (the template fails or breaks the sandbox), MalformedInputError (it takes too much time
        or memory), ResourceError (the system gives no process).
        """
        process = self._process or self._start()
        self._seconds += CPU_SECONDS_EACH
        asked = {"messages": [dict(message) for message in messages], "reply": reply, "cpu": int(self._seconds)}
        try:
            _send(process, asked)
            line = process.stdout.readline(12 * MAX_CHARACTERS + 1000) if process.stdout else b""
        except BrokenPipeError:  # it ended, of which its status tells
            line = b""
        if not line.endswith(b"\n"):
            raise self._died(process)
        said = json.loads(line)
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

    def _start(self) -> subprocess.Popen[bytes]:
        own = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", str(_SCRIPT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=own,
                start_new_session=True,  # a signal from the terminal is ours to answer
            )
        except OSError as error:
            raise ResourceError(
                "the system gives no process to render the chat template in",
                found=error.strerror,
                remedy="raise the limits of memory (ulimit -v) and processes (ulimit -u)",
            ) from error
        self._process, self._end = process, weakref.finalize(self, _finish, process)
        _send(process, self._first)
        return process

    def _died(self, process: subprocess.Popen[bytes]) -> MalformedInputError | ResourceError:
        """The error for a process that ended without an answer, or wrote more than one."""
        self.close()
        status = process.returncode
        if status == -signal.SIGXCPU:
            return self._too_much(f"more than {int(self._seconds)} seconds of CPU")
        if status < 0:
            return self._too_much(f"its process ended by signal {-status} ({signal.strsignal(-status)})")
        return ResourceError(
            "the process that renders the chat template ended",
            file=self._file,
            found=f"exit status {status}",
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


def _send(process: subprocess.Popen[bytes], message: Mapping[str, Any]) -> None:
    """Raises BrokenPipeError where the process is gone."""
    if process.stdin is None:
        return
    view = memoryview(json.dumps(message).encode() + b"\n")
    while view:
        view = view[os.write(process.stdin.fileno(), view) :]


def _finish(process: subprocess.Popen[bytes]) -> None:
    """End the process and close its pipes."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
