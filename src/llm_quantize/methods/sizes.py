"""What error feedback holds in memory, from the width of a matrix alone. Nothing here needs torch."""

from __future__ import annotations

CHUNK = 256  # rows of a Hessian gathered, converted or solved for at a time
TILE_ROWS = 256  # rows worked on at once; pieces of a matrix that begin at multiples of it are tiled alike

WORKING_BYTES = 160 << 20
"""What torch and its BLAS keep once they solve (packed operands, kernels made at run time), however many threads."""


def factor_bytes(columns: int, correction: bool = False) -> int:
    """Peak bytes of ``hessian.factorize``, its inputs included.

    H float32, its float64 copy and the float32 factor: 16 n^2; with a correction, that matrix as well: 20 n^2. (After
    the return H, ``hessian`` and ``lower`` stand: 12 n^2, with ``correction`` 16 n^2.)
    """
    return (20 if correction else 16) * columns * columns + 10 * 8 * CHUNK * columns


def solve_bytes(columns: int, rows: int = TILE_ROWS) -> int:
    """Bytes that a thread in ``gptq.solve`` works in, beside the factor, ``weight`` and what it returns."""
    return 10 * 4 * columns * min(rows, TILE_ROWS)
