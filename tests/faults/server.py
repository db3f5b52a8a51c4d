"""A process that has imported everything and forks one child per request: the real command line in milliseconds.

The words of its own command line are modules to import first. Requests and answers are JSON lines on standard input
and output. A request: ``arguments`` of the command line, and any of ``kill_call`` k (SIGKILL ahead of the k-th
persistence call), ``kill_after_write`` text (SIGKILL ahead of the call that follows its writing), ``fail_call``
[k, errno] (only that one), ``fail_from`` [k, errno] (that one and all later ones), ``signal_call`` [[k, number], ...],
``kill_after`` seconds, ``file_size`` bytes (RLIMIT_FSIZE), ``environment``, ``constants`` [[module, name, value], ...]
to set. The answer: ``code`` (negative: killed by that signal), ``calls`` (names of persistence calls; absent when
killed), ``out``, ``err``.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import tokenizers  # noqa: F401  warm before the fork

from llm_quantize.cli import run
from tests.faults.injection import wrapped


def _before(request: dict[str, Any]) -> Any:
    count = [0]
    signals = dict(request.get("signal_call", []))
    text, written = request.get("kill_after_write", "").encode(), [False]

    def before(name: str, arguments: tuple[Any, ...]) -> None:
        count[0] += 1
        if written[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        if text and name == "write":
            written[0] = text in bytes(arguments[1])
        if count[0] == request.get("kill_call"):
            os.kill(os.getpid(), signal.SIGKILL)
        if count[0] in signals:
            os.kill(os.getpid(), signals[count[0]])
        nth, number = request.get("fail_call", (0, 0))
        since, lasting = request.get("fail_from", (1 << 60, 0))
        if count[0] == nth or count[0] >= since:
            code = number if count[0] == nth else lasting
            raise OSError(code, os.strerror(code))

    return before


def _child(request: dict[str, Any], out: int, err: int, calls: int) -> int:
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.environ.update(request.get("environment", {}))
    for module, name, value in request.get("constants", ()):
        setattr(importlib.import_module(module), name, value)
    if "file_size" in request:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"],) * 2)
    real_write = os.write
    with wrapped(_before(request)) as seen:
        code = run(request["arguments"])
    sys.stdout.flush()
    sys.stderr.flush()
    real_write(calls, json.dumps(seen).encode())
    return code


def _serve(request: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as calls:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = _child(request, out.fileno(), err.fileno(), calls.fileno())
            finally:
                if (problem := sys.exc_info()[1]) is not None:
                    sys.stderr.write(f"{type(problem).__name__}: {problem}\n")
                    sys.stderr.flush()
                os._exit(code)
        if "kill_after" in request:
            time.sleep(request["kill_after"])
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        answer: dict[str, Any] = {"code": os.waitstatus_to_exitcode(status)}
        for name, file in (("out", out), ("err", err), ("calls", calls)):
            file.seek(0)
            text = file.read().decode()
            answer[name] = text if name != "calls" else json.loads(text or "null")
        return answer


def main() -> None:
    for name in sys.argv[1:]:
        importlib.import_module(name)
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_serve(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
