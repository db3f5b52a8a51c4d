"""Another order of arithmetic: the same products in exact numbers, other roundings in float32, this thread only."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from llm_quantize.streams.reordered import Reordered


def values(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


PRODUCTS: dict[str, Callable[[torch.dtype], torch.Tensor]] = {
    "linear": lambda d: torch.nn.functional.linear(values(5, 300, dtype=d), values(7, 300, dtype=d)),
    "linear with bias": lambda d: torch.nn.functional.linear(
        values(2, 5, 300, dtype=d), values(7, 300, dtype=d), values(7, dtype=d)
    ),
    "bias by name": lambda d: torch.nn.functional.linear(
        values(5, 300, dtype=d), values(7, 300, dtype=d), bias=values(7, dtype=d)
    ),
    "matmul": lambda d: torch.matmul(values(2, 3, 40, 64, dtype=d), values(2, 3, 64, 40, dtype=d)),
    "at": lambda d: values(40, 64, dtype=d) @ values(64, 40, dtype=d),
    "bmm": lambda d: torch.bmm(values(3, 40, 64, dtype=d), values(3, 64, 8, dtype=d)),
    "addmm": lambda d: torch.addmm(values(9, dtype=d), values(40, 64, dtype=d), values(64, 9, dtype=d)),
    "module": lambda d: _module(d)(values(5, 300, dtype=d)),
}


def _module(dtype: torch.dtype) -> torch.nn.Linear:
    module = torch.nn.Linear(300, 7, dtype=dtype)
    with torch.no_grad():
        module.weight.copy_(values(7, 300, dtype=dtype))
        module.bias.copy_(values(7, dtype=dtype))
    return module


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str) -> None:
    product = PRODUCTS[name]
    with torch.inference_mode():
        plain = product(torch.float32)
        with Reordered():
            other = product(torch.float32)
            exact = product(torch.float64)
        assert torch.equal(product(torch.float32), plain), "it is over when it is closed"
        assert not torch.equal(other, plain)
        assert torch.allclose(other, plain, rtol=1e-5, atol=1e-4)
        assert torch.allclose(exact, product(torch.float64), rtol=1e-13, atol=1e-12)


def test_short_sums_and_other_functions_are_left_alone() -> None:
    x, w = values(5, 7), values(3, 7)
    plain = torch.nn.functional.linear(x, w)
    with Reordered():
        assert torch.equal(torch.nn.functional.linear(x, w), plain)
        assert torch.equal(torch.softmax(x, -1) * 2, torch.softmax(x, -1) * 2)
        assert torch.equal(torch.matmul(values(300), values(300)), values(300) @ values(300))


def test_other_threads_are_left_alone() -> None:
    x, w = values(5, 300), values(7, 300)
    plain = torch.nn.functional.linear(x, w)
    found: list[torch.Tensor] = []
    with Reordered():
        thread = threading.Thread(target=lambda: found.append(torch.nn.functional.linear(x, w)))
        thread.start()
        thread.join()
    assert torch.equal(found[0], plain)
