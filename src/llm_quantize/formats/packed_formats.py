"""The packed integer formats by name, and which of them a model is in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_quantize.errors import UnsupportedError, printable
from llm_quantize.formats import (
    auto_round,
    awq,
    bitsandbytes,
    compressed_tensors,
    gptq,
    mlx,
    modelopt,
    mxfp4_experts,
    scaled_floats,
)
from llm_quantize.formats.base import Packed
from llm_quantize.formats.foreign import refuse_settings
from llm_quantize.formats.packed import Settings, StoredFormat

PACKED: Mapping[str, Packed] = {form.NAME: form for form in (gptq, awq, compressed_tensors, bitsandbytes, mlx)}
"""By name, which is also the quant_method of their configurations."""

READ: Mapping[str, StoredFormat] = {
    **PACKED,
    **{word: form for form in (modelopt, scaled_floats, mxfp4_experts, auto_round) for word in form.METHODS},
}
"""All that are decoded, by quant_method in small letters: those of PACKED, and those that are only read."""


_NAMED = ("quantization_config", "compression_config")


def said_of(config: Mapping[str, Any]) -> Any:
    """What a config.json says of quantization, its own or in its text_config, with the name of the method where it
    follows from the form; None where it says nothing."""
    text = config.get("text_config")
    wheres = [config] + ([text] if isinstance(text, dict) else [])
    found = next((where[key] for where in wheres for key in _NAMED if where.get(key) is not None), None)
    if isinstance(found, dict) and isinstance(found.get("quant_method"), str):
        return found
    for name, form in PACKED.items():
        key, least = form.UNNAMED or ("", ())
        own = config.get(key)
        if isinstance(own, dict) and own and all(word in own for word in least):
            return {**own, "quant_method": name}
    return found


def unquantized(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what it says of quantization."""
    own = {*_NAMED, *(form.UNNAMED[0] for form in PACKED.values() if form.UNNAMED is not None)}
    found = {key: value for key, value in config.items() if key not in own}
    if isinstance(text := found.get("text_config"), dict):
        found["text_config"] = {key: value for key, value in text.items() if key not in own}
    return found


def read_format(method: Any) -> StoredFormat | None:
    """The format that a configuration calls ``method``; None: none that is decoded."""
    return READ.get(method.lower()) if isinstance(method, str) else None


def format_of(settings: Settings) -> StoredFormat:
    """The format of a quantized model, by its configuration's quant_method.

    Raises UnsupportedError for a method, or a form of it, that is not decoded; MalformedInputError.
    """
    method = settings.values.get("quant_method")
    found = read_format(method)
    if found is None:
        raise refuse_settings(settings.values, settings.file)
    form, known = found.form_of(settings)
    if not known:
        raise UnsupportedError(
            "this way of quantizing is not decoded by this version",
            file=settings.file,
            expected=", ".join(f"{name} ({', '.join(format.FORMS)})" for name, format in READ.items()),
            found=printable(f"quant_method {method!r}{f', layout {form}' if form else ''}", 200),
            remedy="use the model that it was made from, in BF16 or F16 (its model card names it)",
        )
    return found
