"""What a GGUF file takes over of a source that is quantized already: for each tensor the type whose blocks hold it.

From headers alone, so names decide: of the types that hold every number of a grid the smallest. Scales decide too, and
only files know those: float16 holds most that are bfloat16, not all. What came of it is looked at when it is written.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gguf import LlamaFileType
from gguf.constants import Keys

from llm_quantize.architectures.base import OutputTensor
from llm_quantize.architectures.rows import weights_of
from llm_quantize.errors import UsageError
from llm_quantize.formats.gguf.levels import LEVELS, TensorShape, is_quantizable
from llm_quantize.formats.gguf.scales import beside, count_of, is_heeded
from llm_quantize.formats.recipe import Recipe
from llm_quantize.io.journal import canonical_json
from llm_quantize.qtypes import QTYPES
from llm_quantize.qtypes.affine import AffineType
from llm_quantize.qtypes.codebook import CodebookType
from llm_quantize.qtypes.integer import WHOLE_ROW, IntegerType
from llm_quantize.qtypes.packed import packed_type

if TYPE_CHECKING:
    from llm_quantize.models.opening import Source

WITH_A_SCALE = "e2m1_b16_e4m3"
"""The grid of which GGUF has one number for the matrix beside its blocks."""
NVFP4, NVFP4_LEVEL, NVFP4_FILE = "nvfp4", "NVFP4", int(LlamaFileType.MOSTLY_NVFP4)
REST = "q8_0"
"""What a quantized tensor becomes that no type holds, where others of its file are held."""

_SYMMETRIC = {2: "q2_0", 3: "q4_0", 4: "q4_0", 5: "q5_0", 6: "q8_0", 7: "q8_0", 8: "q8_0"}
_AROUND_ZEROS = {2: "q4_0", 3: "q4_0", 4: "q5_0", 5: "q8_0", 6: "q8_0", 7: "q8_0"}
"""By bits: code - zero point goes as far on either side as there are codes."""
_OFFSETS = {2: "q4_1", 3: "q4_1", 4: "q4_1", 5: "q5_1"}
_FLOATS = {
    ("e2m1", "e8m0"): "mxfp4",
    ("e2m1", "e8m0up"): "mxfp4",
    ("e2m1", "e4m3"): NVFP4,
    ("e2m1", "e4m3alone"): NVFP4,
}
_PURE: Mapping[str, str] = {level.base: level.name for level in reversed(tuple(LEVELS.values()))}


def blocks_of(qtype: str, columns: int) -> str | None:
    """The type of ggml whose blocks hold rows of ``columns`` on the grid ``qtype``, of a directory or of ggml; None
    where none does."""
    if qtype in QTYPES:
        return qtype if columns % QTYPES[qtype].block_size == 0 else None
    try:
        grid = packed_type(qtype)
    except UsageError:
        return None
    found = _kind(grid)
    if found is None or columns % QTYPES[found].block_size:
        return None
    group = columns if grid.group_size == WHOLE_ROW else grid.group_size
    whole = isinstance(grid, CodebookType) or group % QTYPES[found].block_size == 0
    if not whole and found == _SYMMETRIC[2]:
        found, whole = _SYMMETRIC[3], group % QTYPES[_SYMMETRIC[3]].block_size == 0
    return found if whole else None


def _kind(grid: IntegerType | AffineType | CodebookType) -> str | None:
    if isinstance(grid, CodebookType):
        return _FLOATS.get((grid.codebook, grid.nested))
    if isinstance(grid, AffineType):
        return _OFFSETS.get(grid.bits)
    return (_SYMMETRIC if grid.symmetric else _AROUND_ZEROS).get(grid.bits)


@dataclass(frozen=True)
class Taken:
    """A tensor of the map as the source stores it: ``qtype``, the type that holds it (None: none does); ``scaled``: how
    many numbers stand beside its blocks, 0 where there are none."""

    qtype: str | None
    scaled: int = 0


def taken(source: Source, output: OutputTensor) -> Taken | None:
    """How GGUF holds ``output`` as ``source`` stores it; None where it is not quantized there."""
    model, columns = source.checkpoint, output.shape[-1] if output.shape else 1
    sources = [piece.source for piece in output.pieces]
    if output.constant is not None or all(model.tensors[name].dtype in _PLAIN for name in sources):
        return None
    if any(piece.transpose or piece.columns is not None or piece.add for piece in output.pieces):
        return Taken(None)
    blocks = {model.block_type(name) for name in sources}
    if len(blocks) == 1 and None not in blocks:  # of a GGUF file: they stay as they are
        return Taken(blocks_of(str(blocks.pop()), columns))
    grids = {model.held(name) for name in sources}
    grid = grids.pop() if len(grids) == 1 else None
    found = None if grid is None else blocks_of(grid.qtype, columns)
    if found is None or grid is None or grid.qtype != WITH_A_SCALE:
        return Taken(found)
    heeded = beside(output.name) != _EMBEDDING and is_heeded(output.name, source.architecture.gguf_name)
    return Taken(found, count_of(output.shape)) if heeded else Taken(None)


_PLAIN = ("F64", "F32", "F16", "BF16")
_EMBEDDING = "token_embd.scale"


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
    level, name = _level(source, held.most_common(1)[0][0])
    digest = hashlib.sha256(canonical_json({"level": level, "tensors": tensors})).hexdigest()
    kept = frozenset(output.name for output in _kept(source))
    return Recipe(name, level, tensors, sha256=digest, kept=kept), held.total()


def _kept(source: Source) -> Iterator[OutputTensor]:
    for output in source.tensors.outputs:
        found = taken(source, output)
        if found is not None and found.qtype is not None:
            yield output


def _level(source: Source, most: str) -> tuple[str, str]:
    """(level, what to call the file's) of a file most weights of which are of one type."""
    said = getattr((source.checkpoint.metadata or {}).get(Keys.General.FILE_TYPE), "value", None)
    level = next((level.name for level in LEVELS.values() if level.file_type == said), None)
    if level is not None and LEVELS[level].base == most:
        return level, level
    return (_PURE.get(most, "Q8_0"), most.upper())


def file_type(level: str, qtypes: Mapping[str, int]) -> int:
    """general.file_type of a file of ``level``; ``qtypes``: weights by type. NVFP4 is no level that is rounded to."""
    most = max(qtypes, key=lambda name: qtypes[name], default="")
    return NVFP4_FILE if most == NVFP4 else LEVELS[level].file_type
