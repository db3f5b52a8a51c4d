"""A model's own chat template, rendered without trusting it.

The template is a Jinja program from a downloaded file; it runs in Jinja's immutable sandbox, which forbids
attributes and mutation beyond plain data (Hugging Face renders with the same environment and the same helpers).
The sandbox bounds no time; here loops and calls are counted, and texts have a longest length.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from llm_quantize.errors import MalformedInputError, MissingExtraError, UnsupportedError

_FAILURES = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, SyntaxError)

MAX_STEPS = 1_000_000  # rounds of loops and calls in one rendering; real templates take a few for each message
MAX_CHARACTERS = 64 << 20
_WIDTH = re.compile(r"[%:][^a-zA-Z]*\d{9}")


class _TooMuchError(Exception):
    """A template that would take all time or memory."""


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


@cache
def _environment() -> type[Any]:
    """The sandbox with a budget for each rendering, which begins anew with ``steps``."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def short(value: Any) -> Any:
        if isinstance(value, str) and len(value) > MAX_CHARACTERS:
            raise _TooMuchError("a text is too long")
        return value

    class Bounded(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**", "%"})
        steps = MAX_STEPS

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.filters.update(counted=self.counted, short=short)

        def step(self, count: int = 1) -> None:
            self.steps -= count
            if self.steps < 0:
                raise _TooMuchError(f"more than {MAX_STEPS:,} steps")

        def counted(self, values: Iterable[Any]) -> Iterator[Any]:
            for value in values:
                self.step()
                yield value

        def call(self, *arguments: Any, **named: Any) -> Any:
            self.step(10)  # a macro that calls itself takes ten times as long as a round of a loop
            wide = isinstance(getattr(arguments[1], "__self__", None), str) and _WIDTH.search(arguments[1].__self__)
            if wide or any(isinstance(value, int) and abs(value) > MAX_CHARACTERS for value in arguments[2:]):
                raise _TooMuchError("a text is too long")
            return short(super().call(*arguments, **named))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            sizes = [len(value) if isinstance(value, str | list | tuple) else 0 for value in (left, right)]
            numbers = [abs(value) if isinstance(value, int) else 0 for value in (left, right)]
            if operator == "*" and max(sizes) * max(numbers) > MAX_CHARACTERS:
                raise _TooMuchError("a text or list is too long")
            if operator == "%" and isinstance(left, str) and _WIDTH.search(left):
                raise _TooMuchError("a text is too long")
            if operator == "**" and numbers[1] * numbers[0].bit_length() > 1 << 16:
                raise _TooMuchError("a number is too large")
            return short(super().call_binop(context, operator, left, right))

    return Bounded


def _bounded(environment: Any, template: str) -> Any:
    """The syntax tree of ``template``, in which every loop counts its rounds and every joined text is measured."""
    from jinja2 import nodes

    def through(node: Any, name: str) -> Any:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    tree = environment.parse(template)
    for loop in list(tree.find_all(nodes.For)):
        loop.iter = through(loop.iter, "counted")
    for joined in list(tree.find_all(nodes.Concat)):
        joined.nodes = [through(node, "short") for node in joined.nodes]
    return tree.set_environment(environment)


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

    Raises: MissingExtraError (Jinja is not installed), UnsupportedError (the template fails or breaks the sandbox),
    MalformedInputError (it goes on without end).
    """
    try:
        from jinja2 import TemplateError

        sandbox = _environment()
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

    environment = sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", generation_block()]
    )
    environment.filters["tojson"] = to_json
    environment.globals.update(raise_exception=refuse, strftime_now=now)
    try:
        text: str = environment.from_string(_bounded(environment, template)).render(
            messages=[dict(m) for m in messages],
            tools=None,
            documents=None,
            bos_token=bos,
            eos_token=eos,
            add_generation_prompt=reply,
        )
        if len(text) > MAX_CHARACTERS:
            raise _TooMuchError("the text is too long")
        return text
    except (_TooMuchError, MemoryError) as problem:
        raise MalformedInputError(
            "the model's chat template takes too much time or memory",
            file=file,
            expected=f"at most {MAX_STEPS:,} steps and {MAX_CHARACTERS:,} characters",
            found=str(problem) or "memory at its end",
            remedy="do without it: remove it from the model's files, or give text without conversations",
        ) from problem
    except (TemplateError, *_FAILURES) as problem:
        raise UnsupportedError(
            "the model's chat template cannot be rendered",
            file=file,
            found=f"{type(problem).__name__}: {problem}",
            remedy="run without --chat",
        ) from problem
