"""The safetensors container, laid out before anything is written: every byte's place, as the library itself chooses it.

Format (huggingface/safetensors): 8 bytes N, little-endian; N bytes of JSON, padded with spaces to a multiple of 8;
then the data without holes. The library orders tensors by element type, widest alignment first, then by name, so that
every tensor is aligned to its own elements; we do the same, so that a file of ours is byte for byte its.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llm_quantize.errors import ResourceError
from llm_quantize.io.safetensors_file import DTYPE_BITS, MAX_HEADER_BYTES

# The library's order of element types (Dtype in its tensor.rs), of those that are written here.
_ORDER = ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "F64", "I64")
_ALIGNMENT = 8


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be laid out: name, the format's word for its element type ("BF16"), shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class SafetensorsLayout:
    """``header``: the bytes in front of the data. ``size``: of the whole file. ``offsets``: tensor -> absolute."""

    header: bytes
    size: int
    offsets: Mapping[str, int]


def layout_safetensors(tensors: Sequence[TensorSpec], metadata: Mapping[str, str]) -> SafetensorsLayout:
    """The file of ``tensors``, in whatever order they are given, with ``metadata`` as its ``__metadata__``.

    Raises ValueError for a name that stands twice or an element type that is not written here, ResourceError for a
    header longer than readers take.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    relative: dict[str, int] = {}
    at = 0
    for tensor in sorted(tensors, key=lambda tensor: (-_ORDER.index(tensor.dtype), tensor.name)):
        if tensor.name in relative:
            raise ValueError(f"{tensor.name} stands twice")
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        relative[tensor.name] = at
        at += tensor.nbytes
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise ResourceError(
            "the header of a file would be longer than readers take",
            expected=f"at most {MAX_HEADER_BYTES:,} bytes",
            found=f"{len(text):,} bytes for {len(relative):,} tensors",
            remedy="give a smaller --output-shard-size",
        )
    header = len(text).to_bytes(8, "little") + text
    offsets = {name: len(header) + start for name, start in relative.items()}
    return SafetensorsLayout(header, len(header) + at, offsets)


def shard_names(count: int) -> list[str]:
    """The names that Transformers gives so many files of one model."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def index_bytes(weight_map: Mapping[str, str], total_size: int) -> bytes:
    """model.safetensors.index.json: which file holds which tensor; ``total_size``: bytes of all data."""
    content = {"metadata": {"total_size": total_size}, "weight_map": dict(weight_map)}
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def split_shards(sizes: Sequence[int], limit: int) -> list[range]:
    """Which of the things of these sizes stand in each file: in order; the next file where one would pass ``limit``."""
    found: list[range] = []
    start = total = 0
    for index, size in enumerate(sizes):
        if index > start and total + size > limit:
            found.append(range(start, index))
            start, total = index, 0
        total += size
    return [*found, range(start, len(sizes))]
