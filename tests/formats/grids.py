"""Integer grids for tests of the packed formats, with every number chosen by hand or by a seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from llm_quantize.formats.base import Packed, Scheme
from llm_quantize.grids.grid import Grid

_STORAGE = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def make_grid(scheme: Scheme, scales: Any, zeros: Any = None) -> Grid:
    """A grid of ``scheme``: scales (rows, groups) rounded to its storage; zeros whole numbers, None if symmetric."""
    bits, storage = scheme.qtype.bits, _STORAGE[scheme.qtype.scale]
    d = torch.as_tensor(np.asarray(scales, np.float32)).to(storage).to(torch.float32)
    half = 1 << (bits - 1)
    low = -half if zeros is None else 0
    levels = torch.arange(low, low + (1 << bits), dtype=torch.float32)
    z = None if zeros is None else torch.as_tensor(np.asarray(zeros, np.float32))
    return Grid(levels, scheme.qtype.group_size, scheme.qtype.group_size, d, torch.ones_like(d), z, storage=storage)


def random_matrix(scheme: Scheme, rows: int, columns: int, seed: int = 0, least: int = 0) -> tuple[Grid, torch.Tensor]:
    """A grid and codes uint8 (rows, columns) that use every code and, where it has them, every zero point."""
    generator = np.random.default_rng(seed)
    groups = columns // scheme.qtype.group_size
    scales = generator.normal(0, 0.02, (rows, groups))
    most = (1 << scheme.qtype.bits) - 1 + (scheme.variant == "gptq")
    zeros = None if scheme.qtype.symmetric else generator.integers(least, most + 1, (rows, groups))
    codes = generator.integers(0, 1 << scheme.qtype.bits, (rows, columns)).astype(np.uint8)
    return make_grid(scheme, scales, zeros), torch.as_tensor(codes)


def unpacked(format: Packed, scheme: Scheme, arrays: Mapping[str, np.ndarray], rows: int, columns: int) -> np.ndarray:
    """float32 (rows, columns): what ``format`` decodes of the arrays of a matrix, whole and in parts the same."""
    packed = format.described(scheme, rows, columns)
    whole = format.unpack(packed, arrays, 0, rows)
    parts = [format.unpack(packed, arrays, at, min(rows, at + 32)) for at in range(0, rows, 32)]
    assert np.array_equal(np.concatenate(parts), whole)
    return whole
