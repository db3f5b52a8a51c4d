"""What a GGUF file takes over of a source that is quantized already: for each tensor the type whose blocks hold it.

From headers alone, so names decide: of the types that hold every number of a grid the smallest. Scales decide too, and
only files know those: float16 holds most that are bfloat16, not all. What came of it is looked at when it is written.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gguf import LlamaFileType
from gguf.constants import Keys

from llm_quantize.architectures.base import OutputTensor
from llm_quantize.architectures.rows import weights_of
from llm_quantize.formats.gguf.levels import LEVELS, Level, TensorShape, is_quantizable
from llm_quantize.formats.gguf.scales import beside, count_of, is_heeded
from llm_quantize.formats.keeping import held_of
from llm_quantize.formats.recipe import Recipe
from llm_quantize.io.journal import canonical_json
from llm_quantize.qtypes import QTYPES
from llm_quantize.qtypes.blocks import WITH_A_SCALE, blocks_of

if TYPE_CHECKING:
    from llm_quantize.models.opening import Source

NVFP4, NVFP4_FILE = "nvfp4", int(LlamaFileType.MOSTLY_NVFP4)
REST = "q8_0"
"""What a quantized tensor becomes that no type holds, where others of its file are held."""

_PLAIN = ("F64", "F32", "F16", "BF16")
_EMBEDDING = "token_embd.weight"
_PURE: Mapping[str, str] = {level.base: level.name for level in reversed(tuple(LEVELS.values()))}


@dataclass(frozen=True)
class Taken:
    """A tensor of the map as the source stores it: ``qtype``, the type that holds it (None: none does); ``scaled``: how
    many numbers stand beside its blocks, 0 where there are none; ``ignored``: it would, but llama.cpp ignores them."""

    qtype: str | None
    scaled: int = 0
    ignored: bool = False


def taken(source: Source, output: OutputTensor) -> Taken | None:
    """How GGUF holds ``output`` as ``source`` stores it; None where it is not quantized there."""
    model, columns = source.checkpoint, output.shape[-1] if output.shape else 1
    sources = [piece.source for piece in output.pieces]
    if output.constant is not None or all(model.tensors[name].dtype in _PLAIN for name in sources):
        return None
    blocks = {model.block_type(piece.source, transpose=piece.transpose) for piece in output.pieces}
    if len(blocks) == 1 and None not in blocks:  # of a GGUF file: they stay as they are
        return Taken(blocks_of(str(blocks.pop()), columns))
    grids = {held_of(source, piece) for piece in output.pieces}
    grid = grids.pop() if len(grids) == 1 else None
    found = None if grid is None or grid.act_order else blocks_of(grid.qtype, columns)
    if found is None or grid is None or grid.qtype != WITH_A_SCALE:
        return Taken(found)
    heeded = output.name != _EMBEDDING and is_heeded(output.name, source.architecture.gguf_name)
    return Taken(found, count_of(output.shape)) if heeded else Taken(None, ignored=True)


def recipe_of(source: Source, floats: Mapping[str, str]) -> tuple[Recipe, int] | None:
    """The types of all tensors that levels may change as the source stores them, and how many weights are held so;
    None where it holds none. ``floats``: {tensor: its type where it is not quantized}."""
    tensors: dict[str, str] = {}
    held: Counter[str] = Counter()
    for output in source.tensors.outputs:
        if not is_quantizable(TensorShape(output.name, output.shape)):
            continue
        found = taken(source, output)
        if found is None:
            tensors[output.name] = floats[output.name]
        elif found.qtype is None:
            tensors[output.name] = REST if output.shape[-1] % QTYPES[REST].block_size == 0 else floats[output.name]
        else:
            tensors[output.name] = found.qtype
            held[found.qtype] += weights_of(output.shape)
    if not held:
        return None
    level, name = _level(source, held)
    digest = hashlib.sha256(canonical_json({"level": level, "tensors": tensors})).hexdigest()
    kept = frozenset(output.name for output in _kept(source))
    return Recipe(name, level, tensors, sha256=digest, kept=kept), held.total()


def _kept(source: Source) -> Iterator[OutputTensor]:
    for output in source.tensors.outputs:
        found = taken(source, output)
        if found is not None and found.qtype is not None:
            yield output


def _level(source: Source, held: Mapping[str, int]) -> tuple[str, str]:
    """(level, what to call the file's) of a file with so many weights of each type; a GGUF file's own where it says."""
    said = getattr((source.checkpoint.metadata or {}).get(Keys.General.FILE_TYPE), "value", None)
    level = next((level.name for level in LEVELS.values() if level.file_type == said), None)
    if level is not None and LEVELS[level].base in held:
        return level, level
    most = max(held, key=lambda name: held[name])
    return (_PURE.get(most, "Q8_0"), most.upper())


def float_level(source: Source) -> str | None:
    """The level of floats that holds every tensor of a model that is not quantized; None for one that is."""
    words = {source.checkpoint.tensors[piece.source].dtype for one in source.tensors.outputs for piece in one.pieces}
    if not words <= set(_PLAIN):
        return None
    matrices = [one for one in source.tensors.outputs if is_quantizable(TensorShape(one.name, one.shape))]
    found = {source.checkpoint.tensors[piece.source].dtype for one in matrices for piece in one.pieces}
    return found.pop() if len(found) == 1 and not found & {"F64"} else "F32"


def ignored(source: Source, outputs: Sequence[OutputTensor]) -> list[str]:
    """Names of the tensors that NVFP4 would hold, but for the numbers beside it, which llama.cpp ignores there."""
    found = ((output, taken(source, output)) for output in outputs)
    return [output.name for output, one in found if one is not None and one.ignored]


def with_scales(
    source: Source, outputs: Sequence[OutputTensor], qtypes: Sequence[str]
) -> tuple[list[OutputTensor], list[str]]:
    """``outputs`` and their ``qtypes``, each matrix that has numbers beside its blocks with these behind it."""
    found: list[tuple[OutputTensor, str]] = []
    for output, qtype in zip(outputs, qtypes, strict=True):
        found.append((output, qtype))
        stored = taken(source, output) if qtype == NVFP4 else None
        if stored is not None and stored.qtype == qtype and stored.scaled:
            found.append((OutputTensor(beside(output.name), (stored.scaled,), float32=True), "f32"))
    return [output for output, _ in found], [qtype for _, qtype in found]


def file_type(level: Level, outputs: Sequence[OutputTensor], qtypes: Sequence[str]) -> int:
    """general.file_type of a file of ``level``, most of whose weights may be kept as NVFP4."""
    weights: Counter[str] = Counter()
    for output, qtype in zip(outputs, qtypes, strict=True):
        weights[qtype] += weights_of(output.shape) if QTYPES[qtype].block_size > 1 else 0
    return NVFP4_FILE if weights.most_common(1)[0][0] == NVFP4 else level.file_type
