"""The GGUF format: what stands in the metadata beside hyper-parameters and vocabulary, and how files are split.

Key names come from the ``gguf`` package. Model-card fields are read from the YAML front matter of README.md with
``yaml.safe_load``; a card that cannot be parsed is left out with a warning, never guessed at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml
from gguf.constants import GGML_QUANT_VERSION, GGUFValueType, Keys
from gguf.utility import size_label

from llm_quantize.io.gguf_file import MetaValue, tensor_bytes
from llm_quantize.io.paths import inside, read_limited
from llm_quantize.qtypes.ggml_types import GgmlType

PROVENANCE = "llm_quantize"
OF_THE_FILE = (
    *(Keys.General.ALIGNMENT, Keys.General.FILE_TYPE, Keys.General.QUANTIZATION_VERSION, Keys.General.QUANTIZED_BY),
    *("split.", "quantize.imatrix.", f"{PROVENANCE}."),
)
"""Keys, or their beginnings, that say how one file was made and laid out, not what model it holds."""
MAX_CARD_BYTES = 1 << 20
MAX_FRONT_MATTER = 1 << 15  # characters; the YAML parser reads about 100,000 a second
MAX_CARD_DEPTH = 64
_DEPTH = {"[": 1, "{": 1, "]": -1, "}": -1}

SAMPLING = {
    "temperature": (Keys.General.SAMPLING_TEMP, GGUFValueType.FLOAT32),
    "top_k": (Keys.General.SAMPLING_TOP_K, GGUFValueType.INT32),
    "top_p": (Keys.General.SAMPLING_TOP_P, GGUFValueType.FLOAT32),
    "min_p": (Keys.General.SAMPLING_MIN_P, GGUFValueType.FLOAT32),
    "repetition_penalty": (Keys.General.SAMPLING_PENALTY_REPEAT, GGUFValueType.FLOAT32),
}


def text(value: str) -> MetaValue:
    """A string value."""
    return MetaValue(GGUFValueType.STRING, value)


def unsigned(value: int) -> MetaValue:
    """A u32 value."""
    return MetaValue(GGUFValueType.UINT32, value)


def texts(values: Sequence[str]) -> MetaValue:
    """An array of strings."""
    return MetaValue(GGUFValueType.ARRAY, list(values), GGUFValueType.STRING)


def general_metadata(
    *,
    architecture: str,
    name: str,
    parameters: int,
    expert_parameters: int,
    experts: int,
    card: Mapping[str, Any],
    generation_config: Mapping[str, Any] | None,
) -> dict[str, MetaValue]:
    """The ``general.*`` keys that do not depend on the recipe. ``parameters`` counts source weights."""
    per_expert = expert_parameters // experts if experts else 0
    metadata = {
        Keys.General.ARCHITECTURE: text(architecture),
        Keys.General.TYPE: text("model"),
        Keys.General.NAME: text(name),
        Keys.General.SIZE_LABEL: text(size_label(parameters, parameters - expert_parameters, per_expert, experts)),
    }
    metadata |= card_metadata(card)
    for key, value in (generation_config or {}).items():
        if key in SAMPLING and _is_number(value):
            gguf_key, kind = SAMPLING[key]
            metadata[gguf_key] = MetaValue(kind, int(value) if kind == GGUFValueType.INT32 else float(value))
    return metadata


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**31


def card_metadata(card: Mapping[str, Any]) -> dict[str, MetaValue]:
    """Licence, tags, languages and base models of a model card's front matter."""
    metadata: dict[str, MetaValue] = {}
    for field, key in (
        ("license", Keys.General.LICENSE),
        ("license_name", Keys.General.LICENSE_NAME),
        ("license_link", Keys.General.LICENSE_LINK),
    ):
        values = _strings(card.get(field))
        if values:
            metadata[key] = text(", ".join(values))
    bases = _strings(card.get("base_model"))
    if bases:
        metadata[Keys.General.BASE_MODEL_COUNT] = unsigned(len(bases))
    for index, base in enumerate(bases):
        organization, _, short = base.rpartition("/")
        metadata[Keys.General.BASE_MODEL_NAME.format(id=index)] = text(short)
        if organization:
            metadata[Keys.General.BASE_MODEL_ORGANIZATION.format(id=index)] = text(organization)
            metadata[Keys.General.BASE_MODEL_REPO_URL.format(id=index)] = text(f"https://huggingface.co/{base}")
    tags = _strings(card.get("tags")) + _strings(card.get("pipeline_tag"))
    if tags:
        metadata[Keys.General.TAGS] = texts(list(dict.fromkeys(tags)))
    languages = _strings(card.get("language")) or _strings(card.get("languages"))
    if languages:
        metadata[Keys.General.LANGUAGES] = texts(languages)
    return metadata


