"""``--fit``: a size in the place of a level."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from llm_quantize.cli.sizes import Size, Tokens

if TYPE_CHECKING:
    from llm_quantize.formats.recipe import Recipe

Function = TypeVar("Function", bound=Any)


def fit_options(function: Function) -> Function:
    """A size, what must fit beside the file, and how sensitivities are found."""
    options = [
        click.option("--fit", "fit", type=Size(),
                     help="Instead of a level: the best artifact of at most this size, for example 8G or 7.5GiB; the "
                     "type of every tensor is chosen by what it loses there. Of gguf, compressed-tensors and mlx."),
        click.option("--context", type=Tokens(),
                     help="With --fit: a cache of so many tokens (8k) and what the runtime takes must fit too."),
        click.option("--kv", metavar="TYPE",
                     help="With --context: the type of the cache: q8_0, q4_0, ... of llama.cpp, fp8 of vLLM. "
                     "[default: f16]"),
        click.option("--exact", is_flag=True,
                     help="With --fit: measure what every tensor loses at every type, which takes a hundred times as "
                     "long as to tell it by gradients."),
    ]  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


def fit_asked(arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """What ``advice.fit`` is to be asked; None where no size was given. Raises UsageError for a size beside a level,
    and for its options without it."""
    from llm_quantize.errors import UsageError

    asked = {key: arguments[key] for key in ("context", "kv", "exact")}
    if arguments["fit"] is None:
        given = [f"--{key}" for key, value in asked.items() if value]
        if given:
            raise UsageError(f"{' and '.join(given)} means nothing without a size", remedy="say how large: --fit 8G")
        return None
    for option, value in (
        ("-q", arguments["levels"]),
        ("--recipe", arguments["recipe"]),
        ("--recipe-from", arguments["recipe_from"]),
    ):
        if value:
            raise UsageError("only one of these can be given", found=f"--fit and {option}")
    return {"size": arguments["fit"], **asked}


def show_fit(recipe: Recipe) -> None:
    """What was chosen for a size, and why: on the screen."""
    from rich.console import Console

    from llm_quantize.reports.terminal import shown
    from llm_quantize.reports.wording import said

    console = Console(highlight=False, soft_wrap=True)
    for note in recipe.notes():
        console.print(shown(f"  {said(note)}"))
    for kind, counts in recipe.groups().items():
        told = ", ".join(f"{qtype} × {count}" if len(counts) > 1 else qtype for qtype, count in sorted(counts.items()))
        console.print(shown(f"  {kind}: {told}"))


def fit_facts(recipe: Recipe) -> dict[str, Any]:
    """The same, JSON-ready."""
    from dataclasses import asdict

    return {**(asdict(recipe.fit) if recipe.fit is not None else {}), "types": recipe.groups()}
