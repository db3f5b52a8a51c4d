"""A model's own chat template, rendered without trusting it.

The template is a Jinja program from a downloaded file; it runs in Jinja's immutable sandbox, which forbids
attributes and mutation beyond plain data (Hugging Face renders with the same environment and the same helpers).
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ...errors import MissingExtraError, UnsupportedError

_FAILURES = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


def generation_block() -> type[Any]:
    """A Jinja extension for ``{% generation %}``, with which templates mark the assistant's words for training: its
    content stays as it is. Raises ImportError without Jinja."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    return Generation


def render(
    template: str,
    messages: Sequence[Mapping[str, str]],
    *,
    bos: str,
    eos: str,
    file: Path,
    reply: bool = True,
    today: datetime.datetime | None = None,
) -> str:
    """The text of ``messages``, followed by the opening of the assistant's turn if ``reply``. ``today``: the date that
    templates may write into the text (None: the clock's).

    Raises: MissingExtraError (Jinja is not installed), UnsupportedError (the template fails or breaks the sandbox).
    """
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise MissingExtraError("rendering this model's chat template", "llamacpp") from None

    def refuse(reason: str) -> NoReturn:
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
        return (today or datetime.datetime.now().astimezone()).strftime(layout)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", generation_block()]
    )
    environment.filters["tojson"] = to_json
    environment.globals.update(raise_exception=refuse, strftime_now=now)
    try:
        return environment.from_string(template).render(
            messages=[dict(m) for m in messages],
            tools=None,
            documents=None,
            bos_token=bos,
            eos_token=eos,
            add_generation_prompt=reply,
        )
    except (TemplateError, *_FAILURES) as problem:
        raise UnsupportedError(
            "the model's chat template cannot be rendered",
            file=file,
            found=f"{type(problem).__name__}: {problem}",
            remedy="run without --chat",
        ) from problem