def _strings(value: object) -> list[str]:
    items = value if isinstance(value, list) else [value]
    return [item for item in items if isinstance(item, str) and item]


def read_card(directory: Path, on_warning: Callable[[str], None]) -> dict[str, Any]:
    """The YAML front matter of ``README.md``, or {} (with a warning when there is one that cannot be read)."""
    path = inside(directory, "README.md")
    if not path.is_file() or path.stat().st_size > MAX_CARD_BYTES:
        return {}
    content = read_limited(path, MAX_CARD_BYTES).decode("utf-8", errors="replace")
    if not content.startswith("---"):
        return {}
    front, separator, _ = content[3:].partition("\n---")
    if not separator:
        return {}
    deepest = max(accumulate(_DEPTH.get(character, 0) for character in front), default=0)
    if len(front) > MAX_FRONT_MATTER or deepest > MAX_CARD_DEPTH:
        on_warning(f"{path}: the front matter is too long or too deep; licence and tags were not copied")
        return {}
    if "&" in front and "*" in front:
        on_warning(f"{path}: the front matter uses YAML anchors; licence and tags were not copied")
        return {}
    try:
        card = yaml.safe_load(front)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        on_warning(f"{path}: the front matter is not valid YAML; licence and tags were not copied ({error!s:.100})")
        return {}
    return card if isinstance(card, dict) else {}


def recipe_metadata(*, file_type: int, quantized: bool, level: str, version: str) -> dict[str, MetaValue]:
    """File type and provenance of the quantization."""
    metadata = {Keys.General.FILE_TYPE: unsigned(file_type)}
    if quantized:
        metadata[Keys.General.QUANTIZATION_VERSION] = unsigned(GGML_QUANT_VERSION)
    metadata[Keys.General.QUANTIZED_BY] = text(f"llm-quantize {version}")
    metadata[f"{PROVENANCE}.version"] = text(version)
    metadata[f"{PROVENANCE}.level"] = text(level)
    return metadata


TEXTS = "quantize.imatrix.dataset"
TEXTS_JOINED = ", "


def importance_metadata(*, file: str, datasets: Sequence[str], entries: int, chunks: int) -> dict[str, MetaValue]:
    """What llama.cpp's quantizer records about the imatrix it used, under the same keys."""
    metadata = {"quantize.imatrix.file": text(file)}
    if datasets:
        metadata[TEXTS] = text(TEXTS_JOINED.join(datasets))
    metadata["quantize.imatrix.entries_count"] = unsigned(entries)
    if chunks > 0:
        metadata["quantize.imatrix.chunks_count"] = unsigned(chunks)
    return metadata


def split_tensors(tensors: Sequence[tuple[str, tuple[int, ...], GgmlType]], max_bytes: int | None) -> list[list[int]]:
    """Indices of the tensors in each file: in order, a new file where the next tensor would pass ``max_bytes``."""
    files: list[list[int]] = [[]]
    size = 0
    for index, (_, shape, kind) in enumerate(tensors):
        nbytes = tensor_bytes(shape, kind)
        if max_bytes is not None and files[-1] and size + nbytes > max_bytes:
            files.append([])
            size = 0
        files[-1].append(index)
        size += nbytes
    return files


def split_metadata(number: int, count: int, tensors: int) -> dict[str, MetaValue]:
    """The keys that tie the parts of a split file together (owner: llama.cpp's gguf-split)."""
    return {
        Keys.Split.LLM_KV_SPLIT_NO: MetaValue(GGUFValueType.UINT16, number),
        Keys.Split.LLM_KV_SPLIT_COUNT: MetaValue(GGUFValueType.UINT16, count),
        Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT: MetaValue(GGUFValueType.INT32, tensors),
    }
