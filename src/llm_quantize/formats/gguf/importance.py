"""What an importance matrix leaves unsaid of a model: tensors that it does not cover, entries that say nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

from llm_quantize.architectures.base import OutputTensor
from llm_quantize.formats.base import Importance
from llm_quantize.io.journal import canonical_json
from llm_quantize.qtypes import QTYPES

_SELDOM_COVERED = ("token_embd.weight", "output.weight")
_NAMED = 8


def uncovered(importance: Importance, outputs: Sequence[OutputTensor], qtypes: Sequence[str]) -> list[str]:
    """Warnings: tensors that could use importance and have none, and entries of tensors that the model does not have.
    ``qtypes`` goes with ``outputs``."""
    pairs = [(output.name, qtype) for output, qtype in zip(outputs, qtypes, strict=True)]
    using = [name for name, qtype in pairs if QTYPES[qtype].uses_importance and name not in _SELDOM_COVERED]
    left = [name for name in using if name not in importance.names]
    told = []
    if left:
        covered = f"covers {len(using) - len(left)} of the {len(using)} tensors that could use it"
        told.append(f"the importance matrix {covered}; the first without: {left[0]}")
    unknown = sorted(set(importance.names) - {output.name for output in outputs})
    if unknown:
        told.append(f"the importance matrix names {len(unknown)} tensors not in this model, such as {unknown[0]}")
    return told


def silent(importance: Importance, rounded: Iterable[tuple[OutputTensor, str]]) -> dict[str, tuple[str, ...]]:
    """{what the importance says nothing of, and what that means: the tensors, with their experts}, of tensors that are
    ``rounded``, each with its qtype. Raises MalformedInputError for importance of another size."""
    found: dict[str, list[str]] = {}
    for output, qtype in rounded:
        if not QTYPES[qtype].uses_importance or output.name not in importance.names or len(output.shape) < 2:
            continue
        for text, matrices in importance.silence(output.name, output.shape).items():
            found.setdefault(text, []).append(_named(output, matrices))
    return {text: tuple(names) for text, names in sorted(found.items())}


def _named(output: OutputTensor, matrices: Sequence[int]) -> str:
    if len(output.shape) < 3:
        return output.name
    shown = ", ".join(map(str, matrices[:_NAMED]))
    more = f" and {len(matrices) - _NAMED} more" if len(matrices) > _NAMED else ""
    return f"{output.name} ({'experts' if len(matrices) > 1 else 'expert'} {shown}{more})"


def gaps_digest(fallbacks: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """What an artifact's identity says of ``silent``, where there is anything: its bytes are not those that an older
    version made of the same importance."""
    if not fallbacks:
        return {}
    told = canonical_json({text: list(names) for text, names in fallbacks.items()})
    return {"importance_gaps": hashlib.sha256(told).hexdigest()}
