"""The rendering of a chat template, in the limited process of ``chat_template.py``: Jinja and the standard library.

Asked for {"messages", "reply": whether the assistant's turn is opened}, it answers {"text"}, {"refused": why} or
{"too_much": what}.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

_FAILURES = (
    *(TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError, SyntaxError, AssertionError),
)


def answers(first: Mapping[str, Any], asked: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """``first``: {"template", "bos", "eos", "today", "characters": the most of a text}."""
    from jinja2 import TemplateError

    try:
        text = _template(first["template"], first["today"]).render(
            messages=asked["messages"],
            tools=None,
            documents=None,
            bos_token=first["bos"],
            eos_token=first["eos"],
            add_generation_prompt=asked["reply"],
        )
    except (TemplateError, *_FAILURES) as error:
        yield {"refused": f"{type(error).__name__}: {error}"[:1000]}
        return
    yield {"text": text} if len(text) <= first["characters"] else {"too_much": f"{len(text):,} characters"}


@cache
def _template(source: str, today: str) -> Any:
    """The template in Jinja's immutable sandbox, which forbids attributes and mutation beyond plain data, with the
    helpers that Hugging Face gives to templates."""
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
        return datetime.datetime.fromisoformat(today).strftime(layout)

    extensions = ["jinja2.ext.loopcontrols", _generation_block()]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = to_json
    environment.globals.update(raise_exception=refuse, strftime_now=now)
    return environment.from_string(source)


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
