"""README.md of an artifact directory: what it was made from, how, how large it is, how it is loaded, what was lost.

A pure function of the plan, so that its size is known before any work; what a run measures stands in the manifest
and, where it is known beforehand, in the card.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from llm_quantize.formats.base import Packed, Scheme
from llm_quantize.qtypes.integer import WHOLE_ROW

_COPIED = ("license", "license_name", "license_link", "language", "pipeline_tag")


@dataclass(frozen=True)
class CardFacts:
    """What the card tells. ``name``: of the artifact. ``source``: the model's name, ``revision`` its commit where it
    comes from the hub. ``card``: the source's own metadata. ``packed`` and ``kept``: bytes of data. ``method``: how the
    codes were chosen, {what: value}. ``experts``: whether the model is a mixture."""

    name: str
    source: str
    revision: str | None
    card: Mapping[str, Any]
    form: Packed
    scheme: Scheme
    matrices: int
    packed: int
    kept: int
    weights: int
    version: str
    method: Mapping[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    tensor_parallel: int = 8
    experts: bool = False


_ROOM = 14
_ROWS = {
    "KL divergence": "kld",
    "Standard error": "kld_sem",
    "Same likeliest token": "same_top",
    "Tokens": "tokens",
    "Computed in": "dtype",
}


def room() -> dict[str, str]:
    """The table "Loss" with room for figures that only the end of the run knows."""
    return {name: f"<{key}>".ljust(_ROOM, ".") for name, key in _ROWS.items()}


def fill_card(text: bytes, measured: Mapping[str, Any] | None) -> bytes:
    """A card with its figures in their places, of the same length. ``measured``: see blockwise/measure.py."""
    told = dict.fromkeys(_ROWS.values(), "not measured")
    if measured is not None:
        told = {
            "kld": f"{measured['kld']:.6f}",
            "kld_sem": f"{measured['kld_sem']:.6f}",
            "same_top": f"{100 * measured['same_top']:.2f} %",
            "tokens": str(measured["tokens"]),
            "dtype": str(measured["dtype"]),
        }
    for key, value in told.items():
        text = text.replace(f"<{key}>".ljust(_ROOM, ".").encode(), value[:_ROOM].ljust(_ROOM).encode(), 1)
    return text


def card(facts: CardFacts, measured: Mapping[str, Any] | None = None) -> str:
    """The whole text. ``measured``: {what: value} of the loss against the source, where it is (or will be) known."""
    parts = [
        f"---\n{yaml.safe_dump(_metadata(facts), sort_keys=False, allow_unicode=True)}---\n",
        f"# {facts.name}\n",
        f"{_origin(facts)}, quantized by llm-quantize {facts.version}.\n",
        _table("Recipe", _recipe(facts)),
        _table("Size", _sizes(facts)),
        _loading(facts),
    ]
    if measured:
        parts.append(_table("Loss", measured))
        parts.append("Against the source, on windows of the calibration texts that were not calibrated on.\n")
    parts.append("`manifest.json` holds the hashes of every tensor and of the source, and what the run measured.\n")
    return "\n".join(parts)


def _metadata(facts: CardFacts) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if facts.revision is not None:
        found |= {"base_model": facts.source, "base_model_relation": "quantized"}
    for name in _COPIED:
        value = facts.card.get(name)
        if isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            found[name] = value
    found["library_name"] = "transformers"
    found["tags"] = ["llm-quantize", "quantized", facts.scheme.format, f"{facts.scheme.qtype.bits}-bit"]
    return found


def _origin(facts: CardFacts) -> str:
    if facts.revision is None:
        return f"`{facts.source}`"
    return f"[{facts.source}](https://huggingface.co/{facts.source}) at commit `{facts.revision}`"


def _recipe(facts: CardFacts) -> dict[str, Any]:
    grid = facts.scheme.qtype
    group = "one for each row" if grid.group_size == WHOLE_ROW else f"one for {grid.group_size} weights"
    found: dict[str, Any] = {
        "Format": facts.form.TITLE,
        "Level": facts.scheme.level,
        "Codes": f"{grid.bits} bit, {'symmetric' if grid.symmetric else 'with zero points'}",
        "Scales": f"{grid.scale}, {group}",
        "Packed": f"{facts.matrices} matrices of the decoder's blocks",
    }
    if facts.ignored:
        found["Left as they are"] = f"{len(facts.ignored)} modules, the first {facts.ignored[0]}"
    return found | {str(name): value for name, value in facts.method.items()}


def _sizes(facts: CardFacts) -> dict[str, str]:
    total = facts.packed + facts.kept
    return {
        "Packed matrices": _bytes(facts.packed),
        "Everything else": _bytes(facts.kept),
        "Together": f"{_bytes(total)}, {8 * total / max(1, facts.weights):.2f} bits per weight",
    }


def _bytes(count: int) -> str:
    return f"{count:,} bytes ({count / 1e9:.2f} GB)"


def _table(title: str, rows: Mapping[str, Any]) -> str:
    lines = [f"## {title}\n", "| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in rows.items())]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def _loading(facts: CardFacts) -> str:
    refusal = facts.form.vllm_refusal(facts.scheme)
    if refusal is None:
        vllm = f"```sh\nvllm serve {facts.name}\n```\nTensor parallel over up to {facts.tensor_parallel} devices."
    else:
        vllm = f"vLLM does not load it: {refusal}."
    transformers = (
        f"Transformers (`pip install transformers accelerate {facts.form.NEEDS}`):\n\n```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{facts.name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{facts.name}")\n```'
    )
    if facts.form.KERNEL:
        transformers += (
            "\n\nOn a CPU name the kernel, as otherwise one is compiled for minutes: "
            f"`quantization_config={facts.form.KERNEL.format(bits=facts.scheme.qtype.bits)}`."
        )
    caution = transformers_caution(facts.form) if facts.experts else None
    return f"## Loading\n\n{vllm}\n\n{transformers}\n" + (f"\n{caution}.\n" if caution else "")


def transformers_caution(form: Packed) -> str | None:
    """What Transformers (5.23) does to experts stored in this form, if it is not what it should."""
    if form.EXPERTS_IN_TRANSFORMERS:
        return None
    return (
        f"Transformers 5.23 does not load experts stored as {form.TITLE}: it leaves them at random values "
        "with no more than a warning; compressed-tensors has no such trouble"
    )
