"""README.md of an artifact directory: what it was made from, how, how large it is, how it is loaded, what was lost.

A pure function of the plan, so that its size is known before any work; what a run measures stands in the manifest
and, where it is known beforehand, in the card.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

import llm_quantize
from llm_quantize.formats.base import Packed, Scheme
from llm_quantize.qtypes.codebook import IN_COMMON, CodebookType
from llm_quantize.qtypes.inputs import InputGrid
from llm_quantize.qtypes.integer import WHOLE_ROW

_COPIED = ("license", "license_name", "license_link", "language", "pipeline_tag")


@dataclass(frozen=True)
class About:
    """What a format tells of an artifact: the tags of the card, its tables, how it is loaded (Markdown), and with what
    library; ``caution``: what the figures of its loss leave out."""

    tags: Sequence[str]
    recipe: Mapping[str, Any]
    sizes: Mapping[str, str]
    loading: str
    library: str = "transformers"
    caution: str = ""


@dataclass(frozen=True)
class PackedFacts:
    """A directory of packed integers. ``packed`` and ``kept``: bytes of data. ``method``: how the codes were chosen,
    {what: value}. ``experts``: whether the model is a mixture. ``grids``: {grid: how many matrices are on it}.
    ``cautions``: what runtimes cannot do with the mix; ``cache``: what keys and values are kept as;
    ``vllm_note``: what was not run of vLLM; ``packed_of``: where the matrices stand."""

    form: Packed
    scheme: Scheme
    name: str
    matrices: int
    packed: int
    kept: int
    weights: int
    method: Mapping[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    tensor_parallel: int = 8
    experts: bool = False
    grids: Mapping[str, int] = field(default_factory=dict)
    cautions: tuple[str, ...] = ()
    vllm_note: str | None = None
    packed_of: str = " of the decoder's blocks"
    cache: InputGrid | None = None
    auto: str = "AutoModelForCausalLM"


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


_VERDICT_ROWS = {"Verdict": "verdict", "Tensors": "tensors", "Weights": "weights", "Largest relative error": "worst"}
_VERDICT_ROOM = 72


def verdict_room() -> dict[str, str]:
    """The table "Conversion" with room for what only the end of the run knows."""
    return {name: f"<{key}>".ljust(_VERDICT_ROOM, ".") for name, key in _VERDICT_ROWS.items()}


def fill_verdict(text: bytes, conversion: Mapping[str, Any]) -> bytes:
    """A card with the verdict of a conversion (artifacts/verdict.py) in its places, of the same length."""
    worst = conversion.get("worst")
    told = {
        "verdict": str(conversion["verdict"]),
        "tensors": ", ".join(f"{count:,} {word}" for word, count in conversion["tensors"].items()),
        "weights": ", ".join(f"{count:,} {word}" for word, count in conversion["weights"].items()),
        "worst": "none" if worst is None else f"{worst['relative_error']:.4g}",
    }
    for key, value in told.items():
        place = f"<{key}>".ljust(_VERDICT_ROOM, ".").encode()
        text = text.replace(place, value[:_VERDICT_ROOM].ljust(_VERDICT_ROOM).encode(), 1)
    return text


def fill_card(text: bytes, measured: Mapping[str, Any] | None) -> bytes:
    """A card with its figures in their places, of the same length. ``measured``: see blockwise/measure.py."""
    told = dict.fromkeys(_ROWS.values(), "not measured")
    if measured is not None:
        told = {
            "kld": f"{measured['kld']:.6f}",
            "kld_sem": "not known" if measured["kld_sem"] is None else f"{measured['kld_sem']:.6f}",
            "same_top": f"{100 * measured['same_top']:.2f} %",
            "tokens": str(measured["tokens"]),
            "dtype": str(measured["dtype"]),
        }
    for key, value in told.items():
        text = text.replace(f"<{key}>".ljust(_ROOM, ".").encode(), value[:_ROOM].ljust(_ROOM).encode(), 1)
    return text


def card(
    about: About,
    *,
    name: str,
    source: str,
    revision: str | None,
    front: Mapping[str, Any],
    measured: Mapping[str, Any] | None = None,
    judged: Mapping[str, str] | None = None,
    merged: Sequence[str] = (),
    manifest: str = "manifest.json",
) -> str:
    """The whole text. ``name``: of the artifact; ``manifest``: of the file that stands in for it. ``source``: the
    model's name, ``revision`` its commit where it comes from the hub; ``front``: its own metadata. ``merged``:
    adapters that are merged into it, in words. ``measured``: {what: value} of the loss against the source, where it is
    (or will be) known; ``judged``: of how exact a conversion is."""
    metadata = _metadata(about, source, revision, front)
    made_of = " with ".join([_origin(source, revision), *merged])
    parts = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n",
        f"# {name}\n",
        f"{made_of}, quantized by llm-quantize {llm_quantize.__version__}.\n",
        _table("Recipe", about.recipe),
        _table("Size", about.sizes),
        about.loading,
    ]
    if judged:
        parts.append(_table("Conversion", judged))
        parts.append("Exact: decodes to the source's very values. Errors are ||Q - W|| / ||W|| of a tensor.\n")
    if measured:
        parts.append(_table("Loss", measured))
        parts.append("Against the source, on windows of the calibration texts that were not calibrated on.\n")
        parts += [f"{about.caution}\n"] if about.caution else []
    parts.append(f"`{manifest}` holds the hashes of every tensor and of the source, and what the run measured.\n")
    return "\n".join(parts)


def _metadata(about: About, source: str, revision: str | None, front: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if revision is not None:
        found |= {"base_model": source, "base_model_relation": "quantized"}
    for name in _COPIED:
        value = front.get(name)
        if isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            found[name] = value
    found["library_name"] = about.library
    found["tags"] = ["llm-quantize", *about.tags]
    return found


_ADDED, _END = b"# added by llm-quantize push\n", b"# end of what was added\n"
_EDGE = b"---\n"


def with_added(card: bytes, added: Mapping[str, Any]) -> bytes:
    """``card`` with the metadata ``added`` that it has not, between two comments at the end of its front matter. Where
    it has no front matter, it gets one."""
    front, edge, rest = card.removeprefix(_EDGE).partition(b"\n" + _EDGE)
    if not card.startswith(_EDGE) or not edge:
        front, rest = b"", card
    known = yaml.safe_load(front) if front else {}
    fresh = {key: value for key, value in added.items() if not isinstance(known, dict) or key not in known}
    if not fresh:
        return card
    text = yaml.safe_dump(fresh, sort_keys=False, allow_unicode=True).encode()
    return b"".join([_EDGE, front, b"\n" if front else b"", _ADDED, text, _END, _EDGE, rest])


def without_added(card: bytes) -> bytes:
    """What ``with_added`` was given, as far as front matter stood there before; another card as it is."""
    before, found, rest = card.partition(_ADDED)
    _, ended, after = rest.partition(_END)
    return before + after if found and ended else card


def _origin(source: str, revision: str | None) -> str:
    if revision is None:
        return f"`{source}`"
    return f"[{source}](https://huggingface.co/{source}) at commit `{revision}`"


def about_packed(facts: PackedFacts) -> About:
    """The card of a directory of packed integers."""
    widths = "mixed-bits" if len(facts.grids) > 1 else f"{facts.scheme.qtype.bits}-bit"
    tags = ("quantized", facts.scheme.format, widths)
    cautions = []
    if facts.form.inputs(facts.scheme) is not None:
        cautions.append(
            "Of weights alone: a runtime rounds activations too, which `llm-quantize analyze quality` does as well."
        )
    if facts.cache is not None:
        cautions.append(
            "Measured with keys and values as they are: what a runtime loses by keeping them in 8 bits is not counted."
        )
    about = About(tags, _recipe(facts), _sizes(facts), _loading(facts), caution=" ".join(cautions))
    return about if facts.form.RUNTIME is None else replace(about, library=facts.form.NAME)


def _recipe(facts: PackedFacts) -> dict[str, Any]:
    grid = facts.scheme.qtype
    group = "one for each row" if grid.group_size == WHOLE_ROW else f"one for {grid.group_size} weights"
    if isinstance(grid, CodebookType) and grid.nested in IN_COMMON:
        rows = IN_COMMON[grid.nested]
        group = f"one for {rows} by {grid.group_size} weights" if rows else "one for each matrix"
    codes = {
        "Codes": f"{grid.bits} bit, {'symmetric' if grid.symmetric else f'with {facts.form.OFFSETS}'}",
        "Scales": f"{grid.scale}, {group}",
    }
    if len(facts.grids) > 1:
        codes = {
            "Codes": ", ".join(f"{count:,} × {qtype}" for qtype, count in facts.grids.items()),
            "Scales": grid.scale,
        }
    found: dict[str, Any] = {
        "Format": facts.form.title(facts.scheme),
        "Level": facts.scheme.level,
        **codes,
        "Packed": f"{facts.matrices} matrices{' of the whole model' if facts.form.EDGES else facts.packed_of}",
    }
    if facts.scheme.act_order:
        found["Groups"] = "of columns that do not stand side by side (act-order, desc_act): each says which it is in"
    inputs = facts.form.inputs(facts.scheme)
    if inputs is not None:
        found["Activations"] = inputs.text
    if facts.cache is not None:
        found["Keys and values"] = f"{facts.cache.text} for the keys of a layer, and one for its values"
    if facts.ignored:
        found["Left as they are"] = f"{len(facts.ignored)} modules, the first {facts.ignored[0]}"
    return found | {str(name): value for name, value in facts.method.items()}


def _sizes(facts: PackedFacts) -> dict[str, str]:
    total = facts.packed + facts.kept
    return {
        "Packed matrices": bytes_words(facts.packed),
        "Everything else": bytes_words(facts.kept),
        "Together": f"{bytes_words(total)}, {8 * total / max(1, facts.weights):.2f} bits per weight",
    }


def bytes_words(count: int) -> str:
    return f"{count:,} bytes ({count / 1e9:.2f} GB)"


def _table(title: str, rows: Mapping[str, Any]) -> str:
    lines = [f"## {title}\n", "| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in rows.items())]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def _loading(facts: PackedFacts) -> str:
    if facts.form.RUNTIME is not None:
        reader, how = facts.form.RUNTIME
        return f"## Loading\n\n{reader}:\n\n{how.format(name=facts.name)}\n"
    refusal = facts.form.vllm_refusal(facts.scheme)
    if refusal is None:
        vllm = f"```sh\nvllm serve {facts.name}\n```\nTensor parallel over up to {facts.tensor_parallel} devices."
        vllm += f" Note: {facts.vllm_note}." if facts.vllm_note else ""
        if facts.cache is not None:
            vllm += " By its code, which was read and not run here, it keeps keys and values in 8 bits unasked."
    else:
        vllm = f"vLLM does not load it: {refusal}."
    transformers = (
        f"Transformers (`pip install transformers accelerate {facts.form.NEEDS}`):\n\n```python\n"
        f"from transformers import {facts.auto}, AutoTokenizer\n\n"
        f'model = {facts.auto}.from_pretrained("{facts.name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{facts.name}")\n```'
    )
    if facts.form.KERNEL:
        transformers += (
            "\n\nOn a CPU name the kernel, as otherwise one is compiled for minutes: "
            f"`quantization_config={facts.form.KERNEL.format(bits=facts.scheme.qtype.bits)}`."
        )
    caution = transformers_caution(facts.form) if facts.experts else None
    notes = [*facts.cautions, *([caution] if caution else [])]
    return f"## Loading\n\n{vllm}\n\n{transformers}\n" + "".join(f"\n{text}.\n" for text in notes)


def transformers_caution(form: Packed) -> str | None:
    """What Transformers (5.23) does to experts stored in this form, if it is not what it should."""
    if form.EXPERTS_IN_TRANSFORMERS:
        return None
    return (
        f"Transformers 5.23 does not load experts stored as {form.TITLE}: it leaves them at random values "
        "with no more than a warning; compressed-tensors has no such trouble"
    )
