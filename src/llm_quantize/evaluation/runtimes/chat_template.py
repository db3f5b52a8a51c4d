"""A model's own chat template, rendered without trusting it.

The template is a Jinja program from a downloaded file; it runs in Jinja's immutable sandbox, which forbids
attributes and mutation beyond plain data (Hugging Face renders with the same environment and the same helpers).
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from ...errors import MissingExtraError, UnsupportedError


def render(template: str, messages: Sequence[Mapping[str, str]], *, bos: str, eos: str, file: Path) -> str:
    """The text of ``messages`` followed by the opening of the assistant's turn.

    Raises: MissingExtraError (Jinja is not installed), UnsupportedError (the template fails or breaks the sandbox).
    """
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise MissingExtraError("rendering this model's chat template", "torch") from None

    def refuse(reason: str) -> NoReturn:
        raise TemplateError(str(reason))

    def to_json(value: object, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    def now(layout: str) -> str:
        return datetime.datetime.now(tz=datetime.UTC).strftime(layout)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = to_json
    environment.globals.update(raise_exception=refuse, strftime_now=now)
    try:
        return environment.from_string(template).render(
            messages=[dict(m) for m in messages], bos_token=bos, eos_token=eos, add_generation_prompt=True
        )
    except (TemplateError, TypeError, ValueError, KeyError, ArithmeticError, RecursionError) as problem:
        raise UnsupportedError(
            "the model's chat template cannot be rendered",
            file=file,
            found=f"{type(problem).__name__}: {problem}",
            remedy="run without --chat",
        ) from problem
