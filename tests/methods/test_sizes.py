"""What error feedback holds, by hand."""

from __future__ import annotations

from llm_quantize.methods.sizes import TILE_ROWS, factor_bytes, solve_bytes


def test_factor_bytes_counts_the_matrices() -> None:
    n = 4096
    assert 16 * n * n < factor_bytes(n) < 22 * n * n
    assert factor_bytes(n, correction=True) - factor_bytes(n) == 4 * n * n


def test_a_thread_works_on_one_tile() -> None:
    assert solve_bytes(1024) == solve_bytes(1024, 10 * TILE_ROWS) == 10 * 4 * 1024 * TILE_ROWS
    assert solve_bytes(1024, 1) == 10 * 4 * 1024
