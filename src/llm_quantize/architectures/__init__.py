"""Model families as rows of data: ``ARCHITECTURES[model_type]``, and a configuration opened as one of them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path

from ..errors import MalformedInputError, UnsupportedError
from . import cohere, gemma, gpt, lfm, llama, olmo, openai, phi, qwen, shared
from .architecture import Architecture
from .base import Family, Hyper, OutputTensor, Piece, TensorMap

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Family",
    "Hyper",
    "OutputTensor",
    "Piece",
    "TensorMap",
    "open_architecture",
]

ARCHITECTURES: dict[str, Family] = {
    family.model_type: family
    for module in (llama, qwen, gemma, phi, gpt, olmo, cohere, openai, shared, lfm)
    for family in module.FAMILIES
}

_GENERATORS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def open_architecture(config: Mapping[str, object], *, file: Path | None = None) -> Architecture:
    """The architecture that ``config`` (config.json as a mapping, read from ``file``) describes.

    Raises: MalformedInputError (model_type or a size absent, of a wrong type, impossible), UnsupportedError (a family
    that is not in the table, the nearest one named; or a variant the runtime cannot compute).
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise MalformedInputError(
            "the configuration does not say what kind of model this is",
            file=file,
            expected="model_type, a string",
            found=repr(model_type)[:200],
            remedy="download config.json again from the model's repository",
        )
    family = ARCHITECTURES.get(model_type)
    if family is None:
        near = difflib.get_close_matches(model_type.lower()[:80], ARCHITECTURES, n=1, cutoff=0.3)
        raise UnsupportedError(
            f"the architecture {model_type[:80]!r} is not supported",
            file=file,
            expected=f"the nearest supported one is {near[0]!r}" if near else None,
            found=repr(config.get("architectures"))[:200],
            remedy="supported: " + ", ".join(sorted(ARCHITECTURES)),
        )
    kinds = config.get("architectures")
    kind = kinds[0] if isinstance(kinds, list) and kinds else None
    if isinstance(kind, str) and not kind.endswith(_GENERATORS):
        raise UnsupportedError(
            "this is not a model that generates text",
            file=file,
            expected="an architecture that ends in " + " or ".join(_GENERATORS),
            found=kind[:80],
        )
    return Architecture(family, config, file)
