"""Sums of products of bfloat16 inputs in float32: exact products, sums in one order at every SIMD level.

Where a processor multiplies bfloat16, torch gives the result in bfloat16, which is too coarse for a Cholesky factor; in
float32 it computes both halves of a symmetric matrix, and on some processors with vectors of half the length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm_quantize import kernels
from llm_quantize.kernels import _native

__all__ = ["add_gram", "serves"]

DEPTH = 128
"""Tokens that are summed up from zero before they are added to the result."""


def serves(inputs: Tensor) -> bool:
    """Whether ``inputs`` are such as ``add_gram`` takes."""
    return inputs.dtype == torch.bfloat16 and inputs.device.type == "cpu"


def add_gram(sums: Tensor, inputs: Tensor, weights: Tensor | None, rows: slice, columns: slice) -> None:
    """Add to a tile of ``sums`` float32 (n, n) the x^T x of ``inputs`` bfloat16 (tokens, n), both contiguous.
    ``weights`` float32 (tokens,): how much each token counts, as bfloat16 holds it; None: once each.

    The tile lies on or above the diagonal. What it has below the diagonal has no meaning afterwards. Sums run over
    DEPTH tokens in their order, and are then added to what stands there. Releases the GIL. Dense twin:
    tests/kernels/test_gram.py.
    """
    values = inputs.contiguous().view(torch.uint16).numpy()
    counts, span = None if weights is None else weights.numpy(), (columns.start, columns.stop)
    _native.add_gram(kernels.simd_level(), values, counts, sums.numpy(), (rows.start, rows.stop), span)
