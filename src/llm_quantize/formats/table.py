"""The packed formats by the names that users give, and the scheme that a plan was made with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from llm_quantize.errors import UnsupportedError, printable
from llm_quantize.formats import awq, compressed_tensors, gptq
from llm_quantize.formats.base import Format, Scheme, scheme_from_dict
from llm_quantize.formats.packed import Settings

if TYPE_CHECKING:
    from llm_quantize.artifacts.plan import ArtifactPlan

FORMATS: Mapping[str, Format] = {"gptq": gptq, "awq": awq, "compressed-tensors": compressed_tensors}


def packed_format(name: str) -> Format:
    """The format of that name. Raises UnsupportedError."""
    if name not in FORMATS:
        raise UnsupportedError("there is no such packed format", expected=", ".join(FORMATS), found=name[:40])
    return FORMATS[name]


def format_of(settings: Settings) -> str:
    """The name of the format of a quantized model, by its configuration's quant_method.

    Raises UnsupportedError for a method, or a form of it, that is not decoded; MalformedInputError.
    """
    method = settings.values.get("quant_method")
    form, known = "", False
    if isinstance(method, str) and method in FORMATS:
        form, known = FORMATS[method].form_of(settings)
    if not known:
        raise UnsupportedError(
            "this way of quantizing is not decoded by this version",
            file=settings.file,
            expected=", ".join(f"{name} ({', '.join(format.FORMS)})" for name, format in FORMATS.items()),
            found=printable(f"quant_method {method!r}{f', layout {form}' if form else ''}", 200),
        )
    return str(method)


def scheme_of(plan: ArtifactPlan) -> Scheme:
    """The scheme of a plan that ``directory.plan_directory`` made."""
    return scheme_from_dict(plan.identity["scheme"])
