"""GPTQ checkpoints as AutoGPTQ began and GPTQModel, Transformers and vLLM read them.

K = in, N = out, G = groups, b = bits, codes q and zero points z from 0; w = scales * (q - z):

    qweight  int32    (K b / 32, N)   codes, packed along K, least significant bits first; 3 bits cross words
    qzeros   int32    (G, N b / 32)   zero points packed along N: z - 1 in format "gptq" (1), z in "gptq_v2"
    scales   float16  (G, N)
    g_idx    int32    (K,)            the group of each input channel, here always k // group

*Zero points.* Symmetric grids have z = 2^(b-1) and are written in format 1, which everything reads. In format 1 a zero
point of 0 is stored as -1, all ones, and readers that add 1 to whole words carry it into the neighbour; and GPTQModel
takes asymmetric format 1 only from itself. So asymmetric grids are written in format 2, and a zero point of 0 is
refused in format 1.

*Order of activations.* The optimiser visits columns in the order of their importance on grids fixed before, so g_idx
stays sequential, no kernel has to permute anything, and ``desc_act`` is false in the file (static ordering). A file
that said true with this g_idx would mean the same, but vLLM refuses it, and others take a slower path for nothing;
``--desc-act`` therefore changes no byte.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

import llm_quantize
from llm_quantize.errors import MalformedInputError, UnsupportedError
from llm_quantize.formats.base import (
    Array,
    Coverage,
    Field,
    Scheme,
    SchemeOptions,
    check_group,
    check_words,
    grid_numbers,
    load_floats,
    mixture_of,
    parse_bits,
    store_floats,
    to_numpy,
)
from llm_quantize.formats.bitpack import pack_bits, unpack_bits
from llm_quantize.qtypes.integer import IntegerType

if TYPE_CHECKING:
    from llm_quantize.grids.grid import Grid

NAME = "gptq"
TITLE = "GPTQ"
LABEL = "GPTQ-{level}"
EXAMPLE = "4bit"
TRANSFORM = "none"
SYMMETRIC = True
NEEDS = "optimum gptqmodel"
KERNEL = 'GPTQConfig(bits={bits}, backend="gptq_torch")'
EXPERTS_IN_TRANSFORMERS = False
_BITS = {"2bit": 2, "3bit": 3, "4bit": 4, "8bit": 8}
LEVELS: Sequence[str] = tuple(_BITS)
_LAYER = re.compile(r"\.(\d+)\.")


def scheme(level: str, options: SchemeOptions) -> Scheme:
    """Symmetric with groups of 128 unless the options say otherwise. Raises UsageError."""
    bits = parse_bits(level, NAME, _BITS)
    group = 128 if options.group_size is None else options.group_size
    symmetric = options.symmetric is not False
    grid = IntegerType(bits, group, symmetric, "float16")
    return Scheme(NAME, f"{bits}bit", grid, "gptq" if symmetric else "gptq_v2")


def fields(scheme: Scheme, rows: int, columns: int, *, name: str | None = None) -> tuple[Field, ...]:
    """The tensors of a matrix (rows, columns). Raises UsageError naming the module where it does not fit."""
    bits, groups = scheme.qtype.bits, check_group(scheme, columns, name)
    check_words("columns", columns, bits, name)
    check_words("rows", rows, bits, name)
    return (
        Field("qweight", "int32", (columns * bits // 32, rows)),
        Field("qzeros", "int32", (groups, rows * bits // 32)),
        Field("scales", "float16", (groups, rows)),
        Field("g_idx", "int32", (columns,)),
    )


def pack(scheme: Scheme, grid: Grid, codes: Any) -> list[Array]:
    """qweight, qzeros, scales, g_idx of ``codes`` uint8 (rows, columns) on ``grid``.

    Raises UnsupportedError for a zero point of 0 in format 1, NumericPolicyError for scales that are not finite,
    ValueError for a grid of another kind.
    """
    bits, first = scheme.qtype.bits, _first(scheme)
    scales, zeros = grid_numbers(scheme, grid, 0, (1 << bits) - 1 + first)
    if first and (zeros == 0).any():
        row, group = (int(index) for index in np.argwhere(zeros == 0)[0])
        raise UnsupportedError(
            "GPTQ's format 1 cannot store a zero point of 0: readers would carry it into the next row's",
            expected=f"zero points from 1 to {1 << bits}",
            found=f"0 at row {row}, group {group}",
            remedy="use a symmetric grid, or checkpoint_format gptq_v2",
        )
    packed = pack_bits(np.ascontiguousarray(to_numpy(codes).T), bits, 0)
    stored = (zeros - np.uint16(first)).astype(np.uint8)
    indices = np.arange(codes.shape[1], dtype=np.int32) // np.int32(grid.group)
    return [
        packed,
        pack_bits(np.ascontiguousarray(stored.T), bits, 1),
        store_floats(np.ascontiguousarray(scales.T), scheme.qtype.scale),
        indices,
    ]


def _first(scheme: Scheme) -> int:
    """What is taken off zero points before they are stored."""
    return 0 if scheme.variant == "gptq_v2" else 1


def unpack(scheme: Scheme, arrays: Mapping[str, Array]) -> npt.NDArray[np.float32]:
    """float32 (rows, columns) of qweight, qzeros, scales and, where there is one, g_idx (any order of groups).

    Raises MalformedInputError where g_idx names groups that there are not.
    """
    bits = scheme.qtype.bits
    scales = load_floats(arrays["scales"])
    groups, rows = scales.shape
    columns = arrays["qweight"].shape[0] * 32 // bits
    codes = unpack_bits(arrays["qweight"], bits, columns, 0)
    zeros = unpack_bits(arrays["qzeros"], bits, rows, 1).astype(np.float32) + np.float32(_first(scheme))
    index = arrays.get("g_idx", np.arange(columns) // max(1, columns // groups))
    if index.shape != (columns,) or (columns and (index.min() < 0 or index.max() >= groups)):
        raise MalformedInputError(
            "g_idx does not give a group for each input channel",
            expected=f"{columns} indices from 0 to {groups - 1}",
            found=f"{index.shape[0]} indices from {index.min()} to {index.max()}",
        )
    return np.ascontiguousarray((scales[index] * (codes.astype(np.float32) - zeros[index])).T)


def config(scheme: Scheme, coverage: Coverage) -> dict[str, Any]:
    """quantization_config, with the names that GPTQModel writes.

    Linear modules of blocks that stay as they are get negative ``dynamic`` rules (GPTQModel, vLLM), and, where all
    blocks are alike, ``modules_in_block_to_quantize`` names the others (Transformers).
    """
    found: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": scheme.qtype.bits,
        "group_size": scheme.qtype.group_size,
        "desc_act": False,
        "sym": scheme.qtype.symmetric,
        "checkpoint_format": scheme.variant,
        "lm_head": False,
        "true_sequential": True,
        "damp_percent": 0.01,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"llm-quantize:{llm_quantize.__version__}"]},
    }
    left = [*coverage.kept, *coverage.outside]
    if left:
        found["dynamic"] = {rule: {} for rule in dict.fromkeys(map(_negative_rule, left))}
    alike = _suffixes(coverage)
    if coverage.kept and alike:
        found["modules_in_block_to_quantize"] = [alike]
    return found


def vllm_refusal(scheme: Scheme) -> str | None:
    """Why vLLM (0.32) refuses this scheme on every device; None where it has kernels."""
    if not scheme.qtype.symmetric:
        return "of GPTQ it takes symmetric grids only"
    return None if scheme.qtype.bits in (4, 8) else "of GPTQ it takes 4 and 8 bits only"


def _negative_rule(name: str) -> str:
    """The rule that leaves out a module; for an expert, the whole mixture."""
    whole = mixture_of(name)
    end = r"(\..*)?$" if whole != name else "$"
    return f"-:^{re.escape(whole)}{end}"


def _suffixes(coverage: Coverage) -> list[str]:
    """The modules that every block has packed, in its own terms; none where blocks differ or there are experts."""
    blocks: dict[str, list[str]] = {}
    for name in coverage.quantized:
        found = _LAYER.search(name)
        if found is None or mixture_of(name) != name:
            return []
        blocks.setdefault(name[: found.end()], []).append(name[found.end() :])
    first = next(iter(blocks.values()), [])
    return first if all(sorted(suffixes) == sorted(first) for suffixes in blocks.values()) else []
