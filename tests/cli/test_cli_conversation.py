"""``run --chat`` without a prompt: lines of standard input, and a terminal with its keys."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_quantize.cli import run
from llm_quantize.pipeline import quantize
from tests.runtimes.test_conversation import talking_model


@pytest.fixture(scope="module")
def talking(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model with a chat template, as a GGUF file."""
    folder = tmp_path_factory.mktemp("talking")
    return quantize(str(talking_model(demo_model, folder)), levels=["Q8_0"], output_dir=folder)[0].path


def call(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, lines: bytes, *words: object
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    code = run(["run", *map(str, words), "--chat", "--threads", "1"])
    out, err = capsys.readouterr()
    return code, out, err


def test_each_line_is_a_message(
    talking: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = call(capsys, monkeypatch, "The old man\n\nand then\r\n日本".encode(), talking, "-n", "7")
    assert code == 0
    assert len(out.splitlines()) == 3
    assert len(re.findall(r"^\d tokens, [\d.]+ tokens/s with 1 thread; the prompt's \d+ in [\d.]+ s$", err, re.M)) == 3
    code, told, err = call(capsys, monkeypatch, b"The old man\nand then\n", talking, "-n", "7", "--json")
    turns: list[dict[str, Any]] = [json.loads(line) for line in told.splitlines()]
    assert code == 0
    assert [turn["prompt"] for turn in turns] == ["The old man", "and then"]
    assert [turn["text"] for turn in turns] == out.splitlines()[:2]
    assert turns[0]["reused_tokens"] == 0 < turns[1]["reused_tokens"]
    assert {turn["end"] for turn in turns} <= {"limit", "end"}
    assert call(capsys, monkeypatch, b"The old man\nand then\n", "-s", talking, "-n", "7")[1:] == (
        "\n".join(out.splitlines()[:2]) + "\n",
        "",
    )
    # An answer to one message is that of a single prompt.
    assert run(["run", str(talking), "The old man", "--chat", "-n", "7", "--threads", "1"]) == 0
    assert capsys.readouterr().out == out.splitlines()[0] + "\n"


def test_what_begins_with_a_slash(
    talking: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = b"Hi\n/reset\nHi\n/system Be kind.\nHi\n/nonsense\n/help\n//Hi\n/system\nHi\n/exit\nHi\n"
    code, out, err = call(capsys, monkeypatch, lines, talking, "-n", "5", "--json")
    turns = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [turn["prompt"] for turn in turns] == ["Hi", "Hi", "Hi", "/Hi", "Hi"]
    sizes = [turn["prompt_tokens"] + turn["reused_tokens"] for turn in turns]
    assert sizes[0] == sizes[1] == sizes[4] < sizes[2] < sizes[3]
    assert turns[0]["text"] == turns[1]["text"] == turns[4]["text"]
    assert "/nonsense is not known" in err


def test_what_is_refused(
    talking: Path, demo_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(["run", str(talking)]) == 2
    assert "there is no prompt" in capsys.readouterr().err
    code, _, err = call(capsys, monkeypatch, b"Hi\n\xff\n", talking, "-n", "3")
    assert (code, "line 2 of standard input is not UTF-8" in err) == (2, True)
    code, _, err = call(capsys, monkeypatch, b"a b " * 400, talking, "-c", "64")
    assert (code, "does not fit the context" in err) == (2, True)
    code, out, err = call(capsys, monkeypatch, b"Hi\n", demo_model)
    assert (code, out) == (4, "")
    assert "no chat template" in err
    assert "run without --chat" in err


class Terminal:
    """The command with a terminal of its own."""

    def __init__(self, *words: str) -> None:
        # This process has threads, so its child may do nothing but become the command; and Ctrl-C must reach that, also
        # where this process was started in the background, which ignores it.
        command = [sys.executable, "-m", "llm_quantize", "run", *words]
        environment = {**os.environ, "TERM": "dumb", "LC_ALL": "C.UTF-8"}
        self.child, self.master = pty.fork()
        if self.child == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.execve(sys.executable, command, environment)
        self.text = ""

    def until(self, words: str, seconds: float = 90) -> str:
        """What is shown up to and with ``words``; it is taken out of ``text``."""
        end = time.monotonic() + seconds
        while words not in self.text:
            assert time.monotonic() < end, f"no {words!r} in {self.text!r}"
            if select.select([self.master], [], [], 0.2)[0]:
                try:
                    data = os.read(self.master, 1 << 16)
                except OSError:  # the other side is closed
                    data = b""
                assert data, f"the end, without {words!r}: {self.text!r}"
                self.text += data.decode("utf-8", "replace")
        before, _, self.text = self.text.partition(words)
        return before + words

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def exit_code(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])


@pytest.fixture
def terminal(talking: Path) -> Iterator[Terminal]:
    opened = Terminal(str(talking), "--chat", "--threads", "1", "-c", "1500")
    yield opened
    os.close(opened.master)


def prompt_of(terminal: Terminal, message: str) -> int:
    """Tokens that were read for a message."""
    terminal.type(message)
    terminal.until(message.strip())
    read = re.findall(r"the prompt's ([\d,]+) in", terminal.until(" s\r\n"))[-1]
    terminal.until("> ")
    return int(read.replace(",", ""))


def test_keys(terminal: Terminal) -> None:
    """Ctrl-C in the middle of an answer, which is kept; at the prompt, where it gives a line up; Ctrl-D ends."""
    terminal.until("Ctrl-D ends")
    terminal.until("> ")
    terminal.type("Tell a story\n")
    terminal.until("Tell a story\r\n")
    terminal.until(" ")  # of the answer
    terminal.type("\x03")
    answer = terminal.until("tokens/s")
    count = int(re.findall(r"([\d,]+) tokens, ", answer)[-1].replace(",", ""))
    assert 0 < count < 1400
    assert len(answer) > 20
    terminal.until("> ")
    terminal.type("not sent")
    terminal.until("not sent")
    time.sleep(0.5)  # a signal just before CPython waits for a key is seen with the next key only
    terminal.type("\x03")
    terminal.until("Ctrl-D or /exit ends")
    terminal.until("> ")
    terminal.type("/help\n")
    terminal.until("/reset begins again")
    terminal.until("> ")
    # What was said until then is asked with, until it is forgotten.
    read = [prompt_of(terminal, "and then?\n")]
    terminal.type("/reset\n")
    terminal.until("a new conversation")
    terminal.until("> ")
    read.append(prompt_of(terminal, "and then?\n"))
    assert 0 < read[1] < read[0]
    terminal.type("\x04")
    assert terminal.exit_code() == 0


def test_a_second_interrupt_ends_it(talking: Path) -> None:
    """As does SIGTERM at once, and a reader that goes away."""
    words = [sys.executable, "-m", "llm_quantize", "run", str(talking), "--chat", "--threads", "1", "-c", "4000"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(b"Tell a story\n")
        child.stdin.flush()
        assert child.stdout.read(1)
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == 75
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(b"Tell a story\nand another\n")
        child.stdin.flush()
        assert child.stdout.read(1)
        child.stdout.close()
        assert child.wait(60) == 0
