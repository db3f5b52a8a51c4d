"""A conversation on the terminal, or with the lines of standard input; and how generated text is shown."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import FrameType
from typing import Any, NoReturn
from unicodedata import category

import click

from llm_quantize import events
from llm_quantize.cli.common import Mode, emit_json, line, warn
from llm_quantize.cli.streams import reader_gone
from llm_quantize.errors import StoppedError, UsageError
from llm_quantize.reports.wording import said
from llm_quantize.runtimes.base import Answered
from llm_quantize.runtimes.conversation import Conversation

LONGEST_MESSAGE = 16 << 20
"""Bytes of a line of standard input."""


class Turns:
    """The turns of ``conversation``, shown as ``shown`` says: text, or one JSON object for each answer."""

    def __init__(self, shown: Mode, conversation: Conversation) -> None:
        self._shown, self._conversation = shown, conversation
        self._terminal = sys.stdin.isatty()
        self._commands: dict[str, Callable[[str], bool]] = {
            "/help": self._help,
            "/system": self._system,
            "/reset": self._reset,
            "/exit": lambda _rest: False,
        }

    def run(self) -> None:
        """Every turn, to the end of the input.

        Raises StoppedError on SIGTERM, UsageError for a line that is not UTF-8 or too long, and what an answer raises.
        """
        if self._terminal:
            import_module("readline")  # lines that can be edited, and brought back
            self._note(f"{self._conversation.context} tokens of context; Ctrl-C stops an answer, Ctrl-D ends, /help")
        with _ended_by_sigterm():
            for text in self._typed() if self._terminal else _lines():
                if not text.strip():
                    continue
                if not (self._command(text) if text.startswith("/") else self._turn(text)):
                    return

    def _typed(self) -> Iterator[str]:
        """What is typed at a terminal; Ctrl-C gives a line up."""
        while True:
            try:
                yield input("> ")
            except KeyboardInterrupt:
                click.echo()
                self._note("Ctrl-D or /exit ends")
            except EOFError:
                click.echo()
                return

    def _command(self, text: str) -> bool:
        """Do what a line that begins with / says; whether the conversation goes on."""
        word, _, rest = text.strip().partition(" ")
        if word.startswith("//"):
            return self._turn(text.strip()[1:])
        if word not in self._commands:
            warn(self._shown, f"{word} is not known; /help lists them; a message that begins with / is typed with //")
            return True
        return self._commands[word](rest.strip())

    def _help(self, _rest: str) -> bool:
        self._note("/system TEXT sets the system message (without TEXT: removes it) and begins again")
        self._note("/reset begins again; /exit or Ctrl-D ends; Ctrl-C stops an answer, and keeps what was said")
        return True

    def _system(self, rest: str) -> bool:
        self._conversation.system = rest or None
        return self._reset(rest)

    def _reset(self, _rest: str) -> bool:
        self._conversation.reset()
        self._note("a new conversation")
        return True

    def _note(self, text: str) -> None:
        if not self._shown.quiet and not self._shown.json:
            click.echo(line(said(text)), err=True)

    def _turn(self, text: str) -> bool:
        """One message and its answer; whether somebody still listens."""
        pieces: list[str] = []
        answered: Answered | None = None
        try:
            with _stopped_by_sigint() as stop:
                writing = self._conversation.say(text, lambda: stop.is_set() or reader_gone())
                while True:
                    try:
                        piece = next(writing)
                    except StopIteration as ended:
                        answered = ended.value
                        break
                    pieces.append(piece)
                    if not self._shown.json:
                        show_piece(piece)
        except UsageError as error:
            if not self._terminal:
                raise
            warn(self._shown, error.what)
            return True
        if answered is not None:
            self._tell(text, "".join(pieces), answered)
        return not reader_gone()

    def _tell(self, text: str, answer: str, answered: Answered) -> None:
        if self._shown.json:
            facts = {**figures(answered.told), "reused_tokens": answered.reused, "end": answered.end}
            emit_json({"prompt": text, "text": answer, **facts})
            sys.stdout.flush()
            return
        click.echo()
        if answered.end == "stopped" and not answer:
            self._note("stopped before the first word; the message is taken back")
        elif answered.end == "limit":
            self._note("the answer reached its limit of tokens")
        tell_rate(self._shown, answered.told)


@contextmanager
def _stopped_by_sigint() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets while an answer is written; a second one raises KeyboardInterrupt."""
    stop = threading.Event()

    def hear(_number: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    with _handled(signal.SIGINT, hear):
        yield stop


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the conversation, where Ctrl-C only gives a line up."""

    def hear(_number: int, _frame: FrameType | None) -> NoReturn:
        raise StoppedError("the conversation was ended by a signal", remedy="begin another one")

    with _handled(signal.SIGTERM, hear):
        yield


@contextmanager
def _handled(number: int, handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """``handler`` for a signal, where this is the thread that may set one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def _lines() -> Iterator[str]:
    """The lines of standard input. Raises UsageError for one that is not UTF-8, or longer than any message."""
    number = 0
    while data := sys.stdin.buffer.readline(LONGEST_MESSAGE + 1):
        number += 1
        if len(data) > LONGEST_MESSAGE:
            raise UsageError(
                f"line {number} of standard input is too long",
                expected=f"at most {LONGEST_MESSAGE} bytes",
                found="more",
            )
        try:
            yield data.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UsageError(
                f"line {number} of standard input is not UTF-8", offset=error.start, remedy="give it as UTF-8"
            ) from error


def show_piece(piece: str) -> None:
    """A piece of generated text on standard output, at once; on a terminal without control characters."""
    click.echo(_safe(piece) if sys.stdout.isatty() else piece, nl=False)


def figures(event: events.Generated) -> dict[str, Any]:
    """How much was written and how fast, for JSON."""
    found = {**event.to_dict(), "tokens_per_second": round(event.rate, 3)}
    return {key: value for key, value in found.items() if key != "event"}


def tell_rate(shown: Mode, event: events.Generated) -> None:
    """How fast the text came, on standard error."""
    if shown.quiet:
        return
    word = "thread" if event.threads == 1 else "threads"
    summary = said(f"{event.tokens:,} tokens, {event.rate:.1f} tokens/s with {event.threads} {word}")
    if event.prompt_tokens is not None and event.prompt_seconds is not None:
        summary += said(f"; the prompt's {event.prompt_tokens:,} in {event.prompt_seconds:.1f} s")
    click.echo(summary, err=True)


def _safe(text: str) -> str:
    """Generated text for a terminal: its lines and tabs as they are, other control characters escaped."""
    return "".join(line(c) if category(c) == "Cc" and c not in "\n\t" else c for c in text)
