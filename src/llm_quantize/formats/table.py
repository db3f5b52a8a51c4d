"""The packed formats by the names that users give, and the scheme that a plan was made with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from llm_quantize.errors import UnsupportedError
from llm_quantize.formats import awq, compressed_tensors, gptq
from llm_quantize.formats.base import Format, Scheme, scheme_from_dict

if TYPE_CHECKING:
    from llm_quantize.artifacts.plan import ArtifactPlan

FORMATS: Mapping[str, Format] = {"gptq": gptq, "awq": awq, "compressed-tensors": compressed_tensors}


def packed_format(name: str) -> Format:
    """The format of that name. Raises UnsupportedError."""
    if name not in FORMATS:
        raise UnsupportedError("there is no such packed format", expected=", ".join(FORMATS), found=name[:40])
    return FORMATS[name]


def scheme_of(plan: ArtifactPlan) -> Scheme:
    """The scheme of a plan that ``directory.plan_directory`` made."""
    return scheme_from_dict(plan.identity["scheme"])
