"""Tries of a scale for each group of weights, on grids of integers: one group in each lane, all tries in one reading.

The meaning is that of ``grids/search.py`` in torch, equal bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm_quantize import kernels
from llm_quantize.kernels import _native

__all__ = ["errors", "refitted"]


def errors(x: Tensor, w: Tensor, scales: Tensor, zeros: Tensor | None, lowest: float, highest: float) -> Tensor:
    """sum w (x - scale (level - zero))^2 of nearest levels, (tries, N).

    ``x``, ``w`` float32 (n, N), on the CPU; ``scales``, ``zeros`` float32 (tries, N), contiguous; levels are the
    integers ``lowest`` .. ``highest``. Releases the GIL.
    """
    return _run(x, w, scales, zeros, lowest, highest, None)


def refitted(
    x: Tensor, w: Tensor, scales: Tensor, zeros: Tensor | None, lowest: float, highest: float
) -> tuple[Tensor, Tensor]:
    """The least-squares scales for the codes of each of ``scales``, and their errors with those codes: (tries, N)
    each. Arguments as of ``errors``."""
    found = torch.empty_like(scales)
    return found, _run(x, w, scales, zeros, lowest, highest, found)


def _run(
    x: Tensor, w: Tensor, scales: Tensor, zeros: Tensor | None, lowest: float, highest: float, found: Tensor | None
) -> Tensor:
    error = torch.empty_like(scales)
    _native.refit_scales(
        kernels.simd_level(),
        x.contiguous().numpy(),
        w.contiguous().numpy(),
        scales.numpy(),
        None if zeros is None else zeros.numpy(),
        lowest,
        highest,
        error.numpy(),
        None if found is None else found.numpy(),
    )
    return error
