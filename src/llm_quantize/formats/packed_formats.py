"""The packed integer formats by name, and which of them a model is in."""

from __future__ import annotations

from collections.abc import Mapping

from llm_quantize.errors import UnsupportedError, printable
from llm_quantize.formats import awq, bitsandbytes, compressed_tensors, gptq
from llm_quantize.formats.base import Packed
from llm_quantize.formats.foreign import refuse_settings
from llm_quantize.formats.packed import Settings

PACKED: Mapping[str, Packed] = {form.NAME: form for form in (gptq, awq, compressed_tensors, bitsandbytes)}
"""By name, which is also the quant_method of their configurations."""


def format_of(settings: Settings) -> Packed:
    """The format of a quantized model, by its configuration's quant_method.

    Raises UnsupportedError for a method, or a form of it, that is not decoded; MalformedInputError.
    """
    method = settings.values.get("quant_method")
    found = PACKED.get(method) if isinstance(method, str) else None
    if found is None:
        raise refuse_settings(settings.values, settings.file)
    form, known = found.form_of(settings)
    if not known:
        raise UnsupportedError(
            "this way of quantizing is not decoded by this version",
            file=settings.file,
            expected=", ".join(f"{name} ({', '.join(format.FORMS)})" for name, format in PACKED.items()),
            found=printable(f"quant_method {method!r}{f', layout {form}' if form else ''}", 200),
            remedy="use the model that it was made from, in BF16 or F16 (its model card names it)",
        )
    return found
