"""A size named, a recipe given: the best artifact of a model whose file, or whose file with a cache and all that a
runtime needs, has at most so many bytes."""

from __future__ import annotations

from collections.abc import Sequence

from llm_quantize.advice.room import room_for
from llm_quantize.errors import UsageError
from llm_quantize.evaluation.fitting import Asked, Range, fit_recipe, foresee_fit
from llm_quantize.evaluation.ladders import ladder_of
from llm_quantize.events import EventSink, ignore
from llm_quantize.formats.recipe import Recipe
from llm_quantize.formats.table import format_name
from llm_quantize.models.opening import open_source
from llm_quantize.options import Options


def fit(
    model: str,
    format: str,
    size: int,
    *,
    context: int | None = None,
    kv: str | None = None,
    exact: bool = False,
    revision: str | None = None,
    lora: Sequence[str] = (),
    options: Options | None = None,
    on_event: EventSink = ignore,
) -> Recipe:
    """The recipe of the artifact of ``model`` that loses least in ``size`` bytes, found on text, tried on other text.

    ``context``: tokens of a cache that must fit too, in the type ``kv`` (None: 16 bits), with the rest of what the
    format's runtime takes. ``exact``: sensitivities measured one by one: hours where gradients take minutes.

    Raises ResourceError where nothing fits, UsageError for what contradicts a size, and as ``fit_recipe``.
    """
    options = options or Options()
    format = _checked(format, options)
    with (source := open_source(model, revision=revision, lora=lora, on_event=on_event)).checkpoint:
        room = room_for(source, format, size, context=context, kv=kv)
        return fit_recipe(source, format, Asked(room.file, room.facts(), exact), options, on_event)


def foresee(
    model: str,
    format: str,
    size: int,
    *,
    context: int | None = None,
    kv: str | None = None,
    exact: bool = False,
    revision: str | None = None,
    lora: Sequence[str] = (),
    options: Options | None = None,
    on_event: EventSink = ignore,
) -> Recipe | Range:
    """What ``fit`` would give, where its sensitivities are kept; else what can be said without. No weight is computed
    with, and nothing fetched. Raises as ``fit``."""
    options = options or Options()
    format = _checked(format, options)
    opened = open_source(model, revision=revision, lora=lora, on_event=on_event, headers_only=True)
    with (source := opened).checkpoint:
        room = room_for(source, format, size, context=context, kv=kv)
        return foresee_fit(source, format, Asked(room.file, room.facts(), exact), options, on_event)


def _checked(format: str, options: Options) -> str:
    """The format by its name. Raises UsageError for one without recipes, and for options that give types."""
    name = format_name(format)
    ladder_of(name)
    if options.overrides.recipe is not None or options.overrides.given:
        raise UsageError(
            "a size chooses the type of every tensor",
            found="--fit with types for single tensors",
            remedy="leave out --recipe, --tensor-type, --output-type, --embedding-type, --pure and --fallback",
        )
    return name
