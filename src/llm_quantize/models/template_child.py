"""The process that renders a chat template: a Jinja program from a downloaded file, bounded by the system's limits.

Started by path (``chat_template.py``); nothing but the standard library and Jinja is imported. Requests and replies are
lines of JSON. First {"path": sys.path, "template", "bos", "eos", "today", "memory": bytes, "characters"}, then for each
conversation {"messages", "reply": whether the assistant's turn is opened, "cpu": seconds that this process may have
used by its end}. A reply is {"text"}, {"refused": why} or {"too_much": what}. Seconds are kept by the kernel, which
ends the process: no sandbox within an interpreter can stop a filter, a comparison or a sum that never ends.
"""

from __future__ import annotations

import datetime
import json
import resource
import signal
import sys
from typing import IO, Any

_FAILURES = (
    *(TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError, SyntaxError, AssertionError),
)


def main(requests: IO[bytes], replies: IO[bytes]) -> None:
    """Serve to the end of ``requests``."""
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    first = json.loads(requests.readline())
    sys.path[:] = first["path"]
    _limit(resource.RLIMIT_CORE, 0)
    if sys.platform == "linux":  # elsewhere the address space is no measure of memory
        _limit(resource.RLIMIT_AS, first["memory"])
    environment = template = None
    for line in requests:
        asked = json.loads(line)
        _limit(resource.RLIMIT_CPU, asked["cpu"])
        try:
            environment = environment or _environment(first)
            template = template or environment.from_string(first["template"])
            reply = _rendered(template, first, asked)
        except MemoryError:
            reply = {"too_much": "memory at its end"}
        except _refusals() as error:
            reply = {"refused": f"{type(error).__name__}: {error}"[:1000]}
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()


def _limit(kind: int, value: int) -> None:
    """Set the soft limit, which may be raised again, as far as the hard one allows."""
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _refusals() -> tuple[type[Exception], ...]:
    from jinja2 import TemplateError

    return (TemplateError, *_FAILURES)


def _rendered(template: Any, first: dict[str, Any], asked: dict[str, Any]) -> dict[str, str]:
    text = template.render(
        messages=asked["messages"],
        tools=None,
        documents=None,
        bos_token=first["bos"],
        eos_token=first["eos"],
        add_generation_prompt=asked["reply"],
    )
    if len(text) > first["characters"]:
        return {"too_much": f"{len(text):,} characters"}
    return {"text": text}


def _environment(first: dict[str, Any]) -> Any:
    """Jinja's immutable sandbox, which forbids attributes and mutation beyond plain data, with the helpers that Hugging
    Face gives to templates."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(reason: str) -> None:
        raise TemplateError(str(reason))

    def to_json(
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def now(layout: str) -> str:
        return datetime.datetime.fromisoformat(first["today"]).strftime(layout)

    extensions = ["jinja2.ext.loopcontrols", _generation_block()]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = to_json
    environment.globals.update(raise_exception=refuse, strftime_now=now)
    return environment


def _generation_block() -> type[Any]:
    """A Jinja extension for ``{% generation %}``, with which templates mark the assistant's words for training: its
    content stays as it is."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    return Generation


if __name__ == "__main__":
    main(sys.stdin.buffer, sys.stdout.buffer)
